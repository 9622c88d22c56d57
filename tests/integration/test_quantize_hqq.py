"""The published per-expert HQQ checkpoints become stores: files of their layouts, made by the hqq package, stand in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertd.convert.checkpoint import read_checkpoint
from expertd.convert.errors import CheckpointError, WrongTensor
from expertd.convert.matrices import SourceMatrix
from expertd.convert.mixtral import dense_records, expert_records
from expertd.convert.worker_messages import MatrixSource
from tests.support.half_done import manifest_of
from tests.support.hqq_checkpoints import OrderName, write_hqq_checkpoint

FIRST = "model.layers.0.block_sparse_moe.experts.0.w1"


@pytest.mark.parametrize("order", ["grouped", "rows"])
@pytest.mark.parametrize("nbits", [2, 3, 4])
def test_every_matrix_is_read_as_the_weights_it_stands_for(tmp_path: Path, nbits: int, order: OrderName) -> None:
    weights = write_hqq_checkpoint(tmp_path, nbits=nbits, order=order)

    checkpoint = read_checkpoint(tmp_path)

    records = (*dense_records(checkpoint.config), *expert_records(checkpoint.config))
    for matrix in (matrix for record in records for matrix in record.matrices):
        place = checkpoint.place_of(matrix)
        source = MatrixSource(matrix.hub_name, str(tmp_path / place.shard.name), place)
        read = SourceMatrix(source, matrix.rows, matrix.cols).rows(0, matrix.rows).float()
        expected = weights[matrix.hub_name].view(read.shape)
        assert float((read - expected).abs().max() / expected.abs().max()) < 1e-6, matrix.hub_name
    assert checkpoint.n_quantized == 4 + 2 * 3


def test_scales_and_zeros_may_be_plain_numbers(tmp_path: Path) -> None:
    weights = write_hqq_checkpoint(tmp_path, nbits=2, order="rows", has_second_level=False)
    checkpoint = read_checkpoint(tmp_path)
    matrix = next(expert_records(checkpoint.config)).matrices[0]
    place = checkpoint.place_of(matrix)

    source = MatrixSource(FIRST, str(tmp_path / place.shard.name), place)
    read = SourceMatrix(source, matrix.rows, matrix.cols).rows(0, matrix.rows)

    assert torch.allclose(read, weights[f"{FIRST}.weight"], rtol=0, atol=1e-6)


def test_it_becomes_a_store_of_4_bits_and_what_that_adds_is_said(tmp_path: Path) -> None:
    write_hqq_checkpoint(tmp_path / "c", nbits=2, order="grouped")
    store = tmp_path / "store"

    done = subprocess.run(
        [sys.executable, "-m", "expertd", "quantize", str(tmp_path / "c"), str(store)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )

    manifest = manifest_of(store)
    errors = [lost for key in manifest.experts for lost in manifest.weight_errors[str(key)]]
    assert manifest.schemes.experts == "4bit-g64"
    assert 0.01 < max(errors) < 0.15
    line = done.stderr.splitlines()[-1]
    assert line.startswith(
        "expertd: 10 of its matrices were quantized before; to what they had lost then, 4bit-g64 adds"
    )
    assert f"{(sum(lost**2 for lost in errors) / len(errors)) ** 0.5:.1%}" in line


def edit_expert(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "expert-000.safetensors"
    tensors = load_file(path)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."))
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, path)
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    prefix = FIRST.removesuffix("w1")
    mine = {name for name, file in index["weight_map"].items() if file == path.name}
    for name in mine - {prefix + name for name in tensors}:
        del index["weight_map"][name]
    index_path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"w1__meta__zero_q": None}, f"{FIRST}.meta.zero_q: the tensor is missing from the checkpoint"),
        (
            {"w1__meta__scale_q": torch.zeros(128, 16)},
            f"{FIRST}.meta.scale_q: type U8 is expected, 'F32' came",
        ),
        (
            {"w1__meta__zero_q": torch.zeros(1, 999, dtype=torch.uint8)},
            f"{FIRST}: scales and zeros of as many groups as divide [256, 128] are expected",
        ),
        (
            {"w1__W_q": torch.zeros(7, 2048, dtype=torch.uint8)},
            f"{FIRST}.W_q: U8 of shape [7, 2048] may be packed in no order that is known, "
            "for [256, 128] in groups of 16",
        ),
        (
            {"w1__meta__meta_scale__scale": torch.zeros(1, 5)},
            f"{FIRST}.meta.meta_scale.scale: one number, or one for each column of [128, 16], is expected, [1, 5] came",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], expected: str
) -> None:
    write_hqq_checkpoint(tmp_path, nbits=2, order="grouped")
    edit_expert(tmp_path, **changes)

    with pytest.raises(WrongTensor) as refusal:
        read_checkpoint(tmp_path)

    assert str(refusal.value) == expected


def test_a_pickled_hqq_checkpoint_is_refused(tmp_path: Path) -> None:
    write_hqq_checkpoint(tmp_path, nbits=2, order="grouped")
    for path in tmp_path.glob("*.safetensors*"):
        path.unlink()
    (tmp_path / "qmodel.pt").write_bytes(b"\x80\x02}")

    with pytest.raises(CheckpointError) as refusal:
        read_checkpoint(tmp_path)

    assert str(refusal.value).startswith(f"{tmp_path}: holds pickled weights (qmodel.pt), which can run code")
