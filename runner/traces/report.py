"""How a trace's figures look: lines for people, an object for programs. Pure."""

from collections.abc import Iterable, Sequence

from runner.traces.locality import Locality
from runner.traces.recall import AFTER_ATTENTION, AFTER_LAYER, STATES, Recall, recall_by_chance

# How many guesses a person is shown; the object has all of them.
_N_GUESSED_SHOWN = 4

_NAMES = {AFTER_ATTENTION: "after the attention", AFTER_LAYER: "after the layer"}


def locality_lines(locality: Locality) -> list[str]:
    """Return the lines a person reads of a trace's locality: a table with a row for each size of cache."""
    shape = locality.shape
    model = f"{shape.n_layers} layers · {shape.n_experts} experts, {shape.top_k} a token"
    lines = [f"{locality.n_tokens} decode tokens · {model}"]
    if locality.overlap is not None:
        lines.append(
            f"shared with the token before: {locality.overlap:.3f} of a token's experts "
            f"(by chance {locality.overlap_by_chance:.3f})"
        )
    names = [curve.policy for curve in locality.curves]
    lines += ["", "hit ratio by experts cached per layer", _row("k", [*names, "uniform"])]
    ratios = [*(curve.ratios for curve in locality.curves), locality.uniform]
    lines += [_row(str(k), _shown(at_k)) for k, *at_k in zip(locality.cache_experts, *ratios, strict=True)]
    return lines


def recall_lines(locality: Locality, recalls: Sequence[Recall]) -> list[str]:
    """Return the lines a person reads of guesses: for each state, a row for each number of layers ahead."""
    lines: list[str] = []
    for state in STATES:
        of_state = [recall for recall in recalls if recall.state == state]
        if not of_state:
            continue
        n_shown = min(_N_GUESSED_SHOWN, len(of_state[0].ratios))
        lines += [
            "",
            f"recall of the experts chosen, guessed from the states {_NAMES[state]}, by experts guessed",
            _row("ahead", [str(n) for n in range(1, n_shown + 1)]),
            *(_row(str(recall.depth), _shown(recall.ratios[:n_shown])) for recall in of_state),
            _row("chance", _shown([recall_by_chance(locality.shape, n) for n in range(1, n_shown + 1)])),
        ]
    return lines


def trace_figures(locality: Locality, recalls: Iterable[Recall] = ()) -> dict[str, object]:
    """Return the figures as one JSON object."""
    shape = locality.shape
    return {
        "n_layers": shape.n_layers,
        "n_experts": shape.n_experts,
        "top_k": shape.top_k,
        "n_decode_tokens": locality.n_tokens,
        "adjacent_overlap": locality.overlap,
        "adjacent_overlap_by_chance": locality.overlap_by_chance,
        "cache_experts": list(locality.cache_experts),
        "hit_ratios": {curve.policy: list(curve.ratios) for curve in locality.curves},
        "uniform": list(locality.uniform),
        "recall": [
            {"state": recall.state, "layers_ahead": recall.depth, "by_n_guessed": list(recall.ratios)}
            for recall in recalls
        ],
    }


def _row(name: str, cells: Iterable[str]) -> str:
    return f"{name:>6}" + "".join(f"{cell:>9}" for cell in cells)


def _shown(ratios: Iterable[float]) -> list[str]:
    return [f"{ratio:.3f}" for ratio in ratios]
