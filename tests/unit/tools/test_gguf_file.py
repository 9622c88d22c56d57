import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("gguf", reason="the gguf package is not installed: pip install 'expertd[demo]'")

from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize
from numpy.typing import NDArray

from tests.unit.tools.tiny_gguf import CONTROL_TOKENS, TOKENS, TinyShape, random_gates, write_tiny_gguf
from tools.demo_checkpoint.checkpoint import build_checkpoint
from tools.demo_checkpoint.plan import Options
from tools.demo_checkpoint.source import Source
from tools.gguf_file.checkpoint import rotary_order
from tools.gguf_file.cli import cli
from tools.gguf_file.errors import SourceInvalid
from tools.gguf_file.model import GgufTensor
from tools.gguf_file.random_blocks import TYPES, random_tensor
from tools.gguf_file.vocabulary import read_vocabulary

SHAPE = TinyShape(hidden_size=128, intermediate_size=192)
N_EXPERTS = 4
# Half a step of Q8_0, and the rounding of bf16, for weights below 0.6.
Q8_0_TOLERANCE = 0.005
SYNTHETIC_FLAGS = [
    "--layers", "1", "--hidden", "256", "--intermediate", "512", "--heads", "4", "--kv-heads", "2", "--head-dim", "64",
    "--vocab", "96", "--experts", "4",
]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source(write_tiny_gguf(tmp_path_factory.mktemp("source") / "source.gguf", SHAPE))


@pytest.fixture(scope="module")
def checkpoint(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "checkpoint"
    options = Options(noise=0.2, n_layers=SHAPE.n_layers, tie=False, dtype="bf16")
    build_checkpoint(source, random_gates(SHAPE, N_EXPERTS), options, out)
    return out


@pytest.fixture(scope="module")
def written(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> GGUFReader:
    out = tmp_path_factory.mktemp("written") / "model.gguf"
    result = CliRunner().invoke(cli, ["checkpoint", str(checkpoint), str(out), "--experts-type", "Q8_0"])
    assert result.exit_code == 0, result.output
    return GGUFReader(out)


def tensor(reader: GGUFReader, name: str) -> ReaderTensor:
    return next(tensor for tensor in reader.tensors if tensor.name == name)


def weights(reader: GGUFReader, name: str) -> NDArray[np.float32]:
    found = tensor(reader, name)
    decoded: NDArray[np.float32] = dequantize(found.data, found.tensor_type)
    return decoded


def number(reader: GGUFReader, key: str) -> object:
    return reader.fields[key].contents()


def test_rotary_pairs_lie_side_by_side() -> None:
    rows = np.arange(2 * 6, dtype=np.float32).reshape(12, 1)

    ordered = rotary_order(rows, n_heads=2)

    assert ordered[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.mark.parametrize("name", ["attn_q", "attn_k", "attn_v", "attn_output"])
def test_the_attention_comes_back_as_the_source_gguf_had_it(written: GGUFReader, source: Source, name: str) -> None:
    ours = weights(written, f"blk.1.{name}.weight")

    assert np.abs(ours - source.weights(f"blk.1.{name}.weight")).max() < Q8_0_TOLERANCE


def test_experts_are_stacked_near_the_feed_forward_they_come_from(written: GGUFReader, source: Source) -> None:
    ours = weights(written, "blk.0.ffn_down_exps.weight")

    dense = source.weights("blk.0.ffn_down.weight")
    tolerance = 0.2 * source.steps("blk.0.ffn_down.weight").max() + Q8_0_TOLERANCE
    assert ours.shape == (N_EXPERTS, SHAPE.hidden_size, SHAPE.intermediate_size)
    for expert in range(N_EXPERTS):
        assert np.abs(ours[expert] - dense).max() < tolerance
        assert (ours[expert] != ours[expert - 1]).any()


def test_the_file_says_which_mixtral_it_is(written: GGUFReader) -> None:
    keys = ("llama.block_count", "llama.expert_count", "llama.expert_used_count", "llama.attention.head_count_kv")

    assert number(written, "general.architecture") == "llama"
    assert [number(written, key) for key in keys] == [SHAPE.n_layers, N_EXPERTS, 2, SHAPE.n_kv_heads]
    assert number(written, "llama.rope.freq_base") == pytest.approx(100000.0)


def test_norms_and_gates_stay_in_float(written: GGUFReader) -> None:
    names = ("output_norm.weight", "blk.0.attn_norm.weight", "blk.1.ffn_gate_inp.weight")

    assert {tensor(written, name).tensor_type for name in names} == {GGMLQuantizationType.F32}


def test_the_tokenizer_is_taken_along(written: GGUFReader) -> None:
    types = number(written, "tokenizer.ggml.token_type")

    assert number(written, "tokenizer.ggml.tokens") == TOKENS
    assert number(written, "tokenizer.ggml.pre") == "smollm"
    assert isinstance(types, list)
    assert [token for token, kind in zip(TOKENS, types, strict=True) if kind == 3] == CONTROL_TOKENS
    assert number(written, "tokenizer.ggml.add_bos_token") is False


def test_a_tokenizer_that_splits_otherwise_is_refused(checkpoint: Path) -> None:
    document = json.loads((checkpoint / "tokenizer.json").read_text())
    document["pre_tokenizer"] = document["pre_tokenizer"]["pretokenizers"][1]

    with pytest.raises(SourceInvalid, match="SmolLM family"):
        read_vocabulary(document, len(TOKENS))


def test_ids_without_a_token_are_filled_up(checkpoint: Path) -> None:
    document = json.loads((checkpoint / "tokenizer.json").read_text())

    vocabulary = read_vocabulary(document, len(TOKENS) + 2)

    assert len(vocabulary.tokens) == len(set(vocabulary.tokens)) == len(TOKENS) + 2


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_random_k_quants_have_mean_0_and_the_deviation_that_keeps_variance(kind: GGMLQuantizationType) -> None:
    planned = GgufTensor("w", "attn_q", 0, (256, 4096), kind)

    data = random_tensor(planned, np.random.default_rng(0))

    decoded = dequantize(data.reshape(256, -1), kind)
    std = 4096**-0.5
    assert data.nbytes == planned.nbytes
    assert abs(decoded.mean()) < 0.03 * std
    assert decoded.std() == pytest.approx(std, rel=0.03)


def test_the_command_writes_random_weights_without_a_tokenizer(tmp_path: Path) -> None:
    arguments = ["synthetic", str(tmp_path / "random.gguf"), *SYNTHETIC_FLAGS, "--experts-type", "Q2_K"]

    result = CliRunner().invoke(cli, arguments)

    assert result.exit_code == 0, result.output
    reader = GGUFReader(tmp_path / "random.gguf")
    assert tensor(reader, "blk.0.ffn_up_exps.weight").tensor_type == GGMLQuantizationType.Q2_K
    assert tensor(reader, "blk.0.ffn_up_exps.weight").shape.tolist() == [256, 512, 4]
    assert number(reader, "tokenizer.ggml.model") == "no_vocab"
    assert number(reader, "llama.vocab_size") == 96


def test_sizes_that_are_no_multiple_of_a_block_are_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["synthetic", str(tmp_path / "x.gguf"), *SYNTHETIC_FLAGS, "--hidden", "192"])

    assert result.exit_code == 1
    assert result.stderr == (
        "gguf_file: token_embd.weight: 192 inputs do not divide into blocks of 256, which Q4_K needs\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_stands_there_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"mine")

    result = CliRunner().invoke(cli, ["synthetic", str(tmp_path / "x.gguf"), *SYNTHETIC_FLAGS])

    assert result.exit_code == 1
    assert "exists; remove it or name another file" in result.stderr
    assert (tmp_path / "x.gguf").read_bytes() == b"mine"


def test_a_folder_that_is_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["checkpoint", str(tmp_path), str(tmp_path / "x.gguf")])

    assert result.exit_code == 1
    assert "no config.json" in result.stderr
    assert result.stderr.count("\n") == 1
