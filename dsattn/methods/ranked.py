"""Ranked blocks: every plan a method can make of one call, from the sparsest to the one that keeps everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsattn.block_plan import BlockPlan


@dataclass(frozen=True)
class Ranked:
    """Block pairs in the order in which growing density takes them in.

    share: ``[b, h, Nq, Nk]`` fp32, b and h as in a plan: a query block reads a key block exactly at densities from
        this one on; at most 1, and negative where it always does.
    make: plan from a block map ``[b, h, Nq, Nk]``.
    """

    share: Tensor
    make: Callable[[Tensor], BlockPlan]

    def at(self, density: Tensor | float) -> BlockPlan:
        """Plan that reads this share of the keys, a number or ``[b, h]``."""
        if isinstance(density, Tensor):
            density = density[..., None, None]
        return self.make(self.share <= density)


def share_by_rank(score: Tensor, cost: Tensor, always: Tensor | None = None) -> Tensor:
    """Density at which every block of a row comes in if the best scores come first.

    Args:
        score: ``[b, h, Nq, Nk]``; ties go to the lower index.
        cost: ``[..., Nk]`` share of all keys in each key block; broadcasts against ``score``.
        always: ``[..., Nq, Nk]`` bool: blocks that are read at every density. They come first and use up density.

    Returns:
        ``[b, h, Nq, Nk]`` fp32: cumulated cost up to the middle of the block, so that a block comes in when more
        than half of it fits; -1 for blocks that are always read and for the best one of every row.

    """
    if always is not None:
        score = score.masked_fill(always, torch.inf)
    order = score.sort(dim=-1, descending=True, stable=True).indices
    ranked = cost.float().expand_as(score).gather(-1, order)
    share = ranked.cumsum(-1) - ranked / 2
    share[..., 0] = -1
    share = torch.empty_like(share).scatter_(-1, order, share)
    return share if always is None else share.masked_fill(always, -1.0)
