"""Stores of random small Mixtrals, made by the converter, without a daemon. For the runner's tests."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertd.convert.config import QuantizeConfig
from expertd.convert.quantize import quantize_checkpoint
from runner.config import RunnerConfig
from runner.engine import Engine
from tests.support.checkpoints import write_checkpoint
from tests.support.local_store import LocalStore

SIXTEEN_BIT = QuantizeConfig(experts="16bit", attention="16bit", head="16bit")


@dataclass(frozen=True)
class SmallStore:
    """A checkpoint and the store made of it."""

    checkpoint: Path
    path: Path

    def engine(self, **options: Any) -> Engine:  # noqa: ANN401  # RunnerConfig's, which checks them
        return Engine(LocalStore(self.path), RunnerConfig(**{"threads": 1, "exact": True, "context": 256} | options))


def make_small_store(
    folder: Path,
    scheme: QuantizeConfig = SIXTEEN_BIT,
    files: dict[str, bytes] | None = None,
    **shape: Any,  # noqa: ANN401  # write_checkpoint's, which names them
) -> SmallStore:
    """Write a checkpoint of that shape, with those files beside it, and quantize it.

    Its weights are numbers that both 16-bit types hold, so that a 16-bit store loses nothing.
    """
    checkpoint = write_checkpoint(folder / "checkpoint", exact_in_16_bits=True, **shape)
    for name, data in (files or {}).items():
        (checkpoint / name).write_bytes(data)
    store = folder / "store"
    quantize_checkpoint(checkpoint, store, scheme, force=False, n_jobs=1, on_progress=lambda _: None)
    return SmallStore(checkpoint, store)
