"""Where a quantized matrix lies in the published per-expert HQQ checkpoints, told from headers alone.

Such a checkpoint has a file for each expert and one for everything else. A matrix X is not X.weight but X.W_q, packed
codes, and X.meta.*: for each group a scale and a zero, w = (code - zero) * scale. Both are themselves numbers of 8 bits
with scales and zeros (`scale_q`, `meta_scale.scale`, `meta_scale.zero`, the same for zeros) or plain (`scale`, `zero`).

A group is one column of the weights reshaped to [group_size, n_groups] (axis 0). Codes are packed in one of two orders:
`GROUPED` as the hqq package packs [group_size, n_groups], rows far apart sharing an item, or `ROWS` as the reference
system repacks [rows, cols], consecutive rows sharing one. Which it is, and how many bits, the shapes say.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import prod

from expertd.convert.errors import WrongTensor
from expertd.convert.shard import Shard, TensorPlace

_SUFFIX = ".W_q"
_EXPERT_CODES = re.compile(r"(.*\.experts\.\d+\.)w[123]\.W_q\Z")
_FLOATS = ("F16", "BF16", "F32")
# Codes in one item of the packed tensor, by its type and the bits of a code.
_CODES_PER_ITEM = {"U8": {8: 1, 4: 2, 2: 4}, "I32": {3: 10}}
_GROUP_SIZE_MAX = 1 << 16


class Order(StrEnum):
    """How codes are packed."""

    GROUPED = "grouped"
    ROWS = "rows"


@dataclass(frozen=True, slots=True)
class HqqPlace:
    """A quantized matrix. `scale` and `zero` are one tensor, or codes with their scale and zero."""

    codes: TensorPlace
    scale: tuple[TensorPlace, ...]
    zero: tuple[TensorPlace, ...]
    nbits: int
    group_size: int
    order: Order

    @property
    def shard(self) -> Shard:
        """The file that all of it lies in."""
        return self.codes.shard

    @property
    def nbytes(self) -> int:
        """The bytes of all of it."""
        return sum(place.slot.nbytes for place in (self.codes, *self.scale, *self.zero))


MatrixPlace = TensorPlace | HqqPlace


def prefix_of(shard: str, weight_map: Mapping[str, str]) -> str:
    """Return what the names in a shard lack of those in the index: an expert's file says w1.W_q and no more."""
    prefixes = set()
    for name, file in weight_map.items():
        if file == shard and (match := _EXPERT_CODES.match(name)):
            prefixes.add(match[1])
    # A file of several experts must call them by their whole names.
    return prefixes.pop() if len(prefixes) == 1 else ""


def find_hqq(
    hub_name: str, rows: int, cols: int, tensors: Mapping[str, TensorPlace]
) -> tuple[HqqPlace, frozenset[str]] | None:
    """Return where a quantized matrix [rows, cols] lies and its tensors' names, None for another; raise WrongTensor."""
    base = hub_name.removesuffix(".weight")
    if base + _SUFFIX not in tensors:
        return None
    scale, zero = (_values(base, word, tensors) for word in ("scale", "zero"))
    names = frozenset((base + _SUFFIX, *scale, *zero))
    if len({tensors[name].shard for name in names}) > 1:
        raise WrongTensor(f"{base}: its tensors lie in several files; one is expected")
    n_groups = prod(tensors[zero[0]].slot.shape)
    if n_groups != prod(tensors[scale[0]].slot.shape) or not n_groups or rows * cols % n_groups:
        raise WrongTensor(f"{base}: scales and zeros of as many groups as divide [{rows}, {cols}] are expected")
    group_size = rows * cols // n_groups
    if group_size > _GROUP_SIZE_MAX:
        raise WrongTensor(f"{base}: groups of {group_size} weights; at most {_GROUP_SIZE_MAX} are expected")
    codes = tensors[base + _SUFFIX]
    nbits, order = _packing(base, codes, rows, cols, group_size)
    place = HqqPlace(
        codes, tuple(map(tensors.__getitem__, scale)), tuple(map(tensors.__getitem__, zero)), nbits, group_size, order
    )
    return place, names


def _values(base: str, word: str, tensors: Mapping[str, TensorPlace]) -> tuple[str, ...]:
    """Return the names of a scale's or a zero's tensors, checked."""
    plain = f"{base}.meta.{word}"
    if plain in tensors:
        names: tuple[str, ...] = (plain,)
    else:
        names = (f"{plain}_q", f"{base}.meta.meta_{word}.scale", f"{base}.meta.meta_{word}.zero")
    for name in names:
        if name not in tensors:
            raise WrongTensor(f"{name}: the tensor is missing from the checkpoint")
        slot = tensors[name].slot
        expected = ("U8",) if name == f"{plain}_q" else _FLOATS
        if slot.dtype not in expected:
            raise WrongTensor(f"{name}: type {', '.join(expected)} is expected, {slot.dtype!r:.60} came")
    if len(names) == 3:
        shape = tensors[names[0]].slot.shape
        for name in names[1:]:
            if prod(tensors[name].slot.shape) not in {1, shape[-1] if shape else 1}:
                raise WrongTensor(
                    f"{name}: one number, or one for each column of {list(shape)}, is expected, "
                    f"{list(tensors[name].slot.shape)} came"
                )
    return names


def _packing(base: str, codes: TensorPlace, rows: int, cols: int, group_size: int) -> tuple[int, Order]:
    """Return bits and order, which the shape says; raise WrongTensor if it says none or two."""
    n_groups = rows * cols // group_size
    found = [
        (nbits, order)
        for nbits, n_codes in _CODES_PER_ITEM.get(codes.slot.dtype, {}).items()
        for order, shape in ((Order.GROUPED, (group_size, n_groups)), (Order.ROWS, (rows, cols)))
        if codes.slot.shape == (-(-shape[0] // n_codes), shape[1])
    ]
    if len(found) != 1:
        how = "either order" if found else "no order that is known"
        raise WrongTensor(
            f"{base}{_SUFFIX}: {codes.slot.dtype} of shape {list(codes.slot.shape)} may be packed in {how}, "
            f"for [{rows}, {cols}] in groups of {group_size}"
        )
    return found[0]
