from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from tests.unit.tools.tiny_gguf import MERGES, TEMPLATE, TOKENS, TinyShape, write_tiny_gguf
from tools.demo_checkpoint.errors import SourceError
from tools.demo_checkpoint.source import Source


def test_the_facts_are_those_of_the_file(tmp_path: Path) -> None:
    source = Source(write_tiny_gguf(tmp_path / "tiny.gguf"))

    facts = source.facts

    assert (facts.n_layers, facts.hidden_size, facts.intermediate_size) == (2, 64, 96)
    assert (facts.n_heads, facts.n_kv_heads, facts.vocab_size) == (4, 2, len(TOKENS))
    # Exactly the decimal that was meant, although the file holds a float32.
    assert facts.rms_norm_eps == 1e-5


def test_the_vocabulary_is_that_of_the_file(tmp_path: Path) -> None:
    source = Source(write_tiny_gguf(tmp_path / "tiny.gguf"))

    vocabulary = source.vocabulary()

    assert vocabulary.tokens == tuple(TOKENS)
    assert vocabulary.merges == tuple(MERGES)
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.padding_id, vocabulary.unknown_id) == (1, 2, 2, 0)
    assert vocabulary.chat_template == TEMPLATE


def test_the_step_of_a_weight_is_the_distance_between_its_codes(tmp_path: Path) -> None:
    source = Source(write_tiny_gguf(tmp_path / "tiny.gguf"))

    steps = source.steps("blk.1.ffn_down.weight")

    # Within a block of 32 inputs all weights are minimum + whole number * step; the extremes lie 15 steps apart.
    weights = source.weights("blk.1.ffn_down.weight").reshape(-1, 32)
    per_block = steps.reshape(-1, 32)
    assert steps.shape == (64, 96)
    assert (per_block == per_block[:, :1]).all()
    spread = weights.max(axis=1) - weights.min(axis=1)
    np.testing.assert_allclose(spread, 15 * per_block[:, 0], rtol=1e-5)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("no such thing")

    with pytest.raises(SourceError, match=r"text\.gguf: not a readable GGUF file"):
        Source(path)


@pytest.mark.parametrize("kept", [0, 20, 2000, 60_000])
def test_a_cut_gguf_is_refused(tmp_path: Path, kept: int) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:kept])

    with pytest.raises(SourceError, match="not a readable GGUF file"):
        Source(path)


def test_a_model_of_another_architecture_is_refused(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", TinyShape(architecture="gpt2"))

    with pytest.raises(SourceError, match=r"general\.architecture is 'gpt2', 'llama' is expected"):
        Source(path)


def test_noise_is_refused_where_the_source_has_no_steps(tmp_path: Path) -> None:
    shape = TinyShape(matrix_type=GGMLQuantizationType.Q8_0)
    source = Source(write_tiny_gguf(tmp_path / "tiny.gguf", shape))

    with pytest.raises(SourceError, match=r"blk\.0\.ffn_up\.weight is Q8_0, noise needs a Q4_1 tensor"):
        source.steps("blk.0.ffn_up.weight")


def test_heads_that_do_not_divide_the_hidden_size_are_refused(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", TinyShape(n_heads=5))

    with pytest.raises(SourceError, match="do not fit together"):
        Source(path)
