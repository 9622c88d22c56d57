"""`runner bench ablation` on a small model: its rows, its figures and what it refuses. Speed is not tested here."""

import json
from pathlib import Path

import pytest

from expertd.convert.config import QuantizeConfig
from runner.ablation import Row
from runner.bench_commands import ROW_NAMES
from tests.support.local_runner import start_runner
from tests.support.small_stores import make_small_store

ROWS = list(ROW_NAMES)
QUICK = ["--context-tokens", "8", "--decode-tokens", "6", "--runs", "1", "--threads", "1"]
LINK = ["--device", "link:2GB/s", "--cache-experts", "4"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scheme = QuantizeConfig(experts="4bit-g64", attention="4bit-g64", head="8bit-g64")
    return make_small_store(tmp_path_factory.mktemp("ablation"), scheme, n_experts=8, n_layers=3).path


def run(store: Path, *arguments: str) -> tuple[int, str, str]:
    process = start_runner("bench ablation", store, *arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out.decode(), err.decode()


def figures_of(store: Path, *arguments: str) -> dict[str, object]:
    status, out, err = run(store, *QUICK, "--json", *arguments)
    assert status == 0, err
    figures: dict[str, object] = json.loads(out)
    return figures


def rows_of(figures: dict[str, object]) -> dict[str, dict[str, float]]:
    rows = figures["rows"]
    assert isinstance(rows, dict)
    return rows


def test_each_row_counts_what_its_way_to_run_does(store: Path) -> None:
    rows = rows_of(figures_of(store, *LINK))

    assert list(rows) == ROWS
    assert rows["resident"]["evictions"] == 0
    assert rows["no prefetch"]["prefetches_issued"] == 0
    assert rows["no cache"]["hits"] == rows["naive"]["hits"] == 0
    assert rows["full"]["misses"] == rows["no prefetch"]["misses"]
    # 6 tokens, 3 layers: all 8 experts of each, or the 2 that were chosen.
    slot_nbytes = figures_of(store, *LINK)["slot_nbytes"]
    assert isinstance(slot_nbytes, int)
    assert rows["naive"]["copied_nbytes"] == 6 * 3 * 8 * slot_nbytes
    assert rows["no cache"]["copied_nbytes"] == 6 * 3 * 2 * slot_nbytes


def test_the_links_speed_can_follow_from_what_computing_takes(store: Path) -> None:
    figures = figures_of(store, *LINK, "--naive-to-compute", "20")

    assert str(figures["device"]).startswith("link:")
    assert figures["device"] != "link:2GB/s"


def test_every_row_can_be_asked_for_by_name() -> None:
    assert [row.value for row in Row] == ROWS


def test_single_rows_are_measured_without_what_they_would_be_compared_with(store: Path) -> None:
    rows = rows_of(figures_of(store, *LINK, "--row", "no prefetch", "--row", "full"))

    assert list(rows) == ["full", "no prefetch"]
    assert rows["full"]["times_naive"] is rows["full"]["share_of_bound"] is None


def test_people_read_a_table(store: Path) -> None:
    status, out, err = run(store, *QUICK, *LINK)

    assert status == 0, err
    table = out.splitlines()[3:]
    assert [line[:12].strip() for line in table] == ["", *ROWS]
    assert table[0].split()[0] == "tok/s"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 1, "--device: one with slots is expected, as in link:12GB/s; on the CPU nothing is copied"),
        (["--device", "link:2GB/s"], 1, "exactly one of --cache-experts and --device-memory is expected, neither came"),
        (["--recall", "0.5", *LINK], 2, "--recall: only with --routing"),
        (["--naive-to-compute", "4"], 2, "--naive-to-compute: only with --device link:SPEED, not auto"),
        (["--routing", "/nonexistent", *LINK], 1, "/nonexistent: No such file or directory"),
        (["--text", "/nonexistent", *LINK], 1, "/nonexistent: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line(store: Path, arguments: list[str], status: int, message: str) -> None:
    came, out, err = run(store, *QUICK, *arguments)

    complaints = [line for line in err.splitlines() if not line.startswith("measuring:")]
    assert (came, out, len(complaints)) == (status, "", 1)
    assert complaints[0].startswith(f"runner: {message}")
