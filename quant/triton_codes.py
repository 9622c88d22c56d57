"""Device functions that read a part's bytes: codes, scale and base codes, a row's own values, 16-bit floats.

`protocol.layout` names every byte. A *unit* is what one 32-byte vector of codes holds, 4 to 16 inputs of the 8 rows of
a panel; at 3 bits it is half a block, three vectors, 32 inputs. A *quad* is four neighbouring inputs: a row's 32-bit
word of a vector, or 64 bits of 16-bit floats. Tiles are [U units, 8 rows], so that a thread reads 16 bytes: four rows
of a unit.

Knows neither launching nor sums. Importing it needs triton. Nobody blocks in here.
"""

import triton
import triton.language as tl

from protocol.layout import BLOCK_COLS, PANEL_ROWS, STRIPE_METADATA_NBYTES
from quant.device_parts import PartOnDevice

ROWS = tl.constexpr(PANEL_ROWS)
# Tiles have 64 units: with 128 threads, 4 words a thread, which is a load of 16 bytes.
UNITS = tl.constexpr(64)
N_WARPS = 4

_BLOCK_COLS = tl.constexpr(BLOCK_COLS)
_METADATA_NBYTES = tl.constexpr(STRIPE_METADATA_NBYTES)


# No table: triton lets a function of constants name nothing but functions of constants.
@triton.constexpr_function
def nbits_of(scheme: str) -> int:
    """Return the bits of one code; 16 where there are no codes."""
    if scheme == "8bit-g64":
        return 8
    if scheme == "4bit-g64":
        return 4
    if scheme == "3bit-g64":
        return 3
    return 2 if scheme == "2bit-g16" else 16


@triton.constexpr_function
def unit_cols_of(scheme: str) -> int:
    """Return the inputs of one unit."""
    nbits = nbits_of(scheme)
    return 32 if nbits == 3 else 32 // nbits


@triton.constexpr_function
def unit_words_of(scheme: str) -> int:
    """Return the 32-bit words that a row has of one unit."""
    return 3 if nbits_of(scheme) == 3 else 1


@triton.constexpr_function
def blocks_per_stripe_of(scheme: str) -> int:
    """Return the blocks of codes behind one stripe's metadata."""
    return 1 if scheme == "2bit-g16" else 4


@triton.constexpr_function
def quad_bit(quad: int, scheme: str) -> int:
    """Return the bit of each byte of quad_words at which the code starts."""
    nbits = nbits_of(scheme)
    if nbits == 3:
        return 3 * (quad % 2) if quad < 6 else 0
    return nbits * quad


@triton.jit
def row_values(part: PartOnDevice, panel: tl.tensor) -> tl.tuple:
    """Return scale_step, base_min and base_step of a panel's rows, each f32 [8]."""
    row = panel * ROWS + tl.arange(0, ROWS)
    first = part.part_bytes.to(tl.pointer_type(tl.float32))
    plane = part.row_plane_nbytes // 4
    return tl.load(first + row), tl.load(first + plane + row), tl.load(first + 2 * plane + row)


@triton.jit
def panel_words(part: PartOnDevice, panel: tl.tensor) -> tl.tensor:
    """Return the address of a panel as that of 32-bit words; a part may be longer than 4 GiB."""
    first = part.part_bytes + 3 * part.row_plane_nbytes + panel.to(tl.int64) * part.panel_nbytes
    # What lets loads be 16 bytes wide: the layout's word, which the launcher has checked for the part's start.
    return tl.multiple_of(first.to(tl.pointer_type(tl.uint32)), 16)


@triton.jit
def load_vectors(panel_at: tl.tensor, unit: tl.tensor, mask: tl.tensor, SCHEME: tl.constexpr) -> tl.tuple:
    """Return the vectors of units, each u32 [U, 8]: three at 3 bits, else one. Where mask is not set they are 0."""
    STRIPE_UNITS: tl.constexpr = blocks_per_stripe_of(SCHEME) * _BLOCK_COLS // unit_cols_of(SCHEME)
    VECTORS: tl.constexpr = unit_words_of(SCHEME)
    # Before a unit lies the metadata of its stripe and of all stripes before.
    metadata_words = (unit // STRIPE_UNITS + 1) * (_METADATA_NBYTES // 4)
    first = panel_at + (unit * (VECTORS * ROWS) + metadata_words)[:, None] + tl.arange(0, ROWS)[None, :]
    vectors = ()
    for vector in tl.static_range(VECTORS):
        vectors = vectors + (tl.load(first + vector * ROWS, mask[:, None], other=0),)
    return vectors


@triton.jit
def quad_words(vectors: tl.tuple, QUAD: tl.constexpr, SCHEME: tl.constexpr) -> tl.tensor:
    """Return words, u32 [U, 8], whose byte i has the code of the quad's input i at bit quad_bit(QUAD, SCHEME)."""
    if nbits_of(SCHEME) != 3:
        return vectors[0]
    elif QUAD < 6:
        return vectors[QUAD // 2]
    elif QUAD == 6:
        return (vectors[0] >> 6 & 0x03030303) | (vectors[2] >> 4 & 0x04040404)
    else:
        return (vectors[1] >> 6 & 0x03030303) | (vectors[2] >> 5 & 0x04040404)


@triton.jit
def code_of(words: tl.tensor, BIT: tl.constexpr, NBITS: tl.constexpr, CENTER: tl.constexpr) -> tl.tensor:
    """Return the code at a bit of each word, less the center, as float32, exact.

    The code's bits are put where they stand for units in the mantissa of 2^(23 - bit), and that is subtracted again:
    two instructions at full rate, where a conversion of integers has a quarter of it.
    """
    if BIT >= 16:
        return code_of(words >> 16, BIT - 16, NBITS, CENTER)
    else:
        mantissa = words & (((1 << NBITS) - 1) << BIT)
        return (mantissa | ((150 - BIT) << 23)).to(tl.float32, bitcast=True) - ((1 << (23 - BIT)) + CENTER)


@triton.jit
def group_codes(panel_at: tl.tensor, unit: tl.tensor, mask: tl.tensor, SCHEME: tl.constexpr) -> tl.tuple:
    """Return the scale codes and base codes of the groups that units lie in, each f32 [U, 8]; 0 without mask."""
    if SCHEME == "2bit-g16":
        return _group_codes_g16(panel_at, unit, mask)
    else:
        return _group_codes_g64(panel_at, unit // (_BLOCK_COLS // unit_cols_of(SCHEME)), mask, nbits_of(SCHEME))


@triton.jit
def _group_codes_g64(panel_at: tl.tensor, block: tl.tensor, mask: tl.tensor, NBITS: tl.constexpr) -> tl.tuple:
    # A stripe's metadata: for each of 4 blocks 8 scale codes, a row each, then 8 base codes.
    STRIPE_NBYTES: tl.constexpr = _METADATA_NBYTES + 4 * ROWS * _BLOCK_COLS * NBITS // 8
    at = tl.multiple_of(panel_at.to(tl.pointer_type(tl.uint8)), 16)
    at = at + (block // 4 * STRIPE_NBYTES + block % 4 * (2 * ROWS))[:, None] + tl.arange(0, ROWS)[None, :]
    scale = tl.load(at, mask[:, None], other=0)
    base = tl.load(at + ROWS, mask[:, None], other=0)
    return code_of(scale.to(tl.uint32), 0, 8, 0), code_of(base.to(tl.uint32), 0, 8, 0)


@triton.jit
def _group_codes_g16(panel_at: tl.tensor, unit: tl.tensor, mask: tl.tensor) -> tl.tuple:
    # A unit is a group, four are a block and a stripe: first 8 words of scale codes, a row's 4 groups each, then 8 of
    # base codes.
    STRIPE_WORDS: tl.constexpr = (_METADATA_NBYTES + ROWS * _BLOCK_COLS * 2 // 8) // 4
    at = panel_at + (unit // 4 * STRIPE_WORDS)[:, None] + tl.arange(0, ROWS)[None, :]
    scale = tl.load(at, mask[:, None], other=0)
    base = tl.load(at + ROWS, mask[:, None], other=0)
    bit = (unit % 4 * 8)[:, None]
    return code_of(scale >> bit, 0, 8, 0), code_of(base >> bit, 0, 8, 0)


@triton.jit
def float_of(words: tl.tensor, PLACE: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """Return number PLACE of the four 16-bit floats in each 64-bit word, as float32."""
    half = (words >> (16 * PLACE) & 0xFFFF).to(tl.uint16)
    return half.to(DTYPE, bitcast=True).to(tl.float32)
