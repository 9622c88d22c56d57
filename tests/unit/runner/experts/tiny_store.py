"""A StoreView of random small experts, made in memory."""

import functools

import torch

from protocol.handles import ExpertKey
from protocol.layout import R8, Part, record_nbytes, record_spans
from protocol.manifest import Manifest, ModelFacts, Record, TensorSchemes
from quant.encode import encode_part
from runner.errors import CorruptExpert

HIDDEN, INTERMEDIATE, N_EXPERTS, N_LAYERS, TOP_K = 64, 64, 8, 2, 2
PARTS = tuple(
    Part(name, rows, cols, "4bit-g64")
    for name, rows, cols in (("w1", INTERMEDIATE, HIDDEN), ("w3", INTERMEDIATE, HIDDEN), ("w2", HIDDEN, INTERMEDIATE))
)
RECORD_NBYTES = record_nbytes(R8, PARTS)


class TinyStore:
    def __init__(self, corrupt: ExpertKey | None = None) -> None:
        self.corrupt = corrupt

    @property
    def manifest(self) -> Manifest:
        return _manifest()

    @property
    def host_slots(self) -> None:
        return None

    def expert_record(self, key: ExpertKey) -> memoryview:
        if key == self.corrupt:
            raise CorruptExpert(f"{key}: its bytes are not those that were stored")
        return memoryview(_records()[key])

    def dense_record(self, name: str) -> memoryview:
        raise AssertionError(name)

    def side_file(self, name: str) -> bytes | None:
        raise AssertionError(name)


@functools.cache
def _manifest() -> Manifest:
    record = Record(R8, PARTS, "experts-00001.safetensors", 4096, RECORD_NBYTES, "0" * 32)
    return Manifest(
        model=ModelFacts("mixtral", N_LAYERS, N_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, "silu", "softmax", "top_k", 0),
        schemes=TensorSchemes("4bit-g64", "bf16", "bf16", "bf16"),
        solver="shortcut",
        experts={ExpertKey(layer, expert): record for layer in range(N_LAYERS) for expert in range(N_EXPERTS)},
        dense={},
        files=(),
    )


@functools.cache
def _records() -> dict[ExpertKey, bytearray]:
    generator = torch.Generator().manual_seed(0)
    records = {}
    for layer in range(N_LAYERS):
        for expert in range(N_EXPERTS):
            data = torch.zeros(RECORD_NBYTES, dtype=torch.uint8)
            for span in record_spans(R8, PARTS):
                weight = torch.randn(span.part.rows, span.part.cols, generator=generator) / 8
                data[span.offset : span.offset + span.nbytes] = encode_part(weight, span.part, solver="shortcut")
            records[ExpertKey(layer, expert)] = bytearray(data.numpy().tobytes())
    return records
