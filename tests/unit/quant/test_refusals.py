"""What the C library itself refuses: Python checks first, these are the second locks, for callers to come."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from protocol.schemes import BF16, Q2_G16, Q4_G64, Scheme
from quant.expert import _CChoice, _CExpert
from quant.kernels import _FORMATS, CPart, _CProduct
from quant.library import check_status
from quant.workspace import Workspace
from tests.unit.quant.c_library import loaded_library, needs_library
from tests.unit.quant.matrices import encoded, gaussian

pytestmark = needs_library

OK, UNKNOWN_FORMAT, BAD_SHAPE, BAD_LENGTH, BAD_ALIGNMENT, BAD_ROWS, MISSING_EXPERT = range(7)
NO_WORKSPACE = 9

LONGEST = 2**63 - 1


@pytest.fixture(scope="module")
def workspace() -> Iterator[Workspace]:
    with Workspace(2) as workspace:
        yield workspace


def i64(n: int) -> ctypes.c_int64:
    return ctypes.c_int64(n)


def c_part(rows: int, cols: int, scheme: Scheme) -> CPart:
    """Return a part whose bytes the tests' cache keeps alive."""
    part_bytes = encoded(rows, cols, scheme)[1]
    return CPart(part_bytes.data_ptr(), part_bytes.numel(), rows, cols, _FORMATS[scheme.name])


def changed(part: CPart, **values: int) -> CPart:
    """Return a copy in which these values are added to the fields; `format` is set."""
    copy = CPart(*(getattr(part, name) or 0 for name in ("bytes", "nbytes", "rows", "cols", "format")))
    for name, value in values.items():
        setattr(copy, name, value if name == "format" else getattr(copy, name) + value)
    return copy


# How a part may be wrong, and what is said of it; [8, 64] in 4 bits.
WRONG_PARTS = (
    ({"format": 6}, UNKNOWN_FORMAT),
    ({"format": -1}, UNKNOWN_FORMAT),
    ({"format": LONGEST}, UNKNOWN_FORMAT),
    ({"rows": -8}, BAD_SHAPE),
    ({"rows": -9}, BAD_SHAPE),
    ({"rows": LONGEST - 8}, BAD_SHAPE),
    ({"cols": -1}, BAD_SHAPE),
    ({"cols": -64}, BAD_SHAPE),
    ({"cols": LONGEST - 127}, BAD_SHAPE),
    ({"nbytes": 1}, BAD_LENGTH),
    ({"nbytes": -1}, BAD_LENGTH),
    ({"nbytes": LONGEST - 10**6}, BAD_LENGTH),
    ({"rows": 1}, BAD_LENGTH),
    ({"cols": 64}, BAD_LENGTH),
    ({"format": 2}, BAD_LENGTH),
    ({"bytes": 1}, BAD_ALIGNMENT),
    ({"bytes": 2}, BAD_ALIGNMENT),
)


@pytest.mark.parametrize(("wrong", "status"), WRONG_PARTS, ids=str)
def test_a_part_that_is_not_what_it_is_said_to_be_is_never_read(
    workspace: Workspace, wrong: dict[str, int], status: int
) -> None:
    part = changed(c_part(8, 64, Q4_G64), **wrong)
    good = c_part(8, 64, Q4_G64)
    weights, x = torch.empty(8, 64), torch.ones(1, 64)

    assert dequantize(part, weights) == status
    assert multiply(workspace, [part], x) == status
    for expert in (_CExpert(part, good, good), _CExpert(good, part, good), _CExpert(good, good, part)):
        assert Choice(experts=[expert]).compute(workspace) == status


def test_rows_that_a_part_does_not_have_are_not_unpacked() -> None:
    part, out = c_part(8, 64, Q4_G64), torch.empty(8, 64)

    assert dequantize(part, out) == OK
    assert dequantize(part, out, first_row=8, n_rows=0, out_length=0) == OK
    for first_row, n_rows in ((1, 8), (-1, 8), (0, -1), (9, 0), (LONGEST, 1), (LONGEST, LONGEST), (0, LONGEST)):
        assert dequantize(part, out, first_row=first_row, n_rows=n_rows) == BAD_ROWS


def test_weights_are_not_unpacked_to_where_they_do_not_fit() -> None:
    part, out = c_part(8, 64, Q4_G64), torch.empty(8, 64)

    assert dequantize(part, out, out_length=511) == dequantize(part, out, out_length=513) == BAD_LENGTH
    assert dequantize(part, out, out_length=-512) == BAD_LENGTH
    assert dequantize(part, out, at=2) == BAD_ALIGNMENT


def test_activations_of_another_length_are_not_read(workspace: Workspace) -> None:
    parts, x = [c_part(8, 64, Q2_G16)], torch.ones(2, 64)

    assert multiply(workspace, parts, x) == OK
    assert multiply(workspace, parts, x, x_length=127) == multiply(workspace, parts, x, x_length=129) == BAD_LENGTH
    assert multiply(workspace, parts, x, x_length=-64, n_tokens=-1, y_lengths=[-8]) == BAD_LENGTH
    assert multiply(workspace, parts, x, x_length=0, n_tokens=2**62, y_lengths=[0]) == BAD_LENGTH
    assert multiply(workspace, parts, x, at=1) == multiply(workspace, parts, x, at=-x.data_ptr()) == BAD_ALIGNMENT


def test_results_are_not_written_to_where_they_do_not_fit(workspace: Workspace) -> None:
    parts, x = [c_part(8, 64, Q2_G16), c_part(5, 64, BF16)], torch.ones(2, 64)

    assert multiply(workspace, parts, x) == OK
    for y_lengths in ([15, 10], [16, 9], [16, 11], [17, 10], [-16, 10], [16, 0]):
        assert multiply(workspace, parts, x, y_lengths=y_lengths) == BAD_LENGTH
    assert multiply(workspace, parts, x, y_at=2) == BAD_ALIGNMENT


def test_a_call_has_as_many_tokens_and_products_as_it_may_have(workspace: Workspace) -> None:
    part, x = c_part(1, 64, Q4_G64), torch.zeros(2**15 + 1, 64)

    assert multiply(workspace, [part], x[:-1]) == OK
    assert multiply(workspace, [part], x) == BAD_LENGTH
    assert multiply(workspace, [part] * 8, x[:1]) == OK
    assert multiply(workspace, [part] * 9, x[:1]) == BAD_LENGTH
    assert multiply(workspace, [part], x[:1], n_products=0) == BAD_LENGTH
    assert multiply(workspace, [part], x[:1], n_products=-1) == BAD_LENGTH


def test_parts_of_different_widths_are_not_multiplied_with_the_same_activations(workspace: Workspace) -> None:
    assert multiply(workspace, [c_part(8, 64, Q4_G64), c_part(8, 128, Q4_G64)], torch.ones(1, 64)) == BAD_SHAPE
    assert multiply(workspace, [c_part(8, 64, BF16), c_part(8, 63, BF16)], torch.ones(1, 64)) == BAD_SHAPE


def test_matrices_that_are_no_expert_are_not_computed_with(workspace: Workspace) -> None:
    inner, outer = c_part(128, 64, Q4_G64), c_part(64, 128, Q4_G64)

    assert Choice(experts=[_CExpert(inner, inner, outer)]).compute(workspace) == OK
    for gate, up, down in (
        (inner, inner, inner),
        (outer, outer, inner),
        (inner, c_part(64, 64, Q4_G64), outer),
        (c_part(64, 64, Q4_G64), c_part(64, 64, Q4_G64), outer),
        (inner, c_part(128, 128, Q4_G64), outer),
        (inner, inner, c_part(63, 128, BF16)),
        (inner, inner, c_part(65, 128, BF16)),
    ):
        assert Choice(experts=[_CExpert(gate, up, down)]).compute(workspace) == BAD_SHAPE


@pytest.mark.parametrize("expert_id", [-1, 2, 2**31, 2**32, LONGEST, -LONGEST - 1])
def test_an_expert_that_is_not_in_the_table_is_not_looked_for(workspace: Workspace, expert_id: int) -> None:
    choice = Choice()
    choice.expert_ids[2, 1] = expert_id

    status = choice.compute(workspace)

    assert status == MISSING_EXPERT
    assert bool((choice.contributions == -7).all())
    assert bool((choice.out == -7).all())


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_experts": 0}, {"n_experts": -1}, {"n_experts": 1025}, {"n_experts": LONGEST},
        {"n_tokens": -1}, {"n_tokens": 2**19 + 1}, {"n_tokens": LONGEST},
        {"top_k": 0}, {"top_k": -1}, {"top_k": 3}, {"top_k": LONGEST},
        {"hidden_size": 0}, {"hidden_size": -64}, {"n_experts": 1, "top_k": 2},
    ],
    ids=str,
)  # fmt: skip
def test_counts_that_cannot_be_are_refused(workspace: Workspace, wrong: dict[str, int]) -> None:
    choice = Choice()

    assert choice.compute(workspace, **wrong) == BAD_LENGTH
    assert bool((choice.out == -7).all())


@pytest.mark.parametrize("name", ["experts", "hidden_states", "expert_ids", "weights", "contributions"])
def test_an_address_that_is_missing_is_not_followed(workspace: Workspace, name: str) -> None:
    choice = Choice()

    assert choice.compute(workspace, **{name: 0}) == BAD_ALIGNMENT
    assert bool((choice.out == -7).all())


@pytest.mark.parametrize("name", ["hidden_states", "expert_ids", "weights", "contributions", "out"])
def test_an_address_that_is_no_multiple_of_4_is_not_followed(workspace: Workspace, name: str) -> None:
    choice = Choice()

    assert choice.compute(workspace, **{name: 2}) == BAD_ALIGNMENT


def test_without_an_output_no_weights_are_needed(workspace: Workspace) -> None:
    choice = Choice()

    assert choice.compute(workspace, out=0, weights=0) == OK
    assert bool((choice.out == -7).all())
    assert not bool((choice.contributions == -7).any())


def test_without_a_workspace_nothing_is_computed() -> None:
    part, x = c_part(8, 64, Q4_G64), torch.ones(1, 64)
    closed = Workspace()
    closed.close()

    assert multiply(closed, [part], x) == NO_WORKSPACE
    assert Choice().compute(closed) == NO_WORKSPACE
    assert loaded_library().expertd_workspace_stay_awake(None, i64(1)) == NO_WORKSPACE
    assert loaded_library().expertd_workspace_stop(None) == NO_WORKSPACE


@pytest.mark.parametrize("n_threads", [0, -1, 1025, LONGEST, -LONGEST - 1])
def test_a_number_of_threads_that_cannot_be_is_refused(n_threads: int) -> None:
    address = ctypes.c_void_p()

    status = loaded_library().expertd_workspace_start(i64(n_threads), ctypes.byref(address))

    assert status == BAD_LENGTH
    assert address.value is None


def test_a_workspace_needs_a_place_to_be_told_at() -> None:
    assert loaded_library().expertd_workspace_start(i64(1), None) == BAD_LENGTH


def test_kernels_that_this_machine_does_not_have_are_not_chosen() -> None:
    for name in (b"avx1024", b"", b"portablex", None):
        assert loaded_library().expertd_use_kernels(name) == UNKNOWN_FORMAT


@pytest.mark.parametrize("status", range(1, 11))
def test_every_status_is_an_error_with_words(status: int) -> None:
    with pytest.raises(Exception, match=r"[a-z ]{20,}") as raised:
        check_status(status, "the matrix")

    assert "status" not in str(raised.value)


def dequantize(
    part: CPart, out: Tensor, *, first_row: int = 0, n_rows: int = 8, out_length: int = 512, at: int = 0
) -> int:
    address = ctypes.c_void_p(out.data_ptr() + at)
    status = loaded_library().expertd_dequantize_rows(
        ctypes.byref(part), i64(first_row), i64(n_rows), address, i64(out_length)
    )
    return int(status)


def multiply(
    workspace: Workspace, parts: list[CPart], x: Tensor, *, x_length: int | None = None, n_tokens: int | None = None,
    n_products: int | None = None, y_lengths: list[int] | None = None, at: int = 0, y_at: int = 0,
) -> int:  # fmt: skip
    """Call the library with what is right unless it is given; outputs are always as long as they must be."""
    results = [torch.empty(len(x), max(1, min(part.rows, 1024))) for part in parts]
    lengths = y_lengths or [len(x) * part.rows for part in parts]
    products = (_CProduct * len(parts))(
        *(_CProduct(part, y.data_ptr() + y_at, n) for part, y, n in zip(parts, results, lengths, strict=True))
    )
    status = loaded_library().expertd_multiply(
        workspace.address, products, i64(len(parts) if n_products is None else n_products),
        ctypes.c_void_p(x.data_ptr() + at), i64(x.numel() if x_length is None else x_length),
        i64(len(x) if n_tokens is None else n_tokens), i64(0),
    )  # fmt: skip
    return int(status)


def good_experts() -> list[_CExpert]:
    expert = _CExpert(c_part(128, 64, Q4_G64), c_part(128, 64, Q4_G64), c_part(64, 128, Q4_G64))
    return [expert, expert]


@dataclass
class Choice:
    """A call with 3 tokens of 64 that choose 2 experts each, of those given."""

    experts: list[_CExpert] = field(default_factory=good_experts)

    def __post_init__(self) -> None:
        addresses = [ctypes.addressof(expert) for expert in self.experts]
        self.table = (ctypes.c_void_p * len(addresses))(*addresses)
        self.top_k = min(2, len(self.experts))
        self.hidden_states = gaussian(3, 64, std=1.0)
        self.expert_ids = torch.arange(3 * self.top_k).view(3, self.top_k) % len(self.experts)
        self.weights = torch.ones(3, self.top_k)
        self.contributions = torch.full((3, self.top_k, 64), -7.0)
        self.out = torch.full((3, 64), -7.0)

    def compute(self, workspace: Workspace, **changes: int) -> int:
        """Return the status of the call with these fields set; 2 for an address is an address off by 2."""
        choice = _CChoice(
            ctypes.addressof(self.table), len(self.experts), 3, 64, self.top_k,
            *(getattr(self, name).data_ptr() for name in _TENSORS),
        )  # fmt: skip
        for name, value in changes.items():
            is_shift = name in _TENSORS and value == 2
            setattr(choice, name, getattr(choice, name) + 2 if is_shift else value)
        return int(loaded_library().expertd_compute_experts(workspace.address, ctypes.byref(choice), i64(0)))


_TENSORS = ("hidden_states", "expert_ids", "weights", "contributions", "out")
