"""``dense``: every pair. The baseline, and the plan every other method is tested against."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.grid import Call
from dsattn.methods.base import Memory, Method


@dataclass(frozen=True)
class DenseConfig:
    """No options."""


def plan(q: Tensor, k: Tensor, v: Tensor, call: Call, config: DenseConfig, memory: Memory) -> BlockPlan:
    """Plan that keeps everything."""
    return BlockPlan.dense(q.shape[0], q.shape[2], q.shape[1], k.shape[1], device=q.device)


METHOD = Method(
    name="dense",
    config=DenseConfig,
    plan=plan,
    summary="all pairs; the pipeline's own attention, the baseline",
    source="Vaswani et al. 2017",
    static=True,
)
