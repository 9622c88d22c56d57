"""Where the parts of a record lie: pure arithmetic, the same on disk, in memory and in the kernels.

A record is the bytes of one expert (or of one dense tensor): its parts one after another, each aligned to 128 bytes,
the whole padded to the page. Layout `r8` stores a part in one of two ways.

16-bit parts      row-major [rows, cols], little endian.
quantized parts   [N, K], K a multiple of 64, N padded to 8 with zero codes:

    scale_step[N] base_min[N] base_step[N]      three fp32 planes, one value an output row
    panel 0 … panel N/8 - 1                     8 output rows each, as stripes of 4 blocks (of 1 for groups of 16):
        metadata   64 bytes, for each block of 64 inputs: s [8 rows][64/group_size], then b likewise, u8
        codes      for each block: 8 rows interleaved, one row per 32-bit lane

Planes and panels are padded to 128 bytes; a panel's last stripe has the blocks that are left, and all of its metadata.
What belongs together lies together, so that a panel is one stream of memory. In a codes block byte b of lane r of
32-byte vector v holds:

    8 bit   input 4v + b
    4 bit   input 8v + b in the low nibble, 8v + 4 + b in the high one
    2 bit   inputs 16v + b, +4, +8, +12 at bits 0, 2, 4, 6
    3 bit   two halves h of 32 inputs, three vectors each; with code c(s) of input 32h + 4s + b
            v = 3h     c(0) | c(1) << 3 | (c(6) & 3) << 6
            v = 3h + 1 c(2) | c(3) << 3 | (c(7) & 3) << 6
            v = 3h + 2 c(4) | c(5) << 3 | (c(6) >> 2) << 6 | (c(7) >> 2) << 7

so that one AVX2 load is 4 inputs (or 8, 16) of 8 rows and a GPU thread's 16 bytes are 4 rows.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from protocol.errors import LayoutError, UnknownLayout
from protocol.schemes import Scheme, scheme_named

R8 = "r8"

PAGE_NBYTES = 4096
PLANE_ALIGNMENT = 128
PANEL_ROWS = 8
BLOCK_COLS = 64
STRIPE_METADATA_NBYTES = 64
SEGMENT_NBYTES_MAX = 1 << 30

# Bounds that no real model reaches; they keep a hostile manifest from asking for absurd arithmetic.
_ROWS_MAX = 1 << 24
_COLS_MAX = 1 << 24


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix (or vector, rows = 1) of a record."""

    name: str
    rows: int
    cols: int
    scheme: str


@dataclass(frozen=True, slots=True)
class PartSpan:
    """Where one part lies in its record, in bytes."""

    part: Part
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PanelPlan:
    """The planes of one quantized [N, K] part, as byte offsets from the part's start, and what a panel is made of."""

    n_panels: int
    n_blocks: int
    groups_per_block: int
    n_stripes: int
    blocks_per_stripe: int
    block_nbytes: int
    stripe_nbytes: int
    scale_step_offset: int
    base_min_offset: int
    base_step_offset: int
    panels_offset: int
    panel_nbytes: int
    nbytes: int

    @property
    def filled_nbytes(self) -> int:
        """How many bytes of a panel are stripes; the rest is padding."""
        return self.n_stripes * STRIPE_METADATA_NBYTES + self.n_blocks * self.block_nbytes


def record_spans(layout_id: str, parts: Sequence[Part]) -> tuple[PartSpan, ...]:
    """Return where each part lies in a record of that layout; raise UnknownLayout or LayoutError."""
    if layout_id != R8:
        raise UnknownLayout(f"record layout {layout_id!r} is not known; this version knows {R8}")
    spans = []
    offset = 0
    for part in parts:
        nbytes = part_nbytes(part)
        spans.append(PartSpan(part, offset, nbytes))
        offset += aligned(nbytes, PLANE_ALIGNMENT)
    return tuple(spans)


def record_nbytes(layout_id: str, parts: Sequence[Part]) -> int:
    """Return the length of a record, padded to the page; raise UnknownLayout or LayoutError."""
    last = record_spans(layout_id, parts)[-1]
    return aligned(last.offset + last.nbytes, PAGE_NBYTES)


# Asked with every product; a model has a handful of different parts.
@functools.lru_cache(maxsize=256)
def part_nbytes(part: Part) -> int:
    """Return the length of one part; raise LayoutError if its shape does not fit its scheme."""
    scheme = scheme_named(part.scheme)
    check_shape(part.name, part.rows, part.cols, scheme)
    if scheme.is_quantized:
        return panel_plan(part.rows, part.cols, scheme).nbytes
    return part.rows * part.cols * 2


def check_shape(name: str, rows: int, cols: int, scheme: Scheme) -> None:
    """Raise LayoutError unless [rows, cols] can be stored in that scheme."""
    if not (0 < rows <= _ROWS_MAX and 0 < cols <= _COLS_MAX):
        raise LayoutError(f"{name}: shape [{rows}, {cols}] is outside 1..{_ROWS_MAX}")
    if scheme.is_quantized and cols % BLOCK_COLS:
        raise LayoutError(
            f"{name}: {cols} inputs do not divide into blocks of {BLOCK_COLS}, which scheme {scheme.name} needs; "
            "store it in 16 bits"
        )


def panel_plan(rows: int, cols: int, scheme: Scheme) -> PanelPlan:
    """Return the planes of a quantized [rows, cols] part of a quantized scheme."""
    if scheme.group_size is None:
        raise LayoutError(f"scheme {scheme.name} has no panels")
    n_panels = -(-rows // PANEL_ROWS)
    n_blocks = cols // BLOCK_COLS
    groups_per_block = BLOCK_COLS // scheme.group_size
    row_plane_nbytes = aligned(n_panels * PANEL_ROWS * 4, PLANE_ALIGNMENT)
    blocks_per_stripe = STRIPE_METADATA_NBYTES // (2 * PANEL_ROWS * groups_per_block)
    n_stripes = -(-n_blocks // blocks_per_stripe)
    block_nbytes = PANEL_ROWS * BLOCK_COLS * scheme.nbits // 8
    panel_nbytes = aligned(n_stripes * STRIPE_METADATA_NBYTES + n_blocks * block_nbytes, PLANE_ALIGNMENT)
    return PanelPlan(
        n_panels=n_panels,
        n_blocks=n_blocks,
        groups_per_block=groups_per_block,
        n_stripes=n_stripes,
        blocks_per_stripe=blocks_per_stripe,
        block_nbytes=block_nbytes,
        stripe_nbytes=STRIPE_METADATA_NBYTES + blocks_per_stripe * block_nbytes,
        scale_step_offset=0,
        base_min_offset=row_plane_nbytes,
        base_step_offset=2 * row_plane_nbytes,
        panels_offset=3 * row_plane_nbytes,
        panel_nbytes=panel_nbytes,
        nbytes=3 * row_plane_nbytes + n_panels * panel_nbytes,
    )


def plan_segments(records_nbytes: Sequence[int], limit: int = SEGMENT_NBYTES_MAX) -> list[tuple[int, int]]:
    """Place whole records one after another; return (segment, offset) of each.

    A segment is as long as the records it holds and at most `limit` bytes, unless one record alone is longer.
    """
    places: list[tuple[int, int]] = []
    segment, end = 0, 0
    for nbytes in records_nbytes:
        if end and end + nbytes > limit:
            segment, end = segment + 1, 0
        places.append((segment, end))
        end += nbytes
    return places


def aligned(nbytes: int, alignment: int) -> int:
    """Return nbytes rounded up to the alignment."""
    return -(-nbytes // alignment) * alignment
