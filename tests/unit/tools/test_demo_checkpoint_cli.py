import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.unit.tools.tiny_gguf import TinyShape, write_tiny_gguf
from tools.demo_checkpoint.cli import load_gates, main


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A source with the real model's hidden size, which the gates carried by the tool fit."""
    return write_tiny_gguf(tmp_path / "tiny.gguf", TinyShape(hidden_size=576, n_heads=9, n_kv_heads=3))


def test_the_command_builds_a_checkpoint_with_the_gates_it_carries(tmp_path: Path, gguf: Path) -> None:
    arguments = [str(tmp_path / "out"), "--gguf", str(gguf), "--layers", "1", "--tie", "--dtype", "f32"]

    result = CliRunner().invoke(main, arguments)

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert result.exit_code == 0
    assert config["num_local_experts"] == 8
    assert (config["num_hidden_layers"], config["tie_word_embeddings"], config["torch_dtype"]) == (1, True, "float32")


def test_a_wrong_source_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("no such thing")

    result = CliRunner().invoke(main, [str(tmp_path / "out"), "--gguf", str(path)])

    assert result.exit_code == 1
    assert result.stderr.startswith(f"demo_checkpoint: {path}: not a readable GGUF file")
    assert result.stderr.count("\n") == 1


def test_noise_beyond_one_step_is_refused(tmp_path: Path, gguf: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path / "out"), "--gguf", str(gguf), "--noise", "1.5"])

    assert result.exit_code == 2
    assert "1.5 is not in the range" in result.stderr


def test_the_gates_carried_are_for_30_layers_of_8_experts() -> None:
    gates = load_gates()

    assert gates.shape == (30, 8, 576)
