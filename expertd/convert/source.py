"""What a user calls a checkpoint: a local folder, or a repository on the Hub."""

import re
from collections.abc import Callable
from pathlib import Path

from expertd.convert.checkpoint import CheckpointFiles
from expertd.convert.errors import CheckpointError, ConfigError
from expertd.convert.hub import Hub
from expertd.convert.hub_repository import find_repository
from expertd.convert.local_folder import LocalFolder

_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.\-]{0,95}\Z")


def open_source(text: str, *, revision: str | None, discards: bool, say: Callable[[str], None]) -> CheckpointFiles:
    """Return the files that the text means: a folder where one is there, else a repository; raise ConvertError.

    `say` is given a line for the user when the Hub has to be asked again.
    """
    if Path(text).exists() or not _REPO_ID.match(text):
        if revision is not None or discards:
            option = "--discard-source" if discards else "--revision"
            raise ConfigError(f"{option}: {text} is no repository on the Hub; what is on this disk is left as it is")
        if not Path(text).exists():
            raise CheckpointError(
                f"{text}: no such folder; a folder or a repository on the Hub (owner/name) is expected"
            )
        return LocalFolder(Path(text))
    return find_repository(Hub(say=say), text, revision)
