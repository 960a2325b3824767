"""What an engine remembers within one run: the cached plan of every (model, layer, branch)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.grid import Call, VideoGrid
from dsattn.methods.base import Memory

# Relative error of attention in fp32 arithmetic, from the rounding of logits.
FP32_ERROR = 1e-6


@dataclass(frozen=True)
class Layout:
    """What a cached plan depends on besides values; a change drops it."""

    grid: VideoGrid
    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, q: Tensor, call: Call) -> Layout:
        """Layout of one call."""
        return cls(call.grid, q.shape[0], q.shape[2], q.shape[3], q.dtype, q.device)


class Arriving:
    """A tensor on its way to the host: reading waits for what was queued before it was made, not for later work."""

    def __init__(self, value: Tensor) -> None:
        self._event = None
        self._value = value
        if value.device.type == "cuda":
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> Tensor:
        """The values, on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._value


@dataclass
class Entry:
    """What is kept of one (model, layer, branch): the layout it fits, the method's memory, and the cached plan, if any.

    step: when the plan was made, or when the memory was last written where there is no plan yet.
    first_error: ``[B]`` estimated error of the plan's first use, at least that of rounding, where it was estimated.
    growth: ``[]`` factor by which the mean error of the last use is larger.
    """

    layout: Layout
    memory: Memory
    step: int
    plan: BlockPlan | None = None
    first_error: Tensor | None = None
    growth: Arriving | None = None

    def note_error(self, error: Tensor, first: bool) -> None:
        """Take in the estimated error ``[B]`` of a use of the plan; rounding alone is no growth."""
        if first:
            rounding = max(torch.finfo(self.layout.dtype).eps, FP32_ERROR)
            self.first_error, self.growth = error.clamp(min=rounding), None
        elif self.first_error is not None:
            self.growth = Arriving(error.mean() / self.first_error.mean())

    def drifted(self, limit: float | None) -> bool:
        """Whether the error has grown by more than a factor."""
        return limit is not None and self.growth is not None and bool(self.growth.read() > limit)


@dataclass
class RunState:
    """State of the current run, keyed by (model, layer, branch); batch rows live inside plans and memories."""

    entries: dict[tuple[str, int, str], Entry] = field(default_factory=dict)
    shared: dict[tuple[str, str, Layout], dict[str, Any]] = field(default_factory=dict)

    def entry(self, call: Call, layout: Layout) -> Entry:
        """Entry for a call; an empty one if there is none or it was made for another layout or a later step."""
        key = (call.model, call.layer, call.branch)
        entry = self.entries.get(key)
        if entry is None or entry.layout != layout or entry.step > call.step:
            if entry is not None and entry.layout != layout:
                # What layers learned together was learned from the old layout; every layer comes by here once, and all
                # of them must meet in the same new one.
                self.shared.pop((call.model, call.branch, entry.layout), None)
            shared = self.shared.setdefault((call.model, call.branch, layout), {})
            entry = self.entries[key] = Entry(layout, Memory(shared), call.step)
        return entry

    def clear(self) -> None:
        """Forget everything: a new run starts."""
        self.entries.clear()
        self.shared.clear()

    @property
    def plan_bytes(self) -> int:
        """Memory held by cached plans and the methods' memory, in bytes; shared storage is counted once."""
        storages: dict[int, int] = {}
        for entry in self.entries.values():
            plan = () if entry.plan is None else vars(entry.plan).values()
            linear = () if entry.plan is None or entry.plan.linear is None else vars(entry.plan.linear).values()
            for value in (*plan, *linear, *entry.memory.values()):
                if isinstance(value, Tensor):
                    storage = value.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())
