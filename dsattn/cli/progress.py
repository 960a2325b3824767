"""The progress bar: on standard error, and only where somebody watches it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dsattn.measure import Watch

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def watching(silent: bool) -> Iterator[Watch]:
    """A bar per run in a terminal; nothing when ``silent`` or when standard error is a file or a pipe."""
    if silent or not sys.stderr.isatty():
        yield Watch()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn twice a second: drawing takes processor time from the runs that are measured.
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=2) as progress:
        yield _Bars(progress)


class _Bars(Watch):
    """One bar for the run that goes on."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def begin(self, label: str, steps: int | None) -> None:
        self.task = self.progress.add_task(label or "denoising", total=steps)

    def step(self) -> None:
        self.progress.advance(self.task)

    def end(self) -> None:
        self.progress.remove_task(self.task)
