"""The door to the C library's solver: cuts a matrix into strips of rows, and lets threads share them.

Its calls release the interpreter's lock. What a strip gives does not depend on who computed it, and sums over strips
are added in their order: no bit depends on the number of threads.
"""

import ctypes
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from protocol.schemes import Scheme
from quant.errors import BadWeights
from quant.library import OK, check_status, library
from quant.packing import QuantizedMatrix
from quant.second_level import FittedGroups, FloatGroups, group_size_of, second_level

# csrc/api.h
_BAD_WEIGHTS = 11

_N_STEPS_MAX = 20
# So many steps are taken while a group is at hand, before the whole matrix's error decides whether they were too many.
_STEPS_AT_ONCE = 4
_STRIP_NELEMENTS = 1 << 20
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_Result = TypeVar("_Result")
_Strip = tuple[slice, Tensor]  # rows, and their weights [n, K]


class _CGroups(ctypes.Structure):
    """struct expertd_groups of csrc/solver.h."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("nbytes", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("n_groups", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("nbits", ctypes.c_int64),
    )


class _CGrid(ctypes.Structure):
    """struct expertd_grid of csrc/solver.h."""

    _fields_ = (
        ("scale_step", ctypes.c_void_p),
        ("base_min", ctypes.c_void_p),
        ("base_step", ctypes.c_void_p),
        ("groups_per_row", ctypes.c_int64),
    )


def has_kernels() -> bool:
    """Whether the library is there; raise StaleLibrary."""
    return library() is not None


def solve(weight: Tensor, scheme: Scheme, *, n_threads: int) -> FloatGroups:
    """Return HQQ's codes, scales and zeros of a weight [N, K]; raise BadWeights."""
    with _sharing(weight, scheme, n_threads) as shared:
        inverse, zero = shared.floats(), shared.floats()
        shared.run(lambda rows, groups: _start(groups, inverse[rows], zero[rows]))
        shared.improve(inverse, zero)
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        shared.run(lambda rows, groups: _call("expertd_hqq_codes", groups, inverse[rows], zero[rows], codes[rows]))
    return FloatGroups(codes, inverse.reciprocal().masked_fill_(inverse == 0, 0), zero)


def refine(
    weight: Tensor, start: FloatGroups, scheme: Scheme, least_step: Tensor | None = None, *, n_threads: int
) -> QuantizedMatrix:
    """Return the matrix with the least error that is found from HQQ's scales and zeros on."""
    with _sharing(weight, scheme, n_threads) as shared:
        scale, base, mean_code = shared.floats(), shared.floats(), shared.floats()
        shared.run(
            lambda rows, groups: _call(
                "expertd_refine", groups, start.scale[rows], start.zero[rows], scale[rows], base[rows], mean_code[rows]
            )
        )
        level = second_level(FittedGroups(scale, base, mean_code), least_step)
        codes = torch.empty(weight.shape, dtype=torch.uint8)

        def put_on_grid(rows: slice, groups: _CGroups) -> None:
            steps = [level.scale_step[rows], level.base_min[rows], level.base_step[rows]]
            grid = _CGrid(*(step.data_ptr() for step in steps), scale.shape[1])
            _call(
                "expertd_refine_on_grid", groups, scale[rows], base[rows], mean_code[rows], ctypes.byref(grid),
                codes[rows], level.scale_codes[rows], level.base_codes[rows],
            )  # fmt: skip

        shared.run(put_on_grid)
    return QuantizedMatrix(
        scheme, codes, level.scale_codes, level.base_codes, level.scale_step, level.base_min, level.base_step
    )


class _Shared:
    """A weight in strips, and the threads that take them."""

    def __init__(self, weight: Tensor, scheme: Scheme, threads: ThreadPoolExecutor | None) -> None:
        self._weight = (weight if weight.dtype in _DTYPES else weight.float()).contiguous()
        self._scheme = scheme
        self._threads = threads
        n_rows, n_cols = weight.shape
        per_strip = max(1, _STRIP_NELEMENTS // n_cols)
        self._strips = [slice(first, min(n_rows, first + per_strip)) for first in range(0, n_rows, per_strip)]

    def floats(self) -> Tensor:
        """Return room for a number of each group, f32 [N, K/g]."""
        return torch.empty(self._weight.shape[0], self._weight.shape[1] // group_size_of(self._scheme))

    def run(self, work: Callable[[slice, _CGroups], _Result]) -> list[_Result]:
        """Have every strip worked on, given its rows and its groups; return what that gave, in their order."""

        def on(rows: slice) -> _Result:
            return work(rows, self._groups(rows))

        return list(self._threads.map(on, self._strips) if self._threads else map(on, self._strips))

    def improve(self, inverse: Tensor, zero: Tensor) -> None:
        """Take HQQ's steps until the mean |error| of the whole matrix stops falling; leave the last one's zeros."""
        best = math.inf
        for _ in range(0, _N_STEPS_MAX, _STEPS_AT_ONCE):
            taken = self.run(lambda rows, groups: _improve(groups, inverse[rows], zero[rows]))
            for step in range(_STEPS_AT_ONCE):
                total = math.fsum(errors[step] for _, errors in taken)
                # In float32, as the package compares: below its resolution nothing improves any more.
                error = float(torch.tensor(total / self._weight.numel(), dtype=torch.float32))
                is_over = not error < best
                best = min(best, error)
                if is_over:
                    break
            for rows, (zeros, _) in zip(self._strips, taken, strict=True):
                zero[rows] = zeros[step]
            if is_over:
                return

    def _groups(self, rows: slice) -> _CGroups:
        strip = self._weight[rows]
        group_size = group_size_of(self._scheme)
        return _CGroups(
            strip.data_ptr(),
            strip.numel() * strip.element_size(),
            _DTYPES[strip.dtype],
            strip.numel() // group_size,
            group_size,
            self._scheme.nbits,
        )


@contextmanager
def _sharing(weight: Tensor, scheme: Scheme, n_threads: int) -> Iterator[_Shared]:
    if n_threads == 1:
        yield _Shared(weight, scheme, None)
        return
    with ThreadPoolExecutor(n_threads) as threads:
        yield _Shared(weight, scheme, threads)


def _start(groups: _CGroups, inverse: Tensor, zero: Tensor) -> None:
    _call("expertd_hqq_start", groups, inverse, zero)


def _improve(groups: _CGroups, inverse: Tensor, zero: Tensor) -> tuple[Tensor, Sequence[float]]:
    """Return the zeros after each of some steps, f32 [steps, n, K/g], and the sum of |errors| before each."""
    zeros = torch.empty(_STEPS_AT_ONCE, *zero.shape)
    errors = torch.empty(_STEPS_AT_ONCE, dtype=torch.float64)
    _call("expertd_hqq_improve", groups, inverse, zero, _STEPS_AT_ONCE, zeros, errors)
    return zeros, errors.tolist()


def _call(name: str, groups: _CGroups, *arguments: object) -> None:
    """Call a function of the library on groups; a tensor goes as its address. Raise BadWeights."""
    function = getattr(_functions(), name)
    plain = (argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments)
    status = function(ctypes.byref(groups), *plain)
    if status == _BAD_WEIGHTS:
        raise BadWeights("weights are expected to be finite and at most 1e+30; a NaN, an infinity or more came")
    if status != OK:
        check_status(status, "the solver")


# Types are the library's for as long as it is loaded; without them every call would convert its arguments by guessing.
@functools.cache
def _functions() -> ctypes.CDLL:
    loaded = library()
    if loaded is None:
        raise RuntimeError("asked for without asking has_kernels()")
    groups, address, count = ctypes.POINTER(_CGroups), ctypes.c_void_p, ctypes.c_int64
    loaded.expertd_hqq_start.argtypes = (groups, address, address)
    loaded.expertd_hqq_improve.argtypes = (groups, address, address, count, address, address)
    loaded.expertd_hqq_codes.argtypes = (groups, address, address, address)
    loaded.expertd_refine.argtypes = (groups, *[address] * 5)
    loaded.expertd_refine_on_grid.argtypes = (
        groups, address, address, address, ctypes.POINTER(_CGrid), address, address, address,
    )  # fmt: skip
    return loaded
