"""How far a plan's output is from dense attention, estimated on a few query rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dsattn.block_plan import BlockPlan, LinearTail
from dsattn.grid import VideoGrid
from dsattn.kernels.pooling import pool_blocks, pool_tail
from dsattn.kernels.sparse_linear import linear_attention


@lru_cache(maxsize=64)
def sample_rows(grid: VideoGrid, count: int, seed: int) -> Tensor:
    """``[count]`` int64 on the CPU: different video tokens (fewer where there are fewer), drawn over the whole clip.

    Copy it to a GPU with ``non_blocking=True``: without, the host waits for all that was queued before.
    """
    drawn = torch.randperm(grid.video_tokens, generator=torch.Generator().manual_seed(seed))[:count]
    return drawn.sort().values + grid.video_start


@dataclass(frozen=True)
class RowSample:
    """Exact attention of R sampled queries, computed once and compared with any number of plans.

    q, k, v: ``[B, R, H, D]``, ``[B, S, H, D]`` twice; logits ``[B, H, R, S]`` and exact ``[B, H, R, D]`` in fp32;
    queries ``[B, S, H, D]``: all of them.
    """

    rows: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    logits: Tensor
    exact: Tensor
    queries: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> RowSample:
        """Sample of one attention call; ``rows [R]`` are query tokens."""
        chosen = q[:, rows].float().transpose(1, 2)
        keys, values = k.float().transpose(1, 2), v.float().transpose(1, 2)
        logits = chosen @ keys.mT * q.shape[-1] ** -0.5
        return cls(rows, chosen, k, v, logits, logits.softmax(-1) @ values, q)

    @property
    def values(self) -> Tensor:
        """``[B, H, S, D]`` fp32."""
        return self.v.float().transpose(1, 2)

    def error(self, plan: BlockPlan) -> Tensor:
        """``[B, H]`` fp32: relative L2 error of the plan's output on the sampled rows, without running it."""
        logits = self.logits.masked_fill(~plan.rows_to_dense(self.rows), -torch.inf)
        values = self.values
        if plan.tail == "pooled":
            k_pool, v_pool, log_count = (x.float() for x in pool_blocks(self.k, self.v, plan))
            tail = self.q @ k_pool.mT * self.q.shape[-1] ** -0.5 + log_count[:, :, None]
            logits = torch.cat([logits, tail.masked_fill(plan.kept_blocks(self.rows), -torch.inf)], -1)
            values = torch.cat([values, v_pool], 2)
        if plan.tail == "pooled_block":
            pooled = pool_tail(self.queries, self.k, self.v, plan, self.q.shape[-1] ** -0.5)
            value, log_weight = (x.float() for x in pooled)
            own = plan.q_block_of_token.expand(*value.shape[:2], -1)[..., self.rows]
            weights = torch.cat([logits, log_weight.gather(2, own)[..., None]], -1).softmax(-1)
            tail = weights[..., -1:] * value.gather(2, own[..., None].expand(-1, -1, -1, value.shape[-1]))
            found = weights[..., :-1] @ values + tail
        else:
            found = logits.softmax(-1) @ values
        return relative_error(found if plan.linear is None else found + self._linear(plan, plan.linear), self.exact)

    def _linear(self, plan: BlockPlan, tail: LinearTail) -> Tensor:
        """``[B, H, R, D]``: the plan's linear branch on the sampled rows, each a query block of its own."""
        if tail.blocks is not None:
            tail = replace(tail, blocks=tail.blocks[:, :, self.rows // plan.block_q])
        mask = torch.ones(1, 1, len(self.rows), 1, dtype=torch.bool, device=self.q.device)
        rows = BlockPlan.from_mask(
            mask, len(self.rows), plan.k_len, batch=plan.batch, heads=plan.heads, block_q=1, block_k=plan.block_k,
            key_lengths=plan.key_lengths,
        )  # fmt: skip
        return linear_attention(self.q.transpose(1, 2), self.k, self.v, rows, tail).transpose(1, 2)


def output_squares(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, *, scale: float, key_lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Squared L2 norms on some rows: of an attention output's error, and of dense attention; both ``[B, H]`` fp32.

    The latter is at least the smallest normal number, so that it can divide.

    Args:
        out, q: ``[B, S, H, D]``; k, v: the keys and values.
        rows: ``[R]`` int64, the query tokens to compare.
        scale: factor on q·k.
        key_lengths: ``[B]``, leading keys that may be read; None means all.

    """
    mask = None
    if key_lengths is not None:
        mask = (torch.arange(k.shape[1], device=k.device) < key_lengths[:, None])[:, None, None]
    chosen = q[:, rows].transpose(1, 2)
    exact = F.scaled_dot_product_attention(chosen, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale)
    difference = out[:, rows].transpose(1, 2).float() - exact.float()
    norm = exact.float().square().sum((2, 3))
    return difference.square().sum((2, 3)), norm.clamp(min=torch.finfo(norm.dtype).tiny)


def relative_error(approximate: Tensor, exact: Tensor) -> Tensor:
    """``[B, H]``: L2 norm of the difference over that of ``exact``, both ``[B, H, R, D]``; 0 where both vanish."""
    difference, norm = ((x.square().sum((2, 3))).sqrt() for x in (approximate - exact, exact))
    return torch.where(difference == 0, 0.0, difference / norm)


# Shares of keys that a target error chooses from; neighbours are a factor of about 1.4 apart.
LADDER = (0.015, 0.02, 0.03, 0.042, 0.06, 0.085, 0.12, 0.17, 0.24, 0.34, 0.48, 1.0)


def fit_density(
    build: Callable[[Tensor], BlockPlan], sample: RowSample, target: float, rung: Tensor | None = None
) -> tuple[BlockPlan, Tensor]:
    """The sparsest plan on ``LADDER`` that meets a target error, head by head, without host synchronisation.

    Args:
        build: makes the plan for densities ``[B, H]``; more density must not keep less.
        sample: judges plans.
        target: relative L2 error of the output.
        rung: ``[B, H]`` int64, what an earlier fit chose: then each head moves by at most one rung, at the price of
            two estimates instead of a full search.

    Returns:
        The plan and the chosen rungs ``[B, H]``.

    """
    ladder = torch.tensor(LADDER).to(sample.exact.device, non_blocking=True)
    top = len(LADDER) - 1
    if rung is None:
        low = torch.zeros(sample.exact.shape[:2], dtype=torch.int64, device=ladder.device)
        high = torch.full_like(low, top)
        for _ in range(top.bit_length()):
            middle = (low + high) // 2
            good = sample.error(build(ladder[middle])) <= target
            low, high = torch.where(good, low, (middle + 1).clamp(max=top)), torch.where(good, middle, high)
        return build(ladder[high]), high
    up = (sample.error(build(ladder[rung])) > target).long()
    below = (rung - 1).clamp(min=0)
    down = (sample.error(build(ladder[below])) <= target).long() * (rung > 0)
    rung = (rung + up - down * (1 - up)).clamp(max=top)
    return build(ladder[rung]), rung
