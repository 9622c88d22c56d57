"""Executes a model whose experts an expertd holds: `runner.open_engine` is the Python interface.

Importing this package loads nothing heavy; the first use of its names does.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runner.engine import Engine, open_engine

__all__ = ["Engine", "open_engine"]


def __getattr__(name: str) -> object:
    """Return a public name from the module that defines it; raise AttributeError."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from runner import engine

    return getattr(engine, name)
