"""The store of the demo, kept between runs. Owns the folder $XDG_CACHE_HOME/expertd/demo and what lies in it.

A store's name says what its bytes depend on: the configuration, the source model, and the sources of everything that
has a part in the bytes, versions included. So a stale store is not found, and is removed when its successor is built.
Who builds holds the folder's lock: a second demo waits for the first and then uses its store.
"""

import fcntl
import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.demo.commands import Commands, run_step
from tools.demo.errors import CacheError
from tools.demo_checkpoint.fetch import SMOLLM2

# The folders whose files decide the checkpoint's bytes, and those that decide the store's beyond them.
CHECKPOINT_SOURCES = ("tools/demo_checkpoint",)
STORE_SOURCES = ("protocol", "quant", "expertd/convert")
_SOURCE_SUFFIXES = (".py", ".npz")

CHECKPOINT_NBYTES = 1_460_000_000
STORE_NBYTES = 500_000_000

# Names of ours in the folder; a name with a dot before it is what an interrupted writer left.
_OURS = ("store-", "checkpoint-", ".store-", ".checkpoint-")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the demo's store is made from; `gguf` is None when the packaged source model is downloaded."""

    root: Path
    config: Path
    gguf: Path | None


@dataclass(frozen=True, slots=True)
class CachedPaths:
    """Where the store of one recipe lies, and where its checkpoint lies while the store is made."""

    store: Path
    checkpoint: Path


def cache_folder(environ: Mapping[str, str], home: Path) -> Path:
    """Return the demo's cache folder; a relative XDG_CACHE_HOME does not count, as its specification says."""
    configured = Path(environ.get("XDG_CACHE_HOME", ""))
    base = configured if configured.is_absolute() else home / ".cache"
    return base / "expertd" / "demo"


def cached_paths(folder: Path, recipe: Recipe) -> CachedPaths:
    """Return where the recipe's store and checkpoint lie; raise CacheError if its files cannot be read."""
    try:
        source_sha256 = SMOLLM2.sha256 if recipe.gguf is None else _sha256(recipe.gguf)
        checkpoint_key = _key([source_sha256, *_source_digests(recipe.root, CHECKPOINT_SOURCES)])
        store_key = _key([checkpoint_key, _sha256(recipe.config), *_source_digests(recipe.root, STORE_SOURCES)])
    except OSError as error:
        raise CacheError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return CachedPaths(store=folder / f"store-{store_key}", checkpoint=folder / f"checkpoint-{checkpoint_key}")


def is_store(path: Path) -> bool:
    """Whether a finished store lies there: it appears whole, its manifest with it."""
    return (path / "manifest.json").is_file()


def ready_store(folder: Path, recipe: Recipe, commands: Commands, *, keep_checkpoint: bool) -> Path:
    """Return the recipe's store, building it if it is not cached; raise StepFailed or CacheError."""
    paths = cached_paths(folder, recipe)
    if is_store(paths.store):
        print(f"The demo's store is cached: {paths.store}")
        return paths.store
    with _locked(folder):
        if not is_store(paths.store):
            _remove_others(folder, paths)
            _check_room(folder, paths)
            _build(paths, recipe, commands)
            if not keep_checkpoint:
                shutil.rmtree(paths.checkpoint)
    return paths.store


def _build(paths: CachedPaths, recipe: Recipe, commands: Commands) -> None:
    if not paths.checkpoint.is_dir():
        source = [] if recipe.gguf is None else ["--gguf", str(recipe.gguf)]
        run_step([*commands.demo_checkpoint, str(paths.checkpoint), *source])
    config = ["--config", str(recipe.config)]
    run_step([*commands.expertd, "quantize", str(paths.checkpoint), str(paths.store), *config])


def _check_room(folder: Path, paths: CachedPaths) -> None:
    checkpoint_nbytes = 0 if paths.checkpoint.is_dir() else CHECKPOINT_NBYTES
    need = checkpoint_nbytes + STORE_NBYTES
    free = shutil.disk_usage(folder).free
    print(
        f"Building the demo's store in {folder}: {need / 1e9:.1f} GB of disk for a minute or two, "
        f"{STORE_NBYTES / 1e9:.1f} GB stay ({free / 1e9:.1f} GB are free)."
    )
    if free < need:
        raise CacheError(
            f"{folder}: {need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; "
            "make room, or set XDG_CACHE_HOME to a folder on a larger disk"
        )


def _remove_others(folder: Path, paths: CachedPaths) -> None:
    for path in folder.iterdir():
        if path.name.startswith(_OURS) and path not in (paths.store, paths.checkpoint):
            print(f"removing {path}, which is of another version or was left unfinished")
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise CacheError(f"{folder}: cannot be used as a cache ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another demo is building the store; waiting for it.", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _source_digests(root: Path, folders: Sequence[str]) -> Iterator[str]:
    """Yield the name and checksum of every source file below those folders, in a fixed order."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in _SOURCE_SUFFIXES:
                yield path.relative_to(root).as_posix()
                yield _sha256(path)


def _key(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
