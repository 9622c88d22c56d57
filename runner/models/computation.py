"""What is computed with what, whatever the device: the facts that all ways to open a model share."""

from dataclasses import dataclass
from typing import TypedDict

import torch

from quant.workspace import Workspace
from runner.config import RunnerConfig
from runner.models.mixtral_config import MixtralConfig
from runner.store_view import StoreView


@dataclass(frozen=True, slots=True)
class Computation:
    """What is computed with what: a store's model, the user's options, the device's full name, the host's threads."""

    store: StoreView
    config: MixtralConfig
    settings: RunnerConfig
    device: str
    workspace: Workspace


class KVShape(TypedDict):
    """What a kv_cache's size depends on besides its context."""

    n_layers: int
    n_kv_heads: int
    head_dim: int
    dtype: torch.dtype


def kv_shape(computation: Computation) -> KVShape:
    """Return the shape and type of the model's keys and values."""
    config = computation.config
    return KVShape(
        n_layers=config.n_layers,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        dtype=torch.float32 if computation.settings.exact else torch.float16,
    )
