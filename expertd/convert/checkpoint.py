"""A Hugging Face Mixtral checkpoint, checked whole from its headers before a weight is read.

Knows the names of its files and what must stand in them; where they come from is `CheckpointFiles`. Holds nothing
open: weights are read one matrix at a time, by any thread. Knows no schemes, no stores and no arithmetic.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from expertd.convert.errors import CheckpointError, MalformedCheckpoint, WrongTensor
from expertd.convert.fetch_messages import FetchJob
from expertd.convert.hqq_layout import HqqPlace, MatrixPlace, find_hqq, prefix_of
from expertd.convert.json_file import parse_object
from expertd.convert.local_folder import LocalFolder
from expertd.convert.mixtral import (
    Matrix,
    dense_records,
    expert_records,
    is_needless,
    read_config,
)
from expertd.convert.safetensors_header import TensorSlot
from expertd.convert.shard import Shard, TensorPlace, read_tensor
from expertd.convert.side_files import CONFIG_FILE, read_side_files
from protocol.mixtral_config import GENERATION_CONFIG_FILE, MixtralConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_INDEX_NBYTES_MAX = 64 << 20
_SHARDS_MAX = 4096
# No separators and no leading dot: such a name reaches no file outside the checkpoint's folder.
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}\Z")
_DTYPES = ("F32", "F16", "BF16")


class CheckpointFiles(Protocol):
    """The files of a checkpoint: a folder on this disk, or a repository elsewhere.

    `place` is what an error line calls it. Each method raises CheckpointError, or FetchFailed for what is elsewhere.
    """

    @property
    def place(self) -> str: ...  # noqa: D102  # the class says it

    def names(self) -> frozenset[str]:
        """Return the names of all files."""
        ...

    def read(self, name: str, nbytes_max: int) -> bytes:
        """Return a file that is no longer than that."""
        ...

    def read_header(self, name: str) -> tuple[Shard, dict[str, TensorSlot]]:
        """Return a file of weights and the tensors in it, from its header alone."""
        ...

    def paths(self) -> dict[str, str]:
        """Return the paths of the files that are on this disk, by name."""
        ...

    def fetch_job(self, folder: Path | None) -> FetchJob | None:
        """Return how shards get to this disk, into that folder or (None) to where they stay; None if they are here."""
        ...


class Checkpoint:
    """A checked checkpoint, its weights still where they are."""

    def __init__(self, config: MixtralConfig, side_files: dict[str, bytes], places: Mapping[str, MatrixPlace]) -> None:
        self.config = config
        self.side_files = side_files
        self._places = places

    @property
    def n_quantized(self) -> int:
        """How many of the matrices are quantized already."""
        return sum(isinstance(place, HqqPlace) for place in self._places.values())

    def dtype(self, matrix: Matrix) -> str:
        """Return the type of that matrix's weights: F32, F16 or BF16; of quantized ones what they are computed in."""
        place = self.place_of(matrix)
        return place.slot.dtype if isinstance(place, TensorPlace) else "F32"

    def nbytes(self, matrix: Matrix) -> int:
        """Return the length of that matrix in the checkpoint."""
        place = self.place_of(matrix)
        return place.slot.nbytes if isinstance(place, TensorPlace) else place.nbytes

    def place_of(self, matrix: Matrix) -> MatrixPlace:
        """Return where that matrix lies."""
        return self._places[matrix.hub_name]


class LocalCheckpoint(Checkpoint):
    """A checkpoint in a folder on this disk. `read` may be called by any thread."""

    def __init__(
        self, folder: Path, config: MixtralConfig, side_files: dict[str, bytes], places: Mapping[str, MatrixPlace]
    ) -> None:
        super().__init__(config, side_files, places)
        self._folder = folder

    def read(self, matrix: Matrix) -> bytearray:
        """Return the bytes of that matrix, row-major; raise CheckpointError, for one that is quantized too."""
        place = self.place_of(matrix)
        if not isinstance(place, TensorPlace):
            raise CheckpointError(f"{matrix.hub_name}: is quantized already; the original weights are needed")
        return read_tensor(self._folder / place.shard.name, place, matrix.hub_name)


def read_checkpoint(folder: Path) -> LocalCheckpoint:
    """Return the checkpoint in that local folder, checked from its headers; raise CheckpointError."""
    return LocalCheckpoint(folder, *_checked(LocalFolder(folder)))


def check_checkpoint(files: CheckpointFiles) -> Checkpoint:
    """Return the checkpoint that those files are, checked from its headers; raise CheckpointError or FetchFailed."""
    return Checkpoint(*_checked(files))


def _checked(files: CheckpointFiles) -> tuple[MixtralConfig, dict[str, bytes], dict[str, MatrixPlace]]:
    names = files.names()
    if CONFIG_FILE not in names:
        raise CheckpointError(f"{files.place}: no {CONFIG_FILE}; the files of a Hugging Face checkpoint are expected")
    side_files = read_side_files(names, files.read)
    config = read_config(side_files[CONFIG_FILE], side_files.get(GENERATION_CONFIG_FILE))
    tensors = _locate_tensors(files, names)
    return config, side_files, _check_tensors(config, tensors)


def _locate_tensors(files: CheckpointFiles, names: frozenset[str]) -> dict[str, TensorPlace]:
    """Return every tensor of every shard; the index must agree with what the shards hold."""
    weight_map = _weight_map(files, names)
    shards = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_FILE]
    tensors: dict[str, TensorPlace] = {}
    for name in shards:
        if name not in names:
            raise MalformedCheckpoint(f"{name}: the shard is missing; fetch the checkpoint again")
        shard, slots = files.read_header(name)
        prefix = prefix_of(name, weight_map or {})
        for bare, slot in slots.items():
            tensor = prefix + bare
            if tensor in tensors:
                raise MalformedCheckpoint(f"{name}: {tensor!r:.200} stands in another shard too")
            tensors[tensor] = TensorPlace(shard, slot)
    for tensor, name in (weight_map or {}).items():
        if tensor not in tensors or tensors[tensor].shard.name != name:
            raise MalformedCheckpoint(f"{name}: {tensor!r:.200} is missing, though {INDEX_FILE} lists it there")
    return tensors


def _weight_map(files: CheckpointFiles, names: frozenset[str]) -> dict[str, str] | None:
    """Return which shard holds which tensor, None for a checkpoint of one file; raise CheckpointError if neither."""
    if SINGLE_FILE in names:
        return None
    if INDEX_FILE not in names:
        raise CheckpointError(_without_safetensors(files.place, names))
    document = parse_object(files.read(INDEX_FILE, _INDEX_NBYTES_MAX), INDEX_FILE)
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


def _without_safetensors(place: str, names: Iterable[str]) -> str:
    pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
    if pickled == ["qmodel.pt"]:
        return (
            f"{place}: holds pickled weights (qmodel.pt), which can run code when they are read; quantize the original"
        )
    if pickled:
        return (
            f"{place}: holds pickled weights ({pickled[0]:.99}), which can run code when they are read; save the model "
            "again as safetensors: transformers' from_pretrained, then save_pretrained"
        )
    return f"{place}: neither {SINGLE_FILE} nor {INDEX_FILE}; a checkpoint in safetensors format is expected"


def _check_tensors(config: MixtralConfig, tensors: Mapping[str, TensorPlace]) -> dict[str, MatrixPlace]:
    """Return the place of each matrix; raise WrongTensor unless exactly the model's tensors are there."""
    places: dict[str, MatrixPlace] = {}
    expected: set[str] = set()
    for record in (*dense_records(config), *expert_records(config)):
        for matrix in record.matrices:
            quantized = find_hqq(matrix.hub_name, matrix.rows, matrix.cols, tensors)
            if quantized is not None:
                places[matrix.hub_name], names = quantized
                expected |= names
                continue
            place = tensors.get(matrix.hub_name)
            _check_tensor(matrix, None if place is None else place.slot)
            places[matrix.hub_name] = tensors[matrix.hub_name]
            expected.add(matrix.hub_name)
    for name in tensors:
        if name not in expected and not is_needless(name, config):
            raise WrongTensor(f"{name!r:.200}: a Mixtral has no such tensor; leaving it out would change the model")
    return places


def _check_tensor(matrix: Matrix, slot: TensorSlot | None) -> None:
    if slot is None:
        raise WrongTensor(f"{matrix.hub_name}: the tensor is missing from the checkpoint")
    if slot.shape != matrix.shape:
        raise WrongTensor(
            f"{matrix.hub_name}: shape {list(matrix.shape)} is expected from {CONFIG_FILE}, {list(slot.shape)} came"
        )
    if slot.dtype not in _DTYPES:
        raise WrongTensor(f"{matrix.hub_name}: type {', '.join(_DTYPES)} is expected, {slot.dtype!r:.60} came")
