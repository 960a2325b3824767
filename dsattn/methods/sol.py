"""``sol``: key blocks whose mean-pooled score stands out by τ standard deviations are exact, the rest enters pooled.

Source: Sol-Attn (arXiv 2607.24027) and its released code (NVlabs/Sana, branch sol-engine): 64-token blocks in 3-D
Morton order, block j exact for block i where ``s_ij = scale q̄_i·k̄_j`` reaches ``mean_j s_ij + τ sqrt(var_j s_ij)``,
the variance exact or from the diagonal of the keys' covariance, text exact. Tail per query block: comfy-kitchen.
Differs in: routing is decided before attention, on scores that are held in memory, not on the fly; mean and variance
run over the blocks of video tokens only; the diagonal, text and prefix are exact as rows and columns.
As published, the first fifth of the steps and layer 0 are dense: ``dense_steps=0.2, dense_layers="0"`` of the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dsattn.block_plan import TAILS, BlockPlan, Tail
from dsattn.config import require, require_choice, require_one_of
from dsattn.grid import Call, VideoGrid
from dsattn.methods.base import Memory, Method, aligned_blocks, keep_exact_segments
from dsattn.methods.budget import Table, at_step, require_shares, require_table
from dsattn.methods.ranked import Ranked, share_by_rank
from dsattn.methods.scores import mean_pool, routing_noise
from dsattn.orders import ORDERS, OrderName, token_order

BLOCKS = (16, 32, 64, 128)
Variance = Literal["diag", "exact"]
# Added to the variance, in squared powers of two as published: rounding must not route scores that are all equal.
FLOOR = 1e-6
LN2 = 0.6931471805599453


@dataclass(frozen=True)
class SolConfig:
    """Options of ``sol``; ``tau`` and ``density`` exclude each other.

    Args:
        tau: standard deviations above the mean that a score must reach, in [-10, 10]; higher is sparser, 0.5 to 1.3
            are usual; 1.0 if no budget is given. A number, or a table over the run such as
            ``"0:1.3,0.5:0.8"`` (``dsattn.methods.budget``).
        density: instead, the share of key blocks kept per query block, in (0, 1], always-kept ones included. A number
            or a table.
        variance: ``"diag"`` takes the channels of the mean keys as uncorrelated (what published values of τ are
            for), ``"exact"`` is the variance of the scores themselves.
        tail: what skipped blocks contribute: ``"pooled"`` per row (as published), ``"pooled_block"`` once per query
            block by its mean query, or ``"none"``.
        block: tokens per block, one of 16, 32, 64, 128.
        order: token order blocks are cut from, as for ``topk``.
        routing_noise: standard deviation of a Gaussian that is added to the scores (natural logs), new at every
            plan, so that no block is passed over at every step (PASA); 0 is none.
        seed: draws the noise.

    """

    tau: Table | None = None
    density: Table | None = None
    variance: Variance = "diag"
    tail: Tail = "pooled"
    block: int = 64
    order: OrderName = "morton"
    routing_noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_one_of(tau=self.tau, density=self.density)
        if not require_shares(density=self.density) and self.tau is None:
            object.__setattr__(self, "tau", 1.0)
        if self.tau is not None:
            require_table("tau", self.tau, -10, 10)
        require_choice("variance", self.variance, get_args(Variance))
        require_choice("tail", self.tail, TAILS)
        require_choice("block", self.block, BLOCKS)
        require_choice("order", self.order, ORDERS)
        require("routing_noise", self.routing_noise, (int, float), low=0, high=10)
        require("seed", self.seed, int)


def plan(q: Tensor, k: Tensor, v: Tensor, call: Call, config: SolConfig, memory: Memory) -> BlockPlan:
    """Plan from the current q and k.

    Args:
        q, k, v: ``[B, S, H, D]`` after norm and RoPE; S must equal ``call.grid.tokens``.

    """
    scores = _Scores.of(q, k, call, config)
    if config.tau is None:
        return scores.ranked().within(config.density, None, call)
    return scores.make(scores.above(at_step(config.tau, call)))


def rank(q: Tensor, k: Tensor, v: Tensor, call: Call, config: SolConfig, memory: Memory) -> Ranked:
    """Blocks by their score; the arguments are those of ``plan``, budgets play no part."""
    return _Scores.of(q, k, call, config).ranked()


@dataclass(frozen=True)
class _Scores:
    """Scores of block pairs in one call.

    config: of the method. q_mean, k_mean: ``[B, H, N, D]``, the former scaled. scores: ``[B, H, N, N]``, their
    products; noisy: the same with noise. always: ``[N, N]`` bool, pairs that are exact whatever their score. video:
    key blocks of video tokens alone. length: tokens. order: ``[1, 1, S]`` or None.
    """

    config: SolConfig
    q_mean: Tensor
    k_mean: Tensor
    scores: Tensor
    noisy: Tensor
    always: Tensor
    video: slice
    length: int
    order: Tensor | None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, call: Call, config: SolConfig) -> _Scores:
        length, heads, dim = q.shape[1:]
        block = config.block
        order = token_order(call.grid, config.order, q.device)
        q_mean, k_mean = mean_pool(q, block, order) * dim**-0.5, mean_pool(k, block, order)
        scores = q_mean @ k_mean.mT
        shape = (heads, scores.shape[2], scores.shape[3])
        noisy = scores + routing_noise(config.routing_noise, shape, call, config.seed, q.device)
        always = aligned_blocks(length, block, block, q.device)
        always = keep_exact_segments(always, call.grid, block, block)
        video, orders = _video_blocks(call.grid, block), None if order is None else order[None, None]
        return cls(config, q_mean, k_mean, scores, noisy, always, video, length, orders)

    def ranked(self) -> Ranked:
        """Blocks by score; a budget of blocks: the partial last one counts as a whole."""
        blocks = self.scores.shape[-1]
        cost = torch.full((blocks,), 1 / blocks, device=self.scores.device)
        return Ranked(share_by_rank(self.noisy, cost, self.always), self.make)

    def above(self, tau: float) -> Tensor:
        """``[B, H, N, N]`` bool: blocks that reach the threshold, and those that are exact anyway."""
        video = self.video
        limit = threshold(self.q_mean, self.k_mean[:, :, video], self.scores[..., video], tau, self.config.variance)
        return (self.noisy >= limit) | self.always

    def make(self, keep: Tensor) -> BlockPlan:
        """Plan from a block map."""
        batch, heads = self.scores.shape[:2]
        return BlockPlan.from_mask(
            keep,
            self.length,
            self.length,
            batch=batch,
            heads=heads,
            block_q=self.config.block,
            block_k=self.config.block,
            q_order=self.order,
            k_order=self.order,
            tail=self.config.tail,
        )


def threshold(q_mean: Tensor, k_mean: Tensor, scores: Tensor, tau: float, variance: Variance) -> Tensor:
    """``[B, H, Nq, 1]`` fp32: the score from which on a key block is exact.

    Args:
        q_mean: ``[B, H, Nq, D]``, scaled.
        k_mean: ``[B, H, M, D]``, mean keys of the blocks that are compared.
        scores: ``[B, H, Nq, M]``, their products.
        tau: standard deviations above the mean.
        variance: ``"diag"`` or ``"exact"``.

    """
    mean = scores.mean(-1, keepdim=True)
    if variance == "exact":
        square = (scores - mean).square().mean(-1, keepdim=True)
    else:
        spread = (k_mean - k_mean.mean(2, keepdim=True)).square().mean(2)
        square = q_mean.square() @ spread[..., None]
    return mean + tau * (square + FLOOR * LN2**2).sqrt()


def _video_blocks(grid: VideoGrid, block: int) -> slice:
    """The key blocks that hold video tokens alone: others are exact whatever their score, and may hold padding."""
    first = -(-grid.video_start // block)
    last = grid.video_end // block if grid.video_end < grid.tokens else -(-grid.tokens // block)
    return slice(first, max(first, last))


METHOD = Method(
    name="sol",
    config=SolConfig,
    plan=plan,
    rank=rank,
    summary="block scores tau deviations above the mean in Morton order, rest enters pooled",
    source="Sol-Attn 2607.24027",
)
