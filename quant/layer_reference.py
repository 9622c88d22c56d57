"""What a layer computes beside its products, in torch: the reference of csrc/layer.h, and what computes without it.

Owns the formulas, not the speed. All arithmetic is float32. Letters:

T   tokens      H   hidden size      D   head_dim      G   query heads a kv head      S   keys that some query sees
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Of positions: the keys of a block lie number by number, so that one vector holds the same number of several keys.
# EXPERTD_KEY_BLOCK of csrc/layer.h.
KEY_BLOCK = 32


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float, *, added: Tensor | None = None) -> Tensor:
    """Return hidden_states [T, H] over their root mean square, times the weight [H] (Zhang and Sennrich, 2019).

    `added` [T, H] is added to hidden_states before, in place.
    """
    if added is not None:
        hidden_states += added
    mean_square = hidden_states.square().mean(-1, keepdim=True)
    return hidden_states * (mean_square + eps).rsqrt_() * weight


def choose_experts(gate_logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return ids int64 and weights f32, both [T, top_k], of the highest of gate_logits f32 [T, n_experts].

    The highest comes first, of equals the lower id, and a NaN before all. The weights are the softmax over the chosen
    alone, which is the softmax over all, normalized over the chosen.
    """
    # topk does not say which of equals it takes; a stable sort does. A NaN is sorted as the highest.
    highest, expert_ids = gate_logits.sort(dim=-1, descending=True, stable=True)
    return expert_ids[:, :top_k].contiguous(), highest[:, :top_k].softmax(-1)


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Return heads [T, n, D] turned by angles [T, D / 2]; the pairs are (i, i + D/2) (Su et al., 2021)."""
    cosines, sines = cosines.unsqueeze(1), sines.unsqueeze(1)
    left, right = heads.chunk(2, dim=-1)
    return torch.cat((left * cosines - right * sines, right * cosines + left * sines), dim=-1)


def attend(
    past: tuple[Tensor, Tensor], start: int, window: int | None, angles: tuple[Tensor, Tensor], new: tuple[Tensor, ...]
) -> Tensor:
    """Put a sequence's new keys and values into its cache; return its queries' attention, f32 [T, heads * D].

    past     one layer's keys [n_kv_heads, n_blocks, D, KEY_BLOCK] and values [n_kv_heads, context, D], fp16 or f32
    start    the position of the first of the T tokens
    window   how many keys a query sees at most, its own among them; None: all
    angles   cosines and sines, both f32 [T, D / 2]
    new      queries f32 [T, heads * D], keys and values f32 [T, n_kv_heads * D]
    """
    past_keys, past_values = past
    n_kv_heads, _, head_dim = past_values.shape
    n_tokens = new[0].shape[0]
    end = start + n_tokens
    queries, keys, values = (projected.view(n_tokens, -1, head_dim) for projected in new)
    positions = torch.arange(start, end)
    past_keys[:, positions // KEY_BLOCK, :, positions % KEY_BLOCK] = rotate(keys, *angles).to(past_keys.dtype)
    past_values[:, start:end] = values.transpose(0, 1)
    first = max(0, start + 1 - (window or end))
    seen_keys = past_keys.transpose(2, 3).reshape(n_kv_heads, -1, head_dim)[:, first:end].float()  # [kv heads, S, D]
    seen_values = past_values[:, first:end].float()  # [kv heads, S, D]
    grouped = rotate(queries, *angles).view(n_tokens, n_kv_heads, -1, head_dim)  # [T, kv heads, G, D]
    if n_tokens == 1:
        return _attend_once(grouped[0], seen_keys, seen_values).reshape(1, -1)
    mask = _visible(start, first, end, window or end)
    attended = _attend_many(grouped.permute(1, 2, 0, 3), seen_keys, seen_values, mask)
    return attended.permute(2, 0, 1, 3).reshape(n_tokens, -1)


def _visible(start: int, first: int, end: int, window: int) -> Tensor:
    """Return which of the keys first..end-1 the queries start..end-1 see: those with 0 <= q - k < window."""
    distance = torch.arange(start, end).unsqueeze(1) - torch.arange(first, end)
    return (distance >= 0) & (distance < window)


def _attend_once(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return the attention of one token, [kv heads, G, D], over keys and values [kv heads, S, D].

    torch's own attention would do, but for one token its result depends on the number of threads.
    """
    scores = torch.bmm(queries * queries.shape[-1] ** -0.5, keys.transpose(1, 2))  # [kv heads, G, S]
    return torch.bmm(scores.softmax(-1), values)


def _attend_many(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Return the attention of queries [kv heads, G, T, D] over keys and values [kv heads, S, D]; mask [T, S]."""
    shared = (-1, queries.shape[1], -1, -1)  # the G query heads of a kv head read the same memory
    return scaled_dot_product_attention(
        queries, keys.unsqueeze(1).expand(shared), values.unsqueeze(1).expand(shared), attn_mask=mask
    )
