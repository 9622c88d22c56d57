import warnings
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from tests.unit.tools.tiny_gguf import CONTROL_TOKENS, TOKENS, TinyShape, random_gates, write_tiny_gguf
from tools.demo_checkpoint.checkpoint import bf16_bits, build_checkpoint
from tools.demo_checkpoint.errors import OutputError, SourceError
from tools.demo_checkpoint.plan import Options
from tools.demo_checkpoint.source import Source

with warnings.catch_warnings():
    # transformers imports hqq, and with it a part of torch that warns of its own deprecation.
    warnings.simplefilter("ignore", DeprecationWarning)
    from transformers import LlamaForCausalLM, MixtralForCausalLM

SHAPE = TinyShape()
EXACT = Options(noise=0.0, n_layers=2, tie=False, dtype="f32")
NOISY = Options(noise=0.5, n_layers=2, tie=False, dtype="f32")


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(write_tiny_gguf(tmp_path / "tiny.gguf", SHAPE))


def build(source: Source, options: Options, out: Path) -> Path:
    build_checkpoint(source, random_gates(SHAPE), options, out)
    return out


def tensor(checkpoint: Path, name: str) -> Tensor:
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        loaded: Tensor = file.get_tensor(name)
    return loaded


def test_without_noise_the_mixtral_computes_what_the_dense_model_does(tmp_path: Path, source: Source) -> None:
    checkpoint = build(source, EXACT, tmp_path / "out")
    ids = torch.arange(3, 40)[None]

    with torch.inference_mode():
        logits = MixtralForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)(ids).logits
        # transformers' own reading of the GGUF is the reference.
        dense_model = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
        dense = dense_model(ids).logits

    logits_range = float(dense.max() - dense.min())
    assert float((logits - dense).abs().max()) < 1e-5 * logits_range


@pytest.mark.parametrize("tie", [False, True])
def test_transformers_finds_nothing_missing_or_unexpected(tmp_path: Path, source: Source, tie: bool) -> None:  # noqa: FBT001
    checkpoint = build(source, Options(noise=0.2, n_layers=2, tie=tie, dtype="bf16"), tmp_path / "out")

    loaded: object = MixtralForCausalLM.from_pretrained(checkpoint, output_loading_info=True)

    assert isinstance(loaded, tuple)
    assert not any(loaded[1].values())


def test_every_expert_lies_within_half_the_noise_of_the_dense_model(tmp_path: Path, source: Source) -> None:
    checkpoint = build(source, NOISY, tmp_path / "out")
    dense, steps = source.weights("blk.1.ffn_down.weight"), source.steps("blk.1.ffn_down.weight")

    experts = [tensor(checkpoint, f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight") for e in range(4)]

    away = [np.abs(expert.numpy() - dense) / steps for expert in experts]
    for distances in away:
        assert distances.max() <= 0.25 * (1 + 1e-3)
        assert distances.max() > 0.2


def test_every_matrix_of_every_expert_has_noise_of_its_own(tmp_path: Path, source: Source) -> None:
    checkpoint = build(source, NOISY, tmp_path / "out")

    noises = []
    for layer, expert, (name, dense_name) in product(range(2), range(4), (("w1", "ffn_gate"), ("w3", "ffn_up"))):
        in_source = f"blk.{layer}.{dense_name}.weight"
        noisy = tensor(checkpoint, f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight").numpy()
        noises.append(((noisy - source.weights(in_source)) / source.steps(in_source)).ravel())

    correlations = np.corrcoef(noises) - np.eye(len(noises))
    assert np.abs(correlations).max() < 0.08  # six standard deviations of 6144 independent pairs


def test_the_gates_are_those_given(tmp_path: Path, source: Source) -> None:
    gates = random_gates(SHAPE)

    checkpoint = build(source, EXACT, tmp_path / "out")

    written = tensor(checkpoint, "model.layers.1.block_sparse_moe.gate.weight").to(torch.bfloat16)
    assert (written.view(torch.uint16).numpy() == gates[1]).all()


def test_the_same_source_gives_the_same_bytes(tmp_path: Path, source: Source) -> None:
    one = build(source, NOISY, tmp_path / "one")
    other = build(source, NOISY, tmp_path / "other")

    files = sorted(path.name for path in one.iterdir())

    assert len(files) == 5
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


def test_fewer_layers_are_the_first_ones(tmp_path: Path, source: Source) -> None:
    checkpoint = build(source, Options(noise=0.0, n_layers=1, tie=True, dtype="f32"), tmp_path / "out")

    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        names = set(file.keys())

    assert not any(name.startswith("model.layers.1.") for name in names)
    assert "lm_head.weight" not in names
    assert len(names) == 2 + 7 + 4 * 3


@pytest.mark.parametrize("n_layers", [0, 3])
def test_layers_that_the_source_does_not_have_are_refused(tmp_path: Path, source: Source, n_layers: int) -> None:
    with pytest.raises(SourceError, match=f"1 to 2 can be built from this source, {n_layers} came"):
        build(source, Options(noise=0.0, n_layers=n_layers, tie=True, dtype="f32"), tmp_path / "out")


def test_gates_of_another_hidden_size_are_refused(tmp_path: Path, source: Source) -> None:
    gates = random_gates(TinyShape(hidden_size=32))

    with pytest.raises(SourceError, match="hidden size 32"):
        build_checkpoint(source, gates, EXACT, tmp_path / "out")


def test_bf16_is_rounded_as_torch_rounds_it() -> None:
    random = np.random.default_rng(1).normal(size=10_000).astype(np.float32)
    ties = (np.arange(200, dtype=np.uint32) * 0x8000 + 0x3F800000).view(np.float32)
    weights = np.concatenate([random, ties, -ties, np.zeros(1, np.float32)])

    bits = bf16_bits(weights)

    assert (bits == torch.from_numpy(weights).bfloat16().view(torch.uint16).numpy()).all()


def test_a_source_that_lacks_a_tensor_leaves_nothing_behind(tmp_path: Path) -> None:
    lacking = Source(write_tiny_gguf(tmp_path / "lacking.gguf", SHAPE, left_out="blk.1.ffn_up.weight"))

    with pytest.raises(SourceError, match=r"blk\.1\.ffn_up\.weight is missing"):
        build(lacking, NOISY, tmp_path / "out")

    assert [path.name for path in tmp_path.iterdir()] == ["lacking.gguf"]


def test_a_folder_with_something_in_it_is_left_as_it_is(tmp_path: Path, source: Source) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")

    with pytest.raises(OutputError, match="out: exists"):
        build(source, EXACT, out)

    assert [path.name for path in out.iterdir()] == ["mine"]


def test_a_folder_below_one_that_does_not_exist_is_refused(tmp_path: Path, source: Source) -> None:
    with pytest.raises(OutputError, match=r"parent folder .*nowhere does not exist"):
        build(source, EXACT, tmp_path / "nowhere" / "out")


def test_the_tokenizer_merges_words_and_splits_digits(tmp_path: Path, source: Source) -> None:
    tokenizer = Tokenizer.from_file(str(build(source, EXACT, tmp_path / "out") / "tokenizer.json"))

    tokens = tokenizer.encode("<|im_start|>the 12 the").tokens

    assert tokens == ["<|im_start|>", "the", "Ġ", "1", "2", "Ġthe"]


def test_the_tokenizer_gives_back_the_text(tmp_path: Path, source: Source) -> None:
    tokenizer = Tokenizer.from_file(str(build(source, EXACT, tmp_path / "out") / "tokenizer.json"))
    text = "Où sont les 1024 the\n\tété? 日本 🙂"

    decoded = tokenizer.decode(tokenizer.encode(text).ids)

    assert decoded == text


def test_control_tokens_are_special_and_no_others(tmp_path: Path, source: Source) -> None:
    tokenizer = Tokenizer.from_file(str(build(source, EXACT, tmp_path / "out") / "tokenizer.json"))

    decoded = tokenizer.decode(list(range(len(CONTROL_TOKENS) + 1)), skip_special_tokens=True)

    assert decoded == TOKENS[len(CONTROL_TOKENS)]
