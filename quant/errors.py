"""The errors of the numbers.

QuantError
├── UnknownSolver   a solver that this version does not know
├── SolverMissing   the package of a solver is not installed
├── BadWeights      weights that cannot be stored: not finite, of another shape or type than promised
├── StaleLibrary    the C library is one of another version
├── KernelsMissing  kernels were asked for that this machine or this build does not have
├── WorkspaceBusy   another thread computes with this workspace
├── WorkspaceForked the workspace's threads belong to the process that this one was forked from
├── ExpertMissing   an expert was chosen that was not put where it is to be computed
├── BadPart         bytes that are not the part they are said to be: type, length, alignment
└── BadShape        activations, row ranges or parts that do not fit the matrix they are used with
"""


class QuantError(Exception):
    """Base of all errors of this package."""


class UnknownSolver(QuantError):
    """A solver that this version does not know."""


class SolverMissing(QuantError):
    """The package of a solver is not installed."""


class BadWeights(QuantError):
    """Weights that cannot be stored."""


class StaleLibrary(QuantError):
    """The C library is one of another version."""


class KernelsMissing(QuantError):
    """Kernels were asked for that this machine or this build does not have."""


class WorkspaceBusy(QuantError):
    """Another thread computes with this workspace."""


class WorkspaceForked(QuantError):
    """The workspace's threads belong to the process that this one was forked from."""


class ExpertMissing(QuantError):
    """An expert was chosen that was not put where it is to be computed."""


class BadPart(QuantError):
    """Bytes that are not the part they are said to be."""


class BadShape(QuantError):
    """Activations, row ranges or parts that do not fit the matrix they are used with."""
