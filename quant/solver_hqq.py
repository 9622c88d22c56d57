"""HQQ by the hqq package itself: slow, and what our own solver is held to. The only module that imports hqq.

The package's limits hold here: a group with a range of at most 1e-4 gets the scale 1, so that small weights are lost.
"""

import torch
from torch import Tensor

from protocol.schemes import Scheme
from quant.errors import BadWeights, SolverMissing
from quant.second_level import FloatGroups


@torch.no_grad()
def solve_with_package(weight: Tensor, scheme: Scheme) -> FloatGroups:
    """Return codes, scales and zeros of a weight [N, K] from the package; raise SolverMissing or BadWeights."""
    try:
        from hqq.core.quantize import Quantizer
    except ImportError:
        raise SolverMissing("solver 'hqq' needs the hqq package: pip install 'expertd[hqq]'") from None
    if not bool(weight.isfinite().all()):
        raise BadWeights("weights are expected to be finite; a NaN or an infinity came")
    codes, meta = Quantizer.quantize(
        weight.float(),
        nbits=scheme.nbits,
        group_size=scheme.group_size,
        round_zero=scheme.nbits == 4,
        axis=1,
        bitpack=False,
        device="cpu",
    )
    rows = weight.shape[0]
    # To a group of zeros the package gives scale 1, which would coarsen the step of its whole row.
    is_empty = (weight.reshape(codes.shape) == 0).all(dim=1).view(rows, -1)
    scale = meta["scale"].view(rows, -1).masked_fill(is_empty, 0)
    return FloatGroups(codes.to(torch.uint8).view(weight.shape), scale, meta["zero"].view(rows, -1))
