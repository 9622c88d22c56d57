"""Matrices of a real size, under the memory that a conversion may take, killed again and again: the same store.

Memory is limited twice: each process by the kernel (RLIMIT_DATA), and all together by a watcher that kills the run when
their proportional set sizes exceed the limit.
"""

import random
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from expertd.convert.memory import LIMIT_NBYTES, QUANTIZED_NELEMENTS_MAX
from expertd.verify import verify_store
from tests.support.half_done import manifest_of, names_in
from tests.support.large_checkpoint import write_large_checkpoint
from tests.support.sparse_checkpoint import write_sparse_checkpoint
from tests.support.waiting import wait_for_exit, wait_until

pytestmark = pytest.mark.slow

_WITHIN_S = 1800.0
PRLIMIT = shutil.which("prlimit") or "prlimit"


@dataclass(frozen=True, slots=True)
class Run:
    """How a run ended: its exit status, and the most that its processes held together."""

    status: int
    said: str
    peak_nbytes: int


def held_nbytes(process: psutil.Process) -> int:
    """Return what a process and its children hold, memory that they share counted once."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def run_limited(checkpoint: Path, store: Path, *, kill_after_s: float | None = None) -> Run:
    """Quantize under the limit; kill the run, not its workers, after so many seconds."""
    command = [sys.executable, "-m", "expertd", "quantize", str(checkpoint), str(store)]
    peak_nbytes, began = 0, time.monotonic()
    with subprocess.Popen(
        [PRLIMIT, f"--data={LIMIT_NBYTES}", *command],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        watched = psutil.Process(process.pid)
        children: set[int] = set()

        def is_over() -> bool:
            nonlocal peak_nbytes
            if process.poll() is not None:
                return True
            children.update(child.pid for child in watched.children())
            peak_nbytes = max(peak_nbytes, held_nbytes(watched))
            is_late = kill_after_s is not None and time.monotonic() - began > kill_after_s
            if is_late or peak_nbytes > LIMIT_NBYTES:
                process.kill()
            return False

        wait_until(is_over, "the end of the run", _WITHIN_S)
        _, said = process.communicate()
    for child in children:
        wait_for_exit(child, within_s=120.0)
    return Run(process.returncode, said, peak_nbytes)


def test_a_full_width_checkpoint_killed_five_times_under_3_gb_becomes_the_same_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_large_checkpoint(tmp_path / "checkpoint", n_layers=2, n_shards=3)
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    rng = random.Random(20261125)

    undisturbed = run_limited(checkpoint, tmp_path / "undisturbed")
    killed = [run_limited(checkpoint, tmp_path / "killed", kill_after_s=rng.uniform(6.0, 20.0)) for _ in range(5)]
    last = run_limited(checkpoint, tmp_path / "killed")

    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == soft
    assert (undisturbed.status, last.status) == (0, 0), undisturbed.said + last.said
    assert [run.status for run in killed] == [-9] * 5
    assert manifest_of(tmp_path / "killed").digest == manifest_of(tmp_path / "undisturbed").digest
    assert names_in(tmp_path) == ["checkpoint", "killed", "undisturbed"]
    for name in names_in(tmp_path / "killed"):
        assert same_bytes(tmp_path / "killed" / name, tmp_path / "undisturbed" / name), name
    peak_nbytes = max(run.peak_nbytes for run in (undisturbed, *killed, last))
    assert peak_nbytes <= LIMIT_NBYTES
    with capsys.disabled():
        sys.stderr.write(f"\n    at most {peak_nbytes / 1e9:.2f} GB held at once\n")


def test_a_vocabulary_of_a_million_tokens_takes_no_more_than_3_gb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Embeddings and output head of 2 GB each in F32, one kept in 16 bits, one quantized to 8: each alone is too large.
    checkpoint = write_sparse_checkpoint(
        tmp_path / "checkpoint",
        hidden=512,
        intermediate=1024,
        n_layers=1,
        n_heads=8,
        n_kv_heads=2,
        n_experts=2,
        vocab=1_000_000,
        dtype="F32",
    )

    run = run_limited(checkpoint, tmp_path / "store")

    assert run.status == 0, run.said
    assert run.peak_nbytes <= LIMIT_NBYTES
    head = manifest_of(tmp_path / "store").dense["lm_head"]
    assert head.parts[0].rows * head.parts[0].cols > QUANTIZED_NELEMENTS_MAX
    assert not verify_store(tmp_path / "store", lambda _done, _total: None).wrong
    with capsys.disabled():
        sys.stderr.write(f"\n    at most {run.peak_nbytes / 1e9:.2f} GB held at once\n")


def same_bytes(one: Path, other: Path) -> bool:
    with one.open("rb") as first, other.open("rb") as second:
        while data := first.read(8 << 20):
            if data != second.read(8 << 20):
                return False
        return not second.read(1)
