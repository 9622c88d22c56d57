"""A weight as the bytes of its part, in any scheme: what the converter writes. Knows neither files nor records."""

import torch
from torch import Tensor

from protocol.layout import Part, part_nbytes
from protocol.schemes import BF16, scheme_named
from quant.errors import BadWeights
from quant.packing import pack
from quant.solver import quantize

_BF16_MAX = torch.finfo(torch.bfloat16).max


def encode_part(
    weight: Tensor, part: Part, *, solver: str = "shortcut", refine: bool = True, n_threads: int = 1
) -> Tensor:
    """Return the bytes, u8 [part_nbytes(part)], of a weight [rows, cols] of any float type.

    Raise BadWeights if its shape is not the part's or a weight is not finite (in 16 bits too), UnknownSolver or
    SolverMissing; LayoutError or UnknownScheme if the part itself is impossible.
    """
    scheme = scheme_named(part.scheme)
    part_nbytes(part)
    if tuple(weight.shape) != (part.rows, part.cols) or not weight.is_floating_point():
        raise BadWeights(
            f"{part.name}: floats of shape [{part.rows}, {part.cols}] are expected, "
            f"{weight.dtype} of shape {list(weight.shape)} came"
        )
    if not scheme.is_quantized:
        return _encode_16bit(weight, part, torch.bfloat16 if scheme == BF16 else torch.float16)
    try:
        return pack(quantize(weight, scheme, solver=solver, refine=refine, n_threads=n_threads))
    except BadWeights as error:
        raise BadWeights(f"{part.name}: {error}") from None


def _encode_16bit(weight: Tensor, part: Part, dtype: torch.dtype) -> Tensor:
    stored = weight.to(dtype).contiguous()
    if dtype == torch.bfloat16 and bool(weight.isfinite().all()):
        # Float32 goes on by a little above the largest bf16, which is nearest to what lies there.
        stored.clamp_(-_BF16_MAX, _BF16_MAX)
    if not bool(stored.isfinite().all()):
        raise BadWeights(f"{part.name}: a weight is not finite in {part.scheme}")
    return stored.view(torch.uint8).view(-1)
