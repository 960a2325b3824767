"""What a method is: a config class and a function from one attention call to a BlockPlan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.grid import Call, VideoGrid
from dsattn.methods.ranked import Ranked
from dsattn.verdict import VerdictRule


class Memory(dict[str, Tensor]):
    """What a method remembers of one (model, layer, branch) from plan to plan within a run, by name; empty at first.

    shared: what all layers of the same (model, branch) remember together, by name.
    """

    def __init__(self, shared: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.shared: dict[str, Any] = {} if shared is None else shared


# q, k, v [B, S, H, D] after norm and RoPE, the call, the method's config, its memory (read and changed in place).
PlanFunction = Callable[[Tensor, Tensor, Tensor, Call, Any, Memory], BlockPlan]
# The same, for every density at once.
RankFunction = Callable[[Tensor, Tensor, Tensor, Call, Any, Memory], Ranked]
# The same, called in the last dense step before the first plan.
ObserveFunction = Callable[[Tensor, Tensor, Tensor, Call, Any, Memory], None]

# The plan of one call, and the rule by which its tiles are judged: from the plan made last, the call, the method's
# config and its memory.
BeforeFunction = Callable[[BlockPlan, Call, Any, Memory], tuple[BlockPlan, VerdictRule]]

# Takes the needed bits of a call (see ``dsattn.attend``) into the memory.
AfterFunction = Callable[[Tensor, Call, Any, Memory], None]


@dataclass(frozen=True)
class Method:
    """One row of the registry.

    Args:
        name: the method's one name everywhere.
        config: its frozen dataclass of options.
        plan: makes the plan.
        summary: one line for ``dsattn methods``.
        source: paper or repository.
        rank: ranks the blocks, for methods whose plans differ in density only; None for others.
        observe: looks at q, k, v of the last dense step and leaves in memory what the first plan needs; None for
            methods that need nothing.
        static: the plan depends on grid, shapes and options only, not on the values of q, k, v.
        before, after: run around every call of a method that learns from the tiles its calls computed, also where a
            plan is reused; both or neither.

    """

    name: str
    config: type
    plan: PlanFunction
    summary: str
    source: str
    rank: RankFunction | None = None
    observe: ObserveFunction | None = None
    static: bool = False
    before: BeforeFunction | None = None
    after: AfterFunction | None = None


def keep_exact_segments(mask: Tensor, grid: VideoGrid, block_q: int, block_k: int) -> Tensor:
    """Block map with every block that holds text or prefix tokens kept, as row and as column.

    Args:
        mask: ``[..., Nq, Nk]`` bool over fixed-size blocks of the raster order; changed in place.

    """
    for start, stop in grid.exact_segments:
        mask[..., start // block_q : -(-stop // block_q), :] = True
        mask[..., start // block_k : -(-stop // block_k)] = True
    return mask


def aligned_blocks(length: int, block_q: int, block_k: int, device: torch.device) -> Tensor:
    """``[Nq, Nk]`` bool: pairs of fixed-size blocks that share a position (the diagonal)."""
    q_start = torch.arange(0, length, block_q, device=device)[:, None]
    k_start = torch.arange(0, length, block_k, device=device)[None, :]
    return (q_start < k_start + block_k) & (k_start < q_start + block_q)
