"""The errors of the expert cache.

RunnerError
└── CopyFailed     a copy into a slot that ended with an error no one foresaw
"""

from runner.errors import RunnerError


class CopyFailed(RunnerError):
    """Experts cannot be copied to the device any more."""
