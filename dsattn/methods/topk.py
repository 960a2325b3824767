"""``topk``: keep the key blocks with the largest mean-pooled scores, per query block and head.

Source: the block selection common to MInference (arXiv 2407.02490), SpargeAttn (arXiv 2502.18137) and
Sol-Attn (arXiv 2607.24027), with the latter's pooled tail.
Differs in: scores weigh a block by its number of tokens, so that the partial last block is not overrated;
selection is in fp32; the blocks on the diagonal, text and prefix are always kept; any sequence length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsattn.block_plan import TAILS, BlockPlan, Tail
from dsattn.config import require_budget, require_choice
from dsattn.grid import Call
from dsattn.methods.base import Memory, Method, aligned_blocks, keep_exact_segments
from dsattn.methods.ranked import Ranked, share_by_rank
from dsattn.methods.scores import SCORERS, ScorerName
from dsattn.orders import ORDERS, OrderName, token_order

BLOCKS = (16, 32, 64, 128)


@dataclass(frozen=True)
class TopkConfig:
    """Options of ``topk``; ``density`` and ``top_p`` exclude each other.

    Args:
        density: share of key blocks kept per query block, in (0, 1], always-kept ones included; 0.15 if
            neither is given.
        top_p: keep the best blocks until their share of the estimated softmax mass reaches ``top_p``, in (0, 1];
            the block that crosses the mark is kept.
        block_q, block_k: tokens per block, one of 16, 32, 64, 128.
        tail: what skipped blocks contribute, ``"pooled"`` or ``"none"``.
        order: token order blocks are cut from: ``"raster"``, ``"tile"`` (8 × 8 patches within a frame), ``"morton"``
            or ``"hilbert"`` (curves through space and time).
        scorer: how blocks are compared: ``"mean"`` by their mean query and key, ``"subblock"`` by the log-sum-exp
            over their quarters, which sees what a mean of unlike tokens hides (SubBlock, NVIDIA).

    """

    density: float | None = None
    top_p: float | None = None
    block_q: int = 64
    block_k: int = 64
    tail: Tail = "pooled"
    order: OrderName = "tile"
    scorer: ScorerName = "mean"

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", require_budget(0.15, density=self.density, top_p=self.top_p))
        require_choice("block_q", self.block_q, BLOCKS)
        require_choice("block_k", self.block_k, BLOCKS)
        require_choice("tail", self.tail, TAILS)
        require_choice("order", self.order, ORDERS)
        require_choice("scorer", self.scorer, SCORERS)


def plan(q: Tensor, k: Tensor, v: Tensor, call: Call, config: TopkConfig, memory: Memory) -> BlockPlan:
    """Plan from the current q and k.

    Args:
        q, k, v: ``[B, S, H, D]`` after norm and RoPE; S must equal ``call.grid.tokens``.

    """
    mass, always, make = _score(q, k, call, config)
    if config.top_p is None:
        return _ranked(mass, always, make).at(config.density or 1.0)
    return make(_up_to(config.top_p, mass, always) | always)


def rank(q: Tensor, k: Tensor, v: Tensor, call: Call, config: TopkConfig, memory: Memory) -> Ranked:
    """Blocks by their score; the arguments are those of ``plan``, budgets play no part."""
    return _ranked(*_score(q, k, call, config))


def _score(
    q: Tensor, k: Tensor, call: Call, config: TopkConfig
) -> tuple[Tensor, Tensor, Callable[[Tensor], BlockPlan]]:
    """Estimated mass ``[B, H, Nq, Nk]``, blocks always kept ``[Nq, Nk]``, and what makes a plan of a block map."""
    batch, length, heads, _ = q.shape
    order = token_order(call.grid, config.order, q.device)
    mass = SCORERS[config.scorer](q, k, config.block_q, config.block_k, order).softmax(-1)
    always = aligned_blocks(length, config.block_q, config.block_k, q.device)
    always = keep_exact_segments(always.clone(), call.grid, config.block_q, config.block_k)
    orders = None if order is None else order[None, None]

    def make(keep: Tensor) -> BlockPlan:
        return BlockPlan.from_mask(
            keep,
            length,
            length,
            batch=batch,
            heads=heads,
            block_q=config.block_q,
            block_k=config.block_k,
            q_order=orders,
            k_order=orders,
            tail=config.tail,
        )

    return mass, always, make


def _ranked(mass: Tensor, always: Tensor, make: Callable[[Tensor], BlockPlan]) -> Ranked:
    # A budget of blocks: the partial last one counts as a whole.
    cost = torch.full(mass.shape[-1:], 1 / mass.shape[-1], device=mass.device)
    return Ranked(share_by_rank(mass, cost, always), make)


def _up_to(top_p: float, mass: Tensor, always: Tensor) -> Tensor:
    """``[B, H, Nq, Nk]`` bool: the best blocks that hold a share of the mass, ``always`` ones first."""
    ranked = mass.masked_fill(always, torch.inf).sort(dim=-1, descending=True, stable=True).indices
    shares = mass.gather(-1, ranked)
    before = shares.cumsum(-1) - shares
    # Rounding may leave a cumulated share just above top_p = 1: keep all then.
    chosen = (before < top_p) | (top_p == 1)
    chosen[..., 0] = True
    return torch.zeros(mass.shape, dtype=torch.bool, device=mass.device).scatter_(-1, ranked, chosen)


METHOD = Method(
    name="topk",
    config=TopkConfig,
    plan=plan,
    rank=rank,
    summary="largest mean-pooled block scores per query block, rest enters pooled",
    source="MInference 2407.02490, SpargeAttn 2502.18137, Sol-Attn 2607.24027",
)
