"""A runner in a process of its own that has computed and waits to be measured.

Run as a module: the store. It attaches to the daemon that runs, writes one line when it has generated its text, and
ends when its standard input does.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.waiting import wait_readable

CONTEXT = 256
N_THREADS = 2
N_PROMPT = 128
N_NEW = 8
WITHIN_S = 120.0


@contextmanager
def waiting_runner(store: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a runner and wait until it has generated; kill it at the end if it still lives."""
    command = [sys.executable, "-m", "tests.support.runner_process", str(store)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root) as process:
        try:
            assert process.stdout is not None
            wait_readable(process.stdout.fileno(), "a runner's text", WITHIN_S)
            assert process.stdout.readline() == b"here\n"
            yield process
        finally:
            process.kill()


def main(store: Path) -> None:
    """Compute a prompt of different tokens and a few more, so that every buffer a session needs has been touched."""
    import runner

    with runner.open_engine(store, context=CONTEXT, threads=N_THREADS, autostart=False) as engine:
        vocab = engine.config.vocab_size
        prompt = [3 + 7 * index % (vocab - 3) for index in range(N_PROMPT)]
        for _ in engine.generate(prompt, max_new_tokens=N_NEW):
            pass
        sys.stdout.write("here\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
