"""A synthetic store as the tensors of a GGUF with exactly the same weights, for comparing programs on one model.

One stacked tensor is in memory at a time. Its tokenizer is the simplest there is: a token a byte.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from expertd.convert.mixtral import read_config
from expertd.convert.side_files import CONFIG_FILE
from expertd.store import StoreFiles
from protocol.handles import ExpertKey
from protocol.layout import Part, PartSpan, record_spans
from protocol.manifest import Record
from protocol.schemes import scheme_named
from quant.packing import unpack
from quant.reference import dequantize
from tools.geometry import Geometry
from tools.gguf_file.checkpoint import DENSE_ROLES, EXPERT_ROLES, geometry_of, rotary_order
from tools.gguf_file.errors import SourceInvalid
from tools.gguf_file.exact_blocks import exact_blocks, exact_type
from tools.gguf_file.model import GgufTensor, TensorTypes, add_sizes
from tools.gguf_file.vocabulary import add_vocabulary, byte_vocabulary

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class StoreSource:
    """An open store, read by the names of GGUF."""

    files: StoreFiles
    config_file: bytes

    @property
    def geometry(self) -> Geometry:
        """The sizes that its config.json says; raise SourceInvalid or CheckpointError."""
        return geometry_of(read_config(self.config_file), self.config_file)

    @property
    def types(self) -> TensorTypes:
        """The types that hold its weights exactly; raise SourceInvalid."""
        schemes = self.files.manifest.schemes
        experts, attention, head = (
            exact_type(scheme_named(name)) for name in (schemes.experts, schemes.attention, schemes.head)
        )
        return TensorTypes(experts, attention, head, embeddings=GGMLQuantizationType.BF16)

    def add_keys(self, writer: GGUFWriter) -> None:
        """Add what the file says of the model, and a tokenizer of single bytes; raise SourceInvalid."""
        add_sizes(writer, self.geometry)
        add_vocabulary(writer, byte_vocabulary(self.geometry.vocab), {})

    def tensor(self, tensor: GgufTensor) -> Bytes:
        """Return the bytes of a tensor in its type, u8 [nbytes]; raise SourceInvalid or OSError."""
        if tensor.role in EXPERT_ROLES and tensor.layer is not None:
            experts = self.files.manifest.experts
            part_name, n_experts = EXPERT_ROLES[tensor.role], tensor.shape[0]
            stacked = np.empty((n_experts, tensor.nbytes // n_experts), np.uint8)
            for expert in range(n_experts):
                record = experts[ExpertKey(tensor.layer, expert)]
                stacked[expert] = self._rows(record, part_name, tensor).reshape(-1)
            return stacked.reshape(-1)
        role = DENSE_ROLES[tensor.role]
        record = self.files.manifest.dense[role if tensor.layer is None else f"layers.{tensor.layer}.{role}"]
        rows = self._rows(record, record.parts[0].name, tensor)
        if tensor.role == "attn_q":
            rows = rotary_order(rows, self.geometry.heads)
        elif tensor.role == "attn_k":
            rows = rotary_order(rows, self.geometry.kv_heads)
        return rows.reshape(-1)

    def _rows(self, record: Record, part_name: str, tensor: GgufTensor) -> Bytes:
        """Return a part of a record, u8 [rows, bytes of a row]."""
        data = bytearray(record.nbytes)
        if not self.files.read_record(record, memoryview(data)):
            raise SourceInvalid(f"{tensor.name}: the store's record is damaged; make the store again")
        span = next(span for span in record_spans(record.layout_id, record.parts) if span.part.name == part_name)
        return _in_type(torch.frombuffer(data, dtype=torch.uint8), span, tensor.type)


@contextmanager
def open_store_source(path: Path) -> Iterator[StoreSource]:
    """Yield the source over the store in that directory; raise StoreInvalid or OSError."""
    with StoreFiles(path) as files:
        yield StoreSource(files, (path / CONFIG_FILE).read_bytes())


def _in_type(record: torch.Tensor, span: PartSpan, type_: GGMLQuantizationType) -> Bytes:
    part = span.part
    data = record[span.offset : span.offset + span.nbytes]
    if type_ in (GGMLQuantizationType.F32, GGMLQuantizationType.BF16):
        return _floats(data, part, type_)
    return exact_blocks(unpack(data, part.rows, part.cols, scheme_named(part.scheme)))


def _floats(data: torch.Tensor, part: Part, type_: GGMLQuantizationType) -> Bytes:
    if type_ == GGMLQuantizationType.BF16:
        return data.numpy().reshape(part.rows, part.cols * 2)
    weights: Bytes = dequantize(data, part.rows, part.cols, scheme_named(part.scheme)).numpy().view(np.uint8)
    return weights
