"""A GGUF file on disk: it appears whole or not at all, and one tensor at a time is in memory."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

from tools.gguf_file.errors import OutputError
from tools.gguf_file.model import ARCHITECTURE, GgufTensor

# Keys and the tensors' list; the tokenizer of a model is the longest.
_HEADER_NBYTES_MAX = 64 << 20

Make = Callable[[GgufTensor], NDArray[np.uint8]]


def write_gguf(
    out: Path,
    tensors: Sequence[GgufTensor],
    *,
    add_keys: Callable[[GGUFWriter], None],
    make: Make,
    on_written: Callable[[int], None],
) -> None:
    """Write the file of those tensors, whose bytes `make` returns; tell on_written of nbytes. Raise OutputError."""
    _check_out(out, tensors)
    try:
        with _appearing_whole(out) as path:
            writer = GGUFWriter(path, ARCHITECTURE)
            try:
                add_keys(writer)
                for tensor in tensors:
                    writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                for tensor in tensors:
                    writer.write_tensor_data(make(tensor))
                    on_written(tensor.nbytes)
            finally:
                writer.close()
    except OSError as error:
        raise OutputError(f"{out}: could not be written ({error.strerror or error})") from None


def gguf_nbytes(tensors: Sequence[GgufTensor]) -> int:
    """Return how long the file becomes, its header left out."""
    return sum(tensor.nbytes for tensor in tensors)


def _check_out(out: Path, tensors: Sequence[GgufTensor]) -> None:
    if os.path.lexists(out):
        raise OutputError(f"{out}: exists; remove it or name another file")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise OutputError(f"{out}: its folder {parent} does not exist")
    need, free = gguf_nbytes(tensors) + _HEADER_NBYTES_MAX, shutil.disk_usage(parent).free
    if free < need:
        raise OutputError(f"{out}: {need / 1e9:.2f} GB are needed there, {free / 1e9:.2f} GB are free")


@contextmanager
def _appearing_whole(out: Path) -> Iterator[Path]:
    path = out.absolute().with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        yield path
        path.rename(out)
    finally:
        path.unlink(missing_ok=True)
