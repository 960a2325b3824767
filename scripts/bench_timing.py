"""What the benchmarks share: timing, facts about the machine, files and tables."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsattn.report import environment, version_of

# How often the cache is overwritten before a call: the GPU is busy with it for a few milliseconds while the host gets
# ahead with launches, as in a model, so that the events do not time the host.
LEAD = 32

SMI_FIELDS = (
    "driver_version",
    "power.limit",
    "power.draw",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "temperature.gpu",
    "memory.total",
)


@dataclass
class Entry:
    """Something to time.

    run: does the work once.
    info: goes into its row of the report.
    memory: bytes it needs beside what is allocated already.
    read: seconds of the last run, where only a part of it counts; None counts all of it.
    check: error of a result of ``run`` against the reference, and the largest one allowed; None checks nothing.
    """

    name: str
    run: Callable[[], Any]
    info: dict[str, Any] = field(default_factory=dict)
    memory: float = 0
    read: Callable[[], float] | None = None
    check: Callable[[Any], tuple[float, float]] | None = None


class Deadline:
    """Time left of a budget in seconds."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


class Stopwatch:
    """Times calls on one device: CUDA events on a GPU, where the L2 cache is overwritten before each call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flushed: torch.Tensor | None = None
        if device.type == "cuda":
            cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
            self.flushed = torch.empty(max(4 * cache, 256 << 20), dtype=torch.uint8, device=device)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def wall(self, run: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds on the host's clock, compilation included, and the result."""
        self.wait()
        began = time.perf_counter()
        result = run()
        self.wait()
        return time.perf_counter() - began, result

    def once(self, run: Callable[[], Any]) -> float:
        """Seconds of one call."""
        if self.flushed is None:
            return self.wall(run)[0]
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(LEAD):
            self.flushed.zero_()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1000


def measure(
    entries: Sequence[Entry],
    watch: Stopwatch,
    seconds: float,
    *,
    least: int = 3,
    most: int = 20,
    log: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """One row per entry: median of runs that take turns, so that a drifting clock hits all alike.

    Every entry first runs twice: the first run, which compiles, is checked and reported apart (``warmup_s`` is what it
    took more than the second). A row has ``status`` ok, wrong, skipped, unavailable, failed or late, and where it is
    not ok, no time but a ``reason``.

    Args:
        entries: what to time; names are unique.
        watch: times them.
        seconds: the budget for warm-up and timing; an entry that cannot have its runs within it is ``late``.
        least, most: runs of every entry.
        log: told what is going on.

    """
    deadline = Deadline(seconds)
    rows, ready = [], []
    for entry in entries:
        row = {"name": entry.name, **entry.info}
        rows.append(row)
        # Those that are ready need their rounds.
        if deadline.left() <= least * sum(row["second_s"] for _, row in ready):
            row |= {"status": "late", "reason": f"the {seconds:.0f} s of its group were used up"}
            continue
        if entry.memory > free_memory(watch.device):
            free = free_memory(watch.device)
            row |= {"status": "skipped", "reason": f"needs {_gib(entry.memory)}, {_gib(free)} are free"}
            continue
        row |= _warm_up(entry, watch)
        log(f"  {entry.name}: {row['status']} {row.get('reason', '')}".rstrip())
        if row["status"] == "ok":
            ready.append((entry, row))
    if not ready:
        return rows
    per_round = sum(row["second_s"] for _, row in ready)
    rounds = max(least, min(most, int(max(0.0, deadline.left()) / per_round)))
    times: dict[str, list[float]] = {entry.name: [] for entry, _ in ready}
    for turn in range(rounds):
        # Another one starts every round: none always follows the same neighbour.
        shift = turn % len(ready)
        for entry, row in ready[shift:] + ready[:shift]:
            if row["status"] != "ok":
                continue
            try:
                took = watch.once(entry.run)
            except Exception as error:  # noqa: BLE001 - as in the warm-up
                row |= {"status": "failed", "reason": f"run {turn + 3}: {type(error).__name__}: {_first_line(error)}"}
                continue
            times[entry.name].append(took if entry.read is None else entry.read())
    for entry, row in ready:
        if row["status"] == "ok":
            row |= summary(times[entry.name])
    return rows


def _warm_up(entry: Entry, watch: Stopwatch) -> dict[str, Any]:
    from dsattn.errors import ImplUnavailableError

    try:
        first, result = watch.wall(entry.run)
        if entry.check is not None:
            error, allowed = entry.check(result)
            if not error <= allowed:  # NaN is wrong too
                reason = f"relative error {error:.3g}, allowed {allowed:.3g}"
                return {"status": "wrong", "reason": reason, "error": error if math.isfinite(error) else None}
        del result
        second, _ = watch.wall(entry.run)
    except ImplUnavailableError as error:
        return {"status": "unavailable", "reason": _first_line(error)}
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return {"status": "skipped", "reason": _first_line(error)}
    except Exception as error:  # noqa: BLE001 - one that fails must not end the others' run
        return {"status": "failed", "reason": f"{type(error).__name__}: {_first_line(error)}"}
    found = {"status": "ok", "first_s": first, "second_s": second, "warmup_s": max(0.0, first - second)}
    return found if entry.check is None else found | {"error": error}


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Median and range of some runs."""
    return {"median_s": statistics.median(times), "min_s": min(times), "max_s": max(times), "runs": len(times)}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return lines[0][:300]


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    return 0.8 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def ceilings(watch: Stopwatch, dtype: torch.dtype) -> dict[str, float]:
    """What this device does at best: bytes per second of a copy (read and written), FLOP/s of a matrix product."""
    size, side = (2 << 30, 8192) if watch.device.type == "cuda" else (64 << 20, 512)
    source = torch.empty(size // 4, device=watch.device).normal_()
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=watch.device).to(dtype) for _ in range(2))
    copy, product = Entry("copy", lambda: target.copy_(source)), Entry("product", lambda: a @ b)
    rows = measure([copy, product], watch, 10, most=20)
    return {"copy_bytes_per_s": 2 * size / rows[0]["median_s"], "flop_per_s": 2 * side**3 / rows[1]["median_s"]}


def machine(device: torch.device) -> dict[str, Any]:
    """Versions, hardware, and what the GPU's driver says of clocks and power."""
    packages = ("numpy", "xformers", "flashinfer-python", "accelerate")
    facts: dict[str, Any] = {**environment(), **{name: version_of(name) for name in packages}, "device": device.type}
    if device.type == "cuda":
        props = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": props.name,
            "capability": f"{props.major}.{props.minor}",
            "processors": props.multi_processor_count,
            "memory_bytes": props.total_memory,
            "l2_bytes": getattr(props, "L2_cache_size", None),
            "smi": smi(device.index or 0),
        }
    return facts


def smi(index: int = 0) -> dict[str, str] | None:
    """Clocks (MHz), power (W), temperature (°C) and driver as nvidia-smi reports them now; None without it."""
    query = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(SMI_FIELDS, (cell.strip() for cell in done.stdout.splitlines()[0].split(",")), strict=False))


def results_folder(name: str) -> str:
    """Folder of a device's results, ``benchmarks/results/<this>``."""
    kept = "".join(c if c.isalnum() else "-" for c in name.lower())
    return "-".join(filter(None, kept.split("-")))


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a report; a run that is stopped leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown table, first column left, the others right."""
    lines = [head, [":--", *("--:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines) + "\n"


def ms(seconds: float | None) -> str:
    """Milliseconds with three significant digits."""
    return "–" if seconds is None else f"{seconds * 1000:.3g}" if seconds < 1 else f"{seconds * 1000:.0f}"
