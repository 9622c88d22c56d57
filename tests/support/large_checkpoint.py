"""A Mixtral checkpoint of full width and few layers, written as a stream: it is larger than what a test may hold."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tests.support.checkpoints import checkpoint_shapes

_BLOCK_NELEMENTS = 1 << 24
_STD = 0.02


def write_large_checkpoint(folder: Path, *, n_layers: int, n_shards: int) -> Path:
    """Write Mixtral-8x7B with so many layers, bf16, of random weights; return its folder."""
    folder.mkdir(parents=True)
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": n_layers, "vocab_size": 32000}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}
    document = {"model_type": "mixtral", "torch_dtype": "bfloat16", "rope_theta": 1e6} | sizes | heads
    (folder / "config.json").write_text(json.dumps(document))
    shapes = checkpoint_shapes(
        hidden=4096,
        intermediate=14336,
        n_layers=n_layers,
        n_heads=32,
        n_kv_heads=8,
        head_dim=None,
        n_experts=8,
        vocab=32000,
        tied=False,
    )
    block = (torch.randn(_BLOCK_NELEMENTS, generator=torch.Generator().manual_seed(1)) * _STD).bfloat16()
    names = list(shapes)
    weight_map: dict[str, str] = {}
    for shard in range(n_shards):
        file = f"model-{shard + 1:05}-of-{n_shards:05}.safetensors"
        members = names[len(names) * shard // n_shards : len(names) * (shard + 1) // n_shards]
        weight_map |= dict.fromkeys(members, file)
        _write_shard(folder / file, {name: shapes[name] for name in members}, block)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], block: Tensor) -> None:
    header, offset = {}, 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            for piece in _pieces(torch.Size(shape).numel(), block, seed=len(name) * 7919 + hash_of(name)):
                file.write(piece.contiguous().view(torch.uint8).numpy().data)


def hash_of(name: str) -> int:
    """Return a number that is the same in every process."""
    return sum(index * byte for index, byte in enumerate(name.encode(), start=1))


def _pieces(count: int, block: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield so many weights, the block's from another place on each time: no two matrices alike."""
    start = seed * 104_729 % block.numel()
    while count:
        piece = block[start : start + count]
        yield piece * (1 if count % 2 else -1)
        count -= piece.numel()
        start = 0
