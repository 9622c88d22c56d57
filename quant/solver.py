"""Half-quadratic quantization (HQQ): which codes, scales and zeros stand for a matrix. Groups run along the inputs.

HQQ starts from the least and greatest weight of each group and then improves the zero by turns:

    q = round(x + zero), kept in 0 … 2^nbits - 1          x = w / scale, the weight in units of codes
    e = shrink(w - (q - zero) * scale)                    the part of the error that is taken for outliers
    zero = mean over the group of q - (w - e) / scale

up to 20 times, or until the mean |error| of the whole matrix stops falling; scales keep their start. (Badri, Shaji:
"Half-Quadratic Quantization of Large Machine Learning Models", 2023, as version 0.2.8 of the hqq package computes it:
l_p norm p = 0.7, beta = 10; with 4 bits the first zero is rounded.)

The shortcut. shrink(e) = sign(e) · max(0, |e| - |e|^(p-1) / beta) is exactly 0 while |e| ≤ (1/beta)^(1/(2-p)) = 0.17,
and the errors of a language model's weights are ten times smaller. Without it the step is zero = mean(q - x): no
powers, a fraction of the time, the same codes. Every few groups test their own errors at every step and use the full
formula where one is larger.

One deviation from the package: degenerate groups. The package gives a group whose range is at most 1e-4 the scale 1 and
keeps every scale above 5e-5, which turns small weights into 0 or into their group's zero. Here each group keeps its
true range. A group that is constant, or nearly so (a range below 1/16 of its greatest magnitude), has its range widened
to contain 0: a constant is stored exactly up to rounding, and its zero stays near those of the row's other groups, with
which it shares a step.

A matrix with rows at the ends of float32's range (quant/row_exponents.py) is solved a strip of rows at a time: its mean
error would be that of its largest rows alone, and to move all of it at once would take a copy.

The loops are the C library's (csrc/hqq_loops.h), or without it torch's (solver_reference.py). Rows are shared among
`n_threads`, which changes no bit. Blocks nobody; holds no state between calls.
"""

import torch
from torch import Tensor

from protocol.layout import check_shape
from protocol.schemes import Scheme
from quant import solver_kernels, solver_reference
from quant.errors import BadWeights, UnknownSolver
from quant.packing import QuantizedMatrix, joined
from quant.refinement import refine_groups
from quant.row_exponents import least_steps, moved, moved_back, row_shifts
from quant.second_level import FloatGroups, quantize_groups

SOLVERS = ("shortcut", "hqq")

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_STRIP_NELEMENTS = 1 << 22


@torch.no_grad()
def quantize(
    weight: Tensor, scheme: Scheme, *, solver: str = "shortcut", refine: bool = True, n_threads: int = 1
) -> QuantizedMatrix:
    """Return the quantized matrix of a weight [N, K] of any float type; raise BadWeights, UnknownSolver, SolverMissing.

    Without `refine` codes are those of the hqq package (axis=1) but for ties in rounding; with it HQQ is the start of a
    search for less error (quant/refinement.py). Scales and bases have an 8-bit second level either way.
    Raises LayoutError where the scheme's groups do not divide K.
    """
    _check_weight(weight, scheme)
    if solver not in SOLVERS:
        raise UnknownSolver(f"solver {solver!r} is not known; this version knows {', '.join(SOLVERS)}")
    if weight.dtype not in _DTYPES:
        weight = weight.float()
    shifts = row_shifts(weight)
    if shifts is None:
        return _quantize_ordinary(weight, scheme, None, solver=solver, refine=refine, n_threads=n_threads)
    strips = []
    per_strip = max(1, _STRIP_NELEMENTS // weight.shape[1])
    for first in range(0, weight.shape[0], per_strip):
        strip, by = (whole[first : first + per_strip] for whole in (weight, shifts))
        matrix = _quantize_ordinary(
            moved(strip, by), scheme, least_steps(by), solver=solver, refine=refine, n_threads=n_threads
        )
        strips.append(moved_back(matrix, by))
    return joined(strips)


@torch.no_grad()
def solve(weight: Tensor, scheme: Scheme, *, n_threads: int = 1) -> FloatGroups:
    """Return HQQ's codes, scales and zeros of a weight [N, K]; raise BadWeights unless finite and at most 1e30."""
    if solver_kernels.has_kernels():
        return solver_kernels.solve(weight, scheme, n_threads=n_threads)
    return solver_reference.solve(weight, scheme)


def _quantize_ordinary(
    weight: Tensor, scheme: Scheme, least_step: Tensor | None, *, solver: str, refine: bool, n_threads: int
) -> QuantizedMatrix:
    """Return the quantized matrix of a weight that solvers can compute with; rows' steps are multiples of the least."""
    if solver == "hqq":
        from quant.solver_hqq import solve_with_package

        groups = solve_with_package(weight, scheme)
    else:
        groups = solve(weight, scheme, n_threads=n_threads)
    if refine:
        return refine_groups(weight, groups, scheme, least_step, n_threads=n_threads)
    return quantize_groups(groups, scheme, least_step)


def _check_weight(weight: Tensor, scheme: Scheme) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise BadWeights(f"a matrix of floats is expected, {weight.dtype} of shape {list(weight.shape)} came")
    if scheme.group_size is None:
        raise BadWeights(f"scheme {scheme.name} is stored as it is, not quantized")
    check_shape("weight", weight.shape[0], weight.shape[1], scheme)
