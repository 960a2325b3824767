"""Ranked blocks: every plan a method can make of one call, from the sparsest to the one that keeps everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.grid import Call
from dsattn.methods.budget import Table, at_step


@dataclass(frozen=True)
class Ranked:
    """Block pairs in the order in which growing density takes them in.

    Args:
        share: ``[b, h, Nq, Nk]`` fp32, b and h as in a plan: a query block reads a key block exactly at densities from
            this one on; at most 1, and negative where it always does.
        make: plan from a block map ``[b, h, Nq, Nk]`` bool.
        before: ``[b, h, Nq, Nk]`` fp32, the share of the estimated softmax mass that better blocks hold, negative
            where a block is always read; for methods that can keep blocks by their mass.

    """

    share: Tensor
    make: Callable[[Tensor], BlockPlan]
    before: Tensor | None = None

    def at(self, density: Tensor | float) -> BlockPlan:
        """Plan that reads this share of the keys, a number or ``[b, h]``, in (0, 1]."""
        if isinstance(density, Tensor):
            density = density[..., None, None]
        return self.make(self.share <= density)

    def within(self, density: Table | None, top_p: Table | None, call: Call) -> BlockPlan:
        """Plan by density, by mass (the block that crosses the mark is read), or what either of them reads."""
        keep = self.share < 0
        if density is not None:
            keep = keep | (self.share <= at_step(density, call))
        if top_p is not None and self.before is not None:
            mark = at_step(top_p, call)
            # Rounding may leave a cumulated share just above top_p = 1: read all then.
            keep = keep | (self.before < mark) | (mark == 1)
        return self.make(keep)


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
    order = _order(score, always)
    ranked = cost.float().expand_as(score).gather(-1, order)
    return _by_block(ranked.cumsum(-1) - ranked / 2, order, always)


def share_by_rank_of_head(score: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Density of a whole head at which every block pair comes in if the best scores of all rows come first.

    Rows that gain most from exact keys get most of them. The best block of every row comes before all others.

    Args:
        score: ``[b, h, Nq, Nk]``, comparable between rows; ties go to the lower index.
        queries: ``[b, h, Nq]``, rows in each query block.
        keys: ``[b, h, Nk]``, share of all keys in each key block.

    Returns:
        ``[b, h, Nq, Nk]`` fp32, as for ``share_by_rank``: mean over queries of the share of keys read, up to the middle
        of the pair; -1 for the best block of every row.

    """
    best = score.argmax(-1, keepdim=True)
    flat = score.scatter(-1, best, torch.inf).flatten(2)
    order = flat.sort(dim=-1, descending=True, stable=True).indices
    # Sums over all pairs of a head are beyond what fp32 adds up.
    part = queries.double() / queries.sum(-1, keepdim=True)
    ranked = (part[..., None] * keys.double()[:, :, None]).flatten(2).gather(-1, order)
    by_rank = (ranked.cumsum(-1) - ranked / 2).clamp(max=1.0).float()
    by_pair = torch.empty_like(by_rank).scatter_(-1, order, by_rank).view_as(score)
    return by_pair.scatter(-1, best, -1.0)


def mass_before(score: Tensor, mass: Tensor, always: Tensor | None = None) -> Tensor:
    """Mass of the better blocks of the same row, for every block; arguments and -1 as for ``share_by_rank``.

    ``mass [b, h, Nq, Nk]``: share of the estimated softmax mass in each key block.
    """
    order = _order(score, always)
    ranked = mass.gather(-1, order)
    return _by_block(ranked.cumsum(-1) - ranked, order, always)


def _order(score: Tensor, always: Tensor | None) -> Tensor:
    score = score if always is None else score.masked_fill(always, torch.inf)
    return score.sort(dim=-1, descending=True, stable=True).indices


def _by_block(by_rank: Tensor, order: Tensor, always: Tensor | None) -> Tensor:
    by_rank[..., 0] = -1
    by_block = torch.empty_like(by_rank).scatter_(-1, order, by_rank)
    return by_block if always is None else by_block.masked_fill(always, -1.0)
