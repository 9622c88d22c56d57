"""What a Mixtral's config.json says, as old and new transformers write it, checked against the store's manifest.

Owns the reading and the refusing; the arithmetic trusts what comes out of here. A key that is absent has the value
transformers gives it.
"""

import json
import math
from dataclasses import dataclass

from protocol.handles import ExpertKey
from protocol.manifest import Manifest, ModelFacts
from runner.errors import StoreInvalid, UnsupportedModel

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"

_ROPE_THETA = 1_000_000.0
_RMS_NORM_EPS = 1e-5
_WHOLE_MAX = 1 << 24

_KNOWN_FACTS = {
    "architecture": "mixtral",
    "activation": "silu",
    "gate_function": "softmax",
    "gate_normalization": "top_k",
    "n_shared_experts": 0,
}


@dataclass(frozen=True, slots=True)
class MixtralConfig:
    """The sizes and constants of one Mixtral."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_experts: int
    top_k: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | None
    is_tied: bool
    eos_token_ids: frozenset[int]


def read_mixtral_config(config_file: bytes, generation_config_file: bytes | None, facts: ModelFacts) -> MixtralConfig:
    """Return the configuration in those files; raise UnsupportedModel or StoreInvalid, naming the key."""
    _check_facts(facts)
    document = _load(CONFIG_FILE, config_file)
    generation = {} if generation_config_file is None else _load(GENERATION_CONFIG_FILE, generation_config_file)
    _check_kind(document)
    hidden_size = _whole(document, "hidden_size")
    n_heads = _whole(document, "num_attention_heads")
    config = MixtralConfig(
        vocab_size=_whole(document, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_whole(document, "intermediate_size"),
        n_layers=_whole(document, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=_optional_whole(document, "num_key_value_heads") or n_heads,
        head_dim=_optional_whole(document, "head_dim") or hidden_size // n_heads,
        n_experts=_whole(document, "num_experts" if "num_local_experts" not in document else "num_local_experts"),
        top_k=_whole(document, "num_experts_per_tok"),
        rms_norm_eps=_number(document, "rms_norm_eps", _RMS_NORM_EPS),
        rope_theta=_read_rope_theta(document),
        sliding_window=_optional_whole(document, "sliding_window"),
        is_tied=_flag(document, "tie_word_embeddings"),
        eos_token_ids=_read_eos(document, generation),
    )
    _check_shapes(config)
    _check_against_facts(config, facts)
    return config


def check_experts(manifest: Manifest, config: MixtralConfig) -> None:
    """Raise StoreInvalid unless every expert has the three matrices of the shapes that the configuration implies."""
    inner, hidden = config.intermediate_size, config.hidden_size
    expected = [("w1", inner, hidden), ("w3", inner, hidden), ("w2", hidden, inner)]
    for layer in range(config.n_layers):
        for expert in range(config.n_experts):
            key = ExpertKey(layer, expert)
            came = [(part.name, part.rows, part.cols) for part in manifest.experts[key].parts]
            if came != expected:
                raise StoreInvalid(
                    f"{key}: the parts {_listed(expected)} are expected, the store holds {_listed(came)}"
                )


def _listed(parts: list[tuple[str, int, int]]) -> str:
    return ", ".join(f"{name} [{rows}, {cols}]" for name, rows, cols in parts)


def _load(name: str, data: bytes) -> dict[str, object]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreInvalid(f"{name}: not JSON ({error})") from None
    if not isinstance(document, dict):
        raise StoreInvalid(f"{name}: an object is expected, {type(document).__name__} came")
    return document


def _check_facts(facts: ModelFacts) -> None:
    for name, known in _KNOWN_FACTS.items():
        came = getattr(facts, name)
        if came != known:
            raise UnsupportedModel(f"the store's model has {name} {came!r}; this version computes {known!r}")


def _check_kind(document: dict[str, object]) -> None:
    for key, known in (("model_type", "mixtral"), ("hidden_act", "silu")):
        came = document.get(key, known)
        if came != known:
            raise UnsupportedModel(f"{CONFIG_FILE}: {key} {came!r} is not supported; this version computes {known!r}")


def _read_rope_theta(document: dict[str, object]) -> float:
    """Return the base of the rotary frequencies: of rope_parameters (new) or of rope_theta and rope_scaling (old)."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = document.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise StoreInvalid(f"{CONFIG_FILE}: {key}: an object is expected, {rope!r:.60} came")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise UnsupportedModel(
                f"{CONFIG_FILE}: {key}: rope type {rope_type!r} is not supported; this version computes 'default'"
            )
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedModel(f"{CONFIG_FILE}: {key}: partial_rotary_factor is not supported")
        if rope.get("rope_theta") is not None:
            return _number(rope, "rope_theta", _ROPE_THETA)
    return _number(document, "rope_theta", _ROPE_THETA)


def _read_eos(document: dict[str, object], generation: dict[str, object]) -> frozenset[int]:
    """Return the ids that end generation: of generation_config.json where it names any, else of config.json."""
    value = generation.get("eos_token_id")
    if value is None:
        value = document.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise StoreInvalid(f"{CONFIG_FILE}: eos_token_id: token ids are expected, {value!r:.60} came")
    return frozenset(ids)


def _check_shapes(config: MixtralConfig) -> None:
    if config.n_heads % config.n_kv_heads:
        raise StoreInvalid(
            f"{CONFIG_FILE}: {config.n_heads} num_attention_heads do not divide among "
            f"{config.n_kv_heads} num_key_value_heads"
        )
    if config.head_dim % 2:
        raise StoreInvalid(f"{CONFIG_FILE}: head_dim {config.head_dim} is odd; rotary embeddings need pairs")
    if config.top_k > config.n_experts:
        raise StoreInvalid(f"{CONFIG_FILE}: num_experts_per_tok {config.top_k} of {config.n_experts} experts")


def _check_against_facts(config: MixtralConfig, facts: ModelFacts) -> None:
    for name in ("n_layers", "n_experts", "top_k", "hidden_size", "intermediate_size"):
        stated, listed = getattr(config, name), getattr(facts, name)
        if stated != listed:
            raise StoreInvalid(f"{CONFIG_FILE}: {name} is {stated}, the store's manifest says {listed}")


def _whole(document: dict[str, object], key: str) -> int:
    value = document.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _WHOLE_MAX:
        raise StoreInvalid(
            f"{CONFIG_FILE}: {key}: a whole number from 1 to {_WHOLE_MAX} is expected, {value!r:.60} came"
        )
    return value


def _optional_whole(document: dict[str, object], key: str) -> int | None:
    return None if document.get(key) is None else _whole(document, key)


def _number(document: dict[str, object], key: str, default: float) -> float:
    value = document.get(key, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type,operator]
        raise StoreInvalid(f"{CONFIG_FILE}: {key}: a positive number is expected, {value!r:.60} came")
    return float(value)  # type: ignore[arg-type]


def _flag(document: dict[str, object], key: str) -> bool:
    value = document.get(key, False)
    if not isinstance(value, bool):
        raise StoreInvalid(f"{CONFIG_FILE}: {key}: true or false is expected, {value!r:.60} came")
    return value
