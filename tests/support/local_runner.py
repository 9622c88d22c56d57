"""The command `runner` over files instead of a daemon: python -m tests.support.local_runner ARGUMENTS."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from runner.cli import main
from runner.config import RunnerConfig
from tests.support.local_store import LocalStore


def start_runner(
    command: str, store: Path, *arguments: str, stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Start the command on a store, its output in pipes, without the user's configuration."""
    return subprocess.Popen(
        [sys.executable, "-m", __name__, *command.split(), "--store", str(store), *arguments],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"XDG_CONFIG_HOME": "/nonexistent"},
    )


@contextmanager
def attach(store_dir: Path, settings: RunnerConfig) -> Iterator[LocalStore]:  # noqa: ARG001  # runner.client's signature
    yield LocalStore(store_dir)


class LocalClient(ModuleType):
    """Stands where runner.client would, with the same interface."""

    attach = staticmethod(attach)


if __name__ == "__main__":
    sys.modules["runner.client"] = LocalClient("runner.client")
    main()
