"""What benchmarks read of processes."""

import subprocess
import sys

from benchmarks.processes import processor_s

# Says how much of the processor it has used, whenever it is asked.
_ASKED = """
import sys, time
for _ in sys.stdin:
    print(time.process_time(), flush=True)
"""


def test_the_processor_time_of_another_process_is_known_finer_than_in_ticks() -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", _ASKED], text=True, stdin=pipe, stdout=pipe) as process:
        before_s = _asked(process)
        used_s = processor_s(process.pid)
        after_s = _asked(process)

    assert before_s <= used_s <= after_s
    assert after_s - before_s < 0.01


def _asked(process: "subprocess.Popen[str]") -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())
