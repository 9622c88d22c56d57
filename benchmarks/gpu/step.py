"""One step's process: `python -m benchmarks.gpu.step NAME WORK_DIR` prints its result, or says what failed."""

import argparse
import json
import sys
import traceback
from pathlib import Path

from benchmarks.gpu.steps import STEPS, StepInput


def main() -> int:
    """Run the step that is named; return the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.step")
    parser.add_argument("name", choices=[step.name for step in STEPS])
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--trace", type=Path)
    arguments = parser.parse_args()
    step = next(step for step in STEPS if step.name == arguments.name)
    try:
        result = step.load()(StepInput(arguments.work_dir, arguments.trace))
    except Exception as error:  # noqa: BLE001  # the process's one end: told whole, and in one line at last
        traceback.print_exc()
        first_line = (str(error).strip() or "no message").splitlines()[0]
        print(f"{type(error).__name__}: {first_line}", file=sys.stderr)
        return 1
    print(json.dumps(result, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
