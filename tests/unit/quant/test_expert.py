"""An expert from its record against the SwiGLU formula in float64."""

import pytest
import torch
from torch import Tensor

from protocol.layout import R8, Part, PartSpan, record_nbytes, record_spans
from protocol.schemes import BF16, Q2_G16, Q3_G64, Q4_G64, Scheme
from quant.encode import encode_part
from quant.errors import BadPart, BadShape
from quant.expert import Expert
from quant.reference import dequantize
from tests.unit.quant.matrices import ALL_SCHEMES, gaussian, name_of

HIDDEN, INTERMEDIATE = 192, 448

# Of the output's range: three float32 products after each other.
TOLERANCE = 2e-5


def record_of(*parts: Part) -> tuple[Tensor, tuple[PartSpan, ...]]:
    spans = record_spans(R8, parts)
    record = torch.zeros(record_nbytes(R8, parts), dtype=torch.uint8)
    for seed, span in enumerate(spans):
        weight = gaussian(span.part.rows, span.part.cols, std=0.1, seed=seed)
        record[span.offset : span.offset + span.nbytes] = encode_part(weight, span.part, solver="shortcut")
    return record, spans


def mixtral_parts(w1: Scheme, w3: Scheme, w2: Scheme) -> tuple[Part, Part, Part]:
    return (
        Part("w1", INTERMEDIATE, HIDDEN, w1.name),
        Part("w3", INTERMEDIATE, HIDDEN, w3.name),
        Part("w2", HIDDEN, INTERMEDIATE, w2.name),
    )


def dense_in_float64(record: Tensor, spans: tuple[PartSpan, ...], x: Tensor) -> Tensor:
    from protocol.schemes import scheme_named

    w = {
        span.part.name: dequantize(
            record[span.offset : span.offset + span.nbytes],
            span.part.rows,
            span.part.cols,
            scheme_named(span.part.scheme),
        ).double()
        for span in spans
    }
    gate = x.double() @ w["w1"].t()
    return (gate * gate.sigmoid() * (x.double() @ w["w3"].t())) @ w["w2"].t()


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=name_of)
@pytest.mark.parametrize("n_tokens", [1, 3, 30])
def test_an_expert_computes_swiglu(scheme: Scheme, n_tokens: int) -> None:
    record, spans = record_of(*mixtral_parts(scheme, scheme, scheme))
    x = gaussian(n_tokens, HIDDEN, std=1.0, seed=9)

    y = Expert(record, spans)(x)

    assert_close(y, dense_in_float64(record, spans, x))


def test_the_matrices_of_an_expert_may_have_different_schemes() -> None:
    record, spans = record_of(*mixtral_parts(Q4_G64, Q2_G16, BF16))
    x = gaussian(2, HIDDEN, std=1.0, seed=9)

    y = Expert(record, spans)(x)

    assert_close(y, dense_in_float64(record, spans, x))


def test_parts_are_known_by_name_not_by_order() -> None:
    record, spans = record_of(*reversed(mixtral_parts(Q3_G64, Q3_G64, Q3_G64)))
    x = gaussian(2, HIDDEN, std=1.0, seed=9)

    y = Expert(record, spans)(x)

    assert_close(y, dense_in_float64(record, spans, x))


def test_the_record_is_only_read() -> None:
    record, spans = record_of(*mixtral_parts(Q4_G64, Q4_G64, Q4_G64))
    before = record.clone()

    for n_tokens in (1, 20):
        Expert(record, spans)(gaussian(n_tokens, HIDDEN, std=1.0))

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


def assert_close(y: Tensor, expected: Tensor) -> None:
    assert float((y - expected).abs().max() / expected.abs().max()) <= TOLERANCE
