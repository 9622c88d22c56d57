"""The copy engine, one step at a time between the model's calls of the device and of the lock, as a seed says.

Each step runs in a thread of its own, as the engine does in earnest, so that a strict device sees two host threads; the
caller waits for the step, so that the order is the seed's.
"""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from runner.experts.transfer import CopyEngine


class Interleaving:
    """Use `before_call` as the device's watcher and `step` as what steps the engine; `leaves_out` drops calls."""

    def __init__(self, seed: int, leaves_out: Callable[[str, str], bool] = lambda _call, _name: False) -> None:
        self._random = random.Random(seed)
        self._eagerness = self._random.choice((0.0, 0.3, 0.8))
        self._leaves_out = leaves_out
        self._thread = ThreadPoolExecutor(1, "copy engine")
        self._is_stepping = False
        self.engine: CopyEngine | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown()

    def before_call(self, call: str, name: str) -> bool:
        # The model's thread holds the cache's lock, which a step takes, in no other of the calls that are watched.
        if call != "observe":
            self.step_some()
        return not self._leaves_out(call, name)

    def step_some(self) -> None:
        if self.engine is not None and not self._is_stepping:
            while self._random.random() < self._eagerness and self.step(self.engine):
                pass

    def step(self, engine: CopyEngine) -> bool:
        self._is_stepping = True
        try:
            return self._thread.submit(engine.step).result()
        finally:
            self._is_stepping = False


class SteppedLock:
    """The cache's lock; the engine may take steps before the model's thread has it."""

    def __init__(self, lock: AbstractContextManager[object], interleaving: Interleaving) -> None:
        self._lock = lock
        self._interleaving = interleaving

    def __enter__(self) -> None:
        self._interleaving.step_some()
        self._lock.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lock.__exit__(kind, error, at)
