"""The steps of the report, in their order, each with the most time that it may take. Imports none of them.

A step is a function of a module of this package: it takes a StepInput and returns what is to be reported. The limits
are generous beside what a step takes; together they may exceed what the whole report may take, which ends it sooner.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class StepInput:
    """Where a step may write, what steps before it have written there, and the trace to route by, if there is one."""

    work_dir: Path
    trace: Path | None = None

    @property
    def small_store(self) -> Path:
        """The store of a small model."""
        return self.work_dir / "small-store"

    @property
    def mixtral_store(self) -> Path:
        """The store of some layers of Mixtral's size."""
        return self.work_dir / "mixtral-store"


Measure = Callable[[StepInput], dict[str, object]]


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its name, its module, and how long it may take."""

    name: str
    module: str
    limit_s: float

    def load(self) -> Measure:
        """Import the step; return what measures."""
        measure: Measure = importlib.import_module(f"benchmarks.gpu.{self.module}").measure
        return measure


STEPS = (
    Step("environment", "environment", 30),
    Step("registration", "registration", 90),
    Step("copies", "copies", 90),
    Step("latency", "latency", 40),
    Step("costs", "costs", 40),
    Step("kernels", "kernels", 120),
    Step("stores", "stores", 90),
    Step("tokens", "tokens", 150),
    Step("ablation", "ablation", 180),
)
