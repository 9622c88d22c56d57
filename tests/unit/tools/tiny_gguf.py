"""A small llama GGUF with random weights, as the real one is built: Q4_1 matrices, Q8_0 embeddings, F32 norms."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel

CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "th e", "Ġ the", "1 2"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
TOKENS = [*CONTROL_TOKENS, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]


@dataclass(frozen=True, slots=True)
class TinyShape:
    """The sizes of the model to write; `matrix_type` stores the feed-forward."""

    n_layers: int = 2
    hidden_size: int = 64
    intermediate_size: int = 96
    n_heads: int = 4
    n_kv_heads: int = 2
    architecture: str = "llama"
    matrix_type: GGMLQuantizationType = GGMLQuantizationType.Q4_1


def write_tiny_gguf(path: Path, shape: TinyShape | None = None, left_out: str | None = None) -> Path:
    """Write the file, without the tensor named left_out, and return its path."""
    shape = shape or TinyShape()
    writer = GGUFWriter(path, shape.architecture)
    _add_fields(writer, shape)
    random = np.random.default_rng(7)
    for name, dims, kind in _tensors(shape):
        if name != left_out:
            weights = random.normal(1.0 if len(dims) == 1 else 0.0, 0.1, dims).astype(np.float32)
            writer.add_tensor(name, quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_gates(shape: TinyShape, n_experts: int = 4) -> NDArray[np.uint16]:
    """Return gates as bf16 bits, [layers, experts, hidden_size]."""
    values = np.random.default_rng(8).normal(0, 1, (shape.n_layers, n_experts, shape.hidden_size))
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _add_fields(writer: GGUFWriter, shape: TinyShape) -> None:
    writer.add_block_count(shape.n_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(shape.hidden_size // shape.n_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in CONTROL_TOKENS else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)


def _tensors(shape: TinyShape) -> list[tuple[str, tuple[int, ...], GGMLQuantizationType]]:
    f32, q8_0, matrix = GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1
    hidden, inner = shape.hidden_size, shape.intermediate_size
    kv_rows = shape.n_kv_heads * hidden // shape.n_heads
    tensors: list[tuple[str, tuple[int, ...], GGMLQuantizationType]] = [
        ("token_embd.weight", (len(TOKENS), hidden), q8_0),
        ("output_norm.weight", (hidden,), f32),
    ]
    for layer in range(shape.n_layers):
        tensors += [
            (f"blk.{layer}.attn_norm.weight", (hidden,), f32),
            (f"blk.{layer}.attn_q.weight", (hidden, hidden), matrix),
            (f"blk.{layer}.attn_k.weight", (kv_rows, hidden), matrix),
            (f"blk.{layer}.attn_v.weight", (kv_rows, hidden), matrix),
            (f"blk.{layer}.attn_output.weight", (hidden, hidden), matrix),
            (f"blk.{layer}.ffn_norm.weight", (hidden,), f32),
            (f"blk.{layer}.ffn_gate.weight", (inner, hidden), shape.matrix_type),
            (f"blk.{layer}.ffn_up.weight", (inner, hidden), shape.matrix_type),
            (f"blk.{layer}.ffn_down.weight", (hidden, inner), shape.matrix_type),
        ]
    return tensors
