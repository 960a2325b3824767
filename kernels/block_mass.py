"""Softmax mass of every pair of blocks, exactly, once the log-sum-exp of the rows is known: for calibration,
and the scores that every cheaper scorer estimates (``topk`` with ``scorer="exact"``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.kernels.pooling import runs_triton

# Logits held at a time.
LOGITS = 1 << 24


def block_mass(q: Tensor, k: Tensor, lse: Tensor, plan: BlockPlan, *, scale: float) -> Tensor:
    """Sum over the rows of a query block and the readable keys of a key block of ``exp(scale q·k - lse)``.

    With the log-sum-exp of dense attention, a row of the result sums to the number of queries in the block. Every pair
    (query, key) is computed, chunk by chunk: half of what dense attention costs. On a GPU it runs in Triton
    (``kernels.block_mass_triton``).

    Args:
        q, k: ``[B, S, H, D]``; computed in fp32 (fp64 for fp64).
        lse: ``[B, H, Sq]`` fp32 (fp64), natural log; -inf (a row that reads nothing) gives the row no mass.
        plan: its blocks, orders and key lengths; which blocks it keeps plays no part.
        scale: factor on q·k.

    Returns:
        ``[B, H, Nq, Nk]`` fp32 (fp64).

    """
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    if runs_triton(q, k):
        from dsattn.kernels import block_mass_triton

        return block_mass_triton.block_mass(q, k, lse, plan, scale=scale)
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    lead = (plan.batch, plan.heads)
    queries, keys = (x.transpose(1, 2).to(work) for x in (q, k))
    q_block, k_block = (x.expand(*lead, -1) for x in (plan.q_block_of_token, plan.k_block_of_token))
    mass = torch.zeros(*lead, plan.num_q_blocks, plan.num_k_blocks, dtype=work, device=q.device)
    rows_at_once = max(1, LOGITS // (plan.batch * plan.heads * plan.k_len))
    readable = _readable(plan)
    for rows in torch.arange(plan.q_len, device=q.device).split(rows_at_once):
        weights = (queries[:, :, rows] @ keys.mT * scale - lse[:, :, rows, None]).exp()
        if readable is not None:
            weights = weights.masked_fill(~readable[:, :, None], 0)
        by_block = weights.new_zeros(*lead, len(rows), plan.num_k_blocks)
        by_block.scatter_add_(3, k_block[:, :, None].expand_as(weights), weights)
        mass.scatter_add_(2, q_block[:, :, rows, None].expand_as(by_block), by_block)
    return mass


def row_lse(q: Tensor, k: Tensor, *, scale: float) -> Tensor:
    """Log-sum-exp of every row of dense attention, ``[B, H, Sq]`` fp32 (fp64), natural log; chunk by chunk.

    Args:
        q, k: ``[B, S, H, D]``; computed in fp32 (fp64 for fp64).
        scale: factor on q·k.

    """
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries, keys = (x.transpose(1, 2).to(work) for x in (q, k))
    rows_at_once = max(1, LOGITS // (q.shape[0] * q.shape[2] * k.shape[1]))
    return torch.cat([(rows @ keys.mT * scale).logsumexp(-1) for rows in queries.split(rows_at_once, 2)], -1)


def _readable(plan: BlockPlan) -> Tensor | None:
    """``[B, H, Sk]`` bool by token; None for all."""
    if plan.key_lengths is None:
        return None
    lead = (plan.batch, plan.heads, plan.k_len)
    readable = (torch.arange(plan.k_len, device=plan.device) < plan.key_lengths[:, None])[:, None].expand(lead)
    if plan.k_order is None:
        return readable
    return torch.zeros(lead, dtype=torch.bool, device=plan.device).scatter_(-1, plan.k_order.expand(lead), readable)
