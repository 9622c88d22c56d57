"""Programs that behave as expertd and runner do towards the demo, and log how they were called."""

import sys
from dataclasses import dataclass
from pathlib import Path

from tools.demo.commands import Commands

_EXPERTD = """
case "$1" in
    status)
        if [ -e "$state/running" ]; then
            held=$(cat "$state/running")
            echo "{\\"running\\": true, \\"stores\\": [${held:+{\\"path\\": \\"$held\\"\\}}]}"
            exit 0
        fi
        if [ "$2" = --json ]; then echo '{"running": false}'; else echo 'expertd: not running' >&2; fi
        exit 1 ;;
    start | load) echo "$2" > "$state/running" ;;
    unload) : > "$state/running" ;;
    stop) rm "$state/running" ;;
    quantize) mkdir "$3" && cat "$2/model" > "$3/manifest.json" ;;
esac
"""
_CHECKPOINT = """
mkdir "$1" && echo weights > "$1/model"
"""


@dataclass(frozen=True, slots=True)
class FakeCommands:
    """Fakes in one folder; the file `running` there is the daemon, its content the one store it holds."""

    state: Path

    @property
    def commands(self) -> Commands:
        return Commands(
            expertd=(str(self.state / "expertd"),),
            runner=(str(self.state / "runner"),),
            demo_checkpoint=(str(self.state / "demo_checkpoint"),),
        )

    @property
    def is_running(self) -> bool:
        return (self.state / "running").exists()

    @property
    def held_store(self) -> str:
        return (self.state / "running").read_text().strip()

    def start_daemon(self, store: Path | None = None) -> None:
        (self.state / "running").write_text("" if store is None else str(store))

    def calls(self) -> list[str]:
        """Return the first two words of each call so far: `expertd stop`."""
        log = self.state / "log"
        return log.read_text().splitlines() if log.exists() else []

    def replace(self, name: str, body: str) -> None:
        """Have the named program do what the shell script says, after logging its call."""
        path = self.state / name
        path.write_text(f'#!/bin/sh\nstate="{self.state}"\necho "{name} $1" >> "$state/log"\n{body}')
        path.chmod(0o755)

    def run_demo_argv(self, cache: Path) -> list[str]:
        """Return the command of a demo on its own, with these fakes and this repository's code."""
        program = (
            "import sys; from pathlib import Path; from tests.unit.tools.fake_commands import FakeCommands\n"
            "from tools.demo.cache import Recipe; from tools.demo.cli import run\n"
            "state, cache = Path(sys.argv[1]), Path(sys.argv[2])\n"
            "recipe = Recipe(root=state, config=state / 'demo.toml', gguf=None)\n"
            "sys.exit(run(recipe, cache, FakeCommands(state).commands, 'Why?', keep_checkpoint=False))"
        )
        return [sys.executable, "-c", program, str(self.state), str(cache)]


def fake_commands(state: Path) -> FakeCommands:
    """Write the fakes and a configuration into the folder."""
    fakes = FakeCommands(state)
    fakes.replace("expertd", _EXPERTD)
    fakes.replace("runner", "echo text")
    fakes.replace("demo_checkpoint", _CHECKPOINT)
    (state / "demo.toml").write_text("[scheme]\n")
    return fakes
