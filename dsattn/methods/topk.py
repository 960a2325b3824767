"""``topk``: keep the key blocks with the largest mean-pooled scores, per query block and head.

Source: the block selection common to MInference (arXiv 2407.02490), SpargeAttn (arXiv 2502.18137) and
Sol-Attn (arXiv 2607.24027), with the latter's pooled tail.
Differs in: scores weigh a block by its number of tokens, so that the partial last block is not overrated;
selection is in fp32; the blocks on the diagonal, text and prefix are always kept; any sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsattn.block_plan import TAILS, BlockPlan, Tail
from dsattn.config import require, require_choice
from dsattn.grid import Call
from dsattn.methods.base import Memory, Method, aligned_blocks, keep_exact_segments
from dsattn.methods.budget import Table, require_shares
from dsattn.methods.ranked import Ranked, mass_before, share_by_rank
from dsattn.methods.scores import SCORERS, ScorerName, routing_noise
from dsattn.orders import ORDERS, OrderName, token_order

BLOCKS = (16, 32, 64, 128)


@dataclass(frozen=True)
class TopkConfig:
    """Options of ``topk``. With both ``density`` and ``top_p``, a row keeps what either of them keeps.

    Args:
        density: share of key blocks kept per query block, in (0, 1], always-kept ones included; 0.15 if
            neither is given. A number, or a table over the run such as ``"0:0.3,0.5:0.1"``
            (``dsattn.methods.budget``).
        top_p: keep the best blocks until their share of the estimated softmax mass reaches ``top_p``, in (0, 1];
            the block that crosses the mark is kept. A number or a table.
        block_q, block_k: tokens per block, one of 16, 32, 64, 128.
        tail: what skipped blocks contribute, ``"pooled"``, ``"pooled_block"`` or ``"none"``.
        order: token order blocks are cut from: ``"raster"``, ``"tile"`` (8 × 8 patches within a frame), ``"morton"``
            or ``"hilbert"`` (curves through space and time).
        scorer: how blocks are compared: ``"mean"`` by their mean query and key, ``"subblock"`` by the log-sum-exp
            over their quarters, which sees what a mean of unlike tokens hides (SubBlock, NVIDIA), ``"exact"`` by the
            mass they hold, which costs more than dense attention: to compare the others with.
        routing_noise: standard deviation of a Gaussian that is added to the scores (natural logs), new at every
            plan, so that no block is passed over at every step (PASA); 0 is none.
        seed: draws the noise.

    """

    density: Table | None = None
    top_p: Table | None = None
    block_q: int = 64
    block_k: int = 64
    tail: Tail = "pooled"
    order: OrderName = "tile"
    scorer: ScorerName = "mean"
    routing_noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not require_shares(density=self.density, top_p=self.top_p):
            object.__setattr__(self, "density", 0.15)
        require_choice("block_q", self.block_q, BLOCKS)
        require_choice("block_k", self.block_k, BLOCKS)
        require_choice("tail", self.tail, TAILS)
        require_choice("order", self.order, ORDERS)
        require_choice("scorer", self.scorer, SCORERS)
        require("routing_noise", self.routing_noise, (int, float), low=0, high=10)
        require("seed", self.seed, int)


def plan(q: Tensor, k: Tensor, v: Tensor, call: Call, config: TopkConfig, memory: Memory) -> BlockPlan:
    """Plan from the current q and k.

    Args:
        q, k, v: ``[B, S, H, D]`` after norm and RoPE; S must equal ``call.grid.tokens``.

    """
    return rank(q, k, v, call, config, memory).within(config.density, config.top_p, call)


def rank(q: Tensor, k: Tensor, v: Tensor, call: Call, config: TopkConfig, memory: Memory) -> Ranked:
    """Blocks by their score; the arguments are those of ``plan``, the values of budgets play no part."""
    batch, length, heads, _ = q.shape
    order = token_order(call.grid, config.order, q.device)
    scores = SCORERS[config.scorer](q, k, config.block_q, config.block_k, order)
    shape = (heads, scores.shape[2], scores.shape[3])
    mass = (scores + routing_noise(config.routing_noise, shape, call, config.seed, q.device)).softmax(-1)
    always = aligned_blocks(length, config.block_q, config.block_k, q.device)
    always = keep_exact_segments(always, call.grid, config.block_q, config.block_k)
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

    # A budget of blocks: the partial last one counts as a whole.
    cost = torch.full(mass.shape[-1:], 1 / mass.shape[-1], device=mass.device)
    before = None if config.top_p is None else mass_before(mass, mass, always)
    return Ranked(share_by_rank(mass, cost, always), make, before)


METHOD = Method(
    name="topk",
    config=TopkConfig,
    plan=plan,
    rank=rank,
    summary="largest mean-pooled block scores per query block, rest enters pooled",
    source="MInference 2407.02490, SpargeAttn 2502.18137, Sol-Attn 2607.24027",
)
