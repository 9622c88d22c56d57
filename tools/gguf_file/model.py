"""A Mixtral as llama.cpp wants it: architecture "llama" with experts, its keys, its tensors' names and shapes.

Shapes are [rows, cols] as in a checkpoint, with the experts of a layer stacked in front; the file lists them in
reverse. Knows no weights. The names: gguf's own tables, llama.cpp's `llama` architecture.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from tools.geometry import Geometry
from tools.gguf_file.errors import SizesDoNotFit

ARCHITECTURE = "llama"

# The number of llama.cpp's MOSTLY_… file types does not matter to it; what each tensor is stands beside the tensor.
_GATE_TYPE = GGMLQuantizationType.F32
_NORM_TYPE = GGMLQuantizationType.F32


@dataclass(frozen=True, slots=True)
class TensorTypes:
    """The type of each class of tensors; norms and gates are F32, as llama.cpp's converter leaves them."""

    experts: GGMLQuantizationType
    attention: GGMLQuantizationType
    head: GGMLQuantizationType
    embeddings: GGMLQuantizationType


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of the file; `layer` is None outside the layers, `role` is its name within."""

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        """Its length in the file, without padding."""
        block, block_nbytes = GGML_QUANT_SIZES[self.type]
        return int(prod(self.shape) // block * block_nbytes)


def tensors(geometry: Geometry, types: TensorTypes) -> list[GgufTensor]:
    """Return all tensors in the order of the computation; raise SizesDoNotFit."""
    listed = [
        _checked("token_embd", None, (geometry.vocab, geometry.hidden), types.embeddings),
        *(tensor for layer in range(geometry.n_layers) for tensor in _layer(layer, geometry, types)),
        _checked("output_norm", None, (geometry.hidden,), _NORM_TYPE),
    ]
    if not geometry.is_tied:
        listed.append(_checked("output", None, (geometry.vocab, geometry.hidden), types.head))
    return listed


def add_sizes(writer: GGUFWriter, geometry: Geometry) -> None:
    """Add the keys that say what model it is."""
    writer.add_block_count(geometry.n_layers)
    writer.add_context_length(geometry.context)
    writer.add_embedding_length(geometry.hidden)
    writer.add_feed_forward_length(geometry.intermediate)
    writer.add_head_count(geometry.heads)
    writer.add_head_count_kv(geometry.kv_heads)
    writer.add_key_length(geometry.head_dim)
    writer.add_value_length(geometry.head_dim)
    writer.add_rope_dimension_count(geometry.head_dim)
    writer.add_rope_freq_base(geometry.rope_theta)
    writer.add_layer_norm_rms_eps(geometry.rms_norm_eps)
    writer.add_expert_count(geometry.experts)
    writer.add_expert_used_count(geometry.top_k)
    writer.add_vocab_size(geometry.vocab)


def _layer(layer: int, geometry: Geometry, types: TensorTypes) -> Iterator[GgufTensor]:
    hidden = geometry.hidden
    q_size, kv_size = geometry.heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    up = (geometry.experts, geometry.intermediate, hidden)
    listed = (
        ("attn_norm", (hidden,), _NORM_TYPE),
        ("attn_q", (q_size, hidden), types.attention),
        ("attn_k", (kv_size, hidden), types.attention),
        ("attn_v", (kv_size, hidden), types.attention),
        ("attn_output", (hidden, q_size), types.attention),
        ("ffn_norm", (hidden,), _NORM_TYPE),
        ("ffn_gate_inp", (geometry.experts, hidden), _GATE_TYPE),
        ("ffn_gate_exps", up, types.experts),
        ("ffn_up_exps", up, types.experts),
        ("ffn_down_exps", (geometry.experts, hidden, geometry.intermediate), types.experts),
    )
    for role, shape, type_ in listed:
        yield _checked(role, layer, shape, type_)


def _checked(role: str, layer: int | None, shape: tuple[int, ...], type_: GGMLQuantizationType) -> GgufTensor:
    name = f"{role}.weight" if layer is None else f"blk.{layer}.{role}.weight"
    block, _ = GGML_QUANT_SIZES[type_]
    if shape[-1] % block:
        raise SizesDoNotFit(
            f"{name}: {shape[-1]} inputs do not divide into blocks of {block}, which {type_.name} needs"
        )
    return GgufTensor(name, role, layer, shape, type_)
