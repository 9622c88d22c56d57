"""Attention over a kv_cache in a device's memory, by torch: keys and values lie position by position.

Queries are computed some tokens at a time, so that what lies between scores and results is bounded. The query heads of
one kv head, of all those tokens, are rows of one product: nothing is expanded. Work is queued on the current stream;
nobody blocks. Letters:

T   tokens      D   head_dim      C   context      G   query heads a kv head      S   keys that some query sees
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quant.layer_reference import rotate

# Tokens whose queries are computed at once.
TILE_TOKENS = 32


def attend(
    past: tuple[Tensor, Tensor], start: int, window: int | None, angles: tuple[Tensor, Tensor], new: tuple[Tensor, ...]
) -> Tensor:
    """Put a sequence's new keys and values into its cache; return its queries' attention, [T, heads * D].

    past     one layer's keys and values, both [n_kv_heads, C, D], fp16 or f32; the result has their type
    start    the position of the first of the T tokens
    window   how many keys a query sees at most, its own among them; None: all
    angles   cosines and sines, both f32 [T, D / 2]
    new      queries f32 [T, heads * D], keys and values f32 [T, n_kv_heads * D]
    """
    past_keys, past_values = past
    n_kv_heads, _, head_dim = past_keys.shape
    n_tokens = new[0].shape[0]
    queries, keys, values = (projected.view(n_tokens, -1, head_dim) for projected in new)
    past_keys[:, start : start + n_tokens] = rotate(keys, *angles).transpose(0, 1)
    past_values[:, start : start + n_tokens] = values.transpose(0, 1)
    turned = rotate(queries, *angles).to(past_keys.dtype)
    grouped = turned.view(n_tokens, n_kv_heads, -1, head_dim)  # [T, kv heads, G, D]
    attended = torch.empty_like(grouped)
    for first in range(0, n_tokens, TILE_TOKENS):
        tile = slice(first, min(first + TILE_TOKENS, n_tokens))
        _attend_tile(past, grouped[tile], start + first, window, out=attended[tile])
    return attended.view(n_tokens, -1)


def _attend_tile(
    past: tuple[Tensor, Tensor], queries: Tensor, first_query: int, window: int | None, *, out: Tensor
) -> None:
    """Write the attention of queries [n, kv heads, G, D], from position first_query on, into out."""
    n_tokens, n_kv_heads, n_grouped, head_dim = queries.shape
    end = first_query + n_tokens
    first_key = max(0, first_query + 1 - (window or end))
    keys, values = (plane[:, first_key:end].unsqueeze(0) for plane in past)  # [1, kv heads, S, D]
    rows = queries.permute(1, 2, 0, 3).reshape(1, n_kv_heads, n_grouped * n_tokens, head_dim)
    mask = None
    if n_tokens > 1:
        mask = _visible(first_query, first_key, end, window or end, queries.device).repeat(n_grouped, 1)  # [G * n, S]
    attended = scaled_dot_product_attention(rows, keys, values, attn_mask=mask)
    out.copy_(attended.view(n_kv_heads, n_grouped, n_tokens, head_dim).permute(2, 0, 1, 3))


def _visible(first_query: int, first_key: int, end: int, window: int, device: torch.device) -> Tensor:
    """Return which of the keys first_key..end-1 the queries first_query..end-1 see: those with 0 <= q - k < window."""
    queries = torch.arange(first_query, end, device=device).unsqueeze(1)
    distance = queries - torch.arange(first_key, end, device=device)
    return (distance >= 0) & (distance < window)
