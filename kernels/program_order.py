"""In which order the programs of a kernel take the rows of a plan, and where each of them starts."""

from __future__ import annotations

import torch
from torch import Tensor

from dsattn.block_plan import BlockPlan, pick_columns

# Rows of one head whose work differs by less than this share of the mean stay in their order: neighbours read
# the same keys.
_CLASSES_PER_MEAN = 4
# Rows of more work than this many means come before everything else.
_LONG = 2


def longest_first(work: Tensor) -> Tensor:
    """Order in which rows should start, so that no multiprocessor is left with a long row at the end.

    Rows of much more work than the mean (text, dense heads) come first, whatever their head. The others stay with
    their head, so that the keys of few heads at a time fill the L2 cache, and within it the longer ones come first.
    Nothing is read back to the host.

    Args:
        work: ``[B, H, N]`` work of every row, any unit.

    Returns:
        ``[B * H * N]`` int32, flat indices of rows.

    """
    batch, heads, _ = work.shape
    mean = work.float().mean().clamp_(min=1e-6)
    level = (work / mean * _CLASSES_PER_MEAN).long()
    classes = _LONG * _CLASSES_PER_MEAN + 1
    head = torch.arange(batch * heads, device=work.device).view(batch, heads, 1)
    key = torch.where(level >= classes, -level, head * classes + (classes - 1 - level))
    return key.flatten().argsort(stable=True).int()


def order_of_blocks(plan: BlockPlan) -> Tensor:
    """`longest_first` of the query blocks of a plan, ``[B * H * Nq]``; made once per plan."""
    if ("order of blocks", 0) not in plan.derived:
        plan.derived["order of blocks", 0] = longest_first(plan.counts.expand(plan.batch, plan.heads, -1))
    order: Tensor = plan.derived["order of blocks", 0]
    return order


def order_of_tiles(plan: BlockPlan, block_m: int, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """`longest_first` of the tiles of query blocks that vary in size, and their `tile_table`; made once per plan.

    Returns:
        ``order [B * H * slots]``, ``block`` and ``start [B, H, slots]``.

    """
    name = ("order of tiles", block_m)
    if name not in plan.derived:
        lead = (plan.batch, plan.heads)
        block, start = (x.expand(*lead, -1) for x in tile_table(plan, block_m, slots))
        counts = plan.counts.expand(*lead, -1).gather(-1, block.clamp(max=plan.num_q_blocks - 1).long())
        # Surplus programs have nothing to do.
        order = longest_first(counts.masked_fill(block >= plan.num_q_blocks, 0))
        plan.derived[name] = (order, block, start)
    found: tuple[Tensor, Tensor, Tensor] = plan.derived[name]
    return found


def tile_table(plan: BlockPlan, block_m: int, programs: int) -> tuple[Tensor, Tensor]:
    """Which tile of queries each program computes when query blocks vary in size.

    Returns:
        ``block [b, h, programs]`` and ``start [b, h, programs]`` int32: query block and first position of each tile.
        Programs bounds the number of tiles without reading any value; surplus programs get block ``Nq``.

    """
    tiles = (plan.q_sizes + block_m - 1) // block_m
    ends = tiles.cumsum(-1)
    ids = torch.arange(programs, device=plan.device).expand(*ends.shape[:2], -1).contiguous()
    block = torch.searchsorted(ends, ids, right=True)
    owner = block.clamp(max=plan.num_q_blocks - 1)
    within = ids - (ends - tiles).gather(-1, owner)
    start = plan.q_edges.gather(-1, owner) + within * block_m
    return block.int(), start.int()


def ends_of_keys(plan: BlockPlan) -> Tensor:
    """``[b, h, Nq, K]`` int32: how many readable keys the first 1, 2, … listed blocks of a row hold together."""
    listed = torch.arange(plan.indices.shape[-1], device=plan.device) < plan.counts[..., None]
    sizes = pick_columns(plan.k_sizes.int(), plan.indices)
    return sizes.masked_fill_(~listed, 0).cumsum(-1, dtype=torch.int32)
