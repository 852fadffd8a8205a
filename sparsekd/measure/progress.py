"""A bar for what takes long."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

__all__ = ["track"]

T = TypeVar("T")


def track(items: Sequence[T], what: str, show: bool) -> Iterable[T]:
    """The items, with a bar on a terminal's standard error while they are gone through."""
    if not show:
        return items
    from rich.console import Console
    from rich.progress import track as tracked

    console = Console(stderr=True)
    return tracked(items, description=what, console=console, disable=not console.is_terminal, transient=True)
