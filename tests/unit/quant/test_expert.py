"""One expert from its record against the SwiGLU formula in float64."""

from functools import cache

import pytest
import torch
from torch import Tensor

from protocol.layout import Part, PartSpan
from protocol.schemes import BF16, FP16, Q2_G16, Q3_G64, Q4_G64, Scheme
from quant.errors import BadPart, BadShape
from quant.expert import Expert, LayerExperts
from quant.workspace import Workspace
from tests.unit.quant.c_library import needs_library
from tests.unit.quant.expert_records import HIDDEN, mixtral_parts, record_of, record_of_weights, swiglu_in_float64
from tests.unit.quant.matrices import ALL_SCHEMES, QUANTIZED, gaussian, name_of, relative_error

# Three float32 products after each other.
EXACT_ERROR = 2e-6
# Two products of activations rounded to int8 after each other; a token of a small expert errs a little more or less.
INT8_ERROR = 0.015
SMALL_INT8_ERROR = 0.02


def compute(record: Tensor, spans: tuple[PartSpan, ...], x: Tensor, *, exact: bool = False) -> Tensor:
    """Return what the expert makes of x, as the only one of a layer: [T, H]."""
    with Workspace(2) as workspace:
        experts = LayerExperts(1, x.shape[1], workspace=workspace, exact=exact)
        experts.put(0, Expert(record, spans))
        ids, weights = torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1)
        return experts.forward(x, ids, weights)


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
@pytest.mark.parametrize("n_tokens", [1, 3, 30])
def test_an_expert_computes_swiglu(scheme: Scheme, n_tokens: int) -> None:
    record, spans = record_of(*mixtral_parts(scheme, scheme, scheme))
    x = gaussian(n_tokens, HIDDEN, std=1.0, seed=9)

    y = compute(record, spans, x)

    assert relative_error(y, swiglu_in_float64(record, spans, x)) <= SMALL_INT8_ERROR


@needs_library
@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
@pytest.mark.parametrize("n_tokens", [1, 6])
def test_rounding_activations_costs_less_than_1_5_hundredths_of_an_experts_output(
    scheme: Scheme, n_tokens: int
) -> None:
    # Weights of such a size that gate and up give numbers around 1, as a model's do.
    record, spans = large_record(scheme)
    x = gaussian(n_tokens, 1024, std=1.0, seed=9)

    y = compute(record, spans, x)

    assert relative_error(y, swiglu_in_float64(record, spans, x)) <= INT8_ERROR


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
@pytest.mark.parametrize("n_tokens", [1, 3, 30])
def test_an_exact_expert_differs_from_float64_by_rounding(scheme: Scheme, n_tokens: int) -> None:
    record, spans = record_of(*mixtral_parts(scheme, scheme, scheme))
    x = gaussian(n_tokens, HIDDEN, std=1.0, seed=9)

    y = compute(record, spans, x, exact=True)

    assert relative_error(y, swiglu_in_float64(record, spans, x)) <= EXACT_ERROR


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
def test_the_reference_computes_swiglu_in_float(scheme: Scheme) -> None:
    record, spans = record_of(*mixtral_parts(scheme, scheme, scheme))
    x = gaussian(3, HIDDEN, std=1.0, seed=9)

    y = Expert(record, spans).reference(x)

    assert relative_error(y, swiglu_in_float64(record, spans, x)) <= EXACT_ERROR


@pytest.mark.parametrize(
    "schemes", [(Q4_G64, Q2_G16, BF16), (BF16, Q3_G64, Q4_G64), (FP16, BF16, Q2_G16)], ids=lambda s: str(len(s))
)
@pytest.mark.parametrize("exact", [False, True])
def test_the_matrices_of_an_expert_may_have_different_schemes(
    schemes: tuple[Scheme, Scheme, Scheme], *, exact: bool
) -> None:
    record, spans = record_of(*mixtral_parts(*schemes))
    x = gaussian(6, HIDDEN, std=1.0, seed=9)

    y = compute(record, spans, x, exact=exact)

    assert relative_error(y, swiglu_in_float64(record, spans, x)) <= (EXACT_ERROR if exact else SMALL_INT8_ERROR)


def test_parts_are_known_by_name_not_by_order() -> None:
    record, spans = record_of(*reversed(mixtral_parts(Q3_G64, Q3_G64, Q3_G64)))
    x = gaussian(2, HIDDEN, std=1.0, seed=9)

    y = compute(record, spans, x)

    assert relative_error(y, swiglu_in_float64(record, spans, x)) <= SMALL_INT8_ERROR


@pytest.mark.parametrize("scheme", [BF16, FP16], ids=name_of)
@pytest.mark.parametrize(("hidden", "intermediate"), [(1, 1), (7, 13), (30, 515), (65, 9)])
def test_an_expert_of_16_bit_matrices_may_have_any_size(scheme: Scheme, hidden: int, intermediate: int) -> None:
    parts = mixtral_parts(scheme, scheme, scheme, hidden=hidden, intermediate=intermediate)
    record, spans = record_of(*parts, std=1.0)
    x = gaussian(5, hidden, std=1.0, seed=9)

    y = compute(record, spans, x)

    assert relative_error(y, swiglu_in_float64(record, spans, x)) <= EXACT_ERROR


def test_silu_is_accurate_wherever_it_is_not_0() -> None:
    # The gate hands on its input, up is 1, down adds up nothing: what comes out is silu of what goes in.
    n = 128
    identity = torch.eye(n)
    of_last = torch.zeros(n, n)
    of_last[:, -1] = 1
    record, spans = record_of_weights(
        mixtral_parts(BF16, BF16, BF16, hidden=n, intermediate=n), [identity, of_last, identity]
    )
    x = torch.linspace(-87, 110, 127 * 200).view(200, 127)
    x = torch.cat((x, torch.ones(200, 1)), dim=1)

    y = compute(record, spans, x)

    expected = x.double() * x.double().sigmoid()
    worst = ((y - expected).abs() / expected.abs().clamp_min(1e-37)).max()
    assert float(worst) <= 4 * 2.0**-24


@pytest.mark.parametrize(("x", "expected"), [(-200.0, 0.0), (-95.0, 0.0), (0.0, 0.0), (1e30, 1e30), (-1e30, 0.0)])
def test_silu_of_what_is_far_from_0_is_its_limit(x: float, expected: float) -> None:
    one = torch.ones(1, 1)
    record, spans = record_of_weights(
        mixtral_parts(BF16, BF16, BF16, hidden=2, intermediate=1),
        [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.cat((one, one))],
    )

    y = compute(record, spans, torch.tensor([[x, 1.0]]))

    assert y[0].tolist() == pytest.approx([expected, expected], rel=1e-6, abs=1e-36)


def test_the_record_is_only_read() -> None:
    record, spans = record_of(*mixtral_parts(Q4_G64, Q4_G64, Q4_G64))
    before = record.clone()

    for n_tokens in (1, 20):
        compute(record, spans, gaussian(n_tokens, HIDDEN, std=1.0))

    assert torch.equal(record, before)


def test_a_record_that_is_too_short_is_refused() -> None:
    record, spans = record_of(*mixtral_parts(Q4_G64, Q4_G64, Q4_G64))

    with pytest.raises(BadPart, match=r"w2: \d+ bytes are expected"):
        Expert(record[: spans[-1].offset + spans[-1].nbytes - 4], spans)


def test_parts_that_are_no_expert_are_refused() -> None:
    w1, w3, w2 = mixtral_parts(Q4_G64, Q4_G64, Q4_G64)

    with pytest.raises(BadShape, match="w1, w2 and w3; w1, w3 came"):
        Expert(*record_of(w1, w3))
    with pytest.raises(BadShape, match="are expected, w1"):
        Expert(*record_of(w1, w3, Part("w2", HIDDEN, HIDDEN, Q4_G64.name)))
    with pytest.raises(BadShape, match="are expected, w1"):
        Expert(*record_of(w1, Part("w3", 64, HIDDEN, Q4_G64.name), w2))


@cache
def large_record(scheme: Scheme) -> tuple[Tensor, tuple[PartSpan, ...]]:
    return record_of(*mixtral_parts(scheme, scheme, scheme, hidden=1024, intermediate=1792), std=0.04)
