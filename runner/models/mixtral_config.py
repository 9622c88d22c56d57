"""A Mixtral's configuration, checked against the store's manifest. Owns that check alone: protocol reads the file."""

from protocol.errors import ModelConfigInvalid, ModelUnsupported
from protocol.handles import ExpertKey
from protocol.manifest import Manifest, ModelFacts
from protocol.mixtral_config import CONFIG_FILE, GENERATION_CONFIG_FILE, MixtralConfig
from protocol.mixtral_config import read_mixtral_config as read_files
from runner.errors import StoreInvalid, UnsupportedModel

__all__ = ["CONFIG_FILE", "GENERATION_CONFIG_FILE", "MixtralConfig", "check_experts", "read_mixtral_config"]

_KNOWN_FACTS = {
    "architecture": "mixtral",
    "activation": "silu",
    "gate_function": "softmax",
    "gate_normalization": "top_k",
    "n_shared_experts": 0,
}


def read_mixtral_config(config_file: bytes, generation_config_file: bytes | None, facts: ModelFacts) -> MixtralConfig:
    """Return the configuration in those files; raise UnsupportedModel or StoreInvalid, naming the key."""
    _check_facts(facts)
    try:
        config = read_files(config_file, generation_config_file)
    except ModelUnsupported as error:
        raise UnsupportedModel(str(error)) from None
    except ModelConfigInvalid as error:
        raise StoreInvalid(str(error)) from None
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


def _check_facts(facts: ModelFacts) -> None:
    for name, known in _KNOWN_FACTS.items():
        came = getattr(facts, name)
        if came != known:
            raise UnsupportedModel(f"the store's model has {name} {came!r}; this version computes {known!r}")


def _check_against_facts(config: MixtralConfig, facts: ModelFacts) -> None:
    for name in ("n_layers", "n_experts", "top_k", "hidden_size", "intermediate_size"):
        stated, listed = getattr(config, name), getattr(facts, name)
        if stated != listed:
            raise StoreInvalid(f"{CONFIG_FILE}: {name} is {stated}, the store's manifest says {listed}")
