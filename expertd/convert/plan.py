"""What a store will consist of, before a weight is read: every record, its file and its place. Pure arithmetic.

Records are planned, and worked on, dense first: among them are the longest, and a long one at the end would leave the
other workers idle. The digest of a store depends on this order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from expertd.convert.checkpoint import Checkpoint
from expertd.convert.config import QuantizeConfig
from expertd.convert.errors import GroupsDoNotDivide, MalformedCheckpoint
from expertd.convert.mixtral import Matrix, RecordSource, TensorClass, dense_records, expert_records
from expertd.convert.overrides import check_overrides
from expertd.convert.safetensors_header import build_header
from expertd.convert.words import SIXTEEN_BIT
from protocol.errors import LayoutError
from protocol.handles import ExpertKey
from protocol.layout import R8, SEGMENT_NBYTES_MAX, Part, check_shape, plan_segments, record_nbytes
from protocol.manifest import DENSE_FILE
from protocol.schemes import BF16, FP16, Scheme, scheme_named


@dataclass(frozen=True, slots=True)
class PlannedRecord:
    """One record to write. An f32 matrix stored in 16 bits is planned as fp16: which of the two fits, its weights say.

    `offset` counts from the file's first byte.
    """

    name: str
    key: ExpertKey | None
    tensor_class: TensorClass
    matrices: tuple[Matrix, ...]
    parts: tuple[Part, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One safetensors file to write: its header, and its length with the records."""

    name: str
    header: bytes
    nbytes: int


@dataclass(frozen=True, slots=True)
class StorePlan:
    """All records and record files of a store to be written."""

    records: tuple[PlannedRecord, ...]
    files: tuple[PlannedFile, ...]
    source_nbytes: int


@dataclass(frozen=True, slots=True)
class _Sized:
    """A record whose length is known and whose place is not."""

    source: RecordSource
    parts: tuple[Part, ...]
    nbytes: int


def plan_store(
    checkpoint: Checkpoint, config: QuantizeConfig, *, file_nbytes_max: int = SEGMENT_NBYTES_MAX
) -> StorePlan:
    """Return the store that the checkpoint becomes; raise ConfigError, or GroupsDoNotDivide naming the remedy.

    A file of experts holds at most `file_nbytes_max` bytes of records, unless one record alone is longer.
    """
    check_overrides(config.override, checkpoint.config.n_layers, checkpoint.config.n_experts)
    dense = [_size(checkpoint, source, config) for source in dense_records(checkpoint.config)]
    experts = [_size(checkpoint, source, config) for source in expert_records(checkpoint.config)]
    places = plan_segments([record.nbytes for record in experts], file_nbytes_max)
    by_file: dict[str, list[_Sized]] = {DENSE_FILE: dense}
    for record, (file, _) in zip(experts, places, strict=True):
        by_file.setdefault(f"experts-{file + 1:05}.safetensors", []).append(record)
    records: list[PlannedRecord] = []
    files: list[PlannedFile] = []
    for name, members in by_file.items():
        header = build_header([(member.source.name, member.nbytes) for member in members])
        records += _place(members, name, len(header))
        files.append(PlannedFile(name, header, len(header) + sum(member.nbytes for member in members)))
    source_nbytes = sum(checkpoint.nbytes(matrix) for record in records for matrix in record.matrices)
    return StorePlan(tuple(records), tuple(files), source_nbytes)


def _place(members: Sequence[_Sized], file: str, data_offset: int) -> list[PlannedRecord]:
    records = []
    offset = data_offset
    for member in members:
        source = member.source
        records.append(
            PlannedRecord(
                name=source.name,
                key=source.key,
                tensor_class=source.tensor_class,
                matrices=source.matrices,
                parts=member.parts,
                file=file,
                offset=offset,
                nbytes=member.nbytes,
            )
        )
        offset += member.nbytes
    return records


def _size(checkpoint: Checkpoint, source: RecordSource, config: QuantizeConfig) -> _Sized:
    word = _scheme_word(source, config)
    remedy = f'{source.tensor_class} = "{SIXTEEN_BIT}"'
    if source.key is not None and word != config.experts:
        remedy = f"nbits = 16 in the override for {source.name}"
    parts = tuple(_plan_part(checkpoint, matrix, word, remedy) for matrix in source.matrices)
    return _Sized(source, parts, record_nbytes(R8, parts))


def _scheme_word(source: RecordSource, config: QuantizeConfig) -> str:
    if source.key is not None:
        return config.scheme_of(source.key)
    return {"attention": config.attention, "head": config.head}.get(source.tensor_class, SIXTEEN_BIT)


def _plan_part(checkpoint: Checkpoint, matrix: Matrix, word: str, remedy: str) -> Part:
    scheme = _sixteen_bit_scheme(checkpoint.dtype(matrix)) if word == SIXTEEN_BIT else scheme_named(word)
    try:
        check_shape(matrix.hub_name, matrix.rows, matrix.cols, scheme)
    except LayoutError as error:
        if scheme.is_quantized:
            raise GroupsDoNotDivide(f"{error}: {remedy}") from None
        raise MalformedCheckpoint(str(error)) from None
    return Part(matrix.part_name, matrix.rows, matrix.cols, scheme.name)


def _sixteen_bit_scheme(dtype: str) -> Scheme:
    return BF16 if dtype == "BF16" else FP16
