"""What a Mixtral checkpoint consists of: the facts of its config.json and the matrices they call for.

The one file that knows the Hub's names and those of the store. Reads no files, knows no schemes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from expertd.convert.errors import MalformedCheckpoint, NotAMixtral
from expertd.convert.json_file import parse_object
from protocol.handles import ExpertKey
from protocol.manifest import ModelFacts

TensorClass = Literal["experts", "attention", "head", "other"]

_CONFIG = "config.json"
_SIZE_MAX = 1 << 24
# The manifest's own bound on layers x experts.
_EXPERTS_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class MixtralConfig:
    """The sizes of one Mixtral."""

    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_experts: int
    top_k: int
    vocab_size: int
    is_tied: bool


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of a checkpoint: its name on the Hub, its shape there, and the name of its part in a record."""

    hub_name: str
    shape: tuple[int, ...]
    part_name: str

    @property
    def rows(self) -> int:
        """Output rows; a vector is one row."""
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def cols(self) -> int:
        """Inputs."""
        return self.shape[-1]


@dataclass(frozen=True, slots=True)
class RecordSource:
    """The matrices that make one record of the store; `key` is None for a dense tensor."""

    name: str
    key: ExpertKey | None
    tensor_class: TensorClass
    matrices: tuple[Matrix, ...]


def read_config(data: bytes) -> MixtralConfig:
    """Return the sizes in a config.json; raise NotAMixtral or MalformedCheckpoint naming the field."""
    document = parse_object(data, _CONFIG)
    _check_kind(document)
    hidden_size = _size(document, "hidden_size")
    n_heads = _size(document, "num_attention_heads")
    config = MixtralConfig(
        hidden_size=hidden_size,
        intermediate_size=_size(document, "intermediate_size"),
        n_layers=_size(document, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=_size(document, "num_key_value_heads"),
        head_dim=_head_dim(document, hidden_size, n_heads),
        n_experts=_size(document, "num_local_experts"),
        top_k=_size(document, "num_experts_per_tok"),
        vocab_size=_size(document, "vocab_size"),
        is_tied=_is_tied(document),
    )
    _check_sizes(config)
    return config


def model_facts(config: MixtralConfig) -> ModelFacts:
    """Return what a store's manifest says of that model."""
    return ModelFacts(
        architecture="mixtral",
        n_layers=config.n_layers,
        n_experts=config.n_experts,
        top_k=config.top_k,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        activation="silu",
        gate_function="softmax",
        gate_normalization="top_k",
        n_shared_experts=0,
    )


def dense_records(config: MixtralConfig) -> Iterator[RecordSource]:
    """Yield the dense records in the order of the computation."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield _dense("embed_tokens", "other", "model.embed_tokens.weight", (vocab, hidden))
    for layer in range(config.n_layers):
        yield from _dense_layer(config, layer)
    yield _dense("norm", "other", "model.norm.weight", (hidden,))
    if not config.is_tied:
        yield _dense("lm_head", "head", "lm_head.weight", (vocab, hidden))


def expert_records(config: MixtralConfig) -> Iterator[RecordSource]:
    """Yield the experts' records, layer by layer; each holds w1, w3, w2: the order in which they are used."""
    up = (config.intermediate_size, config.hidden_size)
    shapes = {"w1": up, "w3": up, "w2": up[::-1]}
    for layer in range(config.n_layers):
        for expert in range(config.n_experts):
            key = ExpertKey(layer, expert)
            hub = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            matrices = tuple(Matrix(f"{hub}.{name}.weight", shape, name) for name, shape in shapes.items())
            yield RecordSource(str(key), key, "experts", matrices)


def is_needless(hub_name: str, config: MixtralConfig) -> bool:
    """Return whether a checkpoint may hold that tensor though the model is whole without it."""
    # Old transformers saved the rotary frequencies; some tied checkpoints carry their embeddings twice.
    return hub_name.endswith(".rotary_emb.inv_freq") or (config.is_tied and hub_name == "lm_head.weight")


def _dense_layer(config: MixtralConfig, layer: int) -> Iterator[RecordSource]:
    hidden = config.hidden_size
    q_size, kv_size = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    to, hub = f"layers.{layer}", f"model.layers.{layer}"
    yield _dense(f"{to}.input_norm", "other", f"{hub}.input_layernorm.weight", (hidden,))
    shapes = {"q": (q_size, hidden), "k": (kv_size, hidden), "v": (kv_size, hidden), "o": (hidden, q_size)}
    for name, shape in shapes.items():
        yield _dense(f"{to}.{name}_proj", "attention", f"{hub}.self_attn.{name}_proj.weight", shape)
    yield _dense(f"{to}.post_attention_norm", "other", f"{hub}.post_attention_layernorm.weight", (hidden,))
    yield _dense(f"{to}.gate", "other", f"{hub}.block_sparse_moe.gate.weight", (config.n_experts, hidden))


def _dense(name: str, tensor_class: TensorClass, hub_name: str, shape: tuple[int, ...]) -> RecordSource:
    return RecordSource(name, None, tensor_class, (Matrix(hub_name, shape, name),))


def _check_kind(document: dict[str, object]) -> None:
    model_type = document.get("model_type")
    if model_type != "mixtral":
        raise NotAMixtral(f"{_CONFIG}: model_type {model_type!r:.60}; expertd reads checkpoints of type 'mixtral'")
    quantization = document.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise NotAMixtral(
            f"{_CONFIG}: the checkpoint is already quantized ({method!r:.60}); expertd needs the original in F32, F16 "
            "or BF16"
        )
    activation = document.get("hidden_act", "silu")
    if activation != "silu":
        raise NotAMixtral(f"{_CONFIG}: hidden_act {activation!r:.60}; a Mixtral's experts use 'silu'")


def _size(document: dict[str, object], field: str) -> int:
    if field not in document:
        raise MalformedCheckpoint(f"{_CONFIG}: {field} is missing")
    value = document[field]
    if type(value) is not int or not 0 < value <= _SIZE_MAX:
        raise MalformedCheckpoint(f"{_CONFIG}: {field}: a count from 1 to {_SIZE_MAX} is expected, {value!r:.60} came")
    return value


def _head_dim(document: dict[str, object], hidden_size: int, n_heads: int) -> int:
    """Return head_dim, which may be absent or null: hidden_size / num_attention_heads then."""
    if document.get("head_dim") is not None:
        return _size(document, "head_dim")
    if hidden_size % n_heads:
        raise MalformedCheckpoint(
            f"{_CONFIG}: hidden_size {hidden_size} does not divide by num_attention_heads {n_heads}, and there is no "
            "head_dim"
        )
    return hidden_size // n_heads


def _is_tied(document: dict[str, object]) -> bool:
    value = document.get("tie_word_embeddings", False)
    if not isinstance(value, bool):
        raise MalformedCheckpoint(f"{_CONFIG}: tie_word_embeddings: true or false is expected, {value!r:.60} came")
    return value


def _check_sizes(config: MixtralConfig) -> None:
    if config.n_heads % config.n_kv_heads:
        raise MalformedCheckpoint(
            f"{_CONFIG}: num_attention_heads {config.n_heads} does not divide by num_key_value_heads "
            f"{config.n_kv_heads}"
        )
    if config.top_k > config.n_experts:
        raise MalformedCheckpoint(
            f"{_CONFIG}: num_experts_per_tok {config.top_k} is more than num_local_experts {config.n_experts}"
        )
    if config.n_layers * config.n_experts > _EXPERTS_MAX:
        raise MalformedCheckpoint(
            f"{_CONFIG}: {config.n_layers} layers x {config.n_experts} experts; a store holds at most {_EXPERTS_MAX}"
        )
