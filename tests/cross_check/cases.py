"""What is computed on both machines: products and experts of every format, and their bytes for compute_cases.c."""

import struct
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from protocol.layout import Part, PartSpan
from protocol.schemes import Scheme
from quant.expert import Expert, LayerExperts
from quant.kernels import Product, c_part
from quant.packing import pack
from quant.workspace import Workspace
from tests.unit.quant.activations import KINDS, activations
from tests.unit.quant.expert_records import mixtral_parts, record_of
from tests.unit.quant.matrices import ALL_SCHEMES, encoded, gaussian, random_quantized

_PRODUCTS, _EXPERTS = 1, 2


@dataclass(frozen=True)
class Products:
    """Parts that are multiplied with the same activations."""

    name: str
    exact: bool
    x: Tensor
    parts: list[tuple[Part, Tensor]]

    def write(self, file: BinaryIO) -> None:
        """Write the case as compute_cases.c reads it."""
        _write_numbers(file, _PRODUCTS, self.exact, *self.x.shape)
        _write_array(file, self.x)
        _write_numbers(file, len(self.parts))
        for part, part_bytes in self.parts:
            _write_part(file, part, part_bytes)

    def compute(self, workspace: Workspace) -> Tensor:
        """Return what this machine's library makes of it, flat."""
        results = Product(self.parts, workspace=workspace, exact=self.exact)(self.x)
        return torch.cat([y.flatten() for y in results])


@dataclass(frozen=True)
class Experts:
    """Experts of one layer and the tokens that chose them."""

    name: str
    exact: bool
    hidden_states: Tensor
    expert_ids: Tensor
    weights: Tensor
    records: list[tuple[Tensor, tuple[PartSpan, ...]]]

    def write(self, file: BinaryIO) -> None:
        """Write the case as compute_cases.c reads it."""
        _write_numbers(file, _EXPERTS, self.exact, *self.hidden_states.shape, self.expert_ids.shape[1])
        for tensor in (self.hidden_states, self.expert_ids, self.weights):
            _write_array(file, tensor)
        _write_numbers(file, len(self.records))
        for record, spans in self.records:
            for span in spans:  # w1, w3, w2: gate, up, down
                _write_part(file, span.part, record[span.offset : span.offset + span.nbytes])

    def compute(self, workspace: Workspace) -> Tensor:
        """Return what this machine's library makes of it, flat: contributions, then their sum."""
        hidden_size = self.hidden_states.shape[1]
        layer = LayerExperts(len(self.records), hidden_size, workspace=workspace, exact=self.exact)
        for expert_id, (record, spans) in enumerate(self.records):
            layer.put(expert_id, Expert(record, spans))
        contributions = torch.empty(*self.expert_ids.shape, hidden_size)
        layer.contribute(self.hidden_states, self.expert_ids, contributions)
        out = layer.forward(self.hidden_states, self.expert_ids, self.weights)
        return torch.cat((contributions.flatten(), out.flatten()))


Case = Products | Experts


def all_cases() -> list[Case]:
    """Return the cases, the same each time."""
    cases: list[Case] = []
    for exact in (False, True):
        for n_tokens in (1, 2, 3, 4, 7):
            cases += [_random_products(scheme, n_tokens, exact=exact) for scheme in ALL_SCHEMES]
            cases += [_special_products(n_tokens, exact=exact), _experts(n_tokens, exact=exact)]
    return cases


def write_cases(cases: list[Case], file: BinaryIO) -> None:
    """Write the file that compute_cases.c reads."""
    _write_numbers(file, len(cases))
    for case in cases:
        case.write(file)


def _random_products(scheme: Scheme, n_tokens: int, *, exact: bool) -> Products:
    cols = 320 if scheme.is_quantized else 203
    parts = [(Part("matrix", rows, cols, scheme.name), _random_bytes(rows, cols, scheme)) for rows in (5, 61, 8)]
    x = activations(KINDS[n_tokens % len(KINDS)], n_tokens, cols, seed=n_tokens)
    return Products(f"{scheme.name}, {n_tokens} tokens, exact={exact}", exact, x, parts)


def _random_bytes(rows: int, cols: int, scheme: Scheme) -> Tensor:
    if scheme.is_quantized:
        return pack(random_quantized(rows, cols, scheme, seed=rows))
    return encoded(rows, cols, scheme)[1]


def _special_products(n_tokens: int, *, exact: bool) -> Products:
    """Return products of activations that are tiny, huge, or not finite."""
    x = gaussian(n_tokens, 128, std=1.0)
    for token, value in enumerate((1e-40, 1.7e-36, 1e36, torch.inf, torch.nan, -0.0, 1e-38)[:n_tokens]):
        x[token, : 64 + 32 * (token % 2)] *= value
    parts = [encoded(43, 128, scheme) for scheme in ALL_SCHEMES]
    return Products(f"special activations, {n_tokens} tokens, exact={exact}", exact, x, parts)


def _experts(n_tokens: int, *, exact: bool) -> Experts:
    records = [
        record_of(*mixtral_parts(scheme, scheme, scheme, hidden=128, intermediate=192), seed=seed)
        for seed, scheme in enumerate(ALL_SCHEMES)
    ]
    logits, expert_ids = gaussian(n_tokens, len(records), std=1.0, seed=3).topk(3)
    hidden_states = gaussian(n_tokens, 128, std=2.0, seed=n_tokens)
    name = f"experts, {n_tokens} tokens, exact={exact}"
    return Experts(name, exact, hidden_states, expert_ids, logits.softmax(-1), records)


def _write_numbers(file: BinaryIO, *numbers: int) -> None:
    file.write(struct.pack(f"<{len(numbers)}q", *numbers))


def _write_array(file: BinaryIO, tensor: Tensor) -> None:
    content = tensor.contiguous().numpy().tobytes()
    _write_numbers(file, len(content))
    file.write(content.ljust(-(-len(content) // 8) * 8, b"\0"))


def _write_part(file: BinaryIO, part: Part, part_bytes: Tensor) -> None:
    _write_numbers(file, c_part(part_bytes, part).format, part.rows, part.cols)
    _write_array(file, part_bytes)
