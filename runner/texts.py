"""Texts from outside: a file, stdin, the command line. Bounded, and UTF-8 or refused with the byte that is not."""

import sys
from pathlib import Path

from runner.errors import PromptInvalid

# Beyond what any context holds; a text is read whole.
_NBYTES_MAX = 1 << 28


def read_text(path: Path) -> str:
    """Return the text in that file; raise PromptInvalid."""
    try:
        with path.open("rb") as file:
            return _decoded(file.read(_NBYTES_MAX + 1), str(path))
    except OSError as error:
        raise PromptInvalid(f"{path}: {error.strerror}") from None


def read_stdin() -> str:
    """Return the prompt that stdin holds, without the newline at its end; raise PromptInvalid."""
    try:
        data = sys.stdin.buffer.read(_NBYTES_MAX + 1)
    except OSError as error:
        raise PromptInvalid(f"the prompt: stdin: {error.strerror}") from None
    return _decoded(data, "the prompt").removesuffix("\n")


def check_text(text: str, name: str) -> None:
    """Raise PromptInvalid for what was typed in bytes that are no UTF-8: Python hands them over as half characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptInvalid(f"{name}: not UTF-8 (byte {len(text[: error.start].encode())})") from None


def _decoded(data: bytes, name: str) -> str:
    if len(data) > _NBYTES_MAX:
        raise PromptInvalid(f"{name}: more than {_NBYTES_MAX} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise PromptInvalid(f"{name}: not UTF-8 (byte {error.start})") from None
