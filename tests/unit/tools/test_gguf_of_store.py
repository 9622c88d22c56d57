from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

pytest.importorskip("gguf", reason="the gguf package is not installed: pip install 'expertd[demo]'")

from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize as decoded_blocks
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel

from expertd.store import StoreFiles
from protocol.handles import ExpertKey
from protocol.layout import record_spans
from protocol.manifest import Record
from protocol.schemes import scheme_named
from quant.reference import dequantize
from tools.gguf_file.checkpoint import rotary_order
from tools.gguf_file.cli import cli
from tools.gguf_file.errors import SourceInvalid
from tools.gguf_file.vocabulary import byte_vocabulary
from tools.synthetic_store.cli import main as make_store

N_EXPERTS = 4
HEADS = {"attn_q": 4, "attn_k": 2}
FLAGS = [
    "--layers", "2", "--hidden", "256", "--intermediate", "512", "--heads", "4", "--kv-heads", "2", "--head-dim", "64",
    "--vocab", "300", "--experts", str(N_EXPERTS),
]  # fmt: skip


@pytest.fixture(scope="module")
def store_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "store"
    assert CliRunner().invoke(make_store, [str(out), *FLAGS, "--for-gguf"]).exit_code == 0
    return out


@pytest.fixture
def files(store_dir: Path) -> Iterator[StoreFiles]:
    with StoreFiles(store_dir) as files:
        yield files


@pytest.fixture(scope="module")
def written(store_dir: Path) -> GGUFReader:
    out = store_dir.with_name("store.gguf")
    result = convert(store_dir, out)
    assert result.exit_code == 0, result.output
    return GGUFReader(out)


def convert(store_dir: Path, out: Path) -> Result:
    return CliRunner().invoke(cli, ["store", str(store_dir), str(out)])


def theirs(reader: GGUFReader, name: str) -> NDArray[np.float32]:
    found = next(tensor for tensor in reader.tensors if tensor.name == name)
    weights: NDArray[np.float32] = decoded_blocks(found.data, found.tensor_type)
    return weights


def ours(files: StoreFiles, record: Record, part: int = 0) -> NDArray[np.float32]:
    data = bytearray(record.nbytes)
    assert files.read_record(record, memoryview(data))
    span = record_spans(record.layout_id, record.parts)[part]
    part_bytes = torch.frombuffer(data, dtype=torch.uint8)[span.offset : span.offset + span.nbytes]
    weights: NDArray[np.float32] = dequantize(
        part_bytes, span.part.rows, span.part.cols, scheme_named(span.part.scheme)
    ).numpy()
    return weights


@pytest.mark.parametrize(("role", "part"), [("ffn_gate_exps", "w1"), ("ffn_up_exps", "w3"), ("ffn_down_exps", "w2")])
def test_every_weight_of_every_expert_is_exactly_the_stores(
    written: GGUFReader, files: StoreFiles, role: str, part: str
) -> None:
    stacked = theirs(written, f"blk.1.{role}.weight")

    for expert in range(N_EXPERTS):
        record = files.manifest.experts[ExpertKey(1, expert)]
        number = [listed.name for listed in record.parts].index(part)
        np.testing.assert_array_equal(stacked[expert], ours(files, record, number))


@pytest.mark.parametrize(
    ("name", "of_the_store"),
    [
        ("token_embd", "embed_tokens"),
        ("output", "lm_head"),
        ("output_norm", "norm"),
        ("blk.0.attn_q", "layers.0.q_proj"),
        ("blk.1.attn_k", "layers.1.k_proj"),
        ("blk.1.attn_v", "layers.1.v_proj"),
        ("blk.0.attn_output", "layers.0.o_proj"),
        ("blk.1.ffn_gate_inp", "layers.1.gate"),
    ],
)
def test_every_dense_weight_is_exactly_the_stores(
    written: GGUFReader, files: StoreFiles, name: str, of_the_store: str
) -> None:
    weights = theirs(written, f"{name}.weight")

    expected = ours(files, files.manifest.dense[of_the_store])
    n_heads = HEADS.get(name.rpartition(".")[2])
    np.testing.assert_array_equal(
        weights.reshape(expected.shape), expected if n_heads is None else rotary_order(expected, n_heads)
    )


def test_experts_take_four_and_a_half_bits_a_weight(written: GGUFReader) -> None:
    types = {tensor.tensor_type for tensor in written.tensors if "_exps" in tensor.name}

    assert types == {GGMLQuantizationType.Q4_K}


def test_each_byte_is_the_token_of_its_value() -> None:
    vocabulary = byte_vocabulary(300)

    text = "A line,\n\x01and ünicode."
    pieces = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    spelled = [vocabulary.tokens.index(character) for piece, _ in pieces for character in piece]
    assert spelled == list(text.encode())


def test_a_vocabulary_without_room_for_all_bytes_is_refused() -> None:
    with pytest.raises(SourceInvalid, match="at least 257 are expected"):
        byte_vocabulary(256)


def test_a_store_whose_weights_no_gguf_holds_is_one_line(tmp_path: Path) -> None:
    CliRunner().invoke(make_store, [str(tmp_path / "store"), *FLAGS])

    result = convert(tmp_path / "store", tmp_path / "x.gguf")

    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("gguf_file: every base_")
    assert "--for-gguf` makes stores that a GGUF can hold" in result.stderr
    assert not (tmp_path / "x.gguf").exists()


def test_a_folder_that_is_no_store_is_one_line(tmp_path: Path) -> None:
    result = convert(tmp_path, tmp_path / "x.gguf")

    assert result.exit_code == 1
    assert result.stderr.startswith("gguf_file: manifest.json: missing")
    assert result.stderr.count("\n") == 1
