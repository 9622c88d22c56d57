"""Random small Mixtral checkpoints as a Hugging Face folder, for tests. Knows torch and safetensors, no transformers.

Weights are scaled so that a forward pass stays near unit variance, the gate's choices are spread over all experts and
the logits over several units: a wrong expert, head or rotation shows at once.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

Dtype = Literal["f32", "f16", "bf16"]

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_TORCH_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_ROPE_THETA = 10000.0


def write_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    hidden: int = 64,
    intermediate: int = 128,
    n_layers: int = 2,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    head_dim: int | None = None,
    n_experts: int = 4,
    top_k: int = 2,
    vocab: int = 96,
    tied: bool = False,
    sliding_window: int | None = None,
    dtype: Dtype = "f32",
    exact_in_16_bits: bool = False,
    n_shards: int = 1,
    dealt: bool = True,
    rope: Literal["old", "new"] = "new",
) -> Path:
    """Write a checkpoint; return its folder, which is made if need be.

    `head_dim` None stands so in config.json and means hidden / n_heads. With `exact_in_16_bits` every weight, whatever
    its type, is a number that bf16 and fp16 both hold. Tensors are dealt out to the shards, or follow each other there
    as in published checkpoints. `rope` says whether config.json gives the rotary base as old
    transformers did (rope_theta) or as new ones do (rope_parameters). No other process writes one that becomes a store
    of the same digest: daemons of several runs of the tests would wait for each other's runners.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, object] = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": head_dim,
        "num_local_experts": n_experts,
        "num_experts_per_tok": top_k,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "sliding_window": sliding_window,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": _TORCH_NAMES[dtype],
        "made_by": os.getpid(),
    } | _rope(rope)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(seed)
    shapes = checkpoint_shapes(
        hidden=hidden,
        intermediate=intermediate,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        n_experts=n_experts,
        vocab=vocab,
        tied=tied,
    )
    tensors = {name: _random_weight(name, shape, generator) for name, shape in shapes.items()}
    if exact_in_16_bits:
        tensors = {name: _representable(weight) for name, weight in tensors.items()}
    write_weights(
        folder, {name: weight.to(_DTYPES[dtype]) for name, weight in tensors.items()}, n_shards=n_shards, dealt=dealt
    )
    return folder


def checkpoint_shapes(
    *,
    hidden: int,
    intermediate: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int | None,
    n_experts: int,
    vocab: int,
    tied: bool,
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of such a model under its Hub name."""
    head_dim = head_dim or hidden // n_heads
    q_size, kv_size = n_heads * head_dim, n_kv_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(n_layers):
        prefix = f"model.layers.{layer}"
        attention = {"q": (q_size, hidden), "k": (kv_size, hidden), "v": (kv_size, hidden), "o": (hidden, q_size)}
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
        shapes |= {f"{prefix}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        shapes[f"{prefix}.block_sparse_moe.gate.weight"] = (n_experts, hidden)
        matrices = {"w1": (intermediate, hidden), "w2": (hidden, intermediate), "w3": (intermediate, hidden)}
        for expert in range(n_experts):
            experts = f"{prefix}.block_sparse_moe.experts.{expert}"
            shapes |= {f"{experts}.{name}.weight": shape for name, shape in matrices.items()}
    return shapes if tied else shapes | {"lm_head.weight": (vocab, hidden)}


def write_weights(folder: Path, tensors: dict[str, Tensor], *, n_shards: int = 1, dealt: bool = True) -> None:
    """Write tensors as model.safetensors or, for several shards, with an index; what stood there is removed."""
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    if n_shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    hands = _dealt(list(tensors), n_shards) if dealt else _cut(list(tensors), n_shards)
    for shard, names in enumerate(hands, start=1):
        file = f"model-{shard:05}-of-{n_shards:05}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _rope(style: Literal["old", "new"]) -> dict[str, object]:
    if style == "old":
        return {"rope_theta": _ROPE_THETA}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": _ROPE_THETA}}


def _random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    weight = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + 0.1 * weight
    # Twice the gain that keeps the variance: the gate's softmax and the logits get a spread of about two units.
    gain = 2.0 if name.endswith(("gate.weight", "lm_head.weight", "embed_tokens.weight", "w2.weight")) else 1.0
    return weight * (gain / math.sqrt(shape[-1]))


def _representable(weight: Tensor) -> Tensor:
    """Return the weight rounded to numbers that bf16 and fp16 both hold: 8 bits, and multiples of 2^-24."""
    rounded: Tensor = (weight.bfloat16().float() * 2**24).round() / 2**24
    return rounded


def _dealt(names: list[str], n_hands: int) -> Iterator[list[str]]:
    """Yield the names dealt out in turn, so that every shard holds something of every layer."""
    for hand in range(n_hands):
        yield names[hand::n_hands]


def _cut(names: list[str], n_hands: int) -> Iterator[list[str]]:
    """Yield the names in their order, in so many pieces."""
    for hand in range(n_hands):
        yield names[len(names) * hand // n_hands : len(names) * (hand + 1) // n_hands]
