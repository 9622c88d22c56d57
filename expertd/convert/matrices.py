"""A matrix of a checkpoint as a tensor, checked: every weight is a number. Knows no schemes and no stores."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from expertd.convert.errors import NotFinite
from expertd.convert.shard import read_tensor
from expertd.convert.worker_messages import MatrixSource

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What is asked of all weights is asked of so many at a time: answers for a whole matrix would take memory, too.
_STRIP_NELEMENTS = 1 << 22


def strips(values: Tensor, n: int) -> Iterator[Tensor]:
    """Yield a vector in pieces of n elements."""
    for first in range(0, values.numel(), n):
        yield values[first : first + n]


def read_matrix(source: MatrixSource, rows: int, cols: int) -> Tensor:
    """Return one matrix as [rows, cols] in the checkpoint's type; raise CheckpointError or NotFinite."""
    data = read_tensor(Path(source.path), source.place, source.hub_name)
    weight = torch.frombuffer(data, dtype=_DTYPES[source.place.slot.dtype])
    if not all(bool(strip.isfinite().all()) for strip in strips(weight, _STRIP_NELEMENTS)):
        raise NotFinite(f"{source.hub_name}: holds weights that are NaN or infinite; the checkpoint is damaged")
    return weight.reshape(rows, cols)


def fits_fp16(weight: Tensor) -> bool:
    """Return whether fp16 holds every weight without making it infinite."""
    return all(bool(strip.half().isfinite().all()) for strip in strips(weight.flatten(), _STRIP_NELEMENTS))
