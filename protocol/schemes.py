"""The ways a matrix is stored: bits per weight and weights per group. Knows no numbers but these.

Every quantized scheme has an 8-bit second level: the scale and the zero of a group are one byte each, in steps of
their output row: w = (q - zero) * scale, scale = scale_step[row] * s, zero = zero_min[row] + zero_step[row] * z.
Groups run along the inputs of one output row.
"""

from dataclasses import dataclass

from protocol.errors import UnknownScheme


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to store a matrix; `group_size` is None for the 16-bit schemes, which are not quantized."""

    name: str
    nbits: int
    group_size: int | None

    @property
    def is_quantized(self) -> bool:
        """Whether weights are codes with scales and zeros."""
        return self.group_size is not None


BF16 = Scheme("bf16", 16, None)
FP16 = Scheme("fp16", 16, None)
Q8_G64 = Scheme("8bit-g64", 8, 64)
Q4_G64 = Scheme("4bit-g64", 4, 64)
Q3_G64 = Scheme("3bit-g64", 3, 64)
Q2_G16 = Scheme("2bit-g16", 2, 16)

SCHEMES = {scheme.name: scheme for scheme in (BF16, FP16, Q8_G64, Q4_G64, Q3_G64, Q2_G16)}


def scheme_named(name: str) -> Scheme:
    """Return the scheme of that name; raise UnknownScheme."""
    try:
        return SCHEMES[name]
    except KeyError:
        raise UnknownScheme(f"scheme {name!r} is not known; this version knows {', '.join(SCHEMES)}") from None
