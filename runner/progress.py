"""A progress bar on stderr, if that is a terminal. For commands that go through a text."""

from collections.abc import Callable, Iterator
from typing import TypeVar

_Item = TypeVar("_Item")


def shown_progress(
    items: Iterator[_Item], label: str, n_tokens: int, n_tokens_of: Callable[[_Item], int]
) -> Iterator[_Item]:
    """Pass the items on; each is worth so many of all tokens."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=n_tokens)
        for item in items:
            progress.advance(task, n_tokens_of(item))
            yield item
