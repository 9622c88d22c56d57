"""A layer's experts computed from their records: down · (silu(gate · x) * (up · x)), the SwiGLU of Mixtral.

Owns no memory but the tables the C library reads: a record belongs to whoever mapped it.

Letters: T tokens, H hidden size.
"""

import ctypes
import functools

import torch
from torch import Tensor
from torch.nn.functional import silu

from protocol.layout import Part, PartSpan
from quant import kernels, reference
from quant.errors import BadShape, ExpertMissing
from quant.library import check_status, library
from quant.workspace import Workspace

GATE, DOWN, UP = "w1", "w2", "w3"


class _CExpert(ctypes.Structure):
    """struct expertd_expert of csrc/api.h."""

    _fields_ = (("gate", kernels.CPart), ("up", kernels.CPart), ("down", kernels.CPart))


class _CChoice(ctypes.Structure):
    """struct expertd_choice of csrc/api.h."""

    _fields_ = (
        ("experts", ctypes.c_void_p),
        ("n_experts", ctypes.c_int64),
        ("n_tokens", ctypes.c_int64),
        ("hidden_size", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("hidden_states", ctypes.c_void_p),
        ("expert_ids", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("contributions", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("others_are_there", ctypes.c_int64),
    )


class Expert:
    """The three matrices of one expert where they lie: w1 (gate) and w3 (up) [I, H], w2 (down) [H, I]."""

    def __init__(self, record: Tensor, spans: tuple[PartSpan, ...]) -> None:
        """Check the record's parts, and keep it; raise BadPart or BadShape."""
        parts = {span.part.name: (span.part, record[span.offset : span.offset + span.nbytes]) for span in spans}
        if set(parts) != {GATE, DOWN, UP} or len(spans) != 3:
            raise BadShape(f"an expert has the parts w1, w2 and w3; {', '.join(parts)} came")
        self._gate, self._down, self._up = parts[GATE], parts[DOWN], parts[UP]
        self._check_shapes()
        self.hidden_size = self._gate[0].cols
        c_parts = {name: kernels.c_part(part_bytes, part) for name, (part, part_bytes) in parts.items()}
        self._c_expert = _CExpert(c_parts[GATE], c_parts[UP], c_parts[DOWN])

    @property
    def address(self) -> int:
        """Where the library finds what it has to know of this expert, as long as this object lives."""
        return ctypes.addressof(self._c_expert)

    def reference(self, hidden_states: Tensor) -> Tensor:
        """Return the expert's output, f32 [T, H], of hidden_states f32 [T, H], computed by torch in float."""
        (gate, gate_bytes), (down, down_bytes), (up, up_bytes) = self._gate, self._down, self._up
        inner = silu(reference.multiply(hidden_states, gate_bytes, gate))
        inner = inner * reference.multiply(hidden_states, up_bytes, up)  # [T, I]
        return reference.multiply(inner, down_bytes, down)

    def _check_shapes(self) -> None:
        gate, down, up = self._gate[0], self._down[0], self._up[0]
        if (gate.rows, gate.cols) != (up.rows, up.cols) or (gate.rows, gate.cols) != (down.cols, down.rows):
            raise BadShape(f"w1 and w3 [I, H] and w2 [H, I] are expected, {_listed(gate, down, up)} came")


class LayerExperts:
    """The experts of one layer, those that were put here so far; computes with them in one call.

    One call at a time, of one thread, as the workspace demands.
    """

    def __init__(self, n_experts: int, hidden_size: int, *, workspace: Workspace, exact: bool = False) -> None:
        self._experts: list[Expert | None] = [None] * n_experts
        self._addresses = (ctypes.c_void_p * n_experts)()
        self._hidden_size = hidden_size
        self._workspace = workspace
        self._exact = exact
        self._functions = _functions()
        self._choice = _CChoice(ctypes.addressof(self._addresses), n_experts, hidden_size=hidden_size)
        self._choice_address = ctypes.byref(self._choice)

    @property
    def address(self) -> int:
        """Where the library finds the table of its experts, as long as this object lives."""
        return ctypes.addressof(self._addresses)

    @property
    def n_experts(self) -> int:
        """How many the layer has, put here or not."""
        return len(self._experts)

    @property
    def is_exact(self) -> bool:
        """Whether products are computed in float throughout."""
        return self._exact

    def has(self, expert: int) -> bool:
        """Whether that expert was put here; the layer has to have such an expert at all."""
        return self._experts[expert] is not None

    def put(self, expert_id: int, expert: Expert | None) -> None:
        """Compute that expert from now on, or leave it to others again (None); raise BadShape."""
        if expert is not None and expert.hidden_size != self._hidden_size:
            raise BadShape(f"an expert of {self._hidden_size} inputs is expected, one of {expert.hidden_size} came")
        self._experts[expert_id] = expert
        self._addresses[expert_id] = None if expert is None else expert.address

    def forward(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs, f32 [T, H].

        hidden_states f32 [T, H]; expert_ids int64 [T, top_k]; weights f32 [T, top_k]. Contributions are added in the
        order of expert_ids. Raise ExpertMissing, before anything is computed, if one of them was not put here, or
        BadShape. The result is written to `out`, if that is given.
        """
        contributions = torch.empty(*expert_ids.shape, self._hidden_size)
        if self._functions is None:
            if not all(self.has(expert) for expert in set(expert_ids.flatten().tolist())):
                raise ExpertMissing("an expert was chosen that is not here yet")
            self.contribute(hidden_states, expert_ids, contributions)
            total = sum_in_order(contributions, weights)
            return total if out is None else out.copy_(total)
        _check("weights", weights, torch.float32, expert_ids.shape)
        out = torch.empty(expert_ids.shape[0], self._hidden_size) if out is None else out
        self._call(self._functions, hidden_states, expert_ids, contributions, weights=weights, out=out)
        return out

    def contribute(self, hidden_states: Tensor, expert_ids: Tensor, contributions: Tensor) -> None:
        """Write what the experts that were put here return into their places of contributions, f32 [T, top_k, H].

        The places of other experts are left as they are. hidden_states f32 [T, H]; expert_ids int64 [T, top_k].
        """
        if self._functions is None:
            self._contribute_by_reference(hidden_states, expert_ids, contributions)
        else:
            self._call(self._functions, hidden_states, expert_ids, contributions)

    def finish(
        self, hidden_states: Tensor, expert_ids: Tensor, contributions: Tensor, weights: Tensor, out: Tensor
    ) -> None:
        """Contribute what is here, where all others have contributed before; write the weighted sum to out, f32 [T, H].

        It is what `forward` returns, bit for bit.
        """
        if self._functions is None:
            self.contribute(hidden_states, expert_ids, contributions)
            out.copy_(sum_in_order(contributions, weights))
            return
        _check("weights", weights, torch.float32, expert_ids.shape)
        self._choice.others_are_there = True
        try:
            self._call(self._functions, hidden_states, expert_ids, contributions, weights=weights, out=out)
        finally:
            self._choice.others_are_there = False

    def _call(
        self,
        functions: ctypes.CDLL,
        hidden_states: Tensor,
        expert_ids: Tensor,
        contributions: Tensor,
        *,
        weights: Tensor | None = None,
        out: Tensor | None = None,
    ) -> None:
        n_tokens, top_k = expert_ids.shape
        _check("hidden_states", hidden_states, torch.float32, (n_tokens, self._hidden_size))
        _check("expert_ids", expert_ids, torch.int64, expert_ids.shape)
        _check("contributions", contributions, torch.float32, (n_tokens, top_k, self._hidden_size))
        if out is not None:
            _check("out", out, torch.float32, (n_tokens, self._hidden_size))
        choice = self._choice
        choice.n_tokens, choice.top_k = n_tokens, top_k
        choice.hidden_states = hidden_states.data_ptr()
        choice.expert_ids = expert_ids.data_ptr()
        choice.weights = None if weights is None else weights.data_ptr()
        choice.contributions = contributions.data_ptr()
        choice.out = None if out is None else out.data_ptr()
        status = functions.expertd_compute_experts(self._workspace.address, self._choice_address, self._exact)
        if status:
            check_status(status, "experts")

    def _contribute_by_reference(self, hidden_states: Tensor, expert_ids: Tensor, contributions: Tensor) -> None:
        for expert_id in sorted(set(expert_ids.flatten().tolist())):
            expert = self._experts[expert_id]
            if expert is not None:
                tokens, places = (expert_ids == expert_id).nonzero(as_tuple=True)
                contributions[tokens, places] = expert.reference(hidden_states[tokens])


def sum_in_order(contributions: Tensor, weights: Tensor) -> Tensor:
    """Return the sum over k of contributions [T, k, H] by weights [T, k], added in the order of k: [T, H]."""
    weighted = contributions * weights.unsqueeze(-1)
    total = weighted[:, 0]
    for place in range(1, weighted.shape[1]):
        total = total + weighted[:, place]
    return total


def _functions() -> ctypes.CDLL | None:
    loaded = library()
    return None if loaded is None else _typed(loaded)


# Types are the library's for as long as it is loaded; without them every call would convert its arguments by guessing.
@functools.cache
def _typed(loaded: ctypes.CDLL) -> ctypes.CDLL:
    loaded.expertd_compute_experts.argtypes = (ctypes.c_void_p, ctypes.POINTER(_CChoice), ctypes.c_int64)
    return loaded


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        came = f"{tensor.dtype} {list(tensor.shape)}"
        raise BadShape(f"{name}: contiguous {dtype} {list(shape)} is expected, {came} came")


def _listed(*parts: Part) -> str:
    return ", ".join(f"{part.name} [{part.rows}, {part.cols}]" for part in parts)
