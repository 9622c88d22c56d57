"""Tables of text: columns that line up, and fewer of them where there is no room. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

_GAP = 2
_LEAST_CLIPPED = 12


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its title, and how dear it is: of those that do not fit, the least dear goes first.

    Words stand left and may be cut in front, numbers right.
    """

    title: str
    worth: int
    is_words: bool = False


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """Return a line of titles and one for each row, none longer than the width; None is as wide as it takes."""
    shown = list(range(len(columns)))
    widths = [max(len(columns[i].title), *(len(row[i]) for row in rows), 0) for i in shown]
    while width is not None and len(shown) > 1 and _least(columns, shown, widths) > width:
        shown.remove(min(shown, key=lambda i: columns[i].worth))
    if width is not None:
        _narrow_words(columns, shown, widths, width)
    lines = [[column.title for column in columns], *rows]
    cells = ([_cell(columns[i], line[i], widths[i]) for i in shown] for line in lines)
    joined = ((" " * _GAP).join(row).rstrip() for row in cells)
    return [line if width is None else line[:width] for line in joined]


def _narrow_words(columns: Sequence[Column], shown: Sequence[int], widths: list[int], width: int) -> None:
    for i in shown:
        excess = _total(shown, widths) - width
        if excess > 0 and columns[i].is_words:
            widths[i] = max(_LEAST_CLIPPED, widths[i] - excess)


def _least(columns: Sequence[Column], shown: Sequence[int], widths: Sequence[int]) -> int:
    """Return the width with words cut as far as they may be."""
    least = [min(width, _LEAST_CLIPPED) if columns[i].is_words else width for i, width in enumerate(widths)]
    return _total(shown, least)


def _total(shown: Sequence[int], widths: Sequence[int]) -> int:
    return sum(widths[i] for i in shown) + _GAP * (len(shown) - 1)


def _cell(column: Column, text: str, width: int) -> str:
    if len(text) > width:
        text = "…" + text[len(text) - width + 1 :]
    return text.ljust(width) if column.is_words else text.rjust(width)
