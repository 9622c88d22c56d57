import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from expertd.convert.checkpoint import read_checkpoint
from expertd.convert.errors import CheckpointError, ConvertError, MalformedCheckpoint, NotAMixtral, WrongTensor
from expertd.convert.mixtral import Matrix
from tests.support.checkpoints import write_checkpoint, write_weights

FIRST_EXPERT = "model.layers.0.block_sparse_moe.experts.0.w1.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint")


def refusal_of(folder: Path, kind: type[ConvertError]) -> str:
    with pytest.raises(kind) as refusal:
        read_checkpoint(folder)
    assert type(refusal.value) is kind
    line = str(refusal.value)
    assert "\n" not in line
    return line


def open_fds() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({field: value for field, value in config.items() if value != "absent"}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    write_weights(folder, tensors)


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_a_matrix_is_read_bit_for_bit(tmp_path: Path, dtype: str, n_shards: int) -> None:
    folder = write_checkpoint(tmp_path / "c", dtype=dtype, n_shards=n_shards)  # type: ignore[arg-type]
    matrix = Matrix(FIRST_EXPERT, (128, 64), "w1")
    tensors = {name: weight for path in folder.glob("*.safetensors") for name, weight in load_file(path).items()}

    checkpoint = read_checkpoint(folder)
    data = checkpoint.read(matrix)
    word = checkpoint.dtype(matrix)

    assert word == dtype.upper()
    assert torch.equal(torch.frombuffer(data, dtype=tensors[FIRST_EXPERT].dtype), tensors[FIRST_EXPERT].flatten())


def test_a_checkpoint_holds_no_file_open(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", n_shards=3)
    before = open_fds()

    checkpoint = read_checkpoint(folder)
    checkpoint.read(Matrix(FIRST_EXPERT, (128, 64), "w1"))

    assert open_fds() == before


def test_a_shard_that_is_replaced_after_its_header_was_read_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    checkpoint = read_checkpoint(folder)
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(0, 0))

    with pytest.raises(CheckpointError) as refusal:
        checkpoint.read(Matrix(FIRST_EXPERT, (128, 64), "w1"))

    assert str(refusal.value) == f"{path}: the checkpoint changed while it was read"


def test_head_dim_may_be_null_or_absent(folder: Path) -> None:
    edit_config(folder, head_dim="absent")

    checkpoint = read_checkpoint(folder)
    assert checkpoint.config.head_dim == 16


def test_kv_heads_of_null_are_as_many_as_the_heads(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", n_kv_heads=4)
    edit_config(folder, num_key_value_heads=None)

    checkpoint = read_checkpoint(folder)
    assert checkpoint.config.n_kv_heads == 4


def test_a_damaged_generation_config_is_refused_before_any_work(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')

    assert "generation_config.json: eos_token_id: token ids are expected" in refusal_of(folder, MalformedCheckpoint)


def test_head_dim_need_not_be_hidden_over_heads(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", head_dim=32, n_kv_heads=1)

    checkpoint = read_checkpoint(folder)
    assert checkpoint.config.head_dim == 32


def test_rotary_frequencies_and_a_second_copy_of_tied_embeddings_are_left_out(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", tied=True)
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    edit_weights(folder, lambda tensors: tensors.update(frequencies | {"lm_head.weight": torch.ones(96, 64)}))

    checkpoint = read_checkpoint(folder)
    assert checkpoint.config.is_tied


@pytest.mark.parametrize(
    ("changes", "kind", "expected"),
    [
        (
            {"model_type": "llama"},
            NotAMixtral,
            "model_type 'llama' is not supported; 'mixtral' is",
        ),
        ({"model_type": "absent"}, NotAMixtral, "model_type None is not supported; 'mixtral' is"),
        ({"hidden_act": "gelu"}, NotAMixtral, "hidden_act 'gelu' is not supported; 'silu' is"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            NotAMixtral,
            "the checkpoint is already quantized ('awq'); the original in F32, F16 or BF16 is needed",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4}},
            NotAMixtral,
            "rope_scaling: rope type 'yarn' is not supported; this version computes 'default'",
        ),
        ({"head_dim": 15}, MalformedCheckpoint, "head_dim 15 is odd; rotary embeddings need pairs"),
        ({"eos_token_id": "</s>"}, MalformedCheckpoint, "eos_token_id: token ids are expected, '</s>' came"),
        ({"hidden_size": "absent"}, MalformedCheckpoint, "hidden_size is missing"),
        (
            {"vocab_size": 0},
            MalformedCheckpoint,
            "vocab_size: a count from 1 to 16777216 is expected, 0 came",
        ),
        (
            {"num_hidden_layers": 2.0},
            MalformedCheckpoint,
            "num_hidden_layers: a count from 1 to 16777216 is expected, 2.0 came",
        ),
        (
            {"num_local_experts": True},
            MalformedCheckpoint,
            "num_local_experts: a count from 1 to 16777216 is expected, True came",
        ),
        (
            {"num_hidden_layers": 1 << 20},
            MalformedCheckpoint,
            "1048576 layers x 4 experts; a store holds at most 65536",
        ),
        (
            {"num_experts_per_tok": 5},
            MalformedCheckpoint,
            "num_experts_per_tok 5 is more than num_local_experts 4",
        ),
        (
            {"num_key_value_heads": 3},
            MalformedCheckpoint,
            "num_attention_heads 4 does not divide by num_key_value_heads 3",
        ),
        (
            {"num_attention_heads": 6, "num_key_value_heads": 2},
            MalformedCheckpoint,
            "hidden_size 64 does not divide by num_attention_heads 6, and there is no head_dim",
        ),
        (
            {"tie_word_embeddings": "yes"},
            MalformedCheckpoint,
            "tie_word_embeddings: true or false is expected, 'yes' came",
        ),
    ],
)
def test_a_configuration_that_is_none_of_ours_is_refused(
    folder: Path, changes: dict[str, object], kind: type[ConvertError], expected: str
) -> None:
    edit_config(folder, **changes)

    line = refusal_of(folder, kind)

    assert line == f"config.json: {expected}"


def test_a_configuration_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")

    line = refusal_of(folder, MalformedCheckpoint)

    assert line.startswith("config.json: not JSON (")


def test_a_missing_tensor_is_named(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop(FIRST_EXPERT))

    line = refusal_of(folder, WrongTensor)

    assert line == f"{FIRST_EXPERT}: the tensor is missing from the checkpoint"


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({FIRST_EXPERT: torch.ones(64, 128)}))

    line = refusal_of(folder, WrongTensor)

    assert line == f"{FIRST_EXPERT}: shape [128, 64] is expected from config.json, [64, 128] came"


def test_a_tensor_of_whole_numbers_is_refused(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({FIRST_EXPERT: torch.ones(128, 64, dtype=torch.int8)}))

    line = refusal_of(folder, WrongTensor)

    assert line == f"{FIRST_EXPERT}: type F32, F16, BF16 is expected, 'I8' came"


def test_a_tensor_that_no_mixtral_has_is_refused(folder: Path) -> None:
    bias = "model.layers.0.self_attn.q_proj.bias"
    edit_weights(folder, lambda tensors: tensors.update({bias: torch.ones(64)}))

    line = refusal_of(folder, WrongTensor)

    assert line == f"'{bias}': a Mixtral has no such tensor; leaving it out would change the model"


def test_a_truncated_file_is_refused_by_name(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)

    line = refusal_of(folder, MalformedCheckpoint)

    assert line.startswith("model.safetensors: truncated; its header lists ")


def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_no_signal(folder: Path) -> None:
    path = folder / "model.safetensors"

    checkpoint = read_checkpoint(folder)
    os.truncate(path, 100)
    with pytest.raises(CheckpointError) as refusal:
        checkpoint.read(Matrix(FIRST_EXPERT, (128, 64), "w1"))

    assert str(refusal.value) == f"{FIRST_EXPERT}: the file became shorter while it was read"


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", n_shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()

    line = refusal_of(folder, MalformedCheckpoint)

    assert line == "model-00002-of-00003.safetensors: the shard is missing; fetch the checkpoint again"


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\0b", 7, None, "x" * 300]
)
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, shard: object) -> None:
    folder = write_checkpoint(tmp_path / "c", n_shards=2)
    write_checkpoint(tmp_path)
    edit_index(folder, lambda weight_map: weight_map.update({FIRST_EXPERT: shard}))  # type: ignore[dict-item]

    line = refusal_of(folder, MalformedCheckpoint)

    assert line.startswith("model.safetensors.index.json: the name of a file beside it is expected, ")


def test_a_shard_that_lacks_what_the_index_lists_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", n_shards=2)
    edit_index(folder, lambda weight_map: weight_map.update(nowhere="model-00001-of-00002.safetensors"))

    line = refusal_of(folder, MalformedCheckpoint)

    assert line == (
        "model-00001-of-00002.safetensors: 'nowhere' is missing, though model.safetensors.index.json lists it there"
    )


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", n_shards=2)
    second = folder / "model-00002-of-00002.safetensors"
    second.write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())

    line = refusal_of(folder, MalformedCheckpoint)

    assert line.startswith("model-00002-of-00002.safetensors: ")
    assert line.endswith(" stands in another shard too")


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_an_index_without_a_map_is_refused(tmp_path: Path, index: str) -> None:
    folder = write_checkpoint(tmp_path / "c", n_shards=2)
    (folder / "model.safetensors.index.json").write_text(index)

    line = refusal_of(folder, MalformedCheckpoint)

    assert line == "model.safetensors.index.json: a weight_map of tensors and their shards is expected"


def test_pickled_weights_are_refused_with_the_remedy(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    line = refusal_of(folder, CheckpointError)

    assert line == (
        f"{folder}: holds pickled weights (pytorch_model.bin), which can run code when they are read; save the model "
        "again as safetensors: transformers' from_pretrained, then save_pretrained"
    )


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()

    line = refusal_of(folder, CheckpointError)

    assert line == (
        f"{folder}: neither model.safetensors nor model.safetensors.index.json; a checkpoint in safetensors format is "
        "expected"
    )


def test_a_folder_without_configuration_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()

    line = refusal_of(folder, CheckpointError)

    assert line == f"{folder}: no config.json; the files of a Hugging Face checkpoint are expected"


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    line = refusal_of(tmp_path / "none", CheckpointError)

    assert line == f"{tmp_path / 'none'}: no such folder; the local folder of a Mixtral checkpoint is expected"


@pytest.mark.parametrize(("name", "nbytes_max"), [("config.json", 1 << 20), ("tokenizer.json", 64 << 20)])
def test_a_side_file_of_absurd_length_is_refused_unread(folder: Path, name: str, nbytes_max: int) -> None:
    with (folder / name).open("ab") as file:
        file.truncate(1 << 40)

    line = refusal_of(folder, MalformedCheckpoint)

    assert line == f"{folder / name}: longer than {nbytes_max} bytes, the most that is expected of such a file"


def test_a_pipe_among_the_files_is_refused_and_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "tokenizer.json")

    line = refusal_of(folder, MalformedCheckpoint)

    assert line == f"{folder / 'tokenizer.json'}: a regular file is expected"
