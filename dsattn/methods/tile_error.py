"""What dropping tiles by a threshold costs, measured on whole query blocks: a block's rows decide together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsattn.block_plan import BlockPlan
from dsattn.grid import VideoGrid
from dsattn.kernels.pooling import pool_blocks
from dsattn.methods.estimate import relative_error
from dsattn.verdict import unpack_bits

# Thresholds between which a fit looks, log2; its halvings leave steps of less than 0.1.
STRICTEST, LOOSEST, HALVINGS = -20.0, 0.0, 8


@lru_cache(maxsize=64)
def draw_blocks(grid: VideoGrid, block_q: int, count: int, seed: int) -> Tensor:
    """``[count]`` int64: different query blocks with video tokens (fewer where there are fewer), ascending."""
    first, last = grid.video_start // block_q, (grid.video_end - 1) // block_q
    drawn = torch.randperm(last + 1 - first, generator=torch.Generator().manual_seed(seed))[:count]
    return drawn.sort().values + first


@dataclass(frozen=True)
class BlockSample:
    """Exact attention of n query blocks (R = n · block_q rows) and the gain of their tiles.

    Keys and values stand in the plan's key order, blocks of one size.
    logits ``[B, H, n, block_q, Sk]``, values ``[B, H, Sk, D]``, exact ``[B, H, R, D]``, exists ``[R]`` (rows of a
    partial last block), gain ``[B, H, n, Nk]`` (log2; -inf: not computed, +inf: always kept), tail logits
    ``[B, H, n, block_q, Nk]`` and values ``[B, H, Nk, D]`` where there is a pooled tail; all fp32.
    """

    logits: Tensor
    values: Tensor
    exact: Tensor
    exists: Tensor
    gain: Tensor
    block_k: int
    tail: tuple[Tensor, Tensor] | None

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, blocks: Tensor, order: Tensor, allowed: Tensor,
        always: Tensor,
    ) -> BlockSample:  # fmt: skip
        """Sample of one attention call.

        Args:
            q, k, v: ``[B, S, H, D]``.
            plan: its blocks, orders and tail count, not its lists.
            blocks: ``[n]`` int64, the query blocks.
            order: ``[n, Nk]``, key blocks in the order of the visit.
            allowed, always: ``[b, h, n, W]`` int32, bits of tiles that are computed, and kept whatever their gain.

        """
        positions = blocks[:, None] * plan.block_q + torch.arange(plan.block_q, device=q.device)
        exists = positions < plan.q_len
        rows = _in_order(q, plan.q_order, positions.clamp(max=plan.q_len - 1).flatten())
        everything = torch.arange(plan.k_len, device=q.device)
        keys, values = (_in_order(x, plan.k_order, everything) for x in (k, v))
        shape = (*rows.shape[:2], len(blocks), plan.block_q)
        logits = (rows @ keys.mT * q.shape[-1] ** -0.5).view(*shape, -1)
        exact = logits.softmax(-1).flatten(2, 3) @ values

        peaks = pad(logits, (0, -plan.k_len % plan.block_k), value=-torch.inf)
        peaks = peaks.view(*shape, -1, plan.block_k).amax(-1)
        computed, kept = (unpack_bits(x, plan.num_k_blocks).expand(*shape[:3], -1) for x in (allowed, always))
        gain = _gains(peaks.masked_fill(~computed[:, :, :, None], -torch.inf), order.long(), exists)
        gain = gain.masked_fill(computed & kept, torch.inf)
        tail = None
        if plan.tail != "none":
            k_pool, v_pool, log_count = (x.float() for x in pool_blocks(k, v, plan))
            pooled = (rows @ k_pool.mT * q.shape[-1] ** -0.5).view(*shape, -1)
            if plan.tail == "pooled_block":
                # All rows of a block see what its mean query sees.
                there = exists[:, :, None]
                mean = (pooled * there).sum(3, keepdim=True) / there.sum(1, keepdim=True)
                pooled = mean.expand(*shape, -1)
            tail = pooled + log_count[:, :, None, None], v_pool
        return cls(logits, values, exact, exists.flatten(), gain, plan.block_k, tail)

    def error(self, threshold: Tensor) -> Tensor:
        """``[B, H]`` fp32: relative L2 error on the sampled rows if tiles at or below ``threshold [B, H]`` are dropped.

        Also of the tiles that are not computed anyway.
        """
        kept = (self.gain > threshold[..., None, None]) | (self.gain == torch.inf)
        pairs = kept.repeat_interleave(self.block_k, -1)[..., : self.logits.shape[-1]]
        logits, values = self.logits.masked_fill(~pairs[:, :, :, None], -torch.inf), self.values
        if self.tail is not None:
            logits = torch.cat([logits, self.tail[0].masked_fill(kept[:, :, :, None], -torch.inf)], -1)
            values = torch.cat([values, self.tail[1]], 2)
        out = logits.softmax(-1).flatten(2, 3) @ values
        return relative_error(*(x * self.exists[:, None] for x in (out, self.exact)))


def fit_threshold(sample: BlockSample, target: float) -> Tensor:
    """``[B, H]`` fp32: the highest threshold that meets a target error; -inf where none does."""
    low = torch.full(sample.gain.shape[:2], STRICTEST, device=sample.gain.device)
    high = torch.full_like(low, LOOSEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        good = sample.error(middle) <= target
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return low.masked_fill(sample.error(low) > target, -torch.inf)


def _in_order(x: Tensor, order: Tensor | None, positions: Tensor) -> Tensor:
    """``[B, H, P, D]`` fp32: the tokens of ``x [B, S, H, D]`` at some positions of an order."""
    if order is None:
        return x[:, positions].float().transpose(1, 2)
    tokens = order[..., positions].expand(x.shape[0], x.shape[2], -1)
    return x.transpose(1, 2).gather(2, tokens[..., None].expand(-1, -1, -1, x.shape[-1])).float()


def _gains(peaks: Tensor, order: Tensor, exists: Tensor) -> Tensor:
    """``[B, H, n, Nk]``: gain of every tile in log2, from the peaks ``[B, H, n, block_q, Nk]`` of its rows."""
    visited = peaks.gather(-1, order[:, None].expand_as(peaks))
    before = torch.cat([torch.full_like(visited[..., :1], -torch.inf), visited.cummax(-1).values[..., :-1]], -1)
    gain = (visited - before).masked_fill((visited == -torch.inf) | ~exists[..., None], -torch.inf)
    gain = gain.amax(-2) * math.log2(math.e)
    return torch.empty_like(gain).scatter_(-1, order.expand_as(gain), gain)
