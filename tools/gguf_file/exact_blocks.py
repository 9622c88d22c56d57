"""Quantized matrices of a store as blocks of a GGUF that mean exactly the same weights, or an error.

A store says w = step (s (q - center) + base). Q4_K has superblocks of 256 inputs, w = d sc q - dmin m with 6 bits for
sc and m of 32 inputs; Q8_0 has blocks of 32, w = d q; all d in fp16. Where each bit lies: ggml-common.h and
ggml-quants.c of llama.cpp.
"""

import numpy as np
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

from protocol.schemes import Q4_G64, Q8_G64, Scheme
from quant.packing import QuantizedMatrix
from tools.gguf_file.errors import SourceInvalid

Bytes = NDArray[np.uint8]

_TYPES = {Q4_G64.name: GGMLQuantizationType.Q4_K, Q8_G64.name: GGMLQuantizationType.Q8_0}

_SUPERBLOCK = 256
_SIX_BITS = 63


def exact_type(scheme: Scheme) -> GGMLQuantizationType:
    """Return the type that can hold a scheme's weights; raise SourceInvalid if there is none."""
    if scheme.name not in _TYPES:
        raise SourceInvalid(f"scheme {scheme.name}: {' or '.join(_TYPES)} is expected; no other has an equal in a GGUF")
    return _TYPES[scheme.name]


def exact_blocks(matrix: QuantizedMatrix) -> Bytes:
    """Return a matrix [N, K] as rows of blocks, u8 [N, bytes of a row]; raise SourceInvalid if it does not fit them."""
    _check(bool((matrix.base_min == 0).all()), "every base_min is expected to be 0")
    return _q8_0(matrix) if matrix.scheme == Q8_G64 else _q4_k(matrix)


def _q4_k(matrix: QuantizedMatrix) -> Bytes:
    rows, cols = matrix.codes.shape
    _check(cols % _SUPERBLOCK == 0, f"{cols} inputs do not divide into superblocks of {_SUPERBLOCK}")
    largest = max(int(matrix.scale_codes.max()), int(matrix.base_codes.max()))
    _check(largest <= _SIX_BITS, f"the largest second-level byte is {largest}, Q4_K has 6 bits")
    n_superblocks = cols // _SUPERBLOCK
    blocks = np.empty((rows, n_superblocks, 144), np.uint8)
    blocks[..., 0:2] = _fp16_bytes(matrix.scale_step)[:, None]
    blocks[..., 2:4] = _fp16_bytes(-matrix.base_step * matrix.scale_step)[:, None]
    # Both halves of a group of 64 have its scale and minimum.
    scales, mins = (
        codes.view(rows, n_superblocks, 4).repeat_interleave(2, dim=2).numpy()
        for codes in (matrix.scale_codes, matrix.base_codes)
    )
    blocks[..., 4:8] = scales[..., :4] | scales[..., 4:] >> 4 << 6
    blocks[..., 8:12] = mins[..., :4] | mins[..., 4:] >> 4 << 6
    blocks[..., 12:16] = scales[..., 4:] & 15 | mins[..., 4:] << 4
    halves = matrix.codes.view(rows, n_superblocks, 4, 2, 32)
    blocks[..., 16:] = (halves[:, :, :, 0] | halves[:, :, :, 1] << 4).view(rows, n_superblocks, 128).numpy()
    return blocks.reshape(rows, -1)


def _q8_0(matrix: QuantizedMatrix) -> Bytes:
    rows, cols = matrix.codes.shape
    _check(bool((matrix.base_step == 0).all()), "every base_step of 8 bits is expected to be 0")
    blocks = np.empty((rows, cols // 32, 34), np.uint8)
    scales = (matrix.scale_step[:, None] * matrix.scale_codes).repeat_interleave(2, dim=1)
    blocks[..., 0:2] = _fp16_bytes(scales)
    # q - 128 as int8 has the bits of q with the highest one turned.
    blocks[..., 2:] = (matrix.codes ^ 128).view(rows, cols // 32, 32).numpy()
    return blocks.reshape(rows, -1)


def _fp16_bytes(values: Tensor) -> Bytes:
    """Return numbers as fp16, u8 [..., 2]."""
    halves = values.to(torch.float16)
    _check(torch.equal(halves.float(), values), "a scale is not exactly a number of fp16")
    stored: Bytes = halves.unsqueeze(-1).numpy().view(np.uint8)
    return stored


def _check(fits: bool, problem: str) -> None:  # noqa: FBT001  # what is checked reads best in front
    if not fits:
        raise SourceInvalid(f"{problem}; `tools.synthetic_store --for-gguf` makes stores that a GGUF can hold")
