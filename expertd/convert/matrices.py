"""A matrix of a checkpoint as tensors, checked: every weight is a number. Knows no schemes and no stores.

Rows are read as they are asked for, so that what is held does not grow with the matrix; one that is quantized already
is unpacked whole.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from expertd.convert.errors import NotFinite
from expertd.convert.hqq_layout import HqqPlace
from expertd.convert.hqq_weights import dequantized, group_values
from expertd.convert.shard import TensorPlace, read_tensor
from expertd.convert.worker_messages import MatrixSource

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "I32": torch.int32}
# What is asked of all weights is asked of so many at a time: answers for a whole matrix would take memory, too.
_STRIP_NELEMENTS = 1 << 22


def strips(values: Tensor, n: int) -> Iterator[Tensor]:
    """Yield a vector in pieces of n elements."""
    for first in range(0, values.numel(), n):
        yield values[first : first + n]


class SourceMatrix:
    """One matrix [n_rows, n_cols] in the checkpoint's type."""

    def __init__(self, source: MatrixSource, n_rows: int, n_cols: int) -> None:
        """Raise CheckpointError for a quantized one that cannot be read."""
        self.n_rows, self.n_cols = n_rows, n_cols
        self._source = source
        self._unpacked: Tensor | None = None
        if isinstance(source.place, HqqPlace):
            self._unpacked, self.dtype = _unpacked(source, source.place, (n_rows, n_cols)), torch.float32
        else:
            self.dtype = _DTYPES[source.place.slot.dtype]

    def rows(self, first: int, n: int) -> Tensor:
        """Return n rows, [n, n_cols], from the first one on; raise CheckpointError or NotFinite."""
        weight = self._read(first, n)
        if not all(bool(strip.isfinite().all()) for strip in strips(weight.view(-1), _STRIP_NELEMENTS)):
            raise NotFinite(
                f"{self._source.hub_name}: holds weights that are NaN or infinite; the checkpoint is damaged"
            )
        return weight

    def largest(self) -> float:
        """Return the largest magnitude of all weights; raise CheckpointError or NotFinite."""
        n = max(1, _STRIP_NELEMENTS // self.n_cols)
        pieces = (self.rows(first, min(n, self.n_rows - first)) for first in range(0, self.n_rows, n))
        return max(float(piece.abs().max()) for piece in pieces)

    def _read(self, first: int, n: int) -> Tensor:
        if self._unpacked is not None:
            return self._unpacked[first : first + n]
        place = self._source.place
        assert isinstance(place, TensorPlace)  # noqa: S101  # the other kind is unpacked
        row_nbytes = self.n_cols * self.dtype.itemsize
        data = read_tensor(
            Path(self._source.path), place, self._source.hub_name, begin=first * row_nbytes, nbytes=n * row_nbytes
        )
        return torch.frombuffer(data, dtype=self.dtype).view(n, self.n_cols)


def _unpacked(source: MatrixSource, place: HqqPlace, shape: tuple[int, int]) -> Tensor:
    return dequantized(
        _read_tensor(source, place.codes),
        _read_values(source, place.scale),
        _read_values(source, place.zero),
        shape,
        nbits=place.nbits,
        group_size=place.group_size,
        order=place.order,
    )


def _read_values(source: MatrixSource, places: tuple[TensorPlace, ...]) -> Tensor:
    """Return scales or zeros, f32 [n_groups]."""
    tensors = [_read_tensor(source, place) for place in places]
    return tensors[0].float().view(-1) if len(tensors) == 1 else group_values(*tensors)


def _read_tensor(source: MatrixSource, place: TensorPlace) -> Tensor:
    data = read_tensor(Path(source.path), place, source.hub_name)
    return torch.frombuffer(data, dtype=_DTYPES[place.slot.dtype]).view(place.slot.shape)
