"""Attention over a random kv_cache, computed in one call or in pieces; and the same in float64, one query at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.layer import KEY_BLOCK, Attention
from quant.workspace import Workspace

LAYER, N_LAYERS = 1, 2


@dataclass(frozen=True)
class Shape:
    n_heads: int = 8
    n_kv_heads: int = 2
    head_dim: int = 32
    start: int = 0
    n_tokens: int = 1
    window: int | None = None
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Case:
    """keys and values: [N_LAYERS, kv heads, blocks, D, KEY_BLOCK] and [N_LAYERS, kv heads, context, D]."""

    shape: Shape
    past: tuple[Tensor, Tensor]
    angles: tuple[Tensor, Tensor]  # both [T, D / 2]
    queries: Tensor  # [T, heads * D]
    keys: Tensor  # [T, kv heads * D]
    values: Tensor  # [T, kv heads * D]


def make_case(shape: Shape, seed: int = 0) -> Case:
    """Return a case whose cache holds numbers up to `start`, and NaN behind them."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    n_blocks = -(-(shape.start + shape.n_tokens) // KEY_BLOCK) + 1
    past = gaussian(2, N_LAYERS, shape.n_kv_heads, n_blocks * KEY_BLOCK, shape.head_dim)
    past[..., shape.start :, :] = torch.nan
    by_block = past[0].view(N_LAYERS, shape.n_kv_heads, n_blocks, KEY_BLOCK, shape.head_dim)
    angles = gaussian(shape.n_tokens, shape.head_dim // 2) * 10
    kv_size = shape.n_kv_heads * shape.head_dim
    return Case(
        shape,
        (by_block.transpose(3, 4).contiguous().to(shape.dtype), past[1].to(shape.dtype)),
        (angles.cos(), angles.sin()),
        gaussian(shape.n_tokens, shape.n_heads * shape.head_dim) * 2,
        gaussian(shape.n_tokens, kv_size),
        gaussian(shape.n_tokens, kv_size),
    )


def attend(case: Case, *, n_threads: int = 1, pieces: Sequence[int] | None = None) -> Tensor:
    """Return the attention of all tokens, [T, heads * D], computed piece by piece; the cache is left as it was."""
    return attend_and_cache(case, n_threads=n_threads, pieces=pieces)[0]


def attend_and_cache(
    case: Case, *, n_threads: int = 1, pieces: Sequence[int] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the attention as attend does, and the kv_cache behind it."""
    shape, past = case.shape, (case.past[0].clone(), case.past[1].clone())
    out = torch.full_like(case.queries, 7.0)
    first = 0
    with Workspace(n_threads) as workspace:
        for n_tokens in pieces or [shape.n_tokens]:
            rows = slice(first, first + n_tokens)
            attention = Attention(
                past,
                (case.angles[0][rows], case.angles[1][rows]),
                n_heads=shape.n_heads,
                window=shape.window,
                start=shape.start + first,
                rows=rows,
                n_rows=shape.n_tokens,
                workspace=workspace,
            )
            attention(LAYER, case.queries, case.keys, case.values, out=out)
            first += n_tokens
    return out, past


def keys_of(past: tuple[Tensor, Tensor], layer: int = LAYER) -> Tensor:
    """Return a layer's keys in the order of their positions, [kv heads, context, D]."""
    return past[0][layer].transpose(2, 3).flatten(1, 2)


def expected(case: Case) -> Tensor:
    """Return what attend should, computed in float64 from the rounded numbers in the cache: f64 [T, heads * D]."""
    shape = case.shape
    cosines, sines = (table.double() for table in case.angles)
    past = attend_and_cache(case)[1]
    keys, values = keys_of(past).double(), past[1][LAYER].double()
    queries = case.queries.double().view(shape.n_tokens, shape.n_heads, 2, -1)
    group = shape.n_heads // shape.n_kv_heads
    rows = []
    for token in range(shape.n_tokens):
        left, right = queries[token, :, 0], queries[token, :, 1]  # both [heads, D / 2]
        cosine, sine = cosines[token], sines[token]
        turned = torch.cat((left * cosine - right * sine, right * cosine + left * sine), -1)  # [heads, D]
        last = shape.start + token
        seen = slice(0 if shape.window is None else max(0, last - shape.window + 1), last + 1)
        for head in range(shape.n_heads):
            scores = keys[head // group, seen] @ turned[head] / shape.head_dim**0.5
            rows.append(scores.softmax(0) @ values[head // group, seen])
    return torch.cat(rows).view_as(case.queries)


def changed(case: Case, **tensors: Tensor) -> Case:
    """Return the case with other queries, keys or values."""
    return Case(
        case.shape,
        case.past,
        case.angles,
        tensors.get("queries", case.queries),
        tensors.get("keys", case.keys),
        tensors.get("values", case.values),
    )
