"""The ablation at Mixtral's size, routed by a recorded trace: `runner bench ablation`, as a user calls it."""

import json
import subprocess
import sys

from benchmarks.gpu.steps import StepInput

_KEPT = 4


def measure(given: StepInput) -> dict[str, object]:
    """Return what the command reports; raise RuntimeError with its last line."""
    if given.trace is None:
        return {"left_out": "no trace to route by: --trace names one"}
    command = [sys.executable, "-m", "runner", "bench", "ablation", "--store", str(given.mixtral_store), "--json"]
    command += ["--device", "cuda:0", "--cache-experts", str(_KEPT), "--routing", str(given.trace), "--runs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["nothing was said"])[-1])
    reported: dict[str, object] = json.loads(done.stdout)
    return reported
