"""The codes plane of panels: eight rows of codes, interleaved and bit-packed, and back. Knows neither scales nor files.

`protocol.layout` names the byte of every code. Two facts make it cheap here. Four neighbouring inputs of a row always
share a 32-bit lane, one byte each, so they move as one int32, a *word*; and no width carries a bit across a byte, so
shifting a word shifts its four codes at once. What is left is to merge words of one row, then to transpose words
between rows.

Letters: P panels, B blocks of 64 inputs, V 32-byte vectors of a block, W words of a block's row (16).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from protocol.layout import BLOCK_COLS, PANEL_ROWS

WORDS_PER_BLOCK = BLOCK_COLS // 4

_LOW_NIBBLES = 0x0F0F0F0F
_LOW_1 = 0x01010101
_LOW_2 = 0x03030303
_LOW_3 = 0x07070707


def interleave(codes: Tensor, nbits: int) -> Tensor:
    """Return the codes planes, u8 [P, plane bytes], of codes u8 [P * 8, K]."""
    merge = _MERGE[nbits]
    words = codes.view(torch.int32).view(-1, PANEL_ROWS, codes.shape[1] // BLOCK_COLS, WORDS_PER_BLOCK)  # [P, 8, B, W]
    merged = merge(words)  # [P, 8, B, V]
    lanes = merged.permute(0, 2, 3, 1).contiguous()  # [P, B, V, 8]
    return lanes.view(lanes.shape[0], -1).view(torch.uint8)


def deinterleave(planes: Tensor, n_cols: int, nbits: int) -> Tensor:
    """Return the codes, u8 [P * 8, n_cols], of codes planes u8 [P, plane bytes]; the inverse of interleave."""
    split = _SPLIT[nbits]
    n_blocks = n_cols // BLOCK_COLS
    lanes = planes.view(torch.int32).view(planes.shape[0], n_blocks, -1, PANEL_ROWS)  # [P, B, V, 8]
    merged = lanes.permute(0, 3, 1, 2).contiguous()  # [P, 8, B, V]
    words = split(merged)  # [P, 8, B, W]
    return words.view(-1, n_cols // 4).view(torch.uint8)


def _merge_8(words: Tensor) -> Tensor:
    return words


def _split_8(merged: Tensor) -> Tensor:
    return merged


def _merge_4(words: Tensor) -> Tensor:
    return words[..., 0::2] | words[..., 1::2] << 4


def _split_4(merged: Tensor) -> Tensor:
    return torch.stack((merged & _LOW_NIBBLES, merged >> 4 & _LOW_NIBBLES), dim=-1).flatten(-2)


def _merge_2(words: Tensor) -> Tensor:
    return words[..., 0::4] | words[..., 1::4] << 2 | words[..., 2::4] << 4 | words[..., 3::4] << 6


def _split_2(merged: Tensor) -> Tensor:
    return torch.stack([merged >> shift & _LOW_2 for shift in (0, 2, 4, 6)], dim=-1).flatten(-2)


def _merge_3(words: Tensor) -> Tensor:
    # Eight words of a half block become three: six of them fill two 3-bit places each, and the bits of the last two
    # go where a byte has 2 bits left.
    c = words.view(*words.shape[:-1], 2, 8).unbind(-1)
    a = c[0] | c[1] << 3 | (c[6] & _LOW_2) << 6
    b = c[2] | c[3] << 3 | (c[7] & _LOW_2) << 6
    d = c[4] | c[5] << 3 | (c[6] >> 2 & _LOW_1) << 6 | (c[7] >> 2 & _LOW_1) << 7
    return torch.stack((a, b, d), dim=-1).flatten(-2)


def _split_3(merged: Tensor) -> Tensor:
    a, b, d = merged.view(*merged.shape[:-1], 2, 3).unbind(-1)
    pairs = [half for word in (a, b, d) for half in (word & _LOW_3, word >> 3 & _LOW_3)]
    c6 = a >> 6 & _LOW_2 | (d >> 6 & _LOW_1) << 2
    c7 = b >> 6 & _LOW_2 | (d >> 7 & _LOW_1) << 2
    return torch.stack((*pairs, c6, c7), dim=-1).flatten(-2)


_MERGE: dict[int, Callable[[Tensor], Tensor]] = {8: _merge_8, 4: _merge_4, 3: _merge_3, 2: _merge_2}
_SPLIT: dict[int, Callable[[Tensor], Tensor]] = {8: _split_8, 4: _split_4, 3: _split_3, 2: _split_2}
