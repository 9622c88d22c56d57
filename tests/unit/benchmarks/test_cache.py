"""The benchmark of the cache's own cost runs over a store's manifest alone, and says what it needs."""

from pathlib import Path

import pytest

from benchmarks import cache
from benchmarks.cache import measure_cache
from benchmarks.errors import NothingToMeasure
from benchmarks.settings import Settings
from tests.support.stores import write_random_store


def test_each_round_is_a_sample_of_milliseconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_N_STEPS", 2)
    write_random_store(tmp_path / "store")

    (figure,) = measure_cache(Settings(tmp_path, rounds=3, store=tmp_path / "store"))

    assert (figure.unit, len(figure.samples)) == ("ms", 3)
    assert all(sample > 0 for sample in figure.samples)


def test_without_a_store_there_is_nothing_to_measure(tmp_path: Path) -> None:
    with pytest.raises(NothingToMeasure, match="cache: a store is needed"):
        measure_cache(Settings(tmp_path))
