from pathlib import Path

import pytest

from expertd.convert.errors import CheckpointError, ConfigError
from expertd.convert.local_folder import LocalFolder
from expertd.convert.source import open_source


def test_a_folder_goes_before_a_repository_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    assert open_source("owner/name", revision=None, discards=False, say=print) == LocalFolder(Path("owner/name"))


@pytest.mark.parametrize("text", ["nowhere", "/no/such/folder", "./a/b", "a/b/c", "owner/na me", "-x/y"])
def test_what_is_neither_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(CheckpointError) as refusal:
        open_source(text, revision=None, discards=False, say=print)

    assert str(refusal.value).startswith(f"{text}: no such folder; ")


@pytest.mark.parametrize(
    ("revision", "discards", "option"), [("v1", False, "--revision"), (None, True, "--discard-source")]
)
def test_a_folder_has_no_revisions_and_is_never_deleted(
    tmp_path: Path, *, revision: str | None, discards: bool, option: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        open_source(str(tmp_path), revision=revision, discards=discards, say=print)

    assert str(refusal.value) == (
        f"{option}: {tmp_path} is no repository on the Hub; what is on this disk is left as it is"
    )
