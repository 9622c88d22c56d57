"""`runner bench`: the engine measured in this process, the command on files, and on a synthetic store with a daemon."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.our_decode import decode
from benchmarks.our_roof import Decoding, RangeReader, measure
from benchmarks.second_halves import score_second_halves
from expertd.convert.config import QuantizeConfig
from protocol.handles import ExpertKey
from quant.library import has_c_library
from runner.bench import BenchPlan, bench
from runner.config import RunnerConfig
from runner.engine import Engine
from runner.perplexity import perplexity
from tests.support.daemon import DaemonProcess, run_expertd
from tests.support.local_runner import start_runner
from tests.support.local_store import LocalStore
from tools.geometry import GEOMETRIES, MIXTRAL_8X7B
from tools.synthetic_store.store import plan_synthetic_store, write_synthetic_store

SMALL = replace(
    GEOMETRIES[MIXTRAL_8X7B],
    n_layers=3,
    hidden=128,
    intermediate=192,
    heads=4,
    kv_heads=2,
    head_dim=32,
    vocab=96,
)
PLAN = BenchPlan(prompt_tokens=6, context_tokens=9, decode_tokens=4, runs=2, seed=1)
ARGUMENTS = ("--prompt-tokens", "6", "--context-tokens", "9", "--decode-tokens", "4", "--runs", "2")
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synthetic") / "store"
    write_synthetic_store(path, plan_synthetic_store(SMALL, QuantizeConfig(experts="2bit-g16")), seed=0)
    return path


@pytest.fixture
def engine(synthetic: Path) -> Iterator[Engine]:
    with Engine(LocalStore(synthetic), RunnerConfig(threads=1, context=16)) as engine:
        yield engine


@pytest.mark.skipif(not has_c_library(), reason="the C library was not built")
def test_the_time_outside_of_products_is_a_part_of_a_tokens_time(engine: Engine) -> None:
    measured = bench(engine, PLAN)

    assert measured.decode is not None
    assert len(measured.outside_s) == PLAN.runs
    for outside_s, tokens_per_s in zip(measured.outside_s, measured.decode.samples, strict=True):
        assert 0 < outside_s < 1 / tokens_per_s


def test_every_run_counts_but_the_one_that_warms_up(engine: Engine) -> None:
    measured = bench(engine, PLAN)

    assert measured.prefill is not None
    assert measured.decode is not None
    assert len(measured.prefill.samples) == len(measured.decode.samples) == 2
    assert all(sample > 0 for sample in measured.prefill.samples + measured.decode.samples)


def test_what_is_asked_for_0_tokens_is_not_measured(engine: Engine) -> None:
    assert bench(engine, replace(PLAN, prompt_tokens=0)).prefill is None
    assert bench(engine, replace(PLAN, decode_tokens=0)).decode is None


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_beside_a_token_all_is_read_that_it_reads_of_the_store(engine: Engine, tmp_path: Path) -> None:
    decoding = Decoding(engine, context_tokens=5, n_tokens=2)

    roof = measure(decoding, RangeReader(tmp_path, 1), n_tokens=2, rounds=3)

    store = engine.store
    experts = SMALL.n_layers * SMALL.top_k * store.expert_record(ExpertKey(0, 0)).nbytes
    dense = sum(store.dense_record(name).nbytes for name in store.manifest.dense if name != "embed_tokens")
    assert roof.nbytes == experts + dense
    assert len(roof.read_s) == len(roof.decode_s) == len(roof.outside_s) == 3
    assert all(0 <= outside_s < decode_s for outside_s, decode_s in zip(roof.outside_s, roof.decode_s, strict=True))


def test_a_text_decoded_token_by_token_is_predicted_as_when_it_is_computed_at_once(engine: Engine) -> None:
    token_ids = [7 * position % 96 for position in range(16)]

    elapsed_s, predicted = decode(engine, token_ids)

    at_once = perplexity(score_second_halves(engine, token_ids, n_windows=1, window=len(token_ids)))
    assert predicted == pytest.approx(at_once, rel=1e-6)
    assert elapsed_s > 0


def test_a_context_longer_than_the_configured_one_has_room(engine: Engine) -> None:
    measured = bench(engine, replace(PLAN, context_tokens=40))

    assert measured.decode is not None


def test_a_synthetic_model_computes_finite_logits_of_unit_size_with_every_expert(synthetic: Path) -> None:
    store = LocalStore(synthetic)
    with Engine(store, RunnerConfig(threads=1, context=256)) as engine:
        logits = engine.logits(torch.randint(SMALL.vocab, (256,), generator=torch.Generator().manual_seed(0)).tolist())

    keys = {ExpertKey(layer, expert) for layer in range(SMALL.n_layers) for expert in range(SMALL.experts)}
    assert store.touched == keys
    assert 0.5 < logits.std() < 2


def test_the_command_prints_one_json_object(synthetic: Path) -> None:
    with start_runner("bench", synthetic, *ARGUMENTS, "--threads", "1", "--json") as process:
        out, err = process.communicate(timeout=TIMEOUT_S)

    figures = json.loads(out)
    assert (process.returncode, err) == (0, b"")
    assert len(figures["decode_tokens_per_s_samples"]) == 2
    assert figures["threads"] == 1


@pytest.mark.skipif(not has_c_library(), reason="the C library was not built")
def test_it_computes_with_the_kernels_that_are_named(synthetic: Path) -> None:
    with start_runner("bench", synthetic, *ARGUMENTS, "--kernels", "portable", "--json") as process:
        out, _ = process.communicate(timeout=TIMEOUT_S)

    assert json.loads(out)["kernels"] == "portable"


@pytest.mark.skipif(not has_c_library(), reason="the C library was not built")
def test_kernels_that_are_not_there_are_one_line(synthetic: Path) -> None:
    with start_runner("bench", synthetic, *ARGUMENTS, "--kernels", "abacus") as process:
        _, err = process.communicate(timeout=TIMEOUT_S)

    assert process.returncode == 1
    assert err.startswith(b"runner: abacus: ")
    assert err.count(b"\n") == 1


def test_nothing_to_measure_is_a_wrong_command_line(synthetic: Path) -> None:
    with start_runner("bench", synthetic, "--prompt-tokens", "0", "--decode-tokens", "0") as process:
        _, err = process.communicate(timeout=TIMEOUT_S)

    assert process.returncode == 2
    assert err.decode().count("\n") == 1
    assert b"nothing to measure" in err


def test_expertd_verifies_and_serves_a_synthetic_store(synthetic: Path, daemon: DaemonProcess) -> None:
    verified = run_expertd("verify", synthetic)
    loaded = run_expertd("load", synthetic)
    command = [sys.executable, "-m", "runner", "bench", "--store", str(synthetic), *ARGUMENTS]
    measured = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)

    assert (verified.returncode, loaded.returncode, measured.returncode) == (0, 0, 0), measured.stderr
    assert daemon.is_alive()
    assert "decode of 4 tokens behind 9" in measured.stdout
