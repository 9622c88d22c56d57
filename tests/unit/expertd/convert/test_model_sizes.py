"""Mixtrals of the sizes that people have are planned from their headers: sparse files stand for the weights."""

from pathlib import Path

import pytest

from expertd.convert.checkpoint import read_checkpoint
from expertd.convert.config import QuantizeConfig
from expertd.convert.forecast import store_size
from expertd.convert.memory import LIMIT_NBYTES, jobs_that_fit, record_need_nbytes, records_budget_nbytes
from expertd.convert.plan import StorePlan, plan_store
from tests.support.sparse_checkpoint import write_sparse_checkpoint

MIXTRAL_8X7B = {"hidden": 4096, "intermediate": 14336, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "n_experts": 8}
SIZES: dict[str, dict[str, int]] = {
    "8x7B": MIXTRAL_8X7B | {"vocab": 32000},
    "8x22B": {"hidden": 6144, "intermediate": 16384, "n_layers": 56, "n_heads": 48, "n_kv_heads": 8, "n_experts": 8}
    | {"vocab": 32768},
    "a 4x7B merge with two more tokens": MIXTRAL_8X7B | {"n_experts": 4, "vocab": 32002},
    "two experts of which one is chosen": MIXTRAL_8X7B | {"n_experts": 2, "vocab": 32000, "top_k": 1},
}


def planned(folder: Path, name: str, config: QuantizeConfig | None = None) -> StorePlan:
    checkpoint = read_checkpoint(write_sparse_checkpoint(folder, **SIZES[name]))  # type: ignore[arg-type]
    return plan_store(checkpoint, config or QuantizeConfig())


@pytest.mark.parametrize(
    ("name", "source_gb", "store_gb"),
    [
        ("8x7B", 93.4, 25.2),
        ("8x22B", 281.3, 75.3),
        ("a 4x7B merge with two more tokens", 48.3, 13.2),
        ("two experts of which one is chosen", 25.7, 7.1),
    ],
)
def test_any_mixtral_is_planned_from_its_headers(tmp_path: Path, name: str, source_gb: float, store_gb: float) -> None:
    plan = planned(tmp_path, name)

    assert plan.source_nbytes / 1e9 == pytest.approx(source_gb, abs=0.1)
    assert store_size(plan).nbytes / 1e9 == pytest.approx(store_gb, abs=0.1)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("n_processors", [1, 2, 64])
def test_workers_and_the_largest_matrix_fit_into_the_limit(tmp_path: Path, name: str, n_processors: int) -> None:
    plan = planned(tmp_path, name)

    n_jobs = jobs_that_fit(plan, n_processors)

    budget_nbytes = records_budget_nbytes(n_jobs)
    experts = [record_need_nbytes(record) for record in plan.records if record.key is not None]
    assert 1 <= n_jobs <= n_processors
    assert budget_nbytes <= LIMIT_NBYTES
    assert n_jobs * max(experts) <= budget_nbytes
    assert max(map(record_need_nbytes, plan.records)) <= budget_nbytes
