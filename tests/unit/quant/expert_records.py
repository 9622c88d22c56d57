"""Experts that tests share: records of small ones, and what they compute, in float64."""

import torch
from torch import Tensor

from protocol.layout import R8, Part, PartSpan, record_nbytes, record_spans
from protocol.schemes import Scheme, scheme_named
from quant.encode import encode_part
from quant.expert import Expert
from quant.reference import dequantize
from tests.unit.quant.activations import rounded_to_int8
from tests.unit.quant.matrices import gaussian

HIDDEN, INTERMEDIATE = 192, 448


def mixtral_parts(
    w1: Scheme, w3: Scheme, w2: Scheme, *, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE
) -> tuple[Part, Part, Part]:
    return (
        Part("w1", intermediate, hidden, w1.name),
        Part("w3", intermediate, hidden, w3.name),
        Part("w2", hidden, intermediate, w2.name),
    )


def record_of(*parts: Part, seed: int = 0, std: float = 0.1) -> tuple[Tensor, tuple[PartSpan, ...]]:
    weights = [gaussian(part.rows, part.cols, std=std, seed=10 * seed + i) for i, part in enumerate(parts)]
    return record_of_weights(parts, weights)


def record_of_weights(parts: tuple[Part, ...], weights: list[Tensor]) -> tuple[Tensor, tuple[PartSpan, ...]]:
    spans = record_spans(R8, parts)
    record = torch.zeros(record_nbytes(R8, parts), dtype=torch.uint8)
    for span, weight in zip(spans, weights, strict=True):
        record[span.offset : span.offset + span.nbytes] = encode_part(weight, span.part, solver="shortcut")
    return record, spans


def expert_of(scheme: Scheme, seed: int = 0, *, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE) -> Expert:
    parts = mixtral_parts(scheme, scheme, scheme, hidden=hidden, intermediate=intermediate)
    return Expert(*record_of(*parts, seed=seed))


def swiglu_in_float64(
    record: Tensor, spans: tuple[PartSpan, ...], x: Tensor, *, rounds_to_int8: bool = False
) -> Tensor:
    """Return w2 · (silu(w1 · x) * (w3 · x)), f64 [T, H], of x f32 [T, H].

    With rounds_to_int8 quantized matrices get their activations as the library rounds them.
    """
    by_name = {span.part.name: span for span in spans}

    def times(activations: Tensor, name: str) -> Tensor:
        span = by_name[name]
        scheme = scheme_named(span.part.scheme)
        part_bytes = record[span.offset : span.offset + span.nbytes]
        rounds = rounds_to_int8 and scheme.is_quantized
        weights = dequantize(part_bytes, span.part.rows, span.part.cols, scheme).double()
        return (rounded_to_int8(activations.float()) if rounds else activations.double()) @ weights.t()

    gate = times(x, "w1")
    return times(gate * gate.sigmoid() * times(x, "w3"), "w2")
