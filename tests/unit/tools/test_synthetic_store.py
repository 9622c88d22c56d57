import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from expertd.convert.config import QuantizeConfig
from expertd.convert.errors import CheckpointError, NoDiskSpace, StoreExists
from expertd.store import read_manifest
from protocol.handles import ExpertKey
from protocol.layout import Part, aligned, part_nbytes
from protocol.manifest import Manifest
from protocol.schemes import BF16, FP16, Q2_G16, Q3_G64, Q4_G64, Q8_G64, Scheme, scheme_named
from quant.packing import pack, unpack
from quant.reference import dequantize
from tools.geometry import GEOMETRIES, MIXTRAL_8X7B, Geometry
from tools.synthetic_store.cli import main
from tools.synthetic_store.packed import SecondLevel, ones_part, random_part
from tools.synthetic_store.store import plan_synthetic_store, write_synthetic_store

SMALL = replace(
    GEOMETRIES[MIXTRAL_8X7B],
    n_layers=2,
    hidden=128,
    intermediate=192,
    heads=4,
    kv_heads=2,
    head_dim=32,
    vocab=96,
    experts=4,
)
SMALL_FLAGS = [
    "--layers", "2", "--hidden", "128", "--intermediate", "192", "--heads", "4", "--kv-heads", "2", "--head-dim", "32",
    "--vocab", "96", "--experts", "4",
]  # fmt: skip
STD = 0.02

quantized = pytest.mark.parametrize("scheme", [Q8_G64, Q4_G64, Q3_G64, Q2_G16], ids=lambda scheme: scheme.name)


def part_bytes(part: Part, seed: int = 0) -> torch.Tensor:
    """Return a part of random weights without what pads it to the next one."""
    data = np.concatenate(list(random_part(part, STD, np.random.default_rng(seed))))
    assert data.nbytes == aligned(part_nbytes(part), 128)
    assert not data[part_nbytes(part) :].any()
    return torch.from_numpy(data[: part_nbytes(part)].copy())


def write(folder: Path, geometry: Geometry = SMALL, *, seed: int = 0, **schemes: str) -> Manifest:
    plan = plan_synthetic_store(geometry, QuantizeConfig(**schemes))  # type: ignore[arg-type]
    return write_synthetic_store(folder, plan, seed=seed)


@quantized
@pytest.mark.parametrize(("rows", "cols"), [(64, 128), (13, 192), (8, 64)])
def test_random_bytes_are_what_packing_their_meaning_gives(scheme: Scheme, rows: int, cols: int) -> None:
    data = part_bytes(Part("w", rows, cols, scheme.name))

    again = pack(unpack(data, rows, cols, scheme))

    assert torch.equal(again, data)


@quantized
def test_quantized_weights_have_mean_0_and_the_standard_deviation_asked_for(scheme: Scheme) -> None:
    data = part_bytes(Part("w", 512, 1024, scheme.name))

    weights = dequantize(data, 512, 1024, scheme)

    # Weights of a group share scale and zero: far fewer than half a million are independent.
    assert weights.mean().abs() < 0.02 * STD
    assert weights.std() == pytest.approx(STD, rel=0.02)


@pytest.mark.parametrize("scheme", [Q8_G64, Q4_G64], ids=lambda scheme: scheme.name)
def test_weights_for_a_gguf_have_nearly_the_mean_and_deviation_asked_for(scheme: Scheme) -> None:
    parts = random_part(Part("w", 512, 1024, scheme.name), STD, np.random.default_rng(0), SecondLevel.GGUF)

    weights = dequantize(torch.from_numpy(np.concatenate(list(parts))), 512, 1024, scheme)

    assert weights.mean().abs() < 0.02 * STD
    # A step has five bits.
    assert weights.std() == pytest.approx(STD, rel=0.04)


@pytest.mark.parametrize("scheme", [BF16, FP16], ids=["bf16", "fp16"])
def test_16_bit_weights_have_mean_0_and_the_standard_deviation_asked_for(scheme: Scheme) -> None:
    weights = dequantize(part_bytes(Part("w", 512, 1024, scheme.name)), 512, 1024, scheme)

    assert weights.mean().abs() < 0.02 * STD
    assert weights.std() == pytest.approx(STD, rel=0.02)


def test_norms_are_ones() -> None:
    data = torch.from_numpy(np.concatenate(list(ones_part(Part("norm", 1, 100, "bf16")))))

    assert data.view(torch.bfloat16)[:100].tolist() == [1.0] * 100


@pytest.mark.parametrize("scheme", ["4bit-g64", "3bit-g64", "2bit-g16", "8bit-g64", "16bit"])
def test_a_store_of_any_scheme_is_whole(tmp_path: Path, scheme: str) -> None:
    written = write(tmp_path / "store", experts=scheme)

    manifest = read_manifest(tmp_path / "store")
    assert manifest.digest == written.digest
    assert len(manifest.experts) == 2 * 4
    assert scheme_named(manifest.schemes.experts).nbits == int(scheme.partition("bit")[0])


def test_every_expert_has_bytes_of_its_own(tmp_path: Path) -> None:
    manifest = write(tmp_path / "store")

    checksums = {record.xxh3_128 for record in manifest.experts.values()}
    assert len(checksums) == len(manifest.experts)


def test_the_seed_alone_decides_the_bytes(tmp_path: Path) -> None:
    first, again = write(tmp_path / "a"), write(tmp_path / "b")
    other = write(tmp_path / "c", seed=1)

    assert first.digest == again.digest != other.digest


def test_the_planned_length_is_what_is_written_and_no_more_than_needed(tmp_path: Path) -> None:
    plan = plan_synthetic_store(SMALL, QuantizeConfig())
    write_synthetic_store(tmp_path / "store", plan, seed=0)

    written = sum(path.stat().st_size for path in (tmp_path / "store").iterdir())
    assert plan.nbytes - 16_000 < written <= plan.nbytes


def test_an_interrupted_store_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_synthetic_store(
            tmp_path / "store", plan_synthetic_store(SMALL, QuantizeConfig()), seed=0, on_written=interrupt
        )

    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))

    with pytest.raises(NoDiskSpace, match=r"needs \d\.\d MB, .* has 0\.0 MB free"):
        write(tmp_path / "store")

    assert list(tmp_path.iterdir()) == []


def test_a_store_that_stands_there_is_not_replaced(tmp_path: Path) -> None:
    write(tmp_path / "store")

    with pytest.raises(StoreExists):
        write(tmp_path / "store", seed=1)


def test_sizes_that_no_mixtral_has_are_refused() -> None:
    with pytest.raises(CheckpointError, match="num_key_value_heads"):
        plan_synthetic_store(replace(SMALL, kv_heads=3), QuantizeConfig())


def test_the_command_writes_the_geometry_of_its_flags(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path / "store"), *SMALL_FLAGS, "--experts-scheme", "3bit-g64"])

    config = json.loads((tmp_path / "store" / "config.json").read_text())
    manifest = read_manifest(tmp_path / "store")
    assert result.exit_code == 0, result.output
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (128, 2, 96)
    assert manifest.experts[ExpertKey(1, 3)].parts[0] == Part("w1", 192, 128, "3bit-g64")


def test_an_unknown_scheme_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path / "store"), *SMALL_FLAGS, "--experts-scheme", "5bit"])

    assert result.exit_code == 1
    assert result.stderr.startswith("synthetic_store: experts: one of '16bit'")
    assert result.stderr.count("\n") == 1
