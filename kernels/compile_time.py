"""Seconds this process has spent compiling: the part of a first call that later calls do not pay again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

# What torch.compile takes for one graph, everything inside included.
_GRAPH = "_compile.compile_inner"
# Seconds of every kernel that Triton compiled or loaded.
_triton: list[float] = []


def seconds() -> float:
    """Compiling Triton kernels or reading them from the cache, loading them into the GPU (where Triton tells, from 3.6
    on), and ``torch.compile`` (FlexAttention). Only grows; read from the host alone.
    """
    # Seconds to import: whoever compiles has done so.
    dynamo = sys.modules.get("torch._dynamo.utils")
    return sum(_triton) + (0.0 if dynamo is None else sum(dynamo.compilation_time_metrics.get(_GRAPH, ())))


def listen() -> None:
    """Have Triton report what it compiles; whoever listened before still hears of it."""
    from triton import knobs

    knobs.compilation.listener = _listener(knobs.compilation.listener)
    if hasattr(knobs.runtime, "kernel_load_end_hook"):
        load = _Load()
        knobs.runtime.kernel_load_start_hook.add(load.start)
        knobs.runtime.kernel_load_end_hook.add(load.end)


def _listener(before: Callable[..., None] | None) -> Callable[..., None]:
    def heard(*, times: Any, **rest: Any) -> None:
        _add(times.total / 1e6)
        if before is not None:
            before(times=times, **rest)

    return heard


class _Load:
    """Time between Triton's hooks around the loading of a kernel."""

    began = 0.0

    def start(self, *_: Any) -> None:
        self.began = time.perf_counter()

    def end(self, *_: Any) -> None:
        _add(time.perf_counter() - self.began)


def _add(spent: float) -> None:
    """Count seconds of Triton; those inside ``torch.compile`` are in its own figure."""
    from torch._guards import CompileContext

    if CompileContext.try_get() is None:
        _triton.append(spent)
