"""What a Mixtral checkpoint consists of: the facts of its config.json and the matrices they call for.

The one file that knows the Hub's names and those of the store. Reads no files, knows no schemes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from expertd.convert.errors import MalformedCheckpoint, NotAMixtral
from protocol.errors import ModelConfigInvalid, ModelUnsupported
from protocol.handles import ExpertKey
from protocol.manifest import ModelFacts
from protocol.mixtral_config import MixtralConfig, read_mixtral_config

TensorClass = Literal["experts", "attention", "head", "other"]


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


def read_config(config_file: bytes, generation_config_file: bytes | None = None) -> MixtralConfig:
    """Return what those files say; raise NotAMixtral or MalformedCheckpoint for what the runner would refuse too."""
    try:
        return read_mixtral_config(config_file, generation_config_file)
    except ModelUnsupported as error:
        raise NotAMixtral(str(error)) from None
    except ModelConfigInvalid as error:
        raise MalformedCheckpoint(str(error)) from None


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
