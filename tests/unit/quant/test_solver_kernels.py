"""The C library's solver: the codes of torch's, the same bits with every instruction set, and what it refuses."""

import ctypes

import pytest
import torch
from torch import Tensor

from protocol.schemes import Scheme
from quant import refinement_reference, solver_kernels, solver_reference
from quant.solver import quantize
from quant.solver_kernels import _CGrid, _CGroups, _functions
from tests.unit.quant.c_library import by_all_kernels, needs_library
from tests.unit.quant.matrices import FIELDS, QUANTIZED, gaussian, have_equal_bits, name_of, relative_error
from tests.unit.quant.test_refinement import restored

pytestmark = needs_library

OK, UNKNOWN_FORMAT, BAD_SHAPE, BAD_LENGTH, BAD_ALIGNMENT, BAD_WEIGHTS = 0, 1, 2, 3, 4, 11

# 301 rows of 27 groups of 64: the last bundle of eight groups is not full.
ROWS, COLS = 301, 27 * 64


def large(rows: int, cols: int) -> Tensor:
    """Return weights so large that HQQ's whole formula is needed."""
    return gaussian(rows, cols, std=4.0)


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
@pytest.mark.parametrize("make", [gaussian, large], ids=["gaussian", "large"])
def test_hqqs_codes_are_those_of_torch(scheme: Scheme, make: object) -> None:
    weight: Tensor = make(ROWS, COLS)  # type: ignore[operator]

    groups = solver_kernels.solve(weight, scheme, n_threads=1)

    expected = solver_reference.solve(weight, scheme)
    assert torch.equal(groups.scale, expected.scale)
    assert float((groups.codes == expected.codes).float().mean()) >= (0.9999 if scheme.nbits == 8 else 0.99998)


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
def test_refining_loses_as_much_as_torchs_and_gives_hardly_another_code(scheme: Scheme) -> None:
    weight = gaussian(67, 640)
    hqq = solver_reference.solve(weight, scheme)

    matrix = solver_kernels.refine(weight, hqq, scheme, n_threads=1)

    expected = refinement_reference.refine(weight, hqq, scheme)
    assert relative_error(restored(matrix), weight) == pytest.approx(
        relative_error(restored(expected), weight), rel=2e-4
    )
    # A tie in a start's codes can lead into another valley of the same depth.
    assert float((matrix.codes == expected.codes).float().mean()) >= 0.998


@pytest.mark.parametrize("scheme", QUANTIZED, ids=name_of)
@pytest.mark.parametrize("make", [gaussian, large], ids=["gaussian", "large"])
def test_every_instruction_set_gives_the_same_bits(scheme: Scheme, make: object) -> None:
    weight: Tensor = make(45, 320)  # type: ignore[operator]
    weight[3] = 0
    weight[5, :64] = 0.25

    def all_fields() -> Tensor:
        matrices = [quantize(weight, scheme, refine=refine) for refine in (False, True)]
        return torch.cat([getattr(matrix, field).flatten().float() for matrix in matrices for field in FIELDS])

    portable, *others = by_all_kernels(all_fields)

    assert all(have_equal_bits(portable, other) for other in others)


def groups_of(weight: Tensor) -> _CGroups:
    return _CGroups(weight.data_ptr(), weight.numel() * 4, 0, weight.numel() // 64, 64, 4)


WRONG_GROUPS = (
    ({"weights": 0}, BAD_ALIGNMENT),
    ({"nbytes": 8 * 64 * 4 - 4}, BAD_LENGTH),
    ({"dtype": 3}, UNKNOWN_FORMAT),
    ({"dtype": -1}, UNKNOWN_FORMAT),
    ({"n_groups": 0}, BAD_SHAPE),
    ({"n_groups": 2**62}, BAD_SHAPE),
    ({"group_size": 72}, BAD_SHAPE),
    ({"group_size": 12}, BAD_SHAPE),
    ({"nbits": 0}, UNKNOWN_FORMAT),
    ({"nbits": 9}, UNKNOWN_FORMAT),
)


@pytest.mark.parametrize(("wrong", "status"), WRONG_GROUPS)
def test_wrong_groups_are_refused_by_every_function(wrong: dict[str, int], status: int) -> None:
    weight = gaussian(8, 64)
    groups = groups_of(weight)
    for name, value in wrong.items():
        setattr(groups, name, value)
    room = torch.empty(4096)
    at = room.data_ptr()
    grid = ctypes.byref(_CGrid(at, at, at, 1))
    library = _functions()

    by = ctypes.byref(groups)
    assert library.expertd_hqq_start(by, at, at) == status
    assert library.expertd_hqq_improve(by, at, at, 1, at, at) == status
    assert library.expertd_hqq_codes(by, at, at, at) == status
    assert library.expertd_refine(by, at, at, at, at, at) == status
    assert library.expertd_refine_on_grid(by, at, at, at, grid, at, at, at) == status


def test_missing_memory_counts_and_rows_that_do_not_divide_are_refused() -> None:
    weight = gaussian(8, 64)
    groups = ctypes.byref(groups_of(weight))
    room = torch.empty(4096)
    at = room.data_ptr()
    library = _functions()

    assert library.expertd_hqq_start(groups, at, None) == BAD_ALIGNMENT
    assert library.expertd_hqq_improve(groups, at, at, 0, at, at) == BAD_LENGTH
    assert library.expertd_hqq_improve(groups, at, at, 65, at, at) == BAD_LENGTH
    assert library.expertd_refine_on_grid(groups, at, at, at, None, at, at, at) == BAD_ALIGNMENT
    grid = ctypes.byref(_CGrid(at, at, at, 3))
    assert library.expertd_refine_on_grid(groups, at, at, at, grid, at, at, at) == BAD_SHAPE


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 2e30])
def test_a_weight_that_is_not_finite_is_seen_wherever_it_stands(bad: float) -> None:
    weight = gaussian(9, 64)  # the last group is a bundle's only one
    inverse, zero = torch.empty(9), torch.empty(9)
    for place in (0, 63, 64, 8 * 64 + 63):
        damaged = weight.clone()
        damaged.view(-1)[place] = bad

        status = _functions().expertd_hqq_start(ctypes.byref(groups_of(damaged)), inverse.data_ptr(), zero.data_ptr())

        assert status == BAD_WEIGHTS
