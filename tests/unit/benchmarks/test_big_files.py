import shutil
from pathlib import Path

import pytest

from benchmarks.big_files import make_room, sources_key
from benchmarks.errors import NoRoom


def test_what_will_be_written_is_said_and_what_it_replaces_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store-old").mkdir()
    (tmp_path / "gguf-old").touch()

    make_room(tmp_path / "store-new", 1_500_000, [tmp_path / "store-old", tmp_path / "gguf-old"])

    said = capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert f"writing {tmp_path / 'store-new'}: 0.0 GB" in said
    assert f"removing {tmp_path / 'store-old'}" in said


def test_a_disk_too_small_is_refused_with_the_remedy(tmp_path: Path) -> None:
    nbytes = shutil.disk_usage(tmp_path).total * 2

    with pytest.raises(NoRoom, match="make room, or set XDG_CACHE_HOME"):
        make_room(tmp_path / "store", nbytes, [])


def test_a_file_s_name_depends_on_the_sources_that_make_it() -> None:
    assert sources_key(["tools/geometry.py"]) == sources_key(["tools/geometry.py"])
    assert sources_key(["tools/geometry.py"]) != sources_key(["tools/geometry.py", "tools/gguf_file"])
