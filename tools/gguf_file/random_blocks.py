"""Random weights in llama.cpp's K-quants: random bytes under scales that give the weights a standard deviation.

What a scale of 1 gives is found by decoding a sample with gguf's own reference; nothing of the formats is known here
but where a block keeps its fp16 scale (ggml-common.h).
"""

import functools
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from tools.gguf_file.model import GgufTensor

_SAMPLE_BLOCKS = 4096
_EMBEDDING_STD = 8.0  # as in the synthetic stores


@dataclass(frozen=True, slots=True)
class _Scales:
    """Where a block's fp16 scale d lies and, where the type has one, that of its minimum.

    `min_ratio` is dmin / d, chosen so that the weights' mean is 0: that of the codes for 4 bits, w = d sc q - dmin m.
    """

    d_offset: int
    min_offset: int | None = None
    min_ratio: float = 0.0


_SCALES = {
    GGMLQuantizationType.Q2_K: _Scales(80, 82, 1.5),
    GGMLQuantizationType.Q3_K: _Scales(108),
    GGMLQuantizationType.Q4_K: _Scales(0, 2, 7.5),
    GGMLQuantizationType.Q6_K: _Scales(208),
}
TYPES = tuple(_SCALES)


def random_tensor(tensor: GgufTensor, generator: np.random.Generator) -> NDArray[np.uint8]:
    """Return the bytes of a tensor, u8 [nbytes]; norms are 1, weights keep the variance of what they multiply."""
    if len(tensor.shape) == 1:
        return np.ones(tensor.shape, np.float32).view(np.uint8)
    std = _EMBEDDING_STD if tensor.role == "token_embd" else tensor.shape[-1] ** -0.5
    if tensor.type == GGMLQuantizationType.F32:
        return (generator.standard_normal(tensor.shape, np.float32) * np.float32(std)).view(np.uint8)
    _, block_nbytes = GGML_QUANT_SIZES[tensor.type]
    d = std / _std_of_unit_scale(tensor.type)
    return _random_blocks(tensor.nbytes // block_nbytes, tensor.type, d, generator).reshape(-1)


@functools.cache
def _std_of_unit_scale(type_: GGMLQuantizationType) -> float:
    sample = _random_blocks(_SAMPLE_BLOCKS, type_, 1.0, np.random.default_rng(0))
    return float(dequantize(sample, type_).std())


def _random_blocks(
    n_blocks: int, type_: GGMLQuantizationType, d: float, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Return blocks, u8 [n_blocks, bytes of a block], with that scale."""
    scales = _SCALES[type_]
    _, block_nbytes = GGML_QUANT_SIZES[type_]
    words = generator.integers(0, 1 << 64, size=-(-n_blocks * block_nbytes // 8), dtype=np.uint64)
    blocks = words.view(np.uint8)[: n_blocks * block_nbytes].reshape(n_blocks, block_nbytes)
    blocks[:, scales.d_offset : scales.d_offset + 2] = _fp16_bytes(d)
    if scales.min_offset is not None:
        blocks[:, scales.min_offset : scales.min_offset + 2] = _fp16_bytes(d * scales.min_ratio)
    return blocks


def _fp16_bytes(value: float) -> NDArray[np.uint8]:
    return np.array([value], np.float16).view(np.uint8)
