"""Figures for people and for programs."""

import json

from runner.traces.locality import HitCurve, Locality
from runner.traces.recall import AFTER_ATTENTION, AFTER_LAYER, Recall
from runner.traces.record import TraceShape
from runner.traces.report import locality_lines, recall_lines, trace_figures

LOCALITY = Locality(
    shape=TraceShape(n_layers=5, n_experts=8, top_k=2),
    n_tokens=7,
    overlap=0.3273,
    overlap_by_chance=0.25,
    cache_experts=(2, 3),
    curves=(HitCurve("lru", (0.3274, 0.4515)), HitCurve("belady", (0.3274, 0.5742))),
    uniform=(0.25, 0.375),
)
RECALLS = (
    Recall(AFTER_ATTENTION, 1, (0.46, 0.79, 0.9, 0.95, 1.0)),
    Recall(AFTER_LAYER, 1, (0.49, 0.87, 0.95, 0.98, 1.0)),
    Recall(AFTER_LAYER, 2, (0.47, 0.77, 0.89, 0.95, 1.0)),
)


def test_a_person_reads_a_table_of_hit_ratios() -> None:
    lines = locality_lines(LOCALITY)

    assert lines == [
        "7 decode tokens · 5 layers · 8 experts, 2 a token",
        "shared with the token before: 0.327 of a token's experts (by chance 0.250)",
        "",
        "hit ratio by experts cached per layer",
        "     k      lru   belady  uniform",
        "     2    0.327    0.327    0.250",
        "     3    0.452    0.574    0.375",
    ]


def test_a_person_reads_a_table_of_recall_for_each_state() -> None:
    lines = recall_lines(LOCALITY, RECALLS)

    assert lines == [
        "",
        "recall of the experts chosen, guessed from the states after the attention, by experts guessed",
        " ahead        1        2        3        4",
        "     1    0.460    0.790    0.900    0.950",
        "chance    0.125    0.250    0.375    0.500",
        "",
        "recall of the experts chosen, guessed from the states after the layer, by experts guessed",
        " ahead        1        2        3        4",
        "     1    0.490    0.870    0.950    0.980",
        "     2    0.470    0.770    0.890    0.950",
        "chance    0.125    0.250    0.375    0.500",
    ]


def test_a_program_reads_one_object() -> None:
    figures = json.loads(json.dumps(trace_figures(LOCALITY, RECALLS[:1])))

    assert figures == {
        "n_layers": 5,
        "n_experts": 8,
        "top_k": 2,
        "n_decode_tokens": 7,
        "adjacent_overlap": 0.3273,
        "adjacent_overlap_by_chance": 0.25,
        "cache_experts": [2, 3],
        "hit_ratios": {"lru": [0.3274, 0.4515], "belady": [0.3274, 0.5742]},
        "uniform": [0.25, 0.375],
        "recall": [
            {"state": "after_attention", "layers_ahead": 1, "by_n_guessed": [0.46, 0.79, 0.9, 0.95, 1.0]},
        ],
    }
