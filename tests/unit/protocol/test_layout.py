import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import LayoutError, UnknownLayout, UnknownScheme
from protocol.layout import (
    PAGE_NBYTES,
    PLANE_ALIGNMENT,
    R8,
    Part,
    panel_plan,
    part_nbytes,
    plan_segments,
    record_nbytes,
    record_spans,
)
from protocol.schemes import Q2_G16, Q3_G64, Q4_G64, Q8_G64, SCHEMES, Scheme

QUANTIZED = [Q8_G64, Q4_G64, Q3_G64, Q2_G16]


def mixtral_parts(scheme: str) -> tuple[Part, ...]:
    return (Part("w1", 14336, 4096, scheme), Part("w3", 14336, 4096, scheme), Part("w2", 4096, 14336, scheme))


@pytest.mark.parametrize(
    ("scheme", "nbytes_max"),
    # The sizes of one HQQ expert with an 8-bit second level, and half a percent for alignment and row planes.
    [("4bit-g64", 93.63e6), ("3bit-g64", 71.65e6), ("2bit-g16", 66.40e6), ("bf16", 352.33e6)],
)
def test_a_mixtral_expert_is_no_larger_than_hqqs_by_half_a_percent(scheme: str, nbytes_max: float) -> None:
    assert record_nbytes(R8, mixtral_parts(scheme)) <= nbytes_max * 1.005


@given(st.integers(1, 200), st.integers(1, 8), st.sampled_from(QUANTIZED))
def test_planes_of_a_part_lie_one_after_another_and_aligned(rows: int, n_blocks: int, scheme: Scheme) -> None:
    plan = panel_plan(rows, n_blocks * 64, scheme)

    offsets = [plan.scale_step_offset, plan.base_min_offset, plan.base_step_offset, plan.panels_offset]
    assert offsets == sorted(offsets)
    assert all(offset % PLANE_ALIGNMENT == 0 for offset in [*offsets, plan.panel_nbytes])
    assert plan.base_min_offset >= rows * 4
    assert plan.n_panels * 8 >= rows
    assert 0 <= plan.panel_nbytes - plan.filled_nbytes < PLANE_ALIGNMENT


@given(st.integers(1, 40), st.sampled_from(QUANTIZED))
def test_a_panel_holds_its_codes_and_two_bytes_a_group(n_blocks: int, scheme: Scheme) -> None:
    plan = panel_plan(8, n_blocks * 64, scheme)

    n_inputs = 8 * n_blocks * 64
    assert scheme.group_size is not None
    needed = n_inputs * scheme.nbits // 8 + 2 * n_inputs // scheme.group_size
    assert needed <= plan.filled_nbytes < needed + 64
    assert (plan.n_stripes - 1) * plan.blocks_per_stripe < n_blocks <= plan.n_stripes * plan.blocks_per_stripe
    assert plan.filled_nbytes <= plan.n_stripes * plan.stripe_nbytes


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 4), st.sampled_from(list(SCHEMES))), min_size=1, max_size=5)
)
def test_parts_do_not_overlap_and_fill_the_record(shapes: list[tuple[int, int, str]]) -> None:
    parts = [Part(f"p{i}", rows, blocks * 64, scheme) for i, (rows, blocks, scheme) in enumerate(shapes)]

    spans = record_spans(R8, parts)

    ends = [0, *(span.offset + span.nbytes for span in spans)]
    assert all(
        span.offset >= end and span.offset % PLANE_ALIGNMENT == 0 for span, end in zip(spans, ends, strict=False)
    )
    assert ends[-1] <= record_nbytes(R8, parts) < ends[-1] + PAGE_NBYTES
    assert record_nbytes(R8, parts) % PAGE_NBYTES == 0


def test_an_unknown_layout_and_scheme_are_refused_by_name() -> None:
    with pytest.raises(UnknownLayout, match="'r9'"):
        record_spans("r9", [Part("w1", 8, 64, "bf16")])
    with pytest.raises(UnknownScheme, match="'5bit-g32'"):
        part_nbytes(Part("w1", 8, 64, "5bit-g32"))


def test_inputs_that_do_not_divide_are_refused_with_the_remedy() -> None:
    with pytest.raises(LayoutError, match=r"w1: 96 inputs do not divide into blocks of 64.*store it in 16 bits"):
        part_nbytes(Part("w1", 8, 96, "4bit-g64"))


@pytest.mark.parametrize(("rows", "cols"), [(0, 64), (8, 0), (1 << 25, 64), (8, 1 << 25)])
def test_absurd_shapes_are_refused(rows: int, cols: int) -> None:
    with pytest.raises(LayoutError):
        part_nbytes(Part("w1", rows, cols, "bf16"))


@given(st.lists(st.integers(1, 50), max_size=40))
def test_segments_hold_whole_records_up_to_the_limit(sizes: list[int]) -> None:
    places = plan_segments(sizes, limit=40)

    ends: dict[int, int] = {}
    for nbytes, (segment, offset) in zip(sizes, places, strict=True):
        assert offset == ends.get(segment, 0)
        ends[segment] = offset + nbytes
        assert ends[segment] <= 40 or offset == 0
    assert sorted(ends) == list(range(len(ends)))
