"""The errors of the benchmarks; str() of each is the one line its user sees.

BenchmarkError
├── NothingToMeasure   what is to be measured is not there: a store, a text, a program
├── CompileFailed      a C source of the benchmarks could not be compiled
├── NoRoom             the cache has no room for what is measured
└── CommandFailed      a measured command ended with an error
"""


class BenchmarkError(Exception):
    """Base of all errors of this package."""


class NothingToMeasure(BenchmarkError):
    """What is to be measured is not there."""


class CompileFailed(BenchmarkError):
    """A C source could not be compiled."""


class NoRoom(BenchmarkError):
    """The cache has no room."""


class CommandFailed(BenchmarkError):
    """A measured command ended with an error."""
