import mmap
import os
from pathlib import Path

from runner.metrics import Memory, process_age_s, read_memory


def write_proc(folder: Path, age_s: float) -> None:
    import time

    start_ticks = int((time.clock_gettime(time.CLOCK_BOOTTIME) - age_s) * os.sysconf("SC_CLK_TCK"))
    (folder / "smaps_rollup").write_text("Rss: 900 kB\nPrivate_Dirty:   500 kB\nAnonymous:   100 kB\n")
    (folder / "status").write_text("Name:\trunner\nRssAnon:\t 100 kB\nRssShmem:\t 700 kB\n")
    (folder / "stat").write_text(f"7 (a) strange) name) S {' '.join(['0'] * 18)} {start_ticks} 0 0\n")


def test_a_page_of_a_shared_segment_is_never_private(tmp_path: Path) -> None:
    write_proc(tmp_path, 1.0)

    assert read_memory(tmp_path) == Memory(private_nbytes=100 * 1024, shared_nbytes=700 * 1024)


def test_memory_that_is_written_is_private() -> None:
    # Memory that the process has been given already could be handed out again; a mapping is always new.
    with mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        before = read_memory().private_nbytes

        memory.write(b"x" * (32 << 20))

        assert read_memory().private_nbytes - before > 30 << 20


def test_the_age_counts_from_the_start_of_the_process(tmp_path: Path) -> None:
    write_proc(tmp_path, 100.0)

    # The kernel counts hundredths of a second; the rest is the time the test itself takes.
    assert 99.9 < process_age_s(tmp_path) < 130
