"""The checkpoint on disk: a folder that appears whole or not at all.

Owns the files' bytes and their place. Everything is written into a hidden sibling of the folder, tensor by tensor,
and renamed when complete; a failure removes the sibling.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tools.demo_checkpoint.errors import OutputError, SourceError
from tools.demo_checkpoint.plan import Options, PlannedTensor, tensor_plan
from tools.demo_checkpoint.source import Source, SourceFacts, Vocabulary
from tools.demo_checkpoint.tokenizer_files import (
    generation_config_document,
    tokenizer_config_document,
    tokenizer_document,
)

# Name in safetensors, bytes a weight, name in config.json.
DTYPES = {"bf16": ("BF16", 2, "bfloat16"), "f32": ("F32", 4, "float32")}
TOP_K = 2

# The files beside the weights: the tokenizer of the source is 2.7 MB.
_SIDE_FILES_NBYTES = 16 << 20
_HEADER_ALIGNMENT = 8


def build_checkpoint(
    source: Source,
    gates: NDArray[np.uint16],
    options: Options,
    out: Path,
    on_written: Callable[[int], None] = lambda _: None,
) -> int:
    """Write the checkpoint folder `out`, telling on_written of every tensor's nbytes; return the bytes of weights.

    Raises OutputError if it cannot be written there, SourceError if the source does not give what is needed.
    """
    plan = tensor_plan(source, gates, options)
    vocabulary = source.vocabulary()
    nbytes = plan_nbytes(plan, options.dtype)
    _check_out(out, nbytes + _SIDE_FILES_NBYTES)
    try:
        with _appearing_whole(out) as folder:
            _write_weights(folder / "model.safetensors", plan, options.dtype, on_written)
            config = config_document(source.facts, vocabulary, options, gates.shape[1])
            _write_json(folder / "config.json", config)
            _write_json(folder / "generation_config.json", generation_config_document(vocabulary))
            _write_json(folder / "tokenizer.json", tokenizer_document(vocabulary))
            tokenizer_config = tokenizer_config_document(vocabulary, source.facts.context_length)
            _write_json(folder / "tokenizer_config.json", tokenizer_config)
    except OSError as error:
        raise OutputError(f"{out}: could not be written ({error.strerror or error})") from None
    return nbytes


def plan_nbytes(plan: Sequence[PlannedTensor], dtype: str) -> int:
    """Return the bytes of all tensors of the plan, without the file's header."""
    return sum(prod(tensor.shape) for tensor in plan) * DTYPES[dtype][1]


def config_document(facts: SourceFacts, vocabulary: Vocabulary, options: Options, n_experts: int) -> dict[str, object]:
    """Return config.json of the Mixtral that is built."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": facts.hidden_size,
        "intermediate_size": facts.intermediate_size,
        "num_hidden_layers": options.n_layers,
        "num_attention_heads": facts.n_heads,
        "num_key_value_heads": facts.n_kv_heads,
        "head_dim": facts.hidden_size // facts.n_heads,
        "vocab_size": facts.vocab_size,
        "num_local_experts": n_experts,
        "num_experts_per_tok": TOP_K,
        "max_position_embeddings": facts.context_length,
        "rms_norm_eps": facts.rms_norm_eps,
        "rope_theta": facts.rope_theta,
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": options.tie,
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": vocabulary.eos_id,
        "pad_token_id": vocabulary.padding_id,
        "router_aux_loss_coef": 0.02,
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": DTYPES[options.dtype][2],
    }


def bf16_bits(weights: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return finite float32 weights as the bits of bfloat16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(weights, np.float32).view(np.uint32)
    last_kept_bit = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + last_kept_bit) >> np.uint32(16)).astype(np.uint16)


def _check_out(out: Path, nbytes: int) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: exists; remove it or name another folder")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise OutputError(f"{out}: its parent folder {parent} does not exist")
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise OutputError(f"{out}: {nbytes / 1e9:.2f} GB are needed there, {free / 1e9:.2f} GB are free")


@contextmanager
def _appearing_whole(out: Path) -> Iterator[Path]:
    folder = out.absolute().with_name(f".{out.name}.{os.getpid()}.tmp")
    folder.mkdir()
    try:
        yield folder
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_weights(path: Path, plan: Sequence[PlannedTensor], dtype: str, on_written: Callable[[int], None]) -> None:
    header = _header(plan, dtype)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)))
        file.write(header)
        for tensor in plan:
            weights = tensor.make()
            if weights.shape != tensor.shape:
                raise SourceError(f"{tensor.name}: shape {tensor.shape} is expected, the source has {weights.shape}")
            stored = bf16_bits(weights) if dtype == "bf16" else weights
            file.write(stored.tobytes())
            on_written(stored.nbytes)


def _header(plan: Sequence[PlannedTensor], dtype: str) -> bytes:
    """Return the header of the safetensors file, padded with spaces: names, dtypes, shapes, offsets."""
    file_dtype, weight_nbytes, _ = DTYPES[dtype]
    document: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in plan:
        end = offset + prod(tensor.shape) * weight_nbytes
        document[tensor.name] = {"dtype": file_dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(document, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % _HEADER_ALIGNMENT)


def _write_json(path: Path, document: dict[str, object]) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False, indent=1), encoding="utf-8")
