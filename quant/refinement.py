"""Refinement: less error than HQQ in the same bytes, from the weights alone.

HQQ keeps the scale that a group's least and greatest weight give it. Here scale and base are both fitted: for fixed
codes the sum of squared errors of w = scale * (q - center + base) is least at a line of regression; for fixed scale and
base each weight's best code is the nearest one. Doing the one and the other by turns only lowers the error, but ends in
the nearest of many valleys. So it is done from several starts: HQQ's own result, so that no group ends above it, and
the group's range with each end drawn in by so many steps; the best one goes on for some more rounds.

Then the second level. Rows get their steps from the refined scales and bases; for each group the nearest scale code and
its two neighbours are tried, each with the base that fits its codes best, and the point of the grid with the least
error is kept, with its codes. What is stored was so compared as it is stored.

Groups that are nearly constant keep HQQ's scale: it stays near those of the row's other groups, with which it shares a
step. 8-bit codes have one start beside HQQ's: there a range's ends hardly matter.

The loops are the C library's (csrc/refine_loops.h), or without it torch's (refinement_reference.py).
"""

import torch
from torch import Tensor

from protocol.schemes import Scheme
from quant import refinement_reference, solver_kernels
from quant.packing import QuantizedMatrix
from quant.second_level import FloatGroups


@torch.no_grad()
def refine_groups(
    weight: Tensor, start: FloatGroups, scheme: Scheme, least_step: Tensor | None = None, *, n_threads: int = 1
) -> QuantizedMatrix:
    """Return a weight [N, K] quantized with less error than HQQ's scales and zeros leave it, or with as much.

    `least_step` is quantize_groups'.
    """
    if solver_kernels.has_kernels():
        return solver_kernels.refine(weight, start, scheme, least_step, n_threads=n_threads)
    return refinement_reference.refine(weight, start, scheme, least_step)
