"""A matrix of a checkpoint as a tensor, checked: every weight is a number. Knows no schemes and no stores."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from expertd.convert.errors import NotFinite
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


def read_matrix(source: MatrixSource, rows: int, cols: int) -> Tensor:
    """Return one matrix as [rows, cols] in the checkpoint's type; raise CheckpointError or NotFinite."""
    weight = _read_weights(source, rows, cols).view(-1)
    if not all(bool(strip.isfinite().all()) for strip in strips(weight, _STRIP_NELEMENTS)):
        raise NotFinite(f"{source.hub_name}: holds weights that are NaN or infinite; the checkpoint is damaged")
    return weight.reshape(rows, cols)


def _read_weights(source: MatrixSource, rows: int, cols: int) -> Tensor:
    place = source.place
    if isinstance(place, TensorPlace):
        return _read_tensor(source, place)
    return dequantized(
        _read_tensor(source, place.codes),
        _read_values(source, place.scale),
        _read_values(source, place.zero),
        (rows, cols),
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


def fits_fp16(weight: Tensor) -> bool:
    """Return whether fp16 holds every weight without making it infinite."""
    return all(bool(strip.half().isfinite().all()) for strip in strips(weight.flatten(), _STRIP_NELEMENTS))
