"""Time and peak memory of a run."""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

RSS_INTERVAL_S = 0.02
_STATM = Path("/proc/self/statm")


class Clock:
    """Time on a device: ``now`` waits for it, ``mark`` does not."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> float:
        """Seconds, after all work given to the device is done."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def mark(self) -> Any:
        """A point in the device's work, for ``between``."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    @staticmethod
    def between(a: Any, b: Any) -> float:
        """Seconds between two marks; the device must be past them."""
        return float(b - a if isinstance(a, float) else a.elapsed_time(b) / 1000)


class PeakMemory(AbstractContextManager["PeakMemory"]):
    """Peak memory in a block: the allocator's on CUDA, elsewhere the process's resident set, sampled."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _STATM.exists():
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.peaks["allocated"] = torch.cuda.max_memory_allocated(self.device)
            self.peaks["reserved"] = torch.cuda.max_memory_reserved(self.device)
        elif self._thread is not None:
            self._stop.set()
            self._thread.join()

    def _sample(self) -> None:
        import resource

        page = resource.getpagesize()
        while True:
            resident = int(_STATM.read_text().split()[1]) * page
            self.peaks["process_rss"] = max(resident, self.peaks.get("process_rss", 0))
            if self._stop.wait(RSS_INTERVAL_S):
                return
