"""The figure: its curves are the numbers, and without matplotlib one line says so."""

import sys
from pathlib import Path

import numpy as np
import pytest

from runner.traces.errors import PlotUnavailable
from runner.traces.locality import measure_locality
from runner.traces.plot import check_plot, draw, write_png
from runner.traces.recall import AFTER_ATTENTION, AFTER_LAYER, Recall
from tests.unit.runner.traces.traces import random_trace

LOCALITY = measure_locality(random_trace(20), ["lru", "belady"])
RECALLS = tuple(
    Recall(state, depth, tuple((n + offset) / (8 + depth) for n in range(1, 9)))
    for state, offset in ((AFTER_ATTENTION, 0), (AFTER_LAYER, 0.5))
    for depth in range(1, 11)
)


def test_without_matplotlib_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(PlotUnavailable, match=r"needs matplotlib.*pip install 'expertd\[plot\]'"):
        write_png(tmp_path / "figure.png", LOCALITY, RECALLS)

    assert not (tmp_path / "figure.png").exists()


def test_the_curves_are_the_hit_ratios_and_the_recall_one_two_and_ten_ahead() -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")

    hit_ratios, recall = (
        {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in axes.get_lines()}
        for axes in draw(LOCALITY, RECALLS).axes
    )

    assert hit_ratios == {curve.policy: list(curve.ratios) for curve in LOCALITY.curves} | {
        "chance": list(LOCALITY.uniform)
    }
    of_depth = {recall.depth: list(recall.ratios) for recall in RECALLS if recall.state == AFTER_LAYER}
    assert recall == {f"{depth} ahead": of_depth[depth] for depth in (1, 2, 10)} | {
        "chance": [n / 8 for n in range(1, 9)]
    }


def test_a_png_is_written_also_of_a_model_without_layers_ahead(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    check_plot()

    write_png(tmp_path / "figure", LOCALITY, ())

    assert (tmp_path / "figure").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
