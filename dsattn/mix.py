"""Heads of one call that follow different methods: their plans, joined into one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsattn.block_plan import BlockPlan


def split_heads(x: Tensor, heads: Tensor) -> Tensor:
    """Some heads of all batch rows as the heads of one row.

    Args:
        x: ``[B, S, H, D]``.
        heads: ``[n]`` int64, indices ``b * H + h``.

    Returns:
        ``[1, S, n, D]``.

    """
    batch, length, count, dim = x.shape
    flat = x if batch == 1 else x.transpose(0, 1).reshape(1, length, batch * count, dim)
    return flat if len(heads) == batch * count else flat.index_select(2, heads)


def join_plans(parts: Sequence[tuple[Tensor, BlockPlan]], batch: int, heads: int) -> BlockPlan:
    """One plan for ``batch × heads`` heads from plans of a part of them each; nothing is read back to the host.

    Blocks of equal size become blocks of variable size that happen to be equal, and plans with fewer blocks get empty
    ones behind their last.

    Args:
        parts: pairs of head indices ``b * heads + h`` ``[n]`` (every head exactly once, ascending within a part) and
            the plan of those heads, with batch 1 and n heads; equal in lengths and tail, without key lengths and linear
            branch.
        batch, heads: of the joined plan.

    Raises:
        ValueError: plans that do not fit each other or the heads, or that have key lengths or a linear branch.

    """
    _check(parts, batch, heads)
    if len(parts) == 1 and batch == 1:
        return parts[0][1]
    plans = [plan for _, plan in parts]
    place = torch.cat([index for index, _ in parts]).argsort()

    def join(tensors: Sequence[Tensor]) -> Tensor:
        rows = torch.cat([x.expand(1, plan.heads, *x.shape[2:]) for x, plan in zip(tensors, plans, strict=True)], 1)
        return rows.index_select(1, place).view(batch, heads, *rows.shape[2:])

    q_blocks, k_blocks = max(p.num_q_blocks for p in plans), max(p.num_k_blocks for p in plans)
    width = max(p.indices.shape[-1] for p in plans)
    counts = [_pad(p.counts, 0, q_blocks) for p in plans]
    indices = [_pad(_pad(p.indices, 0, width).mT, 0, q_blocks).mT for p in plans]
    starts = [
        join([_pad(edges, length, blocks + 1).to(torch.int32) for edges, length in pairs])
        for blocks, pairs in (
            (q_blocks, [(p.q_edges, p.q_len) for p in plans]),
            (k_blocks, [(p.k_edges, p.k_len) for p in plans]),
        )
    ]
    return BlockPlan(
        batch=batch,
        heads=heads,
        q_len=plans[0].q_len,
        k_len=plans[0].k_len,
        block_q=max(p.block_q for p in plans),
        block_k=max(p.block_k for p in plans),
        counts=join(counts),
        indices=join(indices),
        q_order=join([_order(p.q_order, p.q_len, p.device) for p in plans]),
        k_order=join([_order(p.k_order, p.k_len, p.device) for p in plans]),
        q_starts=starts[0],
        k_starts=starts[1],
        tail=plans[0].tail,
        tail_weights=None if all(p.tail_weights is None for p in plans) else join([_weights(p) for p in plans]),
    )


def _check(parts: Sequence[tuple[Tensor, BlockPlan]], batch: int, heads: int) -> None:
    """What shapes show; that every head is named once is up to the caller."""
    named = sum(len(index) for index, _ in parts)
    if named != batch * heads:
        raise ValueError(f"parts must name each of the {batch * heads} heads once, got {named}")
    first = parts[0][1]
    want = (first.q_len, first.k_len, first.tail)
    for index, plan in parts:
        if (plan.batch, plan.heads) != (1, len(index)):
            raise ValueError(f"the plan of {len(index)} heads must have batch 1, got {plan.batch} x {plan.heads} heads")
        came = (plan.q_len, plan.k_len, plan.tail)
        if came != want:
            raise ValueError(f"plans must agree in (queries, keys, tail), got {want} and {came}")
        if plan.key_lengths is not None or plan.linear is not None:
            what = "a linear branch" if plan.key_lengths is None else "key lengths"
            raise ValueError(f"plans with {what} cannot be joined; set it on the joined plan")


def _pad(x: Tensor, value: int, size: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, size - x.shape[-1]), value=value)


def _weights(plan: BlockPlan) -> Tensor:
    if plan.tail_weights is None:
        return torch.ones(1, 1, plan.k_len, device=plan.device)
    return plan.tail_weights


def _order(order: Tensor | None, length: int, device: torch.device) -> Tensor:
    return torch.arange(length, device=device)[None, None] if order is None else order
