import json
from typing import Any

import pytest

from protocol.manifest import ModelFacts
from runner.errors import StoreInvalid, UnsupportedModel
from runner.models.mixtral_config import MixtralConfig, read_mixtral_config

FACTS = ModelFacts(
    architecture="mixtral",
    n_layers=2,
    n_experts=8,
    top_k=2,
    hidden_size=64,
    intermediate_size=96,
    activation="silu",
    gate_function="softmax",
    gate_normalization="top_k",
    n_shared_experts=0,
)
DOCUMENT = {
    "model_type": "mixtral",
    "hidden_act": "silu",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def read(changes: dict[str, Any], generation: dict[str, Any] | None = None) -> MixtralConfig:
    generation_file = None if generation is None else json.dumps(generation).encode()
    return read_mixtral_config(json.dumps(DOCUMENT | changes).encode(), generation_file, FACTS)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"type": "default", "rope_theta": 500000}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
    ],
)
def test_every_spelling_of_the_rotary_base_is_read(spelling: dict[str, Any]) -> None:
    assert read(spelling).rope_theta == 5e5


def test_an_absent_rotary_base_is_that_of_transformers() -> None:
    assert read({}).rope_theta == 1e6


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": {"type": "yarn"}},
    ],
)
def test_an_unsupported_rope_type_is_refused_by_name(spelling: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match=r"config\.json: rope_\w+: rope type 'yarn' is not supported"):
        read(spelling)


def test_a_head_dim_of_null_is_the_hidden_size_over_the_heads() -> None:
    assert read({"head_dim": None}).head_dim == 16


def test_a_head_dim_of_its_own_is_kept() -> None:
    assert read({"head_dim": 32}).head_dim == 32


def test_kv_heads_of_null_are_as_many_as_the_heads() -> None:
    assert read({"num_key_value_heads": None}).n_kv_heads == 4


@pytest.mark.parametrize(("value", "ids"), [(2, {2}), ([2, 7], {2, 7}), (None, set())])
def test_the_end_of_sequence_is_one_id_or_several_or_none(value: object, ids: set[int]) -> None:
    assert read({"eos_token_id": value}).eos_token_ids == ids


def test_the_generation_config_names_the_end_of_sequence_first() -> None:
    assert read({"eos_token_id": 2}, {"eos_token_id": [5, 6]}).eos_token_ids == {5, 6}


def test_a_damaged_end_is_blamed_on_the_file_that_has_it() -> None:
    with pytest.raises(StoreInvalid, match=r"^generation_config\.json: eos_token_id: token ids are expected, 'x' came"):
        read({"eos_token_id": 2}, {"eos_token_id": "x"})
    with pytest.raises(StoreInvalid, match=r"^config\.json: eos_token_id: token ids are expected, 'x' came"):
        read({"eos_token_id": "x"}, {})


def test_a_generation_config_without_an_end_leaves_it_to_the_config() -> None:
    assert read({"eos_token_id": 2}, {"temperature": 0.5}).eos_token_ids == {2}


@pytest.mark.parametrize(("value", "window"), [(None, None), (16, 16)])
def test_the_sliding_window_is_null_or_a_number(value: int | None, window: int | None) -> None:
    assert read({"sliding_window": value}).sliding_window == window


def test_experts_under_their_newer_name_are_read() -> None:
    document = {key: value for key, value in DOCUMENT.items() if key != "num_local_experts"} | {"num_experts": 8}

    assert read_mixtral_config(json.dumps(document).encode(), None, FACTS).n_experts == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"model_type": "llama"}, "model_type 'llama'"),
    ],
)
def test_another_model_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        read(changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_attention_heads": 6}, "hidden_size 64 does not divide by num_attention_heads 6"),
        ({"vocab_size": True}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 does not divide by num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than num_local_experts 8"),
        ({"num_experts_per_tok": 1}, "top_k is 1, the store's manifest says 2"),
        ({"hidden_size": 128}, "hidden_size is 128, the store's manifest says 64"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"rope_parameters": 7}, "rope_parameters: an object is expected"),
        ({"rope_theta": float("inf")}, "rope_theta: a positive number"),
    ],
)
def test_an_impossible_value_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreInvalid, match=message):
        read(changes)


def test_a_size_that_is_absent_is_refused_by_name() -> None:
    document = {key: value for key, value in DOCUMENT.items() if key != "num_key_value_heads"}

    with pytest.raises(StoreInvalid, match=r"^config\.json: num_key_value_heads is missing"):
        read_mixtral_config(json.dumps(document).encode(), None, FACTS)


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"model_type": "mixtral", "model_type": "mixtral"}', b"[" * 100_000])
def test_a_config_that_is_no_object_is_one_clear_line(data: bytes) -> None:
    with pytest.raises(StoreInvalid, match=r"^config\.json: ") as raised:
        read_mixtral_config(data, None, FACTS)

    assert "\n" not in str(raised.value)
