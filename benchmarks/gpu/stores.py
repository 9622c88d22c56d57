"""The stores that later steps compute with, written where they look: random weights, so that nothing is downloaded."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.gpu.figures import timed
from benchmarks.gpu.steps import StepInput
from expertd.convert.config import QuantizeConfig
from tools.geometry import GEOMETRIES, MIXTRAL_8X7B, Geometry
from tools.synthetic_store.store import SyntheticPlan, plan_synthetic_store, write_synthetic_store

SMALL = Geometry(
    n_layers=4,
    hidden=1024,
    intermediate=3584,
    heads=16,
    kv_heads=4,
    head_dim=64,
    vocab=4096,
    experts=8,
    top_k=2,
)
MIXTRAL_LAYERS = 4


def measure(given: StepInput) -> dict[str, object]:
    """Write both; return their sizes and what that took."""
    plans = {
        given.small_store: plan_synthetic_store(SMALL, QuantizeConfig()),
        given.mixtral_store: plan_synthetic_store(
            replace(GEOMETRIES[MIXTRAL_8X7B], n_layers=MIXTRAL_LAYERS), QuantizeConfig()
        ),
    }
    return {
        path.name: {"nbytes": plan.nbytes, "s": round(timed(partial(_write, path, plan)), 2)}
        for path, plan in plans.items()
    }


def _write(path: Path, plan: SyntheticPlan) -> None:
    write_synthetic_store(path, plan, seed=0, force=True, on_written=lambda _: None)
