import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from expertd.convert.errors import ConvertError, NoDiskSpace, NotAStore, StoreExists, WriteFailed
from expertd.convert.staging import check_target, disk_errors, staged


def make_store(path: Path, content: str = "old", **manifest: object) -> Path:
    path.mkdir()
    (path / "manifest.json").write_text(json.dumps({"format_version": 1, "digest": "d"} | manifest))
    (path / "dense.safetensors").write_text(content)
    (path / "experts-00001.safetensors").write_text(content)
    (path / "config.json").write_text("{}")
    return path


def content_of(path: Path) -> str:
    return (path / "dense.safetensors").read_text()


def names_in(path: Path) -> list[str]:
    return sorted(child.name for child in path.iterdir())


@contextmanager
def living(path: Path) -> Iterator[Path]:
    """Yield the directory with the lock that a living run holds on it."""
    fd = os.open(path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        os.close(fd)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "STORE"


def test_nothing_stands_at_the_place_until_the_commit(target: Path) -> None:
    with staged(target, force=False) as staging:
        (staging.path / "dense.safetensors").write_text("new")
        stood_before = target.exists()
        staging.commit(force=False)

    assert not stood_before
    assert content_of(target) == "new"
    assert names_in(target.parent) == ["STORE"]


def test_an_error_leaves_nothing(target: Path) -> None:
    def fail_half_way() -> None:
        with staged(target, force=False) as staging:
            (staging.path / "dense.safetensors").write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()

    assert names_in(target.parent) == []


def test_an_error_leaves_the_store_that_was_to_be_replaced(target: Path) -> None:
    make_store(target)

    with pytest.raises(ZeroDivisionError), staged(target, force=True):
        _ = 1 / 0

    assert content_of(target) == "old"
    assert names_in(target.parent) == ["STORE"]


def test_force_replaces_a_store(target: Path) -> None:
    make_store(target)

    with staged(target, force=True) as staging:
        (staging.path / "dense.safetensors").write_text("new")
        staging.commit(force=True)

    assert content_of(target) == "new"
    assert names_in(target) == ["dense.safetensors"]
    assert names_in(target.parent) == ["STORE"]


def test_force_replaces_a_store_of_another_format_version(target: Path) -> None:
    make_store(target, format_version=99)

    check_target(target, force=True)


def test_a_store_that_appears_meanwhile_is_not_replaced_without_force(target: Path) -> None:
    def lose_the_race() -> None:
        with staged(target, force=False) as staging:
            make_store(target)
            staging.commit(force=False)

    with pytest.raises(StoreExists):
        lose_the_race()

    assert content_of(target) == "old"
    assert names_in(target.parent) == ["STORE"]


def test_a_store_that_another_run_is_replacing_is_left_to_it(target: Path) -> None:
    make_store(target)

    with living(target), pytest.raises(StoreExists) as refusal, staged(target, force=True) as staging:
        staging.commit(force=True)

    assert str(refusal.value) == f"{target}: is being replaced by another run"
    assert content_of(target) == "old"


def test_an_existing_store_is_refused_without_force(target: Path) -> None:
    make_store(target)

    with pytest.raises(StoreExists) as refusal:
        check_target(target, force=False)

    assert str(refusal.value) == f"{target}: exists already; --force replaces a store"


def foreign_folder(target: Path) -> None:
    target.mkdir()
    (target / "thesis.tex").write_text("")


def plain_file(target: Path) -> None:
    target.write_text("")


def web_application(target: Path) -> None:
    target.mkdir()
    (target / "manifest.json").write_text('{"name": "app"}')


def damaged_manifest(target: Path) -> None:
    make_store(target)
    (target / "manifest.json").write_text("{")


@pytest.mark.parametrize("make", [foreign_folder, plain_file, web_application, damaged_manifest, Path.mkdir])
def test_what_is_no_store_is_not_replaced_even_with_force(target: Path, make: Callable[[Path], None]) -> None:
    make(target)

    with pytest.raises(NotAStore) as refusal:
        check_target(target, force=True)

    assert str(refusal.value) == (
        f"{target}: is no store, so --force does not replace it; choose another place or remove it"
    )


@pytest.mark.parametrize("name", ["notes.txt", "experts-1.safetensors", ".hidden", "model.safetensors"])
def test_a_store_that_holds_something_else_is_not_replaced_even_with_force(target: Path, name: str) -> None:
    make_store(target)
    (target / name).write_text("mine")

    with pytest.raises(NotAStore) as refusal:
        check_target(target, force=True)

    assert str(refusal.value) == (
        f"{target}: holds {name!r}, which is no part of a store, so --force does not replace it"
    )


def test_a_place_in_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "none" / "STORE"

    with pytest.raises(WriteFailed) as refusal:
        check_target(target, force=False)

    assert str(refusal.value) == f"{target}: its directory {target.parent} does not exist"


def test_what_a_dead_run_left_is_cleared_away(target: Path) -> None:
    dead = target.parent / ".STORE.partial-0123abcd"
    dead.mkdir()
    (dead / "dense.safetensors").write_text("half")

    with staged(target, force=False):
        present = dead.exists()

    assert not present


def test_what_a_living_run_builds_is_left_alone(target: Path) -> None:
    path = target.parent / ".STORE.partial-0123abcd"
    path.mkdir()

    with living(path), staged(target, force=False):
        pass

    assert path.exists()


@pytest.mark.parametrize("name", [".STORE.partial-xyz", ".STORE2.partial-0123abcd", "STORE.partial-0123abcd"])
def test_what_only_resembles_the_rest_of_a_dead_run_is_left_alone(target: Path, name: str) -> None:
    (target.parent / name).mkdir()

    with staged(target, force=False):
        pass

    assert (target.parent / name).exists()


def test_a_store_that_a_dead_run_had_moved_aside_is_back_before_anything_else(target: Path) -> None:
    make_store(target.parent / ".STORE.old-0123abcd")

    with pytest.raises(StoreExists), staged(target, force=False):
        pass

    assert content_of(target) == "old"
    assert names_in(target.parent) == ["STORE"]


def test_a_store_that_a_dead_run_had_replaced_is_removed(target: Path) -> None:
    make_store(target, "new")
    make_store(target.parent / ".STORE.old-0123abcd")

    with staged(target, force=True):
        pass

    assert content_of(target) == "new"
    assert names_in(target.parent) == ["STORE"]


def test_a_directory_that_may_not_be_written_is_refused() -> None:
    target = Path("/proc/STORE")

    with pytest.raises(WriteFailed) as refusal, staged(target, force=False):
        pass

    assert str(refusal.value).startswith("/proc/STORE: cannot be written (")


@pytest.mark.parametrize(
    ("number", "kind", "expected"),
    [
        (
            errno.ENOSPC,
            NoDiskSpace,
            "STORE: the file system became full (No space left on device)",
        ),
        (errno.EDQUOT, NoDiskSpace, "STORE: the file system became full (Disk quota exceeded)"),
        (errno.EIO, WriteFailed, "STORE: cannot be written (Input/output error)"),
    ],
)
def test_an_error_of_the_file_system_is_one_line(number: int, kind: type[ConvertError], expected: str) -> None:
    with pytest.raises(kind) as refusal, disk_errors(Path("STORE")):
        raise OSError(number, os.strerror(number))

    assert str(refusal.value) == expected


def test_what_was_kept_is_found_by_a_run_that_makes_the_same(target: Path) -> None:
    with staged(target, force=False, made_of="a") as first:
        (first.path / "dense.safetensors").write_text("half")
        first.keeps = True
    with staged(target, force=False, made_of="a") as second:
        found = second.is_resumed, content_of(second.path)
        second.commit(force=False)

    assert found == (True, "half")
    assert names_in(target.parent) == ["STORE"]


@pytest.mark.parametrize("made_of", ["b", None])
def test_what_was_kept_is_cleared_away_by_a_run_that_makes_something_else(target: Path, made_of: str | None) -> None:
    with staged(target, force=False, made_of="a") as first:
        first.keeps = True

    with staged(target, force=False, made_of=made_of) as second:
        present = first.folder.exists()

    assert not second.is_resumed
    assert not present


def test_what_a_run_that_nobody_can_go_on_with_left_is_cleared_away(target: Path) -> None:
    with staged(target, force=False) as first:
        first.keeps = True

    with staged(target, force=False) as second:
        present = first.folder.exists()

    assert not second.is_resumed
    assert not present


def test_of_two_that_made_the_same_one_is_gone_on_with(target: Path) -> None:
    with (
        staged(target, force=False, made_of="a") as first,
        staged(target, force=False, made_of="a") as second,
    ):
        are_apart = first.folder != second.folder
        first.keeps = second.keeps = True

    with staged(target, force=False, made_of="a") as third:
        is_resumed, names = third.is_resumed, names_in(target.parent)

    assert are_apart
    assert is_resumed
    assert names == [third.folder.name]


def test_a_folder_that_was_killed_before_it_said_what_it_is_made_of_is_cleared_away(target: Path) -> None:
    (target.parent / ".STORE.partial-0123abcd" / "store").mkdir(parents=True)

    with staged(target, force=False, made_of="") as staging:
        names = names_in(target.parent)

    assert names == [staging.folder.name]
    assert not staging.is_resumed
