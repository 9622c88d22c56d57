"""Sealed shared memory filled for a measurement: in huge pages as the daemon's, mapped read-only as a runner's."""

import os
import time
from collections.abc import Callable

from protocol.segment import SegmentBuilder, map_segment

_COLLAPSE_S = 60.0


def sealed(nbytes: int, fill: Callable[[memoryview], None]) -> memoryview:
    """Return a mapped segment of that length with what `fill` wrote; it lives as long as a buffer over it."""
    with SegmentBuilder("expertd-bench", nbytes) as builder:
        builder.populate(0, nbytes, collapse_until=time.monotonic() + _COLLAPSE_S)
        fill(builder.view)
        fd = builder.seal()
    try:
        return map_segment(fd, nbytes)
    finally:
        os.close(fd)
