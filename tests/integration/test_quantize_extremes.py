"""Checkpoints with weights at the ends of their types' range: whole commands, from files to files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from protocol.layout import record_spans
from protocol.manifest import Manifest
from protocol.schemes import scheme_named
from quant.reference import dequantize
from tests.support.checkpoints import Dtype, write_checkpoint, write_weights
from tests.support.half_done import manifest_of

LARGEST = {"bf16": torch.finfo(torch.bfloat16).max, "f32": torch.finfo(torch.float32).max}
CONFIG = 'attention = "16bit"\nhead = "16bit"\n[[override]]\nlayers = "1"\nexperts = "3"\nnbits = 2\n'


def expert_name(layer: int, expert: int, matrix: str) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"


def extreme_tensors(checkpoint: Path, dtype: Dtype) -> dict[str, Tensor]:
    """Return the checkpoint's weights, some of them moved to the ends of the type's range."""
    tensors = load_file(checkpoint / "model.safetensors")

    def scaled(name: str, largest: float) -> None:
        weight = tensors[name].double()
        tensors[name] = (weight / weight.abs().max() * largest).to(tensors[name].dtype)

    scaled(expert_name(0, 0, "w1"), LARGEST[dtype])
    scaled(expert_name(0, 1, "w2"), 2.0**-126)
    scaled(expert_name(0, 2, "w3"), 2.0**-133 * 64)
    scaled(expert_name(1, 3, "w1"), LARGEST[dtype])
    scaled("lm_head.weight", LARGEST[dtype])
    scaled("model.embed_tokens.weight", 1e-20)
    tensors[expert_name(1, 0, "w1")].fill_(-LARGEST[dtype])
    tensors[expert_name(1, 1, "w1")][:] = torch.tensor(2.0**-133).to(tensors[expert_name(1, 1, "w1")].dtype)
    tensors[expert_name(1, 2, "w1")][::2] *= 1e-35
    tensors[expert_name(1, 2, "w1")][1, 64:] = 1e38
    return tensors


def expertd(*arguments: object) -> str:
    command = [sys.executable, "-m", "expertd", *map(str, arguments)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def restored(store: Path, manifest: Manifest, layer: int, expert: int, matrix: str) -> Tensor:
    record = next(record for key, record in manifest.experts.items() if (key.layer, key.expert) == (layer, expert))
    with (store / record.file).open("rb") as file:
        file.seek(record.offset)
        data = torch.frombuffer(bytearray(file.read(record.nbytes)), dtype=torch.uint8)
    span = next(span for span in record_spans(record.layout_id, record.parts) if span.part.name == matrix)
    part = span.part
    return dequantize(data[span.offset : span.offset + span.nbytes], part.rows, part.cols, scheme_named(part.scheme))


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_every_finite_checkpoint_becomes_a_store_whose_weights_are_near(tmp_path: Path, dtype: Dtype) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", dtype=dtype)
    tensors = extreme_tensors(checkpoint, dtype)
    write_weights(checkpoint, tensors)
    store, config = tmp_path / "store", tmp_path / "config.toml"
    config.write_text(CONFIG)

    expertd("quantize", checkpoint, store, "--jobs", "1", "--config", config)

    assert "are whole" in expertd("verify", store)
    manifest = manifest_of(store)
    for layer in range(2):
        for expert in range(4):
            for matrix in ("w1", "w2", "w3"):
                weight = tensors[expert_name(layer, expert, matrix)].double()
                back = restored(store, manifest, layer, expert, matrix).double()
                span = weight.amax(1).clamp_min(0) - weight.amin(1).clamp_max(0)
                most = 0.4 if (layer, expert) == (1, 3) else 0.09
                assert bool(back.isfinite().all())
                assert bool(((back - weight).abs().amax(1) <= most * span).all()), (layer, expert, matrix)
    shown = json.loads(expertd("inspect", store, "--json"))
    errors = [
        error for record in (*shown["experts"].values(), *shown["dense"].values()) for error in record["weight_errors"]
    ]
    assert 0 < max(errors) < 0.3
    assert shown["dense"]["embed_tokens"]["weight_errors"][0] < 0.003
    assert shown["dense"]["lm_head"]["weight_errors"][0] < 0.003


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_refused_by_name(tmp_path: Path, value: float) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", dtype="bf16")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[expert_name(1, 2, "w3")][127, 63] = value
    write_weights(checkpoint, tensors)
    command = [sys.executable, "-m", "expertd", "quantize", str(checkpoint), str(tmp_path / "store"), "--jobs", "1"]

    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert done.stderr == (
        f"expertd: {expert_name(1, 2, 'w3')}: holds weights that are NaN or infinite; the checkpoint is damaged\n"
    )
    assert not (tmp_path / "store").exists()
