"""The figure of a trace, as PNG: hit ratio by size of cache, and recall by how many experts are guessed.

The panels are those of figure 2 of Eliseev and Mazur (arXiv 2312.17238), with chance and Belady's bound beside the
curves. matplotlib enters here and nowhere else, when a figure is drawn; it is the optional extra `plot`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runner.traces.errors import PlotUnavailable
from runner.traces.locality import Locality
from runner.traces.recall import AFTER_LAYER, Recall, recall_by_chance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The depths of the paper's panel.
_DEPTHS = (1, 2, 10)
_SIZE_INCHES = (10.0, 4.0)
_DOTS_PER_INCH = 150


def check_plot() -> None:
    """Raise PlotUnavailable if matplotlib cannot be imported: better before the trace is computed than behind it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise PlotUnavailable(
            f"a figure needs matplotlib, which cannot be imported ({error}); pip install 'expertd[plot]' installs it"
        ) from None


def write_png(path: Path, locality: Locality, recalls: Sequence[Recall]) -> None:
    """Draw both panels into that file; raise PlotUnavailable or OSError."""
    check_plot()
    draw(locality, recalls).savefig(path, format="png", dpi=_DOTS_PER_INCH)


def draw(locality: Locality, recalls: Sequence[Recall]) -> "Figure":
    """Return the figure: its axes are the panel of hit ratios and the panel of recall."""
    # Not pyplot: that keeps every figure in a global list, and looks for a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_hit_ratios(left, locality)
    _draw_recall(right, locality, recalls)
    for axes in (left, right):
        axes.set_ylim(0, 1.02)
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    return figure


def _draw_hit_ratios(axes: "Axes", locality: Locality) -> None:
    for curve in locality.curves:
        axes.plot(locality.cache_experts, curve.ratios, marker="o", label=curve.policy)
    axes.plot(locality.cache_experts, locality.uniform, color="grey", linestyle=":", label="chance")
    axes.set_xlabel("experts cached per layer")
    axes.set_ylabel("hit ratio")
    axes.set_xticks(locality.cache_experts)


def _draw_recall(axes: "Axes", locality: Locality, recalls: Iterable[Recall]) -> None:
    counts: range = range(0)
    for recall in recalls:
        if recall.state == AFTER_LAYER and recall.depth in _DEPTHS:
            counts = range(1, len(recall.ratios) + 1)
            axes.plot(counts, recall.ratios, marker="o", label=f"{recall.depth} ahead")
    axes.plot(
        counts, [recall_by_chance(locality.shape, n) for n in counts], color="grey", linestyle=":", label="chance"
    )
    axes.set_xlabel("experts guessed per layer")
    axes.set_ylabel("recall of the experts chosen")
    axes.set_xticks(counts)
