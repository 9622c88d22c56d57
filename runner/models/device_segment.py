"""A layer before its experts on a device: norm, attention, norm, the choice of experts. All by torch and products.

Owns no weights and no order: it is called by the work of a device's compute queue. Nobody blocks. Letters:

T   tokens of the step, all sequences one after another     H   hidden size     D   head_dim
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.device_parts import DevicePart
from quant.layer_reference import choose_experts, rms_norm
from quant.triton_kernels import Products
from runner.models.device_attention import attend
from runner.models.device_weights import DeviceLayer
from runner.models.mixtral_config import MixtralConfig


@dataclass(frozen=True, slots=True)
class Place:
    """The tokens of one sequence in a step: which rows, from which position on, over which kv_cache."""

    past_keys: Tensor  # [n_layers, n_kv_heads, C, D]
    past_values: Tensor
    start: int
    rows: slice


@dataclass(frozen=True, slots=True)
class Arrays:
    """What the layers of one step share on the device; each layer writes over the one before, in order."""

    hidden_states: Tensor  # f32 [T, H], which every layer adds to
    normed: Tensor  # f32 [T, H], what the experts are given
    expert_weights: Tensor  # f32 [T, top_k]
    cosines: Tensor  # f32 [T, D / 2]
    sines: Tensor

    @staticmethod
    def of(n_tokens: int, config: MixtralConfig, device: torch.device) -> "Arrays":
        """Return arrays of any content for so many tokens."""

        def floats(n_cols: int) -> Tensor:
            return torch.empty(n_tokens, n_cols, device=device)

        return Arrays(
            floats(config.hidden_size),
            floats(config.hidden_size),
            floats(config.top_k),
            floats(config.head_dim // 2),
            floats(config.head_dim // 2),
        )


def multiply(products: Products, x: Tensor, part: DevicePart) -> Tensor:
    """Return x · Wᵀ, f32 [T, rows], of x [T, cols] of any type of floats."""
    out = torch.empty(x.shape[0], part.part.rows, device=products.device)
    products.multiply(x.to(products.dtype), part, out)
    return out


def attention_segment(
    arrays: Arrays,
    added: Tensor | None,
    places: Sequence[Place],
    layer: tuple[int, DeviceLayer],
    *,
    config: MixtralConfig,
    products: Products,
) -> Tensor:
    """Update the arrays, with what the layer before left to be added; return the ids chosen, int64 [T, top_k]."""
    number, weights = layer
    hidden_states, eps = arrays.hidden_states, config.rms_norm_eps
    x = rms_norm(hidden_states, weights.input_norm, eps, added=added).to(products.dtype)
    new = [multiply(products, x, part) for part in (weights.q_proj, weights.k_proj, weights.v_proj)]
    attended = [_attended(number, place, arrays, new, config) for place in places]
    projected = multiply(products, torch.cat(attended) if len(attended) > 1 else attended[0], weights.o_proj)
    arrays.normed.copy_(rms_norm(hidden_states, weights.post_attention_norm, eps, added=projected))
    expert_ids, expert_weights = choose_experts(multiply(products, arrays.normed, weights.gate), config.top_k)
    arrays.expert_weights.copy_(expert_weights)
    return expert_ids


def _attended(number: int, place: Place, arrays: Arrays, new: Sequence[Tensor], config: MixtralConfig) -> Tensor:
    return attend(
        (place.past_keys[number], place.past_values[number]),
        place.start,
        config.sliding_window,
        (arrays.cosines[place.rows], arrays.sines[place.rows]),
        tuple(projected[place.rows] for projected in new),
    )
