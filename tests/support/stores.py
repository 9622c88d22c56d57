"""Stores of random bytes: enough for a daemon, which never looks into a record. Quick, and without torch."""

import hashlib
import json
import os
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from protocol.handles import ExpertKey
from protocol.layout import PAGE_NBYTES, R8, Part, record_nbytes
from protocol.manifest import (
    DENSE_FILE,
    MANIFEST_FILE,
    Manifest,
    ModelFacts,
    Record,
    SideFile,
    TensorSchemes,
    dump_manifest,
)

EXPERTS_FILE = "experts-00001.safetensors"


def write_random_store(
    folder: Path, *, seed: int = 0, n_layers: int = 2, n_experts: int = 4, hidden: int = 64, intermediate: int = 128
) -> Manifest:
    """Write a store whose records are random bytes with right checksums; return its manifest.

    No other process writes one of that digest: a daemon that loads it would wait for who maps it there.
    """
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    expert_parts = (
        Part("w1", intermediate, hidden, "4bit-g64"),
        Part("w3", intermediate, hidden, "4bit-g64"),
        Part("w2", hidden, intermediate, "4bit-g64"),
    )
    dense_parts: dict[str, tuple[Part, ...]] = {
        "norm": (Part("norm", 1, hidden, "bf16"),),
        "embed_tokens": (Part("embed_tokens", 96, hidden, "bf16"),),
    }
    keys = [ExpertKey(layer, expert) for layer in range(n_layers) for expert in range(n_experts)]
    experts = _write_file(folder, EXPERTS_FILE, {str(key): expert_parts for key in keys}, rng)
    dense = _write_file(folder, DENSE_FILE, dense_parts, rng)
    config = json.dumps({"model_type": "mixtral", "made_by": os.getpid()}).encode()
    (folder / "config.json").write_bytes(config)
    manifest = Manifest(
        model=ModelFacts("mixtral", n_layers, n_experts, 2, hidden, intermediate, "silu", "softmax", "top_k", 0),
        schemes=TensorSchemes("4bit-g64", "bf16", "bf16", "bf16"),
        solver="none",
        experts={key: experts[str(key)] for key in keys},
        dense=dense,
        files=(SideFile("config.json", len(config), hashlib.sha256(config).hexdigest()),),
    )
    (folder / MANIFEST_FILE).write_bytes(dump_manifest(manifest))
    return manifest


def signed_manifest(document: dict[str, Any]) -> bytes:
    """Return the bytes of a manifest with the digest of its content: damage that a digest does not show."""
    unsigned = {key: value for key, value in document.items() if key != "digest"}
    return signed_body(json.dumps(unsigned, sort_keys=True, separators=(",", ":")).encode())


def signed_body(body: bytes) -> bytes:
    """Return what begins with a brace, with its digest as the first key."""
    return b'{"digest":"' + hashlib.sha256(body).hexdigest().encode() + b'",' + body[1:]


def flip_byte(path: Path, offset: int) -> None:
    """Damage one byte of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))


@contextmanager
def dense_damaged(store: Path, manifest: Manifest) -> Iterator[None]:
    """Damage the store's dense weights on disk meanwhile: a daemon that reads them then refuses the store."""
    record = next(iter(manifest.dense.values()))
    flip_byte(store / record.file, record.offset)
    try:
        yield
    finally:
        flip_byte(store / record.file, record.offset)


def _write_file(folder: Path, name: str, tensors: dict[str, tuple[Part, ...]], rng: random.Random) -> dict[str, Record]:
    header: dict[str, object] = {}
    end = 0
    for tensor, parts in tensors.items():
        nbytes = record_nbytes(R8, parts)
        header[tensor] = {"dtype": "U8", "shape": [nbytes], "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    data_start = -(-(8 + len(text)) // PAGE_NBYTES) * PAGE_NBYTES
    text = text.ljust(data_start - 8)
    records = {}
    with (folder / name).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor, parts in tensors.items():
            data = rng.randbytes(record_nbytes(R8, parts))
            records[tensor] = Record(R8, parts, name, file.tell(), len(data), xxhash.xxh3_128_hexdigest(data))
            file.write(data)
    return records
