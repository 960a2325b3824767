"""Scores of block pairs: how much softmax mass a key block probably holds for a query block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.grid import Call
from dsattn.kernels.block_mass import block_mass, row_lse

# Sub-blocks along each side of a block.
CELLS = 4
# Pairs of sub-blocks whose scores are held at a time: 75,600 tokens and 40 heads have 9e8 of them.
CELL_PAIRS = 1 << 27


def mean_pool(x: Tensor, block: int, order: Tensor | None = None) -> Tensor:
    """Mean of every fixed-size block.

    Args:
        x: ``[B, S, H, D]``.
        block: tokens per block; the last block may be partial.
        order: ``[S]`` int64, token at each position; None keeps the given order.

    Returns:
        ``[B, H, N, D]`` fp32.

    """
    x = (x if order is None else x[:, order]).float()
    batch, length, heads, dim = x.shape
    full = length // block
    means = x[:, : full * block].view(batch, full, block, heads, dim).mean(2)
    if full * block < length:
        means = torch.cat([means, x[:, full * block :].mean(1, keepdim=True)], dim=1)
    return means.transpose(1, 2)


def block_sizes(length: int, block: int, device: torch.device) -> Tensor:
    """``[N]`` fp32: tokens of every fixed-size block."""
    starts = torch.arange(0, length, block, device=device)
    return (length - starts).clamp(max=block).float()


def mean_scores(q: Tensor, k: Tensor, block_q: int, block_k: int, order: Tensor | None = None) -> Tensor:
    """Log of the mass a key block would hold if its keys and the block's queries were all alike: one product of means.

    Args:
        q, k: ``[B, S, H, D]``, of one length.
        block_q, block_k: tokens per block.
        order: ``[S]`` int64, token at each position; None keeps the given order.

    Returns:
        ``[B, H, Nq, Nk]`` fp32, natural log up to a constant per row.

    """
    sizes = block_sizes(k.shape[1], block_k, k.device)
    scores: Tensor = mean_pool(q, block_q, order) @ mean_pool(k, block_k, order).mT * q.shape[-1] ** -0.5 + sizes.log()
    return scores


def subblock_scores(q: Tensor, k: Tensor, block_q: int, block_k: int, order: Tensor | None = None) -> Tensor:
    """Log of the block's un-normalised softmax mass from the means of its quarters, summed over all pairs of them.

    Source: SubBlock (NVIDIA), log-sum-exp over sub-blocks. Same arguments and result as ``mean_scores``.
    """
    rows, columns = (-(-x.shape[1] // block) for x, block in ((q, block_q), (k, block_k)))
    q_cells, q_log = _cells(q, block_q // CELLS, rows * CELLS, order)
    k_cells, k_log = _cells(k, block_k // CELLS, columns * CELLS, order)
    k_cells = k_cells.mT * q.shape[-1] ** -0.5
    step = max(1, CELL_PAIRS // (q.shape[0] * q.shape[2] * columns * CELLS**2)) * CELLS
    parts = []
    for q_part, log_part in zip(torch.split(q_cells, step, 2), torch.split(q_log, step), strict=True):
        cells = (q_part @ k_cells).add_(k_log).add_(log_part[:, None])
        parts.append(cells.unflatten(3, (columns, CELLS)).unflatten(2, (-1, CELLS)).logsumexp((3, 5)))
    return torch.cat(parts, 2)


def exact_scores(q: Tensor, k: Tensor, block_q: int, block_k: int, order: Tensor | None = None) -> Tensor:
    """Log of the mass that a key block does hold, mean over the block's queries: what the others estimate.

    Costs more than dense attention, so it saves nothing: it tells what is lost by estimating. Same arguments and result
    as ``mean_scores``.
    """
    (batch, length, heads, _), scale = q.shape, q.shape[-1] ** -0.5
    orders = None if order is None else order[None, None]
    plan = BlockPlan.dense(batch, heads, length, length, block_q=block_q, block_k=block_k, device=q.device)
    plan = replace(plan, q_order=orders, k_order=orders)
    mass = block_mass(q, k, row_lse(q, k, scale=scale), plan, scale=scale)
    # No mass at all is the smallest there is: minus infinity would make noise of no effect.
    mass = mass / block_sizes(length, block_q, q.device)[:, None]
    return mass.clamp(min=torch.finfo(mass.dtype).tiny).log()


def _cells(x: Tensor, cell: int, count: int, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """Means ``[B, H, count, D]`` of sub-blocks and logs of their sizes ``[count]``, -inf behind the last token."""
    means, sizes = mean_pool(x, cell, order), block_sizes(x.shape[1], cell, x.device)
    missing = count - len(sizes)
    return torch.nn.functional.pad(means, (0, 0, 0, missing)), torch.nn.functional.pad(sizes, (0, missing)).log()


def routing_noise(
    std: float, shape: tuple[int, int, int], call: Call, seed: int, device: torch.device
) -> Tensor | float:
    """Random numbers to add to block scores, so that the same block is not passed over at every step.

    The number of a block pair follows from seed, layer, step, head and block indices alone: branches of guidance, rows
    of a batch and ranks that share out the heads agree, and nothing is drawn on, or copied from, the host.

    Source: PASA (arXiv 2604.12219) adds a small random bias; the hash is "lowbias32" by Wellons, with the constants
    of TheIronBorn.

    Args:
        std: standard deviation of the Gaussian, in the natural-log units of the scores; 0 for none.
        shape: heads, query blocks, key blocks.
        call: its layer, step and first head.
        seed: draws other numbers.
        device: of the result.

    Returns:
        ``[H, Nq, Nk]`` fp32, or 0.0 without noise.

    """
    if std == 0:
        return 0.0
    heads, rows, columns = (torch.arange(n, device=device) for n in shape)
    start = 0
    for part in (seed & 0xFFFFFFFF, call.layer, call.step):
        start = _hash(start ^ part)
    per_head = _hash((heads + call.first_head) ^ start)
    per_row = _hash(per_head[:, None] ^ rows)
    bits = _hash(per_row[..., None] ^ columns)
    # 23 bits, in the middle of their step: never 0 or 1, whose Gaussian would be infinite.
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23
    noise: Tensor = torch.special.ndtri(uniform) * std
    return noise


_Integer = TypeVar("_Integer", Tensor, int)


def _hash(x: _Integer) -> _Integer:
    """Integers in [0, 2**32) to integers in [0, 2**32) without visible pattern; products stay below 2**63."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 15)


ScorerName = Literal["mean", "subblock", "exact"]
SCORERS: dict[str, Callable[[Tensor, Tensor, int, int, Tensor | None], Tensor]] = {
    "mean": mean_scores,
    "subblock": subblock_scores,
    "exact": exact_scores,
}
