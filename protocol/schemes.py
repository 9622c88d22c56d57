"""The ways a matrix is stored: bits per weight and weights per group. Knows no numbers but these.

Every quantized scheme has an 8-bit second level: a group has two bytes, s and b, in steps of their output row:

    w = scale_step[row] * (s * (q - center) + base)        base = base_min[row] + base_step[row] * b

The base is what a weight of the code `center` is, in steps of the scale: a solver's (q - zero) * scale has the scale
scale_step * s and the base s * (center - zero). Groups run along the inputs of one output row.
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

    @property
    def center(self) -> int:
        """The code from which codes count: 128 where they are whole bytes, so that bases stay small, else 0."""
        return 128 if self.nbits == 8 else 0


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
