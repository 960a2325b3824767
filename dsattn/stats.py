"""What happened in a run, one record per attention call. Kept as tensors until somebody asks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dsattn.grid import Call
from dsattn.kernels import compile_time

Kind = Literal["dense", "refresh", "reuse", "fallback"]


@dataclass
class Record:
    """One attention call.

    kind: dense (scheduled), refresh (plan made), reuse (plan cached) or fallback (dense, unplanned).
    reason: why it was dense or fell back.
    impl: implementation that ran; ``"pipeline"`` is the pipeline's own dense attention.
    density: ``[H]`` share of (query, key) pairs computed exactly, mean over the batch; None when dense.
    pairs: (query, key) pairs of the whole call over batch and heads.
    error: ``[H]`` estimated relative L2 error of the output, root mean square over the batch; None where none was made.
    layer_error: ``[]`` the same of all heads together.
    plan_s, attend_s, monitor_s: seconds, measured where ``Config.timing`` is set.
    compile_s: seconds of these spent compiling kernels, always measured; 0 but where a call is the first of its kind.
    """

    model: str
    branch: str
    layer: int
    step: int
    kind: Kind
    reason: str
    impl: str
    pairs: int
    density: Tensor | None = None
    error: Tensor | None = None
    layer_error: Tensor | None = None
    plan_s: float = 0.0
    attend_s: float = 0.0
    monitor_s: float = 0.0
    compile_s: float = 0.0
    events: dict[str, Any] = field(default_factory=dict, repr=False)

    def read_events(self) -> None:
        """Turn GPU events into seconds (synchronises)."""
        for name, (start, stop) in self.events.items():
            stop.synchronize()
            setattr(self, name, start.elapsed_time(stop) / 1000)
        self.events.clear()


@dataclass
class RunStats:
    """Records of the current run; ``clear`` starts a new one."""

    records: list[Record] = field(default_factory=list)

    def add(
        self,
        call: Call | None,
        q: Tensor | None,
        kind: Kind,
        reason: str = "",
        impl: str = "",
        density: Tensor | None = None,
    ) -> Record:
        """Append a record for a call; call and q are None where a fallback happens before they are known."""
        record = Record(
            model=call.model if call else "",
            branch=call.branch if call else "",
            layer=call.layer if call else -1,
            step=call.step if call else -1,
            kind=kind,
            reason=reason,
            impl=impl,
            pairs=0 if q is None else q.shape[0] * q.shape[2] * q.shape[1] ** 2,
            density=density,
        )
        self.records.append(record)
        return record

    def clear(self) -> None:
        """Forget all records."""
        self.records.clear()

    def summary(self) -> dict[str, Any]:
        """Totals as plain values: counts, density, times, implementations, fallbacks with reasons."""
        for record in self.records:
            record.read_events()
        sparse = [r for r in self.records if r.density is not None]
        shares = [_mean(r.density) for r in self.records]
        pairs = sum(r.pairs for r in self.records)
        sparse_pairs = sum(r.pairs for r in sparse)
        kept = sum(share * r.pairs for share, r in zip(shares, self.records, strict=True))
        kept_sparse = sum(_mean(r.density) * r.pairs for r in sparse)
        return {
            "calls": dict(Counter(r.kind for r in self.records)),
            "density_all_calls": kept / pairs if pairs else 1.0,
            "density_sparse_calls": kept_sparse / sparse_pairs if sparse_pairs else None,
            "plan_s": sum(r.plan_s for r in self.records),
            "attend_s": sum(r.attend_s for r in self.records),
            "monitor_s": sum(r.monitor_s for r in self.records),
            "compile_s": sum(r.compile_s for r in self.records),
            "refresh_reasons": dict(Counter(r.reason for r in self.records if r.kind == "refresh")),
            "estimated_error": _rms(r.layer_error for r in self.records),
            "estimated_error_by_layer": self._error_by("layer"),
            "estimated_error_by_step": self._error_by("step"),
            "impls": dict(Counter(r.impl for r in self.records if r.impl)),
            "dense_reasons": dict(Counter(r.reason for r in self.records if r.kind == "dense")),
            "fallbacks": dict(Counter(r.reason for r in self.records if r.kind == "fallback")),
            "density_by_layer": self._mean_by("layer"),
            "density_by_step": self._mean_by("step"),
        }

    def _mean_by(self, key: str) -> dict[int, float]:
        """Density per layer or step, dense calls counted as 1."""
        groups: dict[int, list[tuple[float, int]]] = {}
        for record in self.records:
            if record.pairs:
                groups.setdefault(getattr(record, key), []).append((_mean(record.density), record.pairs))
        return {k: sum(d * n for d, n in v) / sum(n for _, n in v) for k, v in sorted(groups.items())}

    def _error_by(self, key: str) -> dict[int, float | None]:
        groups: dict[int, list[Tensor | None]] = {}
        for record in self.records:
            if record.layer_error is not None:
                groups.setdefault(getattr(record, key), []).append(record.layer_error)
        return {k: _rms(v) for k, v in sorted(groups.items())}


def _rms(errors: Iterable[Tensor | None]) -> float | None:
    """Root mean square over calls; None of nothing."""
    known = [error for error in errors if error is not None]
    return float(torch.stack([e.square().mean() for e in known]).mean().sqrt()) if known else None


def _mean(density: Tensor | None) -> float:
    return 1.0 if density is None else float(density.mean())


@contextmanager
def timed(record: Record, name: str, device: torch.device, enabled: bool) -> Iterator[None]:
    """Measure a block into ``record.plan_s``, ``attend_s`` or ``monitor_s``; on a GPU by events, no waiting.

    ``compile_s`` grows also where this is not ``enabled``.
    """
    compiled = compile_time.seconds()
    if not enabled:
        yield
    elif device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        yield
        stop.record()
        record.events[name] = (start, stop)
    else:
        began = time.perf_counter()
        yield
        setattr(record, name, time.perf_counter() - began)
    record.compile_s += compile_time.seconds() - compiled
