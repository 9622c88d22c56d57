"""Which experts a later layer is likely to choose: its own norm and gate, on states that are not its own yet.

One call to the C library; without it, step by step. (Eliseev and Mazur, arXiv 2312.17238, section 3.2.)

Letters: T tokens, H hidden size.
"""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from quant.errors import BadShape
from quant.kernels import CPart, c_part
from quant.layer import choose_experts, rms_norm
from quant.library import check_status, library
from quant.linear import Linear
from quant.part_bytes import check_floats
from quant.workspace import Workspace


class _CForesight(ctypes.Structure):
    """struct expertd_foresight of csrc/layer.h."""

    _fields_ = (
        ("norm", ctypes.c_void_p),
        ("hidden_size", ctypes.c_int64),
        ("gate", CPart),
        ("n_guessed", ctypes.c_int64),
        ("n_tokens_max", ctypes.c_int64),
        ("normed", ctypes.c_void_p),
        ("gate_logits", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("is_exact", ctypes.c_int64),
        ("eps", ctypes.c_float),
    )


class Foresight:
    """One layer's norm and gate, for up to n_tokens_max tokens. One call at a time, as the workspace demands.

    With a margin, what is guessed has to lie so far above the best expert that is not, in the gate's logits; in the
    place of one that does not stands the likeliest again.
    """

    def __init__(
        self,
        norm: Tensor,
        gate: Linear,
        *,
        eps: float,
        n_guessed: int,
        n_tokens_max: int,
        workspace: Workspace,
        margin: float = 0.0,
    ) -> None:
        """Keep norm f32 [H] and the gate's bytes; raise BadShape if they do not fit together."""
        hidden_size, n_experts = gate.part.cols, gate.part.rows
        check_floats("norm", norm, (hidden_size,))
        if not 1 <= n_guessed <= n_experts:
            raise BadShape(f"1 to {n_experts} experts can be guessed, not {n_guessed}")
        self._norm, self._eps = norm, eps
        self._gate = Linear(gate.part, gate.part_bytes, workspace=workspace, exact=gate.exact)
        self._n_guessed, self._n_tokens_max = n_guessed, n_tokens_max
        self._margin = margin if n_guessed < n_experts else 0.0
        self._workspace = workspace
        self._scratch = [torch.empty(n_tokens_max, width) for width in (hidden_size, n_experts, n_guessed)]
        normed, gate_logits, weights = (tensor.data_ptr() for tensor in self._scratch)
        self._c_foresight = _CForesight(
            norm=norm.data_ptr(),
            hidden_size=hidden_size,
            gate=c_part(gate.part_bytes, gate.part),
            n_guessed=n_guessed,
            n_tokens_max=n_tokens_max,
            normed=normed,
            gate_logits=gate_logits,
            weights=weights,
            is_exact=gate.exact,
            eps=eps,
        )
        self._c_address = ctypes.byref(self._c_foresight)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Return the likeliest experts first, int64 [T, n_guessed], for states f32 [T, H]; raise BadShape."""
        n_tokens = hidden_states.shape[0]
        check_floats("hidden_states", hidden_states, (n_tokens, self._norm.shape[0]))
        if n_tokens > self._n_tokens_max:
            raise BadShape(f"up to {self._n_tokens_max} tokens are expected, {n_tokens} came")
        foresee = _foresee()
        if foresee is None:
            return self.by_parts(hidden_states)
        expert_ids = torch.empty(n_tokens, self._n_guessed, dtype=torch.int64)
        status = foresee(
            self._workspace.address, self._c_address, hidden_states.data_ptr(), n_tokens, expert_ids.data_ptr()
        )
        if status:
            check_status(status, "what is foreseen")
        return self._sure(expert_ids, self._scratch[1][:n_tokens])

    def by_parts(self, hidden_states: Tensor) -> Tensor:
        """Do what calling does, one step after another."""
        normed = rms_norm(hidden_states, self._norm, self._eps, workspace=self._workspace)
        gate_logits = self._gate(normed)
        return self._sure(choose_experts(gate_logits, self._n_guessed)[0], gate_logits)

    def _sure(self, expert_ids: Tensor, gate_logits: Tensor) -> Tensor:
        if not self._margin:
            return expert_ids
        rows: list[list[int]] = expert_ids.tolist()
        for ids, logits in zip(rows, gate_logits.tolist(), strict=True):
            least = self._margin + max(logit for expert, logit in enumerate(logits) if expert not in ids)
            ids[1:] = [expert if logits[expert] >= least else ids[0] for expert in ids[1:]]
        return torch.tensor(rows)


# How the library is called while the interpreter's lock is held, as by no other function: that lock would take longer
# to get back, while others compute, than the few microseconds the call takes.
_PROTOTYPE = ctypes.PYFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(_CForesight), ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p
)


def _foresee() -> Callable[..., int] | None:
    loaded = library()
    return None if loaded is None else _typed(loaded)


@functools.cache
def _typed(loaded: ctypes.CDLL) -> Callable[..., int]:
    return _PROTOTYPE(("expertd_foresee_experts", loaded))
