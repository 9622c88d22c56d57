"""Attention over the kv_cache against float64 and against itself, computed another way."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant import library as library_module
from quant.errors import BadShape
from quant.layer import Attention
from quant.layer_reference import rotate
from quant.library import library
from quant.workspace import Workspace
from tests.unit.quant.attention_cases import (
    LAYER,
    Case,
    Shape,
    attend,
    attend_and_cache,
    changed,
    expected,
    keys_of,
    make_case,
)
from tests.unit.quant.c_library import KERNELS, by_all_kernels, has_kernels, kernels, needs_avx2, needs_library

# Of outputs of about 1: weighted means of normal values, scores up to about 20 rounded in the 24th bit.
TOLERANCE = 1e-5

SHAPES = {
    "one token": Shape(start=37),
    "first token": Shape(),
    "prefill": Shape(n_tokens=70),
    "fp16": Shape(start=100, n_tokens=21, dtype=torch.float16),
    "fp16, one token": Shape(start=100, dtype=torch.float16),
    "over three stretches": Shape(start=1010, n_tokens=30),
    "window within a block": Shape(start=50, n_tokens=40, window=5),
    "window of one": Shape(start=50, n_tokens=9, window=1),
    "window over two stretches": Shape(start=700, n_tokens=20, window=300, dtype=torch.float16),
    "window over more than a stretch": Shape(start=1100, n_tokens=40, window=600),
    "window beyond all": Shape(start=10, n_tokens=20, window=10**9),
    "three heads a kv head": Shape(n_heads=9, n_kv_heads=3, start=5, n_tokens=17),
    "a head a kv head": Shape(n_heads=3, n_kv_heads=3, start=5, n_tokens=17, window=6),
    "one kv head": Shape(n_heads=40, n_kv_heads=1, start=5, n_tokens=3),
    "head_dim not a multiple of 8": Shape(head_dim=10, start=5, n_tokens=17, dtype=torch.float16),
    "head_dim 2": Shape(head_dim=2, start=5, n_tokens=17),
    "head_dim 128": Shape(n_heads=4, n_kv_heads=1, head_dim=128, start=60, n_tokens=12, dtype=torch.float16),
    "head_dim 72": Shape(n_heads=4, n_kv_heads=1, head_dim=72, start=60, n_tokens=12),
}

shapes = st.builds(
    lambda kv_heads, group, half, start, n_tokens, window, dtype: Shape(
        kv_heads * group, kv_heads, 2 * half, start, n_tokens, window, dtype
    ),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 20),
    st.integers(0, 70) | st.integers(500, 530),
    st.integers(1, 40),
    st.none() | st.integers(1, 80),
    st.sampled_from([torch.float16, torch.float32]),
)


@pytest.fixture(params=SHAPES)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(SHAPES[request.param])


def test_attention_is_that_of_float64(case: Case) -> None:
    assert float((attend(case) - expected(case)).abs().max()) <= TOLERANCE


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 99))
def test_attention_of_any_shape_is_that_of_float64(shape: Shape, seed: int) -> None:
    case = make_case(shape, seed)

    assert float((attend(case, n_threads=2) - expected(case)).abs().max()) <= TOLERANCE


@needs_library
def test_threads_change_no_bit(case: Case) -> None:
    alone, two, three = (attend(case, n_threads=n_threads) for n_threads in (1, 2, 3))

    assert torch.equal(alone, two)
    assert torch.equal(alone, three)


@needs_library
@settings(max_examples=40, deadline=None)
@given(shapes, st.lists(st.integers(1, 40), max_size=5))
def test_where_a_prompt_is_cut_changes_no_bit(shape: Shape, cuts: list[int]) -> None:
    case = make_case(shape)
    ends = sorted({cut for cut in cuts if cut < shape.n_tokens} | {shape.n_tokens})
    pieces = [end - before for before, end in zip([0, *ends], ends, strict=False)]

    cut, cut_cache = attend_and_cache(case, pieces=pieces)
    by_token, _ = attend_and_cache(case, pieces=[1] * shape.n_tokens)
    whole, whole_cache = attend_and_cache(case)

    assert torch.equal(cut, whole)
    assert torch.equal(by_token, whole)
    assert torch.equal(cut_cache[0].nan_to_num(), whole_cache[0].nan_to_num())
    assert torch.equal(cut_cache[1].nan_to_num(), whole_cache[1].nan_to_num())


@needs_library
def test_one_token_at_a_time_gives_the_same_bits(case: Case) -> None:
    assert torch.equal(attend(case, pieces=[1] * case.shape.n_tokens), attend(case))


@needs_avx2
def test_the_instruction_set_changes_no_bit(case: Case) -> None:
    portable, *others = by_all_kernels(lambda: attend(case))

    assert all(torch.equal(portable, other) for other in others)


def test_new_keys_are_turned_and_values_kept_in_their_layer_alone(case: Case) -> None:
    shape = case.shape
    places = slice(shape.start, shape.start + shape.n_tokens)
    heads = (shape.n_tokens, shape.n_kv_heads, shape.head_dim)

    _, past = attend_and_cache(case)

    turned = rotate(case.keys.view(heads), *case.angles).transpose(0, 1).to(shape.dtype)
    assert torch.equal(keys_of(past)[:, places], turned)
    assert torch.equal(past[1][LAYER][:, places], case.values.view(heads).transpose(0, 1).to(shape.dtype))
    for after, before in zip(past, case.past, strict=True):
        assert torch.equal(after[1 - LAYER].nan_to_num(), before[1 - LAYER].nan_to_num())
    assert torch.equal(keys_of(past)[:, : shape.start], keys_of(case.past)[:, : shape.start])
    assert bool(keys_of(past)[:, shape.start + shape.n_tokens :].isnan().all())


def test_the_rows_of_other_sequences_are_left_alone() -> None:
    case = make_case(Shape(n_tokens=5))
    out = torch.full_like(case.queries, 7.0)
    angles = (case.angles[0][1:3], case.angles[1][1:3])

    with Workspace() as workspace:
        attention = Attention(
            case.past, angles, n_heads=8, window=None, start=0, rows=slice(1, 3), n_rows=5, workspace=workspace
        )
        attention(LAYER, case.queries, case.keys, case.values, out=out)

    assert bool((out[[0, 3, 4]] == 7.0).all())
    assert bool((out[1:3] != 7.0).any(dim=1).all())


@pytest.mark.parametrize("kernels_name", KERNELS)
@needs_library
def test_values_are_rounded_to_16_bits_as_torch_does(kernels_name: str) -> None:
    if not has_kernels(kernels_name):
        pytest.skip(f"this machine has no {kernels_name} kernels")
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    exact = halves.float()
    # Halfway to the next one up, where the even one wins, and the floats beside that.
    between = (exact[:-1] + exact[1:]) / 2
    beside = [torch.nextafter(between, torch.full_like(between, towards)) for towards in (-9e9, 9e9)]
    low_nan = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)  # what 16 bits keep of it is 0
    largest = torch.tensor([65519.99, 65520.0, -1e38, 1e-45, 2.0**-25])
    values = torch.cat((low_nan, largest, exact, between, *beside))
    values = torch.nn.functional.pad(values, (0, -len(values) % 64)).view(-1, 64)
    zeros = torch.zeros_like(values)
    case = make_case(Shape(n_heads=1, n_kv_heads=1, head_dim=64, n_tokens=len(values), window=1, dtype=torch.float16))

    with kernels(kernels_name):
        out, past = attend_and_cache(changed(case, queries=zeros, keys=zeros, values=values))

    stored, rounded = past[1][LAYER, 0, : len(values)], values.half()
    assert torch.equal(stored.isnan(), rounded.isnan())
    assert torch.equal(
        stored.nan_to_num(9.0, 1e5, -1e5).view(torch.int16), rounded.nan_to_num(9.0, 1e5, -1e5).view(torch.int16)
    )
    # With a window of one each token sees its own value alone, with the weight 1.
    assert torch.equal(out.nan_to_num(9.0, 1e6, -1e6), rounded.float().nan_to_num(9.0, 1e6, -1e6))


@needs_library
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_a_query_does_not_see_does_not_reach_it(name: str, poison: float, dtype: torch.dtype) -> None:
    case = make_case(Shape(n_heads=6, start=20, n_tokens=30, window=9, dtype=dtype))
    poisoned = getattr(case, name).clone()
    poisoned[11] = poison
    clean = attend(case)

    out = attend(changed(case, **{name: poisoned}))

    assert torch.equal(out[:11], clean[:11])
    assert torch.equal(out[20:], clean[20:])
    assert not bool(out[11:20].isfinite().all(dim=1).any())


@needs_library
@pytest.mark.parametrize("start", [1, 40, 512, 600])
def test_a_score_of_minus_infinity_has_no_weight(start: int) -> None:
    case = make_case(Shape(n_heads=1, n_kv_heads=1, head_dim=2, start=start))
    case.past[0].fill_(-3e38)
    case = replace(
        case,
        angles=(torch.ones(1, 1), torch.zeros(1, 1)),
        queries=torch.tensor([[3e38, 3e38]]),
        keys=torch.zeros(1, 2),
    )

    out = attend(case)

    assert torch.equal(out, case.values)


def test_shapes_and_types_that_do_not_fit_are_refused() -> None:
    case = make_case(Shape(n_tokens=3))
    workspace = Workspace()

    def attention(**changes: Any) -> Attention:  # noqa: ANN401  # Attention's, which checks them
        arguments: dict[str, Any] = {"n_heads": 8, "window": None, "start": 0, "rows": slice(0, 3), "n_rows": 3}
        past, angles = changes.pop("past", case.past), changes.pop("angles", case.angles)
        return Attention(past, angles, workspace=workspace, **arguments | changes)

    keys, values = case.past
    refused: list[dict[str, Any]] = [
        {"past": (keys.transpose(3, 4), values)},
        {"past": (keys.half(), values)},
        {"past": (keys.double(), values.double())},
        {"angles": (case.angles[0][:2], case.angles[1][:2])},
        {"start": 62},
        {"start": -1},
        {"rows": slice(1, 4)},
        {"n_heads": 7},
        {"window": 0},
    ]
    for changes in refused:
        with pytest.raises(BadShape):
            attention(**changes)
    tensors = {"queries": case.queries, "keys": case.keys, "values": case.values, "out": case.queries.clone()}
    for name in tensors:
        with pytest.raises(BadShape, match=name):
            attention()(0, **tensors | {name: tensors[name][:2]})


@needs_library
def test_a_layer_that_the_cache_does_not_have_is_refused() -> None:
    case = make_case(Shape())
    with Workspace() as workspace:
        attention = Attention(
            case.past, case.angles, n_heads=8, window=None, start=0, rows=slice(0, 1), n_rows=1, workspace=workspace
        )

        with pytest.raises(Exception, match="no such rows"):
            attention(2, case.queries, case.keys, case.values, out=case.queries.clone())


def test_without_the_library_torch_does_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with_library = attend(case)
    monkeypatch.setattr(library_module, "LIBRARY_FILE", "libabsent.so")
    library.cache_clear()
    try:
        without, past = attend_and_cache(case)
    finally:
        monkeypatch.undo()
        library.cache_clear()

    assert float((without - with_library).abs().max()) <= TOLERANCE
    assert torch.equal(past[0].nan_to_num(), attend_and_cache(case)[1][0].nan_to_num())
