"""A layer beside its products: norms, attention over the kv_cache, the choice of experts. The door to csrc/layer.h.

With the library a token's results are the same bits whatever the number of threads, whichever other tokens are computed
with it, and wherever a prompt was cut in pieces; without it quant.layer_reference computes, and they may differ by
rounding. Shapes and types are checked here, at each call, as the library trusts what it is told of lengths. There are
several calls a layer for every token: what one costs beside its work is kept to some microseconds.

Letters: T tokens, H hidden size, D head_dim.
"""

import ctypes
import functools

import torch
from torch import Tensor

from quant import layer_reference
from quant.errors import BadShape
from quant.layer_reference import KEY_BLOCK
from quant.library import check_status, library
from quant.part_bytes import check_floats
from quant.workspace import Workspace

__all__ = ["KEY_BLOCK", "Attention", "choose_experts", "exponentials", "rms_norm"]


class _CAttention(ctypes.Structure):
    """struct expertd_attention of csrc/layer.h."""

    _fields_ = (
        ("past_keys", ctypes.c_void_p),
        ("past_values", ctypes.c_void_p),
        ("past_nbytes", ctypes.c_int64),
        ("is_fp16", ctypes.c_int64),
        ("n_layers", ctypes.c_int64),
        ("n_kv_heads", ctypes.c_int64),
        ("context", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("n_heads", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("n_tokens", ctypes.c_int64),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("angles_length", ctypes.c_int64),
        ("n_rows", ctypes.c_int64),
        ("first_row", ctypes.c_int64),
        ("layer", ctypes.c_int64),
        ("queries", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    )


def rms_norm(
    hidden_states: Tensor, weight: Tensor, eps: float, *, workspace: Workspace, added: Tensor | None = None
) -> Tensor:
    """Return hidden_states f32 [T, H] over their root mean square, times the weight f32 [H]; raise BadShape.

    `added` f32 [T, H] is added to hidden_states before, in place (Zhang and Sennrich, 2019).
    """
    shape = hidden_states.shape
    check_floats("hidden_states", hidden_states, (shape[0], weight.shape[0]))
    check_floats("weight", weight, (shape[-1],))
    if added is not None:
        check_floats("added", added, shape)
    functions = _functions()
    if functions is None:
        return layer_reference.rms_norm(hidden_states, weight, eps, added=added)
    normed = torch.empty_like(hidden_states)
    status = functions.expertd_rms_norm(
        workspace.address,
        hidden_states.data_ptr(),
        None if added is None else added.data_ptr(),
        weight.data_ptr(),
        shape[1],
        eps,
        normed.data_ptr(),
        normed.numel(),
    )
    if status:
        check_status(status, "a norm")
    return normed


def choose_experts(gate_logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return ids int64 and weights f32, both [T, top_k], of the highest of gate_logits f32 [T, n_experts].

    The highest comes first, of equals the lower id, and a NaN before all; the weights are the softmax over the chosen.
    Raise BadShape.
    """
    n_tokens, n_experts = gate_logits.shape
    check_floats("gate_logits", gate_logits, (n_tokens, n_experts))
    if not 0 < top_k <= n_experts:
        raise BadShape(f"gate_logits: {top_k} experts are to be chosen of {n_experts}")
    functions = _functions()
    if functions is None:
        return layer_reference.choose_experts(gate_logits, top_k)
    expert_ids = torch.empty(n_tokens, top_k, dtype=torch.int64)
    weights = torch.empty(n_tokens, top_k)
    status = functions.expertd_choose_experts(
        gate_logits.data_ptr(), n_tokens, n_experts, top_k, expert_ids.data_ptr(), weights.data_ptr()
    )
    if status:
        check_status(status, "the choice of experts")
    return expert_ids, weights


class Attention:
    """The attention of one sequence's new tokens over its kv_cache: made once a step, called once a layer.

    past       the cache's keys [n_layers, n_kv_heads, n_blocks, D, KEY_BLOCK] and values [n_layers, n_kv_heads,
               n_blocks * KEY_BLOCK, D], both fp16 or f32; the keys of a block of positions lie number by number
    angles     cosines and sines of the new tokens' rotary angles, both f32 [T, D / 2]
    start      the position of the first of the T tokens
    rows       which rows of the step are these tokens'; the step has n_rows
    window     how many keys a query sees at most, its own among them; None: all
    """

    def __init__(
        self,
        past: tuple[Tensor, Tensor],
        angles: tuple[Tensor, Tensor],
        *,
        n_heads: int,
        window: int | None,
        start: int,
        rows: slice,
        n_rows: int,
        workspace: Workspace,
    ) -> None:
        n_tokens = rows.stop - rows.start
        n_layers, n_kv_heads, context, head_dim = _check_past(*past)
        for name, tensor in zip(("cosines", "sines"), angles, strict=True):
            check_floats(name, tensor, (n_tokens, head_dim // 2))
        _check_place(start, rows, n_rows, context)
        if n_heads % n_kv_heads or head_dim % 2 or (window is not None and window < 1):
            raise BadShape(f"{n_heads} heads, {n_kv_heads} kv heads, head_dim {head_dim}, window {window} do not fit")
        # Held, since the library knows addresses only.
        self._past, self._angles = past, angles
        self._start, self._rows, self._window, self._workspace = start, rows, window, workspace
        self.queries_shape = (n_rows, n_heads * head_dim)
        self.keys_shape = (n_rows, n_kv_heads * head_dim)
        self._c_attention = _CAttention(
            past_keys=past[0].data_ptr(),
            past_values=past[1].data_ptr(),
            past_nbytes=past[0].numel() * past[0].element_size(),
            is_fp16=past[0].dtype == torch.float16,
            n_layers=n_layers,
            n_kv_heads=n_kv_heads,
            context=context,
            head_dim=head_dim,
            n_heads=n_heads,
            window=min(window or context, context),
            start=start,
            n_tokens=n_tokens,
            cosines=angles[0].data_ptr(),
            sines=angles[1].data_ptr(),
            angles_length=angles[0].numel(),
            n_rows=n_rows,
            first_row=rows.start,
        )
        self._c_address = ctypes.byref(self._c_attention)

    @property
    def address(self) -> int:
        """Where the library finds what it has to know of this attention, as long as this object lives."""
        return ctypes.addressof(self._c_attention)

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, out: Tensor) -> None:
        """Put the new keys and values into that layer's cache and write the attention into these rows of `out`.

        All are f32: queries and out [n_rows, n_heads * D], keys and values [n_rows, n_kv_heads * D]. Raise BadShape.
        """
        check_floats("queries", queries, self.queries_shape)
        check_floats("keys", keys, self.keys_shape)
        check_floats("values", values, self.keys_shape)
        check_floats("out", out, self.queries_shape)
        functions = _functions()
        if functions is None:
            past = (self._past[0][layer], self._past[1][layer])
            new = (queries[self._rows], keys[self._rows], values[self._rows])
            out[self._rows] = layer_reference.attend(past, self._start, self._window, self._angles, new)
            return
        c_attention = self._c_attention
        c_attention.layer = layer
        c_attention.queries = queries.data_ptr()
        c_attention.keys = keys.data_ptr()
        c_attention.values = values.data_ptr()
        c_attention.out = out.data_ptr()
        status = functions.expertd_attend(self._workspace.address, self._c_address)
        if status:
            check_status(status, f"the attention of layer {layer}")


def exponentials(x: Tensor) -> Tensor:
    """Return e^x of x f32, of the same shape: what every softmax and SwiGLU computes with. Raise BadShape."""
    check_floats("x", x, x.shape)
    functions = _functions()
    if functions is None:
        return x.exp()
    out = torch.empty_like(x)
    check_status(functions.expertd_exponentials(x.data_ptr(), out.data_ptr(), x.numel()), "exponentials")
    return out


def _functions() -> ctypes.CDLL | None:
    loaded = library()
    return None if loaded is None else _typed(loaded)


# Types are the library's for as long as it is loaded; without them every call would convert its arguments by guessing.
@functools.cache
def _typed(loaded: ctypes.CDLL) -> ctypes.CDLL:
    address, count = ctypes.c_void_p, ctypes.c_int64
    loaded.expertd_rms_norm.argtypes = (
        address, address, address, address, count, ctypes.c_float, address, count,
    )  # fmt: skip
    loaded.expertd_choose_experts.argtypes = (address, count, count, count, address, address)
    loaded.expertd_attend.argtypes = (address, ctypes.POINTER(_CAttention))
    loaded.expertd_exponentials.argtypes = (address, address, count)
    return loaded


def _check_past(keys: Tensor, values: Tensor) -> torch.Size:
    """Return the values' shape."""
    is_known = values.dtype in (torch.float16, torch.float32) and keys.dtype == values.dtype and values.dim() == 4
    if is_known and keys.is_contiguous() and values.is_contiguous():
        n_layers, n_kv_heads, context, head_dim = values.shape
        if keys.shape == (n_layers, n_kv_heads, context // KEY_BLOCK, head_dim, KEY_BLOCK) and not context % KEY_BLOCK:
            return values.shape
    raise BadShape(
        f"kv_cache: contiguous keys [n_layers, n_kv_heads, n_blocks, D, {KEY_BLOCK}] and values [n_layers, n_kv_heads, "
        f"n_blocks * {KEY_BLOCK}, D] are expected, both float16 or float32; "
        f"{keys.dtype} {list(keys.shape)} and {values.dtype} {list(values.shape)} came"
    )


def _check_place(start: int, rows: slice, n_rows: int, context: int) -> None:
    if not 0 <= rows.start < rows.stop <= n_rows:
        raise BadShape(f"rows {rows.start} to {rows.stop} are not among the step's {n_rows}")
    if not 0 <= start <= context - (rows.stop - rows.start):
        raise BadShape(f"{rows.stop - rows.start} tokens from position {start} on do not fit into {context}")
