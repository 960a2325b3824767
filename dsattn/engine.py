"""Engine: the stateful object a pipeline calls instead of its attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.config import DEFAULT_METHOD, Config, build, load_config
from dsattn.errors import StrictFallbackError, UsageError
from dsattn.functional import attend, check_qkv, choose_impl, find_method
from dsattn.grid import Call
from dsattn.kernels import dense as dense_kernels
from dsattn.kernels import tuning
from dsattn.methods.estimate import output_squares, sample_rows
from dsattn.schedule import decide
from dsattn.state import Arriving, Entry, Layout, RunState
from dsattn.stats import Kind, Record, RunStats, timed
from dsattn.verdict import VerdictRule

DenseAttention = Callable[[], Tensor]


class Engine:
    """One method with its schedule, cached plans and statistics. One engine per pipeline.

    Args:
        method: method name, or a ``Config``.
        options: engine options (``dsattn.Config``) and options of the method, by flat name.

    Raises:
        UsageError: unknown method or option, or a value out of range.

    """

    def __init__(self, method: str | Config = DEFAULT_METHOD, **options: Any) -> None:
        base = {"method": method} if isinstance(method, str) else method.to_dict()
        self.config = Config.from_dict({**base, **options})
        self.method = find_method(self.config.method)
        engine_options = [f.name for f in dataclasses.fields(Config) if f.name not in ("method", "options")]
        owner = f"method {self.method.name!r}"
        self.method_config: Any = build(self.method.config, self.config.options, owner, engine_options)
        self.state = RunState()
        self.stats = RunStats()
        self._last_step = -1

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: Call,
        *,
        dense: DenseAttention | None = None,
        key_lengths: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attention of one call, ``[B, S, H, D]`` in and out.

        Args:
            q, k, v: after norm and RoPE; all of one length, that of ``call.grid``.
            call: where in model and run this is. A step before the last one starts a new run.
            dense: runs the pipeline's own attention; used for dense steps, dense layers and fallbacks unless
                ``Config.dense`` names a backend. None stands for SDPA.
            key_lengths: ``[B]`` int, leading tokens that may be read as keys (padded text stands behind them).
            scale: factor on q·k; None is ``1 / sqrt(D)``.

        Raises:
            StrictFallbackError: ``strict`` is set and the call would fall back to dense attention.

        """
        if call.step < self._last_step:
            self.reset()
        self._last_step = call.step
        check_qkv(q, k, v)
        run_dense = self._dense_attention(q, k, v, dense, key_lengths, scale)
        layout = Layout.of(q, call)
        if self.method.name == "dense":
            record = self.stats.add(call, q, "dense", "method", self.config.dense or "pipeline")
            with timed(record, "attend_s", q.device, self.config.timing):
                return run_dense()
        entry = self.state.entry(call, layout)
        decision = decide(self.config, call, entry.step if entry.plan else None, entry.drifted(self.config.drift))
        if decision.action == "dense":
            record = self.stats.add(call, q, "dense", decision.reason, self.config.dense or "pipeline")
            if decision.last and self.method.observe is not None and q.shape[1] == k.shape[1] == call.grid.tokens:
                with timed(record, "plan_s", q.device, self.config.timing):
                    self.method.observe(q, k, v, call, self.method_config, entry.memory)
                entry.step = call.step
            with timed(record, "attend_s", q.device, self.config.timing):
                return run_dense()
        if not q.shape[1] == k.shape[1] == call.grid.tokens:
            tokens = f"{q.shape[1]} queries and {k.shape[1]} keys"
            return self.fallback(call, f"{tokens} do not fit the grid's {call.grid.tokens} tokens", run_dense, q)

        # Before any work: an implementation that was named and cannot run is an error.
        judged = self.method.before is not None
        choose_impl(q, self.config.impl, verdict=judged, quantization=self.config.quantization)
        record = self.stats.add(call, q, decision.action, decision.reason, self.config.impl)
        rule: VerdictRule | None = None
        with timed(record, "plan_s", q.device, self.config.timing):
            if entry.plan is None or decision.action == "refresh":
                entry.plan = self.method.plan(q, k, v, call, self.method_config, entry.memory)
                entry.step = call.step
            plan = entry.plan
            if key_lengths is not None:
                plan = plan.with_key_lengths(key_lengths.to(device=q.device, dtype=torch.int32))
            if self.method.before is not None:
                plan, rule = self.method.before(plan, call, self.method_config, entry.memory)
        record.impl, _ = choose_impl(q, self.config.impl, plan, judged, self.config.quantization)
        with timed(record, "attend_s", q.device, self.config.timing), tuning.using(self.config.autotune):
            result = attend(
                q, k, v, plan, impl=record.impl, scale=scale, verdict=rule, quantization=self.config.quantization
            )
            out: Tensor = result if rule is None else result[0]
            if self.method.after is not None:
                self.method.after(result[1], call, self.method_config, entry.memory)
        record.density = plan.density.mean(0)
        age = call.step - entry.step
        if self.config.monitor and (self.config.drift or age == self.config.refresh - 1):
            with timed(record, "monitor_s", q.device, self.config.timing):
                self._monitor(out, q, k, v, plan, call, record, entry, scale)
        return out

    def _monitor(
        self,
        out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: BlockPlan,
        call: Call,
        record: Record,
        entry: Entry,
        scale: float | None,
    ) -> None:
        """Estimate the error of an output, for statistics, drift, and methods that follow their target."""
        rows = sample_rows(call.grid, self.config.monitor, seed=call.step).to(q.device, non_blocking=True)
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        difference, norm = output_squares(out, q, k, v, rows, scale=factor, key_lengths=plan.key_lengths)
        record.error = (difference / norm).mean(0).sqrt()
        error = (difference.sum(1) / norm.sum(1)).sqrt()
        record.layer_error = error.square().mean().sqrt()
        entry.note_error(error, first=call.step == entry.step)
        entry.memory.shared.setdefault("errors", {})[call.layer] = Arriving(error)

    def fallback(self, call: Call | None, reason: str, dense: DenseAttention, q: Tensor | None = None) -> Tensor:
        """Run dense attention where sparse attention was due; counted with its reason.

        Raises:
            StrictFallbackError: ``strict`` is set.

        """
        # The dense method asked for dense attention: nothing falls back.
        kind: Kind = "dense" if self.method.name == "dense" else "fallback"
        if self.config.strict and kind == "fallback":
            where = f" (layer {call.layer}, step {call.step})" if call else ""
            raise StrictFallbackError(f"strict: dense fallback{where}: {reason}")
        record = self.stats.add(call, q, kind, reason, self.config.dense or "pipeline")
        if q is None:
            return dense()
        with timed(record, "attend_s", q.device, self.config.timing):
            return dense()

    def reset(self) -> None:
        """Forget plans and statistics: a new run starts."""
        self.state.clear()
        self.stats.clear()
        self._last_step = -1

    def summary(self) -> dict[str, Any]:
        """Configuration, totals of the current run, and the memory its plans hold."""
        return {
            "method": self.method.name,
            "config": {**self.config.to_dict(), **dataclasses.asdict(self.method_config)},
            "plan_bytes": self.state.plan_bytes,
            **self.stats.summary(),
        }

    def _dense_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dense: DenseAttention | None,
        key_lengths: Tensor | None,
        scale: float | None,
    ) -> DenseAttention:
        backend = self.config.dense
        if backend is None and dense is not None:
            return dense
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        return lambda: dense_kernels.attention(
            q, k, v, backend=backend or "sdpa", scale=factor, key_lengths=key_lengths
        )


def as_engine(method: str | Path | Config | Engine = DEFAULT_METHOD, **options: Any) -> Engine:
    """Engine from a method name, a config, the path of a YAML file, or an engine (which takes no options).

    Raises:
        UsageError: unknown method or option, a bad file, or options beside an engine.

    """
    if isinstance(method, Engine):
        if options:
            raise UsageError(f"an Engine is already configured; got options {', '.join(options)} beside it")
        return method
    if isinstance(method, Path) or (isinstance(method, str) and method.endswith((".yaml", ".yml"))):
        return Engine(load_config(method), **options)
    return Engine(method, **options)
