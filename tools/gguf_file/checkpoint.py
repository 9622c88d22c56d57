"""A Mixtral checkpoint as the tensors of a GGUF: stacked experts, rotary rows in llama.cpp's order, quantized.

Reads through the converter's own reader, so what is refused there is refused here. One stacked tensor is in memory at
a time, in float32.
"""

import json
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from numpy.typing import NDArray

from expertd.convert.checkpoint import LocalCheckpoint
from expertd.convert.mixtral import Matrix, dense_records, expert_records
from protocol.mixtral_config import MixtralConfig
from tools.geometry import Geometry
from tools.gguf_file.errors import SourceInvalid
from tools.gguf_file.model import GgufTensor, TensorTypes, add_sizes
from tools.gguf_file.vocabulary import add_vocabulary, read_vocabulary, special_ids

# GGUF's name within a layer: the store's name of the same tensor.
DENSE_ROLES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "input_norm",
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "ffn_norm": "post_attention_norm",
    "ffn_gate_inp": "gate",
}
EXPERT_ROLES = {"ffn_gate_exps": "w1", "ffn_up_exps": "w3", "ffn_down_exps": "w2"}

_Number = TypeVar("_Number", bound=np.generic)


def checkpoint_types(experts: GGMLQuantizationType) -> TensorTypes:
    """Return the types nearest to configs/demo.toml: experts in 4 bits, all other matrices in 8."""
    q8_0 = GGMLQuantizationType.Q8_0
    return TensorTypes(experts=experts, attention=q8_0, head=q8_0, embeddings=q8_0)


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """An open checkpoint, read by the names of GGUF."""

    checkpoint: LocalCheckpoint

    @property
    def geometry(self) -> Geometry:
        """The sizes that its config.json says; raise SourceInvalid."""
        return geometry_of(self.checkpoint.config, self.checkpoint.side_files["config.json"])

    def add_keys(self, writer: GGUFWriter) -> None:
        """Add what the file says of the model and its tokenizer; raise SourceInvalid."""
        add_sizes(writer, self.geometry)
        files = {name: self._document(name) for name in ("tokenizer.json", "tokenizer_config.json")}
        vocabulary = read_vocabulary(files["tokenizer.json"], self.checkpoint.config.vocab_size)
        add_vocabulary(writer, vocabulary, special_ids(vocabulary, files["tokenizer_config.json"]))
        template = files["tokenizer_config.json"].get("chat_template")
        if isinstance(template, str):
            writer.add_chat_template(template)

    def tensor(self, tensor: GgufTensor) -> NDArray[np.uint8]:
        """Return the bytes of a tensor in its type, u8 [nbytes]; raise CheckpointError."""
        if tensor.role in EXPERT_ROLES:
            part_name = EXPERT_ROLES[tensor.role]
            experts = [
                _weights(self.checkpoint, matrix)
                for source in expert_records(self.checkpoint.config)
                if source.key is not None and source.key.layer == tensor.layer
                for matrix in source.matrices
                if matrix.part_name == part_name
            ]
            return _quantized(np.stack(experts), tensor.type)
        weights = _weights(self.checkpoint, self._dense_matrix(tensor))
        if tensor.role == "attn_q":
            weights = rotary_order(weights, self.checkpoint.config.n_heads)
        elif tensor.role == "attn_k":
            weights = rotary_order(weights, self.checkpoint.config.n_kv_heads)
        return _quantized(weights, tensor.type)

    def _dense_matrix(self, tensor: GgufTensor) -> Matrix:
        role = DENSE_ROLES[tensor.role]
        name = role if tensor.layer is None else f"layers.{tensor.layer}.{role}"
        return next(source.matrices[0] for source in dense_records(self.checkpoint.config) if source.name == name)

    def _document(self, name: str) -> dict[str, object]:
        data = self.checkpoint.side_files.get(name)
        if data is None:
            raise SourceInvalid(f"the checkpoint has no {name}, without which llama.cpp has no tokenizer")
        document: dict[str, object] = json.loads(data)
        return document


def geometry_of(config: MixtralConfig, config_file: bytes) -> Geometry:
    """Return the sizes that a config.json says; raise SourceInvalid for what llama.cpp computes otherwise."""
    if config.sliding_window is not None:
        raise SourceInvalid("config.json: llama.cpp computes this architecture without a sliding window")
    context = json.loads(config_file).get("max_position_embeddings")
    return Geometry(
        n_layers=config.n_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.n_heads,
        kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        experts=config.n_experts,
        top_k=config.top_k,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.rms_norm_eps,
        context=context if type(context) is int else 4096,
        is_tied=config.is_tied,
    )


def rotary_order(rows: NDArray[_Number], n_heads: int) -> NDArray[_Number]:
    """Return the rows [n_heads * D, cols] of a rotated projection as llama.cpp turns them: pairs (2i, 2i + 1).

    A checkpoint, like a store, has the pairs (i, i + D/2) of each head.
    """
    n_rows, cols = rows.shape
    halves = rows.reshape(n_heads, 2, n_rows // n_heads // 2, cols)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(n_rows, cols)


def _weights(checkpoint: LocalCheckpoint, matrix: Matrix) -> NDArray[np.float32]:
    """Return a matrix in float32, in its shape on the Hub."""
    data, dtype = checkpoint.read(matrix), checkpoint.dtype(matrix)
    if dtype == "BF16":
        bits = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(matrix.shape)
    stored = np.frombuffer(data, {"F16": np.float16, "F32": np.float32}[dtype])
    return stored.astype(np.float32).reshape(matrix.shape)


def _quantized(weights: NDArray[np.float32], type_: GGMLQuantizationType) -> NDArray[np.uint8]:
    quantized: NDArray[np.uint8] = np.ascontiguousarray(quantize(weights, type_)).view(np.uint8).reshape(-1)
    return quantized
