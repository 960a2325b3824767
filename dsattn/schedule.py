"""Which calls stay dense, which make a plan anew, which reuse one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dsattn.config import Config
from dsattn.grid import Call

Action = Literal["dense", "refresh", "reuse"]


@dataclass(frozen=True)
class Decision:
    """What to do with one call, and why.

    last: a dense call in the last dense step of a layer that will be sparse afterwards.
    """

    action: Action
    reason: str = ""
    last: bool = False


def decide(config: Config, call: Call, planned_at: int | None, drifted: bool = False) -> Decision:
    """Decision for one call.

    Args:
        config: the engine's options.
        call: layer, step, and the totals where they are known.
        planned_at: step of the cached plan for this layer and branch; None without one.
        drifted: the cached plan's error has grown beyond ``config.drift``.

    """
    dense_steps = dense_step_count(config.dense_steps, call.num_steps)
    if dense_steps is None:
        return Decision("dense", "the number of steps is unknown, dense_steps is a fraction")
    always_dense = call.layer in _resolve(config.dense_layers, call.num_layers)
    if call.step < dense_steps:
        sparse_afterwards = not always_dense and (call.num_steps is None or dense_steps < call.num_steps)
        return Decision("dense", "dense_steps", last=call.step == dense_steps - 1 and sparse_afterwards)
    if always_dense:
        return Decision("dense", "dense_layers")
    if planned_at is None:
        return Decision("refresh", "no plan yet")
    if call.step - planned_at >= config.refresh or call.step < planned_at:
        return Decision("refresh", "refresh")
    return Decision("refresh", "drift") if drifted else Decision("reuse")


def dense_step_count(dense_steps: int | float, num_steps: int | None) -> int | None:
    """Number of leading dense steps; None if a fraction is given and the number of steps is unknown."""
    if isinstance(dense_steps, int):
        return dense_steps
    if dense_steps == 0:
        return 0
    return None if num_steps is None else math.floor(dense_steps * num_steps + 1e-9)


def _resolve(layers: tuple[int, ...], num_layers: int | None) -> set[int]:
    """Layer indices with negative ones counted from the end, where the end is known."""
    return {layer + num_layers if layer < 0 and num_layers is not None else layer for layer in layers}
