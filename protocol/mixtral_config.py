"""What a Mixtral's config.json says, as old and new transformers write it: the one reader, for converter and runner.

What is accepted here is computed by the runner; everything else is refused by name, before any work. The sizes must
stand in the file, but for head_dim. Another key that is absent has the value transformers gives it, but for
eos_token_id: none then. Knows no store; blocks on nothing.
"""

import math
from dataclasses import dataclass

from protocol.errors import ModelConfigInvalid, ModelUnsupported
from protocol.json_object import parse_json_object

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"

_ROPE_THETA = 1_000_000.0
_RMS_NORM_EPS = 1e-5
_SIZE_MAX = 1 << 24
# The manifest's own bound on layers x experts.
_EXPERTS_MAX = 1 << 16


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


def read_mixtral_config(config_file: bytes, generation_config_file: bytes | None) -> MixtralConfig:
    """Return the configuration in those files; raise ModelUnsupported or ModelConfigInvalid, naming file and key."""
    document = _load(CONFIG_FILE, config_file)
    generation = {} if generation_config_file is None else _load(GENERATION_CONFIG_FILE, generation_config_file)
    _check_kind(document)
    hidden_size = _size(document, "hidden_size")
    n_heads = _size(document, "num_attention_heads")
    config = MixtralConfig(
        vocab_size=_size(document, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_size(document, "intermediate_size"),
        n_layers=_size(document, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=_size(document, "num_key_value_heads", if_null=n_heads),
        head_dim=_head_dim(document, hidden_size, n_heads),
        n_experts=_size(document, "num_experts" if "num_experts" in document else "num_local_experts"),
        top_k=_size(document, "num_experts_per_tok"),
        rms_norm_eps=_number(document, "rms_norm_eps", _RMS_NORM_EPS),
        rope_theta=_read_rope_theta(document),
        sliding_window=_size(document, "sliding_window") if document.get("sliding_window") is not None else None,
        is_tied=_flag(document, "tie_word_embeddings"),
        eos_token_ids=_read_eos(document, generation),
    )
    _check_sizes(config)
    return config


def _load(name: str, data: bytes) -> dict[str, object]:
    try:
        return parse_json_object(data)
    except ValueError as error:
        raise ModelConfigInvalid(f"{name}: {error}") from None


def _check_kind(document: dict[str, object]) -> None:
    model_type = document.get("model_type")
    if model_type != "mixtral":
        raise ModelUnsupported(f"{CONFIG_FILE}: model_type {model_type!r:.60} is not supported; 'mixtral' is")
    quantization = document.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ModelUnsupported(
            f"{CONFIG_FILE}: the checkpoint is already quantized ({method!r:.60}); the original in F32, F16 or BF16 "
            "is needed"
        )
    activation = document.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelUnsupported(f"{CONFIG_FILE}: hidden_act {activation!r:.60} is not supported; 'silu' is")


def _read_rope_theta(document: dict[str, object]) -> float:
    """Return the base of the rotary frequencies: of rope_parameters (new) or of rope_theta and rope_scaling (old)."""
    ropes = [_rope(document, key) for key in ("rope_parameters", "rope_scaling")]
    stated = [rope for rope in (*ropes, document) if rope.get("rope_theta") is not None]
    return _number(stated[0] if stated else {}, "rope_theta", _ROPE_THETA)


def _rope(document: dict[str, object], key: str) -> dict[str, object]:
    """Return that object of the document, {} where there is none; raise ModelUnsupported unless it asks for nothing."""
    rope = document.get(key)
    if rope is None:
        return {}
    if not isinstance(rope, dict):
        raise ModelConfigInvalid(f"{CONFIG_FILE}: {key}: an object is expected, {rope!r:.60} came")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ModelUnsupported(
            f"{CONFIG_FILE}: {key}: rope type {rope_type!r:.60} is not supported; this version computes 'default'"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelUnsupported(f"{CONFIG_FILE}: {key}: partial_rotary_factor is not supported")
    return rope


def _read_eos(document: dict[str, object], generation: dict[str, object]) -> frozenset[int]:
    """Return the ids that end generation: of generation_config.json where it names any, else of config.json."""
    name, value = GENERATION_CONFIG_FILE, generation.get("eos_token_id")
    if value is None:
        name, value = CONFIG_FILE, document.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if type(token_id) is not int or token_id < 0:
            raise ModelConfigInvalid(f"{name}: eos_token_id: token ids are expected, {value!r:.60} came")
    return frozenset(ids)


def _head_dim(document: dict[str, object], hidden_size: int, n_heads: int) -> int:
    """Return head_dim, which may be absent or null: hidden_size / num_attention_heads then."""
    if document.get("head_dim") is not None:
        return _size(document, "head_dim")
    if hidden_size % n_heads:
        raise ModelConfigInvalid(
            f"{CONFIG_FILE}: hidden_size {hidden_size} does not divide by num_attention_heads {n_heads}, and there is "
            "no head_dim"
        )
    return hidden_size // n_heads


def _check_sizes(config: MixtralConfig) -> None:
    if config.n_heads % config.n_kv_heads:
        raise ModelConfigInvalid(
            f"{CONFIG_FILE}: num_attention_heads {config.n_heads} does not divide by num_key_value_heads "
            f"{config.n_kv_heads}"
        )
    if config.head_dim % 2:
        raise ModelConfigInvalid(f"{CONFIG_FILE}: head_dim {config.head_dim} is odd; rotary embeddings need pairs")
    if config.top_k > config.n_experts:
        raise ModelConfigInvalid(
            f"{CONFIG_FILE}: num_experts_per_tok {config.top_k} is more than num_local_experts {config.n_experts}"
        )
    if config.n_layers * config.n_experts > _EXPERTS_MAX:
        raise ModelConfigInvalid(
            f"{CONFIG_FILE}: {config.n_layers} layers x {config.n_experts} experts; a store holds at most "
            f"{_EXPERTS_MAX}"
        )


def _size(document: dict[str, object], key: str, *, if_null: int | None = None) -> int:
    if key not in document:
        raise ModelConfigInvalid(f"{CONFIG_FILE}: {key} is missing")
    value = document[key]
    if value is None and if_null is not None:
        return if_null
    if type(value) is not int or not 0 < value <= _SIZE_MAX:
        raise ModelConfigInvalid(f"{CONFIG_FILE}: {key}: a count from 1 to {_SIZE_MAX} is expected, {value!r:.60} came")
    return value


def _number(document: dict[str, object], key: str, default: float) -> float:
    value = document.get(key, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type,operator]
        raise ModelConfigInvalid(f"{CONFIG_FILE}: {key}: a positive number is expected, {value!r:.60} came")
    return float(value)  # type: ignore[arg-type]


def _flag(document: dict[str, object], key: str) -> bool:
    value = document.get(key, False)
    if not isinstance(value, bool):
        raise ModelConfigInvalid(f"{CONFIG_FILE}: {key}: true or false is expected, {value!r:.60} came")
    return value
