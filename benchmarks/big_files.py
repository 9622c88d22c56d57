"""Stores and GGUF files of random weights, kept in the cache; sizes are said before they are written.

A file's name says what its bytes depend on, sources included, so that a stale one is not found; it is removed when its
successor is written. Owns the folder's content but for the compiled libraries.
"""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.errors import CommandFailed, NoRoom
from expertd.convert.config import QuantizeConfig
from tools.geometry import GEOMETRIES, MIXTRAL_8X7B
from tools.synthetic_store.store import plan_synthetic_store

ROOT = Path(__file__).resolve().parents[1]
_STORE_SOURCES = ("protocol/layout.py", "protocol/manifest.py", "tools/geometry.py", "tools/synthetic_store")
_GGUF_SOURCES = ("tools/geometry.py", "tools/gguf_file")
_GGUF_NBITS = {"Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5}

# The type of llama.cpp nearest to each of our schemes.
NEAREST_TYPE = {"4bit-g64": "Q4_K", "3bit-g64": "Q3_K", "2bit-g16": "Q2_K"}


def synthetic_store(folder: Path, n_layers: int, scheme: str) -> Path:
    """Return a store of Mixtral's geometry with so many layers, writing it if need be; raise BenchmarkError."""
    path = folder / f"store-{n_layers}x-{scheme}-{sources_key(_STORE_SOURCES)}"
    if not (path / "manifest.json").is_file():
        geometry = replace(GEOMETRIES[MIXTRAL_8X7B], n_layers=n_layers)
        _make_room(path, plan_synthetic_store(geometry, QuantizeConfig(experts=scheme)).nbytes)
        arguments = ["--layers", str(n_layers), "--experts-scheme", scheme]
        run_tool("tools.synthetic_store", str(path), *arguments)
    return path


def synthetic_gguf(folder: Path, n_layers: int, type_name: str) -> Path:
    """Return a GGUF of Mixtral's geometry with so many layers, writing it if need be; raise BenchmarkError."""
    path = folder / f"gguf-{n_layers}x-{type_name}-{sources_key(_GGUF_SOURCES)}.gguf"
    if not path.is_file():
        _make_room(path, _gguf_nbytes(n_layers, type_name))
        run_tool("tools.gguf_file", "synthetic", str(path), "--layers", str(n_layers), "--experts-type", type_name)
    return path


def same_weights(folder: Path, n_layers: int) -> tuple[Path, Path]:
    """Return a store and a GGUF of exactly the same 4-bit weights in Mixtral's geometry; raise BenchmarkError.

    Of the vocabulary it has as much as such a model has of its layers: a few layers with all of it would be mostly
    embeddings and head.
    """
    key = sources_key((*_STORE_SOURCES, *_GGUF_SOURCES))
    store, gguf = folder / f"same-{n_layers}x-{key}", folder / f"same-{n_layers}x-{key}.gguf"
    full = GEOMETRIES[MIXTRAL_8X7B]
    vocab = full.vocab * n_layers // full.n_layers
    geometry = replace(full, n_layers=n_layers, vocab=vocab)
    stale = [old for old in folder.glob(f"same-{n_layers}x-*") if old not in (store, gguf)]
    if not (store / "manifest.json").is_file():
        make_room(store, plan_synthetic_store(geometry, QuantizeConfig()).nbytes, stale)
        run_tool("tools.synthetic_store", str(store), "--layers", str(n_layers), "--vocab", str(vocab), "--for-gguf")
    if not gguf.is_file():
        make_room(gguf, _gguf_nbytes(n_layers, "Q4_K"), ())
        run_tool("tools.gguf_file", "store", str(store), str(gguf))
    return store, gguf


def run_tool(module: str, *arguments: str) -> None:
    """Run one of our tools; raise CommandFailed with what it said last."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise CommandFailed(f"{module}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


def make_room(path: Path, nbytes: int, stale: Iterable[Path]) -> None:
    """Say what will be written, remove what it replaces, and see that it fits; raise NoRoom."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in stale:
        print(f"removing {old}, which is of another version", file=sys.stderr)
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    free = shutil.disk_usage(path.parent).free
    print(f"writing {path}: {nbytes / 1e9:.1f} GB ({free / 1e9:.1f} GB are free)", file=sys.stderr)
    if free < nbytes:
        raise NoRoom(
            f"{path}: {nbytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; make room, or set XDG_CACHE_HOME "
            "to a folder on a larger disk"
        )


def sources_key(sources: Sequence[str]) -> str:
    """Return what tells two versions of those source files apart."""
    digest = hashlib.sha256()
    for source in sources:
        path = ROOT / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:8]


def _make_room(path: Path, nbytes: int) -> None:
    stem = path.name.removesuffix(".gguf").rpartition("-")[0]
    make_room(path, nbytes, [old for old in path.parent.glob(f"{stem}-*") if old != path])


def _gguf_nbytes(n_layers: int, type_name: str) -> int:
    geometry = GEOMETRIES[MIXTRAL_8X7B]
    n_weights = 3 * geometry.experts * geometry.hidden * geometry.intermediate
    # Attention in Q4_K, embeddings in Q4_K, head in Q6_K: a tenth of a layer, and twice 0.1 GB.
    return int(n_layers * (n_weights * _GGUF_NBITS[type_name] / 8 + 30e6) + 2e8)
