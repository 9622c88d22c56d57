"""Reads a trace from a file that anybody may have made, in either format; every complaint names the line.

The first byte tells the formats apart: JSON lines start with a brace, plain text with a digit. Memory is bounded by
the length of the file, which is bounded here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from runner.traces.errors import TraceInvalid
from runner.traces.json_lines import parse_header, parse_token
from runner.traces.plain_lines import MIXTRAL_8X7B, parse_plain_line
from runner.traces.record import DECODE, PREFILL, TokenRouting, Trace

_FILE_NBYTES_MAX = 1 << 28
_LINE_NBYTES_MAX = 1 << 20


def read_trace(path: Path) -> Trace:
    """Return the trace in that file; raise TraceInvalid, naming the file and the line."""
    try:
        with path.open("rb") as file:
            lines = _Lines(file)
            try:
                return _parse(lines)
            except TraceInvalid as error:
                raise TraceInvalid(f"{path}: line {lines.n_read}: {error}") from None
    except OSError as error:
        raise TraceInvalid(f"{path}: {error.strerror}") from None


class _Lines:
    """A file's lines, each bounded and all of them together; `n_read` is the number of the latest, from 1."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._nbytes = 0
        self.n_read = 0

    def __iter__(self) -> Iterator[bytes]:
        while line := self._file.readline(_LINE_NBYTES_MAX + 1):
            self.n_read += 1
            self._nbytes += len(line)
            if len(line) > _LINE_NBYTES_MAX:
                raise TraceInvalid(f"more than {_LINE_NBYTES_MAX} bytes")
            if self._nbytes > _FILE_NBYTES_MAX:
                raise TraceInvalid(f"the file has more than {_FILE_NBYTES_MAX} bytes")
            yield line


def _parse(lines: _Lines) -> Trace:
    each = iter(lines)
    first = next(each, b"")
    if first.startswith(b"{"):
        shape = parse_header(first)
        return Trace(shape, tuple(parse_token(line, shape) for line in each))
    if first[:1].isdigit():
        return Trace(MIXTRAL_8X7B, tuple(_plain_tokens(first, each)))
    raise TraceInvalid(f"a trace starts with a brace or a digit, {first!r:.40} came")


def _plain_tokens(first: bytes, rest: Iterator[bytes]) -> Iterator[TokenRouting]:
    shape = MIXTRAL_8X7B
    layers = [parse_plain_line(first, shape, is_prefill=True)]
    phase = PREFILL
    for line in rest:
        if len(layers) == shape.n_layers:
            yield TokenRouting(phase, tuple(layers))
            phase, layers = DECODE, []
        layers.append(parse_plain_line(line, shape, is_prefill=phase == PREFILL))
    if len(layers) != shape.n_layers:
        raise TraceInvalid(f"the last step ends behind {len(layers)} of {shape.n_layers} layers")
    yield TokenRouting(phase, tuple(layers))
