"""The dense weights in a device's memory: all parts side by side in one piece of it, as they lie in the store.

Owns that memory, and nothing of the host's but the embeddings' table, which stays in the shared mapping: a step looks
up a few rows. Knows no arithmetic. Copying blocks the calling thread, once, when the model is opened.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.layout import part_nbytes
from quant.device_parts import DevicePart
from quant.linear import Linear
from runner.weights import DenseWeights

# Where a part may start: what the kernels read at once, and torch's own allocations, start there.
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class DeviceLayer:
    """The weights of one layer before its experts; norms are f32 [H]."""

    input_norm: Tensor
    q_proj: DevicePart
    k_proj: DevicePart
    v_proj: DevicePart
    o_proj: DevicePart
    post_attention_norm: Tensor
    gate: DevicePart


@dataclass(frozen=True, slots=True)
class DeviceWeights:
    """All that is not an expert. `embed_tokens` is the host's."""

    embed_tokens: Linear
    layers: tuple[DeviceLayer, ...]
    norm: Tensor
    lm_head: DevicePart


def dense_nbytes(weights: DenseWeights) -> int:
    """Return how much of a device's memory those weights take."""
    return _norms_nbytes(weights) + sum(_rounded(part_nbytes(linear.part)) for linear in _linears(weights))


def copy_dense_weights(weights: DenseWeights, device: torch.device) -> DeviceWeights:
    """Return the weights in the device's memory."""
    arena = _Arena(torch.empty(dense_nbytes(weights), dtype=torch.uint8, device=device))
    layers = []
    for segment in weights.attention_segments:
        of_host = segment.weights
        layers.append(
            DeviceLayer(
                input_norm=arena.vector(of_host.input_norm),
                q_proj=arena.part(of_host.q_proj),
                k_proj=arena.part(of_host.k_proj),
                v_proj=arena.part(of_host.v_proj),
                o_proj=arena.part(of_host.o_proj),
                post_attention_norm=arena.vector(of_host.post_attention_norm),
                gate=arena.part(of_host.gate),
            )
        )
    return DeviceWeights(weights.embed_tokens, tuple(layers), arena.vector(weights.norm), arena.part(weights.lm_head))


class _Arena:
    """Memory that is handed out from its start on."""

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self._n_used = 0

    def part(self, linear: Linear) -> DevicePart:
        return DevicePart(linear.part, self._copied(linear.part_bytes))

    def vector(self, vector: Tensor) -> Tensor:
        return self._copied(vector.view(torch.uint8)).view(torch.float32)

    def _copied(self, data: Tensor) -> Tensor:
        place = self._memory[self._n_used : self._n_used + data.numel()]
        place.copy_(data)
        self._n_used += _rounded(data.numel())
        return place


def _linears(weights: DenseWeights) -> list[Linear]:
    linears = [weights.lm_head]
    for segment in weights.attention_segments:
        layer = segment.weights
        linears += [layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj, layer.gate]
    return linears


def _norms_nbytes(weights: DenseWeights) -> int:
    n_norms = 2 * len(weights.attention_segments) + 1
    return n_norms * _rounded(weights.norm.numel() * weights.norm.element_size())


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
