"""In which order the experts of one call are asked for. Pure.

The last tokens' experts come last, so that they are what a cache keeps.
"""

from torch import Tensor


def in_one_row(expert_ids: Tensor) -> list[int]:
    """Return the ids of a guess, int64 of one dimension or two, in the order in which they stand."""
    # Through torch it would cost more than all the rest of a prefetch that has nothing to do.
    rows: list[int] | list[list[int]] = expert_ids.tolist()
    return [expert for row in rows for expert in (row if isinstance(row, list) else (row,))]


def by_last_token(expert_ids: Tensor) -> list[list[int]]:
    """Return the experts that were chosen, grouped by the last token that chose them, those of the first one first."""
    rows: list[list[int]] = expert_ids.tolist()
    if len(rows) == 1:
        return [sorted(rows[0])]
    groups: list[list[int]] = []
    seen: set[int] = set()
    for row in reversed(rows):
        group = sorted(set(row) - seen)
        if group:
            groups.append(group)
            seen.update(group)
    return groups[::-1]
