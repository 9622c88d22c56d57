"""A synthetic store on disk: planned, staged and committed by the converter's own code, its records random.

Every record has a random generator of its own, so that no two experts share bytes. A failure or a signal leaves
nothing. Holds a few MB at a time.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from expertd.convert.checkpoint import Checkpoint
from expertd.convert.config import QuantizeConfig
from expertd.convert.errors import NoDiskSpace
from expertd.convert.interruption import interruption
from expertd.convert.mixtral import Matrix, model_facts, read_config
from expertd.convert.plan import PlannedRecord, StorePlan, plan_store
from expertd.convert.side_files import CONFIG_FILE
from expertd.convert.staging import check_target, disk_errors, staged
from expertd.convert.writer import RecordFiles, record_files_with_headers, write_file
from protocol.layout import R8
from protocol.manifest import MANIFEST_FILE, Manifest, Record, SideFile, TensorSchemes, dump_manifest
from tools.geometry import Geometry
from tools.synthetic_store.packed import SecondLevel, ones_part, random_part

# What the manifest says in place of the solver that found the codes.
_SOLVER = "random"
# Every layer adds about 1 to the hidden states. What attention adds is much alike for all tokens; were it not small
# beside a token's own embedding, deep layers would send most tokens to the same experts.
_EMBEDDING_STD = 8.0
_MANIFEST_NBYTES_PER_RECORD = 512


class SyntheticCheckpoint(Checkpoint):
    """A bf16 checkpoint of which only the geometry exists: enough for a plan, nothing can be read from it."""

    def __init__(self, geometry: Geometry) -> None:
        """Take the sizes; raise MalformedCheckpoint for those that make no Mixtral."""
        config_file = json.dumps(geometry.config_document(), indent=2).encode()
        super().__init__(read_config(config_file), {CONFIG_FILE: config_file}, {})

    def dtype(self, matrix: Matrix) -> str:  # noqa: ARG002  # all are of one type
        """Return BF16."""
        return "BF16"

    def nbytes(self, matrix: Matrix) -> int:
        """Return the length that the matrix would have."""
        return matrix.rows * matrix.cols * 2


@dataclass(frozen=True, slots=True)
class SyntheticPlan:
    """A store to be written: its records and files, and what its manifest will say beside them."""

    checkpoint: SyntheticCheckpoint
    store: StorePlan
    second_level: SecondLevel = SecondLevel.FULL

    @property
    def nbytes(self) -> int:
        """The bytes of the store, its manifest estimated from above."""
        files = sum(file.nbytes for file in self.store.files)
        return files + sum(map(len, self.checkpoint.side_files.values())) + self._manifest_nbytes_max

    @property
    def _manifest_nbytes_max(self) -> int:
        return _MANIFEST_NBYTES_PER_RECORD * (len(self.store.records) + 8)


def plan_synthetic_store(
    geometry: Geometry, schemes: QuantizeConfig, second_level: SecondLevel = SecondLevel.FULL
) -> SyntheticPlan:
    """Return the plan of a store; raise CheckpointError for sizes that make no Mixtral or fit no scheme."""
    checkpoint = SyntheticCheckpoint(geometry)
    return SyntheticPlan(checkpoint, plan_store(checkpoint, schemes), second_level)


def write_synthetic_store(
    out: Path,
    plan: SyntheticPlan,
    *,
    seed: int,
    force: bool = False,
    on_written: Callable[[int], None] = lambda _: None,
) -> Manifest:
    """Write the store and return its manifest, telling on_written of every record's nbytes; raise ConvertError."""
    target = Path(os.path.realpath(out))
    check_target(target, force=force)
    _check_disk_space(target, plan)
    with interruption() as asked, staged(target, force=force) as staging:
        with record_files_with_headers(staging.path, target, plan.store.files) as files:
            records: dict[str, Record] = {}
            for number, planned in enumerate(plan.store.records):
                asked.check()
                generator = np.random.Generator(np.random.SFC64([seed, number]))
                records[planned.name] = _write_record(files, planned, generator, plan.second_level)
                on_written(planned.nbytes)
                if _is_last_of_file(plan.store, number):
                    files.sync(planned.file)
        manifest = _manifest(plan, records)
        for name, data in plan.checkpoint.side_files.items():
            write_file(staging.path, target, name, data)
        write_file(staging.path, target, MANIFEST_FILE, dump_manifest(manifest))
        asked.check()
        staging.commit(force=force)
    return manifest


def _write_record(
    files: RecordFiles, planned: PlannedRecord, generator: np.random.Generator, second_level: SecondLevel
) -> Record:
    checksum = xxhash.xxh3_128()
    end = planned.offset
    for data in _record_bytes(planned, generator, second_level):
        checksum.update(data)
        files.write(planned.file, end, data)
        end += len(data)
    return Record(R8, planned.parts, planned.file, planned.offset, planned.nbytes, checksum.hexdigest())


def _record_bytes(planned: PlannedRecord, generator: np.random.Generator, second_level: SecondLevel) -> Iterator[bytes]:
    """Yield a record's bytes in order, padded to its length; weights keep the variance of what they multiply."""
    nbytes = 0
    for part in planned.parts:
        is_norm = planned.name.endswith("norm")
        std = _EMBEDDING_STD if planned.name == "embed_tokens" else part.cols**-0.5
        for data in ones_part(part) if is_norm else random_part(part, std, generator, second_level):
            nbytes += data.nbytes
            yield data.tobytes()
    yield bytes(planned.nbytes - nbytes)


def _is_last_of_file(plan: StorePlan, number: int) -> bool:
    records = plan.records
    return number + 1 == len(records) or records[number + 1].file != records[number].file


def _check_disk_space(target: Path, plan: SyntheticPlan) -> None:
    with disk_errors(target):
        free_nbytes = shutil.disk_usage(target.parent).free
    if plan.nbytes > free_nbytes:
        raise NoDiskSpace(
            f"{target}: the store needs {plan.nbytes / 1e6:.1f} MB, {target.parent} has {free_nbytes / 1e6:.1f} MB free"
        )


def _manifest(plan: SyntheticPlan, records: dict[str, Record]) -> Manifest:
    planned = plan.store.records
    scheme_of = {record.tensor_class: record.parts[0].scheme for record in planned}
    return Manifest(
        model=model_facts(plan.checkpoint.config),
        schemes=TensorSchemes(
            experts=scheme_of["experts"],
            attention=scheme_of["attention"],
            head=scheme_of["head"],
            other=scheme_of["other"],
        ),
        solver=_SOLVER,
        experts={record.key: records[record.name] for record in planned if record.key is not None},
        dense={record.name: records[record.name] for record in planned if record.key is None},
        files=tuple(
            SideFile(name, len(data), hashlib.sha256(data).hexdigest())
            for name, data in plan.checkpoint.side_files.items()
        ),
    )
