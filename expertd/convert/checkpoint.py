"""A Hugging Face Mixtral checkpoint in a local folder, checked whole from its headers before a weight is read.

Owns the open shards. Weights come one matrix at a time by pread, from any thread: never mapped, so that a file cut
under us is an error line and no SIGBUS. Knows no schemes, no stores and no arithmetic.
"""

import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from expertd.convert.errors import CheckpointError, MalformedCheckpoint, WrongTensor
from expertd.convert.json_file import parse_object, read_bounded
from expertd.convert.mixtral import (
    Matrix,
    dense_records,
    expert_records,
    is_needless,
    read_config,
)
from expertd.convert.safetensors_header import TensorSlot, read_header
from expertd.convert.side_files import CONFIG_FILE, read_side_files
from protocol.mixtral_config import GENERATION_CONFIG_FILE, MixtralConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_INDEX_NBYTES_MAX = 64 << 20
_SHARDS_MAX = 4096
# No separators and no leading dot: such a name reaches no file outside the checkpoint's folder.
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}\Z")
_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class _Located:
    """A tensor and the shard it lies in."""

    slot: TensorSlot
    shard: BinaryIO


class Checkpoint:
    """An open, checked checkpoint. `read` may be called by any thread; closing ends it, when nobody reads."""

    def __init__(
        self, config: MixtralConfig, side_files: dict[str, bytes], tensors: dict[str, _Located], shards: ExitStack
    ) -> None:
        self.config = config
        self.side_files = side_files
        self._tensors = tensors
        self._shards = shards

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._shards.close()

    def dtype(self, matrix: Matrix) -> str:
        """Return the type of that matrix's weights: F32, F16 or BF16."""
        return self._tensors[matrix.hub_name].slot.dtype

    def nbytes(self, matrix: Matrix) -> int:
        """Return the length of that matrix in the checkpoint."""
        return self._tensors[matrix.hub_name].slot.nbytes

    def read(self, matrix: Matrix) -> bytearray:
        """Return the bytes of that matrix, row-major; raise CheckpointError."""
        return _read_exactly(self._tensors[matrix.hub_name], matrix.hub_name)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Return the checkpoint in that folder, checked from its headers; raise CheckpointError."""
    try:
        return _open_checked(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror})") from None


def _open_checked(folder: Path) -> Checkpoint:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; the local folder of a Mixtral checkpoint is expected")
    if not (folder / CONFIG_FILE).exists():
        raise CheckpointError(f"{folder}: no {CONFIG_FILE}; the folder of a Hugging Face checkpoint is expected")
    side_files = read_side_files(folder)
    config = read_config(side_files[CONFIG_FILE], side_files.get(GENERATION_CONFIG_FILE))
    with ExitStack() as opened:
        tensors = _locate_tensors(folder, opened)
        _check_tensors(config, {name: located.slot for name, located in tensors.items()})
        return Checkpoint(config, side_files, tensors, opened.pop_all())


def _locate_tensors(folder: Path, opened: ExitStack) -> dict[str, _Located]:
    """Return every tensor of every shard; the index must agree with what the shards hold."""
    weight_map = _weight_map(folder)
    shards = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_FILE]
    tensors: dict[str, _Located] = {}
    for name in shards:
        shard = opened.enter_context(_open_shard(folder / name))
        for tensor, slot in read_header(shard, name).items():
            if tensor in tensors:
                raise MalformedCheckpoint(f"{name}: {tensor!r:.200} stands in another shard too")
            tensors[tensor] = _Located(slot, shard)
    for tensor, name in (weight_map or {}).items():
        if tensor not in tensors or Path(tensors[tensor].shard.name).name != name:
            raise MalformedCheckpoint(f"{name}: {tensor!r:.200} is missing, though {INDEX_FILE} lists it there")
    return tensors


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Return which shard holds which tensor, None for a checkpoint of one file; raise CheckpointError if neither."""
    if (folder / SINGLE_FILE).exists():
        return None
    if not (folder / INDEX_FILE).exists():
        raise CheckpointError(_without_safetensors(folder))
    document = parse_object(read_bounded(folder / INDEX_FILE, _INDEX_NBYTES_MAX), INDEX_FILE)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MalformedCheckpoint(f"{INDEX_FILE}: a weight_map of tensors and their shards is expected")
    shards = set(map(repr, weight_map.values()))
    if len(shards) > _SHARDS_MAX:
        raise MalformedCheckpoint(f"{INDEX_FILE}: {len(shards)} shards, at most {_SHARDS_MAX} are allowed")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not _SHARD_NAME.match(shard):
            raise MalformedCheckpoint(f"{INDEX_FILE}: the name of a file beside it is expected, {shard!r:.80} came")
    return weight_map


def _without_safetensors(folder: Path) -> str:
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        return (
            f"{folder}: holds pickled weights ({pickled[0]}), which can run code when they are read; save the model "
            "again as safetensors: transformers' from_pretrained, then save_pretrained"
        )
    return f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE}; a checkpoint in safetensors format is expected"


def _open_shard(path: Path) -> BinaryIO:
    if not path.exists():
        raise MalformedCheckpoint(f"{path.name}: the shard is missing; fetch the checkpoint again")
    if not path.is_file():
        raise MalformedCheckpoint(f"{path.name}: a regular file is expected")
    try:
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def _check_tensors(config: MixtralConfig, slots: Mapping[str, TensorSlot]) -> None:
    """Raise WrongTensor unless exactly the model's tensors are there, in shape and type."""
    expected: set[str] = set()
    for record in (*dense_records(config), *expert_records(config)):
        for matrix in record.matrices:
            _check_tensor(matrix, slots.get(matrix.hub_name))
            expected.add(matrix.hub_name)
    for name in slots:
        if name not in expected and not is_needless(name, config):
            raise WrongTensor(f"{name!r:.200}: a Mixtral has no such tensor; leaving it out would change the model")


def _check_tensor(matrix: Matrix, slot: TensorSlot | None) -> None:
    if slot is None:
        raise WrongTensor(f"{matrix.hub_name}: the tensor is missing from the checkpoint")
    if slot.shape != matrix.shape:
        raise WrongTensor(
            f"{matrix.hub_name}: shape {list(matrix.shape)} is expected from {CONFIG_FILE}, {list(slot.shape)} came"
        )
    if slot.dtype not in _DTYPES:
        raise WrongTensor(f"{matrix.hub_name}: type {', '.join(_DTYPES)} is expected, {slot.dtype!r:.60} came")


def _read_exactly(located: _Located, name: str) -> bytearray:
    """Return a tensor's bytes; raise CheckpointError if the file has become shorter or cannot be read."""
    slot = located.slot
    data = bytearray(slot.nbytes)
    rest = memoryview(data)
    offset = slot.offset
    while rest:
        try:
            n_read = os.preadv(located.shard.fileno(), [rest], offset)
        except OSError as error:
            raise CheckpointError(f"{name}: cannot be read ({error.strerror})") from None
        if n_read == 0:
            raise CheckpointError(f"{name}: the file became shorter while it was read")
        rest = rest[n_read:]
        offset += n_read
    return data
