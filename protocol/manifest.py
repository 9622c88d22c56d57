"""The manifest of a store: what it holds, where each record lies, and the checksum of every byte.

`manifest.json` is compact JSON whose first key is `digest`, the sha256 of the same bytes without that key. As it lists
the xxh3-128 of every record and the sha256 of every other file, the digest stands for the whole content. The errors of
weights are what storing them cost, as the store's maker measured it; one who did not leaves them out.
Reading bounds everything before it is used: a manifest comes from a directory anybody may have made.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TypeVar

from protocol.errors import LayoutError, ManifestError, UnknownLayout, UnknownScheme
from protocol.handles import ExpertKey
from protocol.layout import PAGE_NBYTES, Part, record_nbytes
from protocol.schemes import scheme_named
from protocol.version import STORE_FORMAT_VERSION

MANIFEST_FILE = "manifest.json"
DENSE_FILE = "dense.safetensors"
MANIFEST_NBYTES_MAX = 16 << 20

_HEAD = b'{"digest":"?",'
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}\Z")
_HEX32 = re.compile(r"[0-9a-f]{32}\Z")
_HEX64 = re.compile(r"[0-9a-f]{64}\Z")
_EXPERTS_MAX = 1 << 16
_DENSE_MAX = 1 << 16
_PARTS_MAX = 32
_FILES_MAX = 64
_ERROR_MAX = 1e6

_Record = TypeVar("_Record")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What must be known of the model to compute with its experts."""

    architecture: str
    n_layers: int
    n_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    activation: str
    gate_function: str
    gate_normalization: str
    n_shared_experts: int


@dataclass(frozen=True, slots=True)
class TensorSchemes:
    """The scheme of each class of tensors; embeddings, norms and gates are `other`."""

    experts: str
    attention: str
    head: str
    other: str


@dataclass(frozen=True, slots=True)
class Record:
    """Where one record lies on disk, and how it is checked. `offset` counts from the file's first byte."""

    layout_id: str
    parts: tuple[Part, ...]
    file: str
    offset: int
    nbytes: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file of the store that holds no records: configuration, tokenizer."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of one store."""

    model: ModelFacts
    schemes: TensorSchemes
    solver: str
    experts: dict[ExpertKey, Record]
    dense: dict[str, Record]
    files: tuple[SideFile, ...]
    weight_errors: dict[str, tuple[float, ...]] = field(default_factory=dict)  # by record: ||w - ŵ|| / ||w|| by part
    read_from: bytes | None = field(default=None, init=False, compare=False, repr=False)  # the bytes, digest and all

    @property
    def experts_nbytes(self) -> int:
        """The bytes of all experts' records."""
        return sum(record.nbytes for record in self.experts.values())

    @property
    def dense_nbytes(self) -> int:
        """The bytes of all dense records."""
        return sum(record.nbytes for record in self.dense.values())

    @property
    def digest(self) -> str:
        """The sha256 that names this content, in hex."""
        # What it was read from has been checked: its head is right.
        return _digest_at_head(dump_manifest(self))


def dump_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of manifest.json: those it was read from, whatever this version would have written."""
    if manifest.read_from is not None:
        return manifest.read_from
    body = _canonical(_document(manifest))
    return _HEAD.replace(b"?", hashlib.sha256(body).hexdigest().encode()) + body[1:]


def manifest_digest(data: bytes) -> str:
    """Return the digest of a manifest's bytes without parsing them; raise ManifestError if it is not theirs."""
    if len(data) > MANIFEST_NBYTES_MAX:
        raise ManifestError(f"{MANIFEST_FILE}: more than the {MANIFEST_NBYTES_MAX} bytes that are allowed")
    start, end = _HEAD.split(b"?")
    rest = data[len(start) + 64 :]
    if not data.startswith(start) or not rest.startswith(end):
        raise ManifestError(f"{MANIFEST_FILE}: it does not begin with a digest; this is no store's manifest")
    digest = hashlib.sha256(b"{" + rest[len(end) :]).hexdigest()
    if digest != _digest_at_head(data):
        raise ManifestError(f"{MANIFEST_FILE}: its digest does not match its content; the file was changed or cut")
    return digest


def _digest_at_head(data: bytes) -> str:
    start = _HEAD.index(b"?")
    return data[start : start + 64].decode("ascii", errors="replace")


def load_manifest(data: bytes) -> Manifest:
    """Return the manifest in those bytes; raise ManifestError unless it is whole, bounded and of this format."""
    manifest_digest(data)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{MANIFEST_FILE}: not JSON ({error})") from None
    _check_format_version(document)
    manifest = _read_manifest(document)
    # Set behind the constructor's back, so that a changed copy does not inherit it.
    object.__setattr__(manifest, "read_from", data)
    return manifest


def _document(manifest: Manifest) -> dict[str, object]:
    return {
        "format_version": STORE_FORMAT_VERSION,
        "model": _plain(manifest.model),
        "schemes": _plain(manifest.schemes),
        "solver": manifest.solver,
        "experts": [[*key, *_plain_record(record)] for key, record in manifest.experts.items()],
        "dense": [[name, *_plain_record(record)] for name, record in manifest.dense.items()],
        "files": [_plain(file) for file in manifest.files],
        "weight_errors": manifest.weight_errors,
    }


def _canonical(document: object) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _plain(record: object) -> dict[str, object]:
    return {item.name: getattr(record, item.name) for item in fields(record)}  # type: ignore[arg-type]


def _plain_record(record: Record) -> list[object]:
    parts = [[part.name, part.rows, part.cols, part.scheme] for part in record.parts]
    return [record.layout_id, parts, record.file, record.offset, record.nbytes, record.xxh3_128]


def _check_format_version(document: dict[str, object]) -> None:
    version = document.get("format_version")
    if version != STORE_FORMAT_VERSION:
        raise ManifestError(
            f"{MANIFEST_FILE}: store format version {version!r}, this expertd reads version {STORE_FORMAT_VERSION}; "
            "quantize the checkpoint again"
        )


def _read_manifest(document: dict[str, object]) -> Manifest:
    model = _read_flat(ModelFacts, "model", document.get("model"))
    experts: dict[ExpertKey, Record] = {}
    for item in _list(document, "experts", _EXPERTS_MAX):
        key, record = _read_expert(item, model)
        if key in experts:
            raise ManifestError(f"{key}: listed twice")
        experts[key] = record
    expected = model.n_layers * model.n_experts
    if not expected:
        raise ManifestError(f"model: {model.n_layers} layers of {model.n_experts} experts, at least one is expected")
    if len(experts) != expected:
        raise ManifestError(f"experts: {len(experts)} listed, {model.n_layers} x {model.n_experts} expected")
    dense: dict[str, Record] = {}
    for item in _list(document, "dense", _DENSE_MAX):
        name, record = _read_dense(item)
        if name in dense:
            raise ManifestError(f"{name}: listed twice")
        dense[name] = record
    schemes = _read_flat(TensorSchemes, "schemes", document.get("schemes"))
    _guarded("schemes", lambda: [scheme_named(getattr(schemes, field.name)) for field in fields(schemes)])
    return Manifest(
        model=model,
        schemes=schemes,
        solver=_text(document.get("solver"), "solver"),
        experts=experts,
        dense=dense,
        files=tuple(_read_side_file(item) for item in _list(document, "files", _FILES_MAX)),
        weight_errors=_read_weight_errors(
            document.get("weight_errors", {}), {str(key): record for key, record in experts.items()} | dense
        ),
    )


def _read_weight_errors(item: object, records: dict[str, Record]) -> dict[str, tuple[float, ...]]:
    if not isinstance(item, dict):
        raise ManifestError("weight_errors: an object of lists is expected")
    errors = {}
    for name, values in item.items():
        if name not in records:
            raise ManifestError(f"weight_errors: {name!r:.80} is no record of this store")
        if not isinstance(values, list) or len(values) != len(records[name].parts):
            n_parts = len(records[name].parts)
            raise ManifestError(f"weight_errors of {name}: a list of {n_parts}, one for each part, is expected")
        errors[name] = tuple(_error(value, f"weight_errors of {name}") for value in values)
    return errors


def _read_expert(item: object, model: ModelFacts) -> tuple[ExpertKey, Record]:
    if not isinstance(item, list) or len(item) != 8:
        raise ManifestError("experts: an item is no list of 8")
    key = ExpertKey(_count(item[0], "layer", model.n_layers - 1), _count(item[1], "expert", model.n_experts - 1))
    return key, _read_record(str(key), item[2:])


def _read_dense(item: object) -> tuple[str, Record]:
    if not isinstance(item, list) or len(item) != 7:
        raise ManifestError("dense: an item is no list of 7")
    name = _text(item[0], "dense name")
    return name, _read_record(name, item[1:])


def _read_record(name: str, values: list[object]) -> Record:
    layout_id, plain_parts, file, offset, nbytes, checksum = values
    parts, expected = _read_parts(name, _text(layout_id, f"{name}: layout_id"), plain_parts)
    record = Record(
        layout_id=str(layout_id),
        parts=parts,
        file=_matching(file, f"{name}: file", _FILE_NAME),
        offset=_count(offset, f"{name}: offset", 1 << 62),
        nbytes=_count(nbytes, f"{name}: nbytes", 1 << 40),
        xxh3_128=_matching(checksum, f"{name}: xxh3_128", _HEX32),
    )
    if record.nbytes != expected:
        raise ManifestError(f"{name}: {record.nbytes} bytes, its parts need {expected}")
    if record.offset % PAGE_NBYTES:
        raise ManifestError(f"{name}: offset {record.offset} is not a multiple of {PAGE_NBYTES}")
    return record


def _read_parts(name: str, layout_id: str, plain_parts: object) -> tuple[tuple[Part, ...], int]:
    """Return the parts of a record and the length they need."""
    if not isinstance(plain_parts, list) or not 0 < len(plain_parts) <= _PARTS_MAX:
        raise ManifestError(f"{name}: 1 to {_PARTS_MAX} parts are expected")
    try:
        return _checked_parts(layout_id, tuple(map(tuple, plain_parts)))
    except TypeError:
        raise ManifestError(f"{name}: a part is no list of name, rows, cols and scheme") from None
    except (ManifestError, LayoutError, UnknownLayout, UnknownScheme) as error:
        raise ManifestError(f"{name}: {error}") from None


# A model's experts are alike: their parts are checked once.
@functools.lru_cache(maxsize=1024)
def _checked_parts(layout_id: str, plain_parts: tuple[tuple[object, ...], ...]) -> tuple[tuple[Part, ...], int]:
    parts = tuple(_read_part(item) for item in plain_parts)
    return parts, record_nbytes(layout_id, parts)


def _read_part(item: tuple[object, ...]) -> Part:
    if len(item) != 4:
        raise ManifestError("a part is no list of name, rows, cols and scheme")
    name = _text(item[0], "part name")
    rows, cols = _count(item[1], f"rows of {name}"), _count(item[2], f"cols of {name}")
    return Part(name, rows, cols, _text(item[3], f"scheme of {name}"))


def _read_side_file(item: object) -> SideFile:
    side_file = _read_flat(SideFile, "files", item)
    _matching(side_file.name, "files: name", _FILE_NAME)
    _matching(side_file.sha256, f"{side_file.name}: sha256", _HEX64)
    return side_file


def _read_flat(cls: type[_Record], name: str, item: object) -> _Record:
    """Return a flat dataclass of texts and counts; raise ManifestError for a missing, unknown or mistyped field."""
    kinds = {field.name: field.type for field in fields(cls)}  # type: ignore[arg-type]
    if not isinstance(item, dict) or set(item) != set(kinds):
        raise ManifestError(f"{name}: the fields {', '.join(kinds)} are expected")
    values = {
        field: _text(item[field], f"{name}.{field}") if kind in (str, "str") else _count(item[field], f"{name}.{field}")
        for field, kind in kinds.items()
    }
    return cls(**values)


def _list(document: dict[str, object], name: str, length_max: int) -> list[object]:
    value = document.get(name)
    if not isinstance(value, list) or len(value) > length_max:
        raise ManifestError(f"{name}: a list of at most {length_max} is expected")
    return value


def _count(value: object, name: str, maximum: int = 1 << 40) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= maximum:
        raise ManifestError(f"{name}: a whole number from 0 to {maximum} is expected, {value!r:.40} came")
    return value


def _error(value: object, name: str) -> float:
    # A NaN compares false with everything; JSON's own ones are read by Python, and refused here.
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= _ERROR_MAX:
        raise ManifestError(f"{name}: a number from 0 to {_ERROR_MAX:g} is expected, {value!r:.40} came")
    return float(value)


def _text(value: object, name: str) -> str:
    # What cannot be printed could not be sent either (lone surrogates), or would play tricks on a terminal.
    if not isinstance(value, str) or not 0 < len(value) <= 256 or not value.isprintable():
        raise ManifestError(f"{name}: a text of 1 to 256 characters, all printable, is expected, {value!r:.40} came")
    return value


def _matching(value: object, name: str, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.match(value):
        raise ManifestError(f"{name}: {value!r:.60} is not of the form {pattern.pattern}")
    return value


def _guarded(name: str, check: Callable[[], _Record]) -> _Record:
    """Return what check returns; say of which record an unknown or impossible layout is."""
    try:
        return check()
    except (LayoutError, UnknownLayout, UnknownScheme) as error:
        raise ManifestError(f"{name}: {error}") from None
