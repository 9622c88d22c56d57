"""The errors of the demo.

DemoError
├── StepFailed      a command of the demo failed; it has said why itself
├── Terminated      a signal asked the demo to end
└── CacheError      the cache cannot be used: no room, no rights, a file missing
"""


class DemoError(Exception):
    """Base of all errors of this package."""


class StepFailed(DemoError):
    """A command of the demo failed; `exit_code` is its own."""

    def __init__(self, command: str, exit_code: int) -> None:
        super().__init__(f"{command}: ended with exit code {exit_code}")
        self.exit_code = exit_code


class Terminated(DemoError):
    """A signal asked the demo to end; `signum` is its number."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"ended by signal {signum}")
        self.signum = signum


class CacheError(DemoError):
    """The cache cannot be used."""
