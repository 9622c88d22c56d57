"""All of a layer before its experts, in one call to the C library: norm, attention, norm, the choice of experts.

Step by step, which is also what runs where the library was not built:

    hidden_states += added                      what the layer before left to be added
    normed = norm(hidden_states)
    queries, keys, values = projections of normed
    hidden_states += o_proj(attention(queries, keys, values))
    normed = norm(hidden_states)
    expert_ids, expert_weights = the gate's choice for normed

The bits are the same; one call instead of seven spares a token most of its time in the interpreter.

Letters: T tokens of the step, H hidden size.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.errors import BadShape
from quant.kernels import CPart, c_part
from quant.layer import Attention, choose_experts, rms_norm
from quant.library import check_status, library
from quant.linear import Linear, LinearGroup
from quant.part_bytes import check_floats
from quant.workspace import Workspace


class _CSegment(ctypes.Structure):
    """struct expertd_segment of csrc/layer.h."""

    _fields_ = (
        ("input_norm", ctypes.c_void_p),
        ("post_attention_norm", ctypes.c_void_p),
        ("hidden_size", ctypes.c_int64),
        ("q_proj", CPart),
        ("k_proj", CPart),
        ("v_proj", CPart),
        ("o_proj", CPart),
        ("gate", CPart),
        ("layer", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("is_exact", ctypes.c_int64),
        ("eps", ctypes.c_float),
    )


class CStep(ctypes.Structure):
    """struct expertd_step of csrc/layer.h."""

    _fields_ = (
        ("n_tokens", ctypes.c_int64),
        ("hidden_states", ctypes.c_void_p),
        ("added", ctypes.c_void_p),
        ("normed", ctypes.c_void_p),
        ("projected", ctypes.c_void_p),
        ("queries", ctypes.c_void_p),
        ("attended", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("gate_logits", ctypes.c_void_p),
        ("expert_ids", ctypes.c_void_p),
        ("expert_weights", ctypes.c_void_p),
        ("attentions", ctypes.c_void_p),
        ("n_attentions", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True)
class SegmentWeights:
    """The weights of one layer before its experts; norms are f32 [H]."""

    input_norm: Tensor
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    post_attention_norm: Tensor
    gate: Linear


class Step:
    """What the layers of one step share: hidden_states f32 [T, H], which every layer adds to, and the arrays between.

    `added` f32 [T, H] is what was not added to hidden_states yet; a segment adds it and leaves None.
    """

    def __init__(self, hidden_states: Tensor, attentions: Sequence[Attention], like: "AttentionSegment") -> None:
        """Make the arrays, as long as that segment and all that are alike need them; raise BadShape."""
        n_tokens = hidden_states.shape[0]
        weights = like.weights
        check_floats("hidden_states", hidden_states, (n_tokens, weights.o_proj.part.rows))
        self.hidden_states = hidden_states
        self.added: Tensor | None = None
        self.normed, self._projected = torch.empty_like(hidden_states), torch.empty_like(hidden_states)
        self._queries = torch.empty(n_tokens, weights.q_proj.part.rows)
        self._attended = torch.empty_like(self._queries)
        self._keys = torch.empty(n_tokens, weights.k_proj.part.rows)
        self._values = torch.empty(n_tokens, weights.v_proj.part.rows)
        self._gate_logits = torch.empty(n_tokens, weights.gate.part.rows)
        self.expert_ids = torch.empty(n_tokens, like.top_k, dtype=torch.int64)
        self.expert_weights = torch.empty(n_tokens, like.top_k)
        self.attentions = attentions
        for attention in attentions:
            if (attention.queries_shape, attention.keys_shape) != (self._queries.shape, self._keys.shape):
                raise BadShape(
                    f"queries {list(self._queries.shape)} and keys {list(self._keys.shape)} do not fit an attention of "
                    f"{list(attention.queries_shape)} and {list(attention.keys_shape)}"
                )
        addresses = [attention.address for attention in attentions]
        self._addresses = (ctypes.c_void_p * len(addresses))(*addresses)
        self._c_step = CStep(
            n_tokens=n_tokens,
            hidden_states=hidden_states.data_ptr(),
            normed=self.normed.data_ptr(),
            projected=self._projected.data_ptr(),
            queries=self._queries.data_ptr(),
            attended=self._attended.data_ptr(),
            keys=self._keys.data_ptr(),
            values=self._values.data_ptr(),
            gate_logits=self._gate_logits.data_ptr(),
            expert_ids=self.expert_ids.data_ptr(),
            expert_weights=self.expert_weights.data_ptr(),
            attentions=ctypes.addressof(self._addresses),
            n_attentions=len(addresses),
        )

    def c_step(self) -> ctypes.Structure:
        """Return what the library takes; raise BadShape if `added` does not fit."""
        if self.added is None:
            self._c_step.added = None
        else:
            check_floats("added", self.added, tuple(self.hidden_states.shape))
            self._c_step.added = self.added.data_ptr()
        return self._c_step


class AttentionSegment:
    """One layer before its experts, over its weights."""

    def __init__(
        self,
        weights: SegmentWeights,
        *,
        layer: int,
        top_k: int,
        eps: float,
        workspace: Workspace,
    ) -> None:
        """Keep the weights; raise BadShape if they do not fit together."""
        self.weights, self.top_k = weights, top_k
        self._layer, self._eps, self._workspace = layer, eps, workspace
        self._qkv_proj = LinearGroup([weights.q_proj, weights.k_proj, weights.v_proj])
        hidden_size = weights.o_proj.part.rows
        for name, norm in (("input_norm", weights.input_norm), ("post_attention_norm", weights.post_attention_norm)):
            check_floats(name, norm, (hidden_size,))
        self._c_segment = _CSegment(
            input_norm=weights.input_norm.data_ptr(),
            post_attention_norm=weights.post_attention_norm.data_ptr(),
            hidden_size=hidden_size,
            q_proj=_c_part(weights.q_proj),
            k_proj=_c_part(weights.k_proj),
            v_proj=_c_part(weights.v_proj),
            o_proj=_c_part(weights.o_proj),
            gate=_c_part(weights.gate),
            layer=layer,
            top_k=top_k,
            is_exact=weights.q_proj.exact,
            eps=eps,
        )
        self._c_address = ctypes.byref(self._c_segment)

    @property
    def address(self) -> int:
        """Where the library finds the segment, as long as this object lives."""
        return ctypes.addressof(self._c_segment)

    @property
    def is_exact(self) -> bool:
        """Whether its products are computed in float throughout."""
        return self.weights.q_proj.exact

    def __call__(self, step: Step) -> None:
        """Compute the segment: update hidden_states, and leave what the experts need in the step."""
        functions = _functions()
        if functions is None:
            self.by_parts(step)
            return
        status = functions.expertd_attention_segment(
            self._workspace.address, self._c_address, ctypes.byref(step.c_step())
        )
        step.added = None
        if status:
            check_status(status, f"the attention of layer {self._layer}")

    def by_parts(self, step: Step) -> None:
        """Do what calling does, one step after another."""
        weights = self.weights
        normed = self._norm(step, weights.input_norm, step.added)
        queries, keys, values = self._qkv_proj(normed)
        attended = torch.empty_like(queries)
        for attention in step.attentions:
            attention(self._layer, queries, keys, values, out=attended)
        step.added = None
        step.normed.copy_(self._norm(step, weights.post_attention_norm, weights.o_proj(attended)))
        expert_ids, expert_weights = choose_experts(weights.gate(step.normed), self.top_k)
        step.expert_ids.copy_(expert_ids)
        step.expert_weights.copy_(expert_weights)

    def _norm(self, step: Step, weight: Tensor, added: Tensor | None) -> Tensor:
        return rms_norm(step.hidden_states, weight, self._eps, workspace=self._workspace, added=added)


def _functions() -> ctypes.CDLL | None:
    loaded = library()
    return None if loaded is None else _typed(loaded)


@functools.cache
def _typed(loaded: ctypes.CDLL) -> ctypes.CDLL:
    loaded.expertd_attention_segment.argtypes = (
        ctypes.c_void_p, ctypes.POINTER(_CSegment), ctypes.POINTER(CStep),
    )  # fmt: skip
    return loaded


def _c_part(linear: Linear) -> CPart:
    return c_part(linear.part_bytes, linear.part)
