"""The progress bar: on standard error, and only where somebody watches it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dsattn.compare import Watch


@contextmanager
def watching(silent: bool) -> Iterator[Watch]:
    """A bar per run in a terminal; nothing when ``silent`` or when standard error is a file or a pipe."""
    if silent or not sys.stderr.isatty():
        yield Watch()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Bars(progress)


class _Bars(Watch):
    """One bar for the run that goes on."""

    def __init__(self, progress: object) -> None:
        from rich.progress import Progress

        if not isinstance(progress, Progress):
            raise TypeError(f"expected a rich Progress, got {type(progress).__name__}")
        self.progress = progress

    def begin(self, label: str, steps: int | None) -> None:
        self.task = self.progress.add_task(label or "denoising", total=steps)

    def step(self) -> None:
        self.progress.advance(self.task)

    def end(self) -> None:
        self.progress.remove_task(self.task)
