"""C sources compiled when they are needed, kept in the cache. Owns the compiler's command line; knows no function."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.errors import CompileFailed

# The fastest first: a compiler that does not know the first gets the second.
_NATIVE = (("-march=native",), ())


def compiled(source: Path, folder: Path, *, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """Return the library made of a C source, compiled into the folder unless it lies there; raise CompileFailed."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise CompileFailed("no C compiler was found: install one (gcc or clang), or name it in CC")
    try:
        key = hashlib.sha256(repr((source.read_bytes(), compiler, tuple(flags))).encode()).hexdigest()[:16]
    except OSError as error:
        raise CompileFailed(f"{source}: cannot be read ({error.strerror})") from None
    library = folder / f"{source.stem}-{key}.so"
    if not library.exists():
        _compile([compiler, "-O3", "-shared", "-fPIC", *flags], source, library)
    return ctypes.CDLL(str(library))


def _compile(command: Sequence[str], source: Path, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        for native in _NATIVE:
            done = subprocess.run(
                [*command, *native, str(source), "-o", str(made), "-lm"], capture_output=True, text=True, check=False
            )
            if done.returncode == 0:
                made.rename(library)
                return
    complaint = done.stderr.strip().splitlines() or ["no message"]
    raise CompileFailed(f"{source}: {command[0]} refused it: {complaint[0]}")
