"""What an engine remembers within one run: the cached plan of every (model, layer, branch)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.grid import Call, VideoGrid
from dsattn.methods.base import Memory


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


@dataclass
class Entry:
    """A cached plan, the step it was made at, the layout it was made for, and what the method remembers."""

    plan: BlockPlan
    step: int
    layout: Layout
    memory: Memory


@dataclass
class RunState:
    """Plans of the current run, keyed by (model, layer, branch); batch rows live inside the plans."""

    entries: dict[tuple[str, int, str], Entry] = field(default_factory=dict)

    def find(self, call: Call, layout: Layout) -> Entry | None:
        """Entry for a call, or None if there is none or it was made for another layout or a later step."""
        entry = self.entries.get((call.model, call.layer, call.branch))
        if entry is None or entry.layout != layout or entry.step > call.step:
            return None
        return entry

    def store(self, call: Call, plan: BlockPlan, layout: Layout, memory: Memory) -> None:
        """Remember a plan and the method's memory."""
        self.entries[call.model, call.layer, call.branch] = Entry(plan, call.step, layout, memory)

    def clear(self) -> None:
        """Forget everything: a new run starts."""
        self.entries.clear()

    @property
    def plan_bytes(self) -> int:
        """Memory held by cached plans and the methods' memory, in bytes; shared storage is counted once."""
        storages: dict[int, int] = {}
        for entry in self.entries.values():
            for value in (*vars(entry.plan).values(), *entry.memory.values()):
                if isinstance(value, Tensor):
                    storage = value.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())
