"""Where commands print, and how they show progress."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["console", "progress_bar"]

console = Console(markup=False)
"""Prints what it is given as it is: square brackets in names are no markup. Colours come as ``rich.text.Text``."""


def progress_bar() -> Progress:
    """A bar with a count, the time, and a ``note`` that every task is given."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
    )
