"""The weights of a quantized matrix, w = (code - zero) * scale, as the hqq package has them. Knows no files."""

from collections.abc import Iterator

import torch
from torch import Tensor

from expertd.convert.hqq_layout import Order

_SHIFTS = {8: (0,), 4: (4, 0), 3: (27, 24, 21, 18, 15, 12, 9, 6, 3, 0), 2: (6, 4, 2, 0)}


def dequantized(
    packed: Tensor, scale: Tensor, zero: Tensor, shape: tuple[int, int], *, nbits: int, group_size: int, order: Order
) -> Tensor:
    """Return the weights, f32 [rows, cols] = shape; `scale` and `zero` are f32 [n_groups].

    `packed` are codes of [group_size, n_groups] or [rows, cols], by the order; each of its rows is unpacked by itself,
    so that beside the result only a row's codes are held.
    """
    n_rows = group_size if order == Order.GROUPED else shape[0]
    weights = torch.empty(n_rows, shape[0] * shape[1] // n_rows)
    for row, codes in _unpacked(packed, nbits, n_rows, order):
        weights[row] = codes
    groups = weights.view(group_size, -1)  # the same memory: a group is a column of it
    for line in groups:
        line.sub_(zero).mul_(scale)
    return weights.view(shape)


def group_values(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return scales or zeros, f32 [a * b], stored as codes [a, b] with one scale and zero or with b of each."""
    return ((codes.float() - zero.float().view(-1)) * scale.float().view(-1)).view(-1)


def _unpacked(packed: Tensor, nbits: int, n_rows: int, order: Order) -> Iterator[tuple[int, Tensor]]:
    """Yield the number of each row and its codes; rows that were added to fill the last item are left out."""
    shifts = _SHIFTS[nbits]
    for item, codes in enumerate(packed):
        for place, shift in enumerate(shifts):
            row = item * len(shifts) + place if order == Order.ROWS else place * len(packed) + item
            if row < n_rows:
                yield row, (codes >> shift) & (1 << nbits) - 1
