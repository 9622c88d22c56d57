from pathlib import Path

import pytest

from protocol.errors import RuntimeDirError
from protocol.runtime_dir import RuntimeDir, check_runtime_dir, create_runtime_dir, runtime_dir


def test_the_environment_chooses_the_place_in_order(tmp_path: Path) -> None:
    both = {"EXPERTD_RUNTIME_DIR": str(tmp_path / "own"), "XDG_RUNTIME_DIR": str(tmp_path / "xdg")}

    assert runtime_dir(both, 7).path == tmp_path / "own"
    assert runtime_dir({"XDG_RUNTIME_DIR": str(tmp_path / "xdg")}, 7).path == tmp_path / "xdg" / "expertd"
    assert runtime_dir({}, 4_000_000).path == Path("/tmp/expertd-4000000")  # noqa: S108


def test_a_made_directory_is_closed_to_others_whatever_the_umask(runtime: RuntimeDir) -> None:
    create_runtime_dir(runtime)
    create_runtime_dir(runtime)

    assert runtime.path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o777])
def test_a_directory_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    directory = RuntimeDir(tmp_path / "run")
    directory.path.mkdir()
    directory.path.chmod(mode)

    with pytest.raises(RuntimeDirError, match=f"mode {mode:04o}, 0700 was expected"):
        create_runtime_dir(directory)


def test_a_link_to_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "run").symlink_to(tmp_path / "real")

    with pytest.raises(RuntimeDirError, match="a link or file is there"):
        check_runtime_dir(RuntimeDir(tmp_path / "run"))


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()

    with pytest.raises(RuntimeDirError, match="directory was expected"):
        create_runtime_dir(RuntimeDir(tmp_path / "run"))


def test_a_path_too_long_for_a_socket_is_refused_with_the_remedy(tmp_path: Path) -> None:
    directory = RuntimeDir(tmp_path / ("x" * 100))

    with pytest.raises(RuntimeDirError, match="set EXPERTD_RUNTIME_DIR to a shorter one"):
        create_runtime_dir(directory)
