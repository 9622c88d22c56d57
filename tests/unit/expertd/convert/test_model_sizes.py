"""Mixtrals of the sizes that people have are planned from their headers: sparse files stand for the weights."""

from pathlib import Path

import pytest

from expertd.convert.checkpoint import Checkpoint, read_checkpoint
from expertd.convert.config import QuantizeConfig
from expertd.convert.forecast import store_size
from expertd.convert.memory import LIMIT_NBYTES, crew_of, record_need_nbytes
from expertd.convert.plan import plan_store
from tests.support.sparse_checkpoint import write_sparse_checkpoint

MIXTRAL_8X7B = {"hidden": 4096, "intermediate": 14336, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "n_experts": 8}
SIZES: dict[str, dict[str, int]] = {
    "8x7B": MIXTRAL_8X7B | {"vocab": 32000},
    "8x22B": {"hidden": 6144, "intermediate": 16384, "n_layers": 56, "n_heads": 48, "n_kv_heads": 8, "n_experts": 8}
    | {"vocab": 32768},
    "a 4x7B merge with two more tokens": MIXTRAL_8X7B | {"n_experts": 4, "vocab": 32002},
    "8x22B with a million tokens": {"hidden": 6144, "intermediate": 16384, "n_layers": 56, "n_heads": 48}
    | {"n_kv_heads": 8, "n_experts": 8, "vocab": 1_000_000},
    "two experts of which one is chosen": MIXTRAL_8X7B | {"n_experts": 2, "vocab": 32000, "top_k": 1},
}


def checkpoint_of(folder: Path, name: str) -> Checkpoint:
    return read_checkpoint(write_sparse_checkpoint(folder, **SIZES[name]))  # type: ignore[arg-type]


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
    plan = plan_store(checkpoint_of(tmp_path, name), QuantizeConfig())

    assert plan.source_nbytes / 1e9 == pytest.approx(source_gb, abs=0.1)
    assert store_size(plan).nbytes / 1e9 == pytest.approx(store_gb, abs=0.1)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("n_processors", [1, 2, 64])
def test_workers_and_the_largest_matrix_fit_into_the_limit(tmp_path: Path, name: str, n_processors: int) -> None:
    checkpoint = checkpoint_of(tmp_path, name)
    plan = plan_store(checkpoint, QuantizeConfig())

    crew = crew_of(plan, checkpoint, n_asked=None, n_processors=n_processors)

    needs = {record.name: record_need_nbytes(record, checkpoint) for record in plan.records}
    experts = [needs[record.name] for record in plan.records if record.key is not None]
    assert 1 <= crew.n_jobs <= n_processors
    assert crew.held_nbytes == LIMIT_NBYTES
    assert crew.n_jobs * max(experts) <= crew.budget_nbytes
    assert max(needs.values()) <= crew.budget_nbytes


def test_so_many_workers_as_were_asked_for_have_room_for_an_expert_each(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, "8x7B")
    plan = plan_store(checkpoint, QuantizeConfig())

    one, sixteen = (crew_of(plan, checkpoint, n_asked=n, n_processors=2) for n in (1, 16))

    expert = next(record for record in plan.records if record.key is not None)
    assert (one.n_jobs, one.held_nbytes) == (1, LIMIT_NBYTES)
    assert sixteen.n_jobs == 16
    assert sixteen.budget_nbytes == 16 * record_need_nbytes(expert, checkpoint)
    assert sixteen.held_nbytes / 1e9 == pytest.approx(13.5, abs=0.1)
