"""A checkpoint of any size that takes no disk: whole headers, and files as long as they say, with nothing in them."""

import json
import struct
from math import prod
from pathlib import Path

from tests.support.checkpoints import checkpoint_shapes


def write_sparse_checkpoint(
    folder: Path,
    *,
    hidden: int,
    intermediate: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    n_experts: int,
    vocab: int,
    dtype: str = "BF16",
    top_k: int = 2,
) -> Path:
    """Write config.json and model.safetensors of zeros; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": n_layers}
    heads = {"num_attention_heads": n_heads, "num_key_value_heads": n_kv_heads, "vocab_size": vocab}
    experts = {"num_local_experts": n_experts, "num_experts_per_tok": top_k}
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral"} | sizes | heads | experts))
    shapes = checkpoint_shapes(
        hidden=hidden,
        intermediate=intermediate,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=None,
        n_experts=n_experts,
        vocab=vocab,
        tied=False,
    )
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + (4 if dtype == "F32" else 2) * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return folder
