"""The errors of traces; str() of each is the one line its user sees.

RunnerError
└── TraceError
    ├── TraceInvalid     a file that is no trace, a damaged one, or one without what was asked of it
    └── PlotUnavailable  a figure that cannot be drawn here
"""

from runner.errors import RunnerError


class TraceError(RunnerError):
    """Base of the errors of this package."""


class TraceInvalid(TraceError):
    """A file that is no trace, a damaged one, or one without what was asked of it."""


class PlotUnavailable(TraceError):
    """A figure that cannot be drawn here."""
