"""Kernels that multiply up to eight tokens with the bytes of parts; one of them makes the first half of a SwiGLU.

A program computes 8 output rows (a panel) for up to 4 tokens; its threads share the inputs, and their sums meet once,
after the loop. No atomics, no order that depends on timing: the same inputs give the same bits. All sums are float32,
and a token's does not depend on how many tokens there are.

Within a group Σ w x = scale_step * (s * Σ (q - center) x + base * Σ x); scale_step is a row's own factor and is
multiplied in at the end.

Tokens are tuples, unrolled: kernels come for 1, 2 and 4 tokens; a last token stands in for those that are missing, and
is stored once. More than 4 tokens are programs next to each other, the later of which finds the weights in the cache:
8 at once would not leave enough registers.

Importing it needs triton. Nobody blocks in here.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from quant.device_parts import PartOnDevice
from quant.triton_codes import (
    ROWS,
    UNITS,
    code_of,
    float_of,
    group_codes,
    load_vectors,
    nbits_of,
    panel_words,
    quad_bit,
    quad_words,
    row_values,
    unit_cols_of,
)


class TokensOnDevice(NamedTuple):
    """Rows of activations, or of results, as kernels take them."""

    data: Tensor
    stride: int
    n_tokens: int


# Numbers are not specialized: one kernel serves every shape, and what a small shape has compiled a large one uses. What
# the compiler has to know of alignment, it is told where addresses are made.
_PART = PartOnDevice._fields
_TOKENS = ("x", "x_stride", "out", "out_stride", "n_tokens")


@triton.jit(do_not_specialize=(*_PART, *_TOKENS))
def multiply_kernel(
    part_bytes: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    row_plane_nbytes: tl.tensor,
    panel_nbytes: tl.tensor,
    x: tl.tensor,
    x_stride: tl.tensor,
    out: tl.tensor,
    out_stride: tl.tensor,
    n_tokens: tl.tensor,
    SCHEME: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """Store x · Wᵀ [T, rows] of x [T, cols]; a program for 8 rows of TOKENS tokens."""
    part = PartOnDevice(part_bytes, rows, cols, row_plane_nbytes, panel_nbytes)
    panel, first_token = _place(n_tokens, TOKENS)
    sums = _product(part, panel, TokensOnDevice(x, x_stride, n_tokens), first_token, SCHEME, TOKENS)
    _store(TokensOnDevice(out, out_stride, n_tokens), panel, rows, first_token, sums, TOKENS)


@triton.jit(do_not_specialize=("gate_bytes", "up_bytes", *_PART[1:], *_TOKENS))
def gate_up_kernel(
    gate_bytes: tl.tensor,
    up_bytes: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    row_plane_nbytes: tl.tensor,
    panel_nbytes: tl.tensor,
    x: tl.tensor,
    x_stride: tl.tensor,
    out: tl.tensor,
    out_stride: tl.tensor,
    n_tokens: tl.tensor,
    SCHEME: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """Store silu(gate · x) * (up · x), [T, rows], of x [T, cols]; a program for 8 rows of both and TOKENS tokens.

    Both have the same shape and scheme.
    """
    gate = PartOnDevice(gate_bytes, rows, cols, row_plane_nbytes, panel_nbytes)
    up = PartOnDevice(up_bytes, rows, cols, row_plane_nbytes, panel_nbytes)
    panel, first_token = _place(n_tokens, TOKENS)
    tokens = TokensOnDevice(x, x_stride, n_tokens)
    gates = _product(gate, panel, tokens, first_token, SCHEME, TOKENS)
    ups = _product(up, panel, tokens, first_token, SCHEME, TOKENS)
    inner = ()
    for t in tl.static_range(TOKENS):
        inner = inner + (gates[t] / (1 + tl.exp(-gates[t])) * ups[t],)
    _store(TokensOnDevice(out, out_stride, n_tokens), panel, rows, first_token, inner, TOKENS)


@triton.jit
def _place(n_tokens: tl.tensor, TOKENS: tl.constexpr) -> tl.tuple:
    # The programs of a panel are neighbours.
    n_groups = tl.cdiv(n_tokens, TOKENS)
    program = tl.program_id(0)
    return program // n_groups, program % n_groups * TOKENS


@triton.jit
def _product(
    part: PartOnDevice,
    panel: tl.tensor,
    x: TokensOnDevice,
    first_token: tl.tensor,
    SCHEME: tl.constexpr,
    TOKENS: tl.constexpr,
) -> tl.tuple:
    # The products of a panel's rows, f32 [8] for each token.
    if nbits_of(SCHEME) == 16:
        return _product_of_rows(part, panel, x, first_token, SCHEME, TOKENS)
    else:
        return _product_of_panel(part, panel, x, first_token, SCHEME, TOKENS)


@triton.jit
def _product_of_panel(
    part: PartOnDevice,
    panel: tl.tensor,
    x: TokensOnDevice,
    first_token: tl.tensor,
    SCHEME: tl.constexpr,
    TOKENS: tl.constexpr,
) -> tl.tuple:
    QUADS: tl.constexpr = unit_cols_of(SCHEME) // 4
    NBITS: tl.constexpr = nbits_of(SCHEME)
    CENTER: tl.constexpr = 128 if NBITS == 8 else 0
    panel_at = panel_words(part, panel)
    scale_step, base_min, base_step = row_values(part, panel)
    n_units = part.cols // unit_cols_of(SCHEME)
    sums = _zeros(TOKENS)
    for start in range(0, n_units, UNITS):
        unit = start + tl.arange(0, UNITS)
        mask = unit < n_units
        vectors = load_vectors(panel_at, unit, mask, SCHEME)
        scale, base = group_codes(panel_at, unit, mask, SCHEME)
        base = tl.fma(base, base_step[None, :], base_min[None, :])
        partials = _zeros(TOKENS)
        x_sums = (tl.zeros([UNITS], tl.float32),) * TOKENS
        for quad in tl.static_range(QUADS):
            words = quad_words(vectors, quad, SCHEME)
            x_words = _load_quads(x, first_token, unit * QUADS + quad, mask, TOKENS)
            for place in tl.static_range(4):
                code = code_of(words, 8 * place + quad_bit(quad, SCHEME), NBITS, CENTER)
                floats = _floats(x_words, place, x.data.dtype.element_ty, TOKENS)
                partials = _add_products(partials, code, floats, TOKENS)
                x_sums = _add(x_sums, floats, TOKENS)
        added = ()
        for t in tl.static_range(TOKENS):
            with_codes = tl.fma(scale, partials[t], sums[t])
            added = added + (tl.fma(base, x_sums[t][:, None], with_codes),)
        sums = added
    return _reduced(sums, scale_step, TOKENS)


@triton.jit
def _product_of_rows(
    part: PartOnDevice,
    panel: tl.tensor,
    x: TokensOnDevice,
    first_token: tl.tensor,
    SCHEME: tl.constexpr,
    TOKENS: tl.constexpr,
) -> tl.tuple:
    WEIGHT: tl.constexpr = tl.bfloat16 if SCHEME == "bf16" else tl.float16
    # Rows that the last panel does not have are the last row over again.
    row = tl.minimum(panel * ROWS + tl.arange(0, ROWS), part.rows - 1)
    # The launcher has checked that there are pairs of quads: loads of 16 bytes.
    n_quads = part.cols // 8 * 2
    first = part.part_bytes.to(tl.pointer_type(tl.uint64))
    row_at = tl.multiple_of(first + row.to(tl.int64) * n_quads, 16)
    sums = _zeros(TOKENS)
    for start in range(0, n_quads, UNITS):
        quad = start + tl.arange(0, UNITS)
        mask = quad < n_quads
        words = tl.load(row_at[None, :] + quad[:, None], mask[:, None], other=0)
        x_words = _load_quads(x, first_token, quad, mask, TOKENS)
        for place in tl.static_range(4):
            weight = float_of(words, place, WEIGHT)
            floats = _floats(x_words, place, x.data.dtype.element_ty, TOKENS)
            sums = _add_products(sums, weight, floats, TOKENS)
    return _reduced(sums, 1.0, TOKENS)


@triton.jit
def _load_quads(
    x: TokensOnDevice, first_token: tl.tensor, quad: tl.tensor, mask: tl.tensor, TOKENS: tl.constexpr
) -> tl.tuple:
    # Four activations a word, u64 [U] for each token.
    first = x.data.to(tl.pointer_type(tl.uint64))
    words = ()
    for t in tl.static_range(TOKENS):
        token = tl.minimum(first_token + t, x.n_tokens - 1)
        token_at = tl.multiple_of(first + token.to(tl.int64) * (x.stride // 4), 16)
        words = words + (tl.load(token_at + quad, mask, other=0),)
    return words


@triton.jit
def _floats(words: tl.tuple, PLACE: tl.constexpr, DTYPE: tl.constexpr, TOKENS: tl.constexpr) -> tl.tuple:
    floats = ()
    for t in tl.static_range(TOKENS):
        floats = floats + (float_of(words[t], PLACE, DTYPE),)
    return floats


@triton.jit
def _add_products(sums: tl.tuple, weight: tl.tensor, floats: tl.tuple, TOKENS: tl.constexpr) -> tl.tuple:
    added = ()
    for t in tl.static_range(TOKENS):
        added = added + (tl.fma(weight, floats[t][:, None], sums[t]),)
    return added


@triton.jit
def _add(sums: tl.tuple, floats: tl.tuple, TOKENS: tl.constexpr) -> tl.tuple:
    added = ()
    for t in tl.static_range(TOKENS):
        added = added + (sums[t] + floats[t],)
    return added


@triton.jit
def _reduced(sums: tl.tuple, factor: tl.tensor, TOKENS: tl.constexpr) -> tl.tuple:
    reduced = ()
    for t in tl.static_range(TOKENS):
        reduced = reduced + (tl.sum(sums[t], axis=0) * factor,)
    return reduced


@triton.jit
def _store(
    out: TokensOnDevice,
    panel: tl.tensor,
    rows: tl.tensor,
    first_token: tl.tensor,
    values: tl.tuple,
    TOKENS: tl.constexpr,
) -> None:
    row = panel * ROWS + tl.arange(0, ROWS)
    for t in tl.static_range(TOKENS):
        token = first_token + t
        place = out.data + token.to(tl.int64) * out.stride + row
        tl.store(place, values[t].to(out.data.dtype.element_ty), (row < rows) & (token < out.n_tokens))


@triton.jit
def _zeros(TOKENS: tl.constexpr) -> tl.tuple:
    return (tl.zeros([UNITS, ROWS], tl.float32),) * TOKENS
