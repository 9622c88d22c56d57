"""A pytest plugin that tests another build of the C library: `-p tests.support.other_kernels --kernels-from FOLDER`."""

from pathlib import Path

import pytest

import quant
from quant.library import LIBRARY_FILE, library


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernels-from", metavar="FOLDER", type=Path, required=True, help="where the library was built")


def pytest_configure(config: pytest.Config) -> None:
    """Have that folder's library found before the installed one; raise UsageError if there is none."""
    folder: Path = config.getoption("--kernels-from").resolve()
    if not (folder / LIBRARY_FILE).is_file():
        raise pytest.UsageError(f"{folder} holds no {LIBRARY_FILE}")
    quant.__path__.insert(0, str(folder))
    library.cache_clear()
    library()
