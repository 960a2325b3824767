"""Mean keys and values of every key block: what skipped blocks contribute to a pooled tail."""

from __future__ import annotations

import torch
from torch import Tensor

from dsattn.block_plan import BlockPlan


def pool_blocks(k: Tensor, v: Tensor, plan: BlockPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Mean key, mean value and log size of every key block, over the keys that may be read.

    Sums run in fp32 (fp64 for fp64 inputs) per block, never as differences of a running sum, which would lose
    digits over a long sequence. Nothing is read back to the host.

    Args:
        k, v: ``[B, Sk, H, D]`` and ``[B, Sk, H, Dv]``, any strides.
        plan: its ``k_order``, ``k_starts`` and ``key_lengths`` say which tokens form a block.

    Returns:
        ``kbar [B, H, Nk, D]``, ``vbar [B, H, Nk, Dv]`` and ``log_count [B, H, Nk]``, all fp32 (fp64). A block
        without readable keys has mean 0 and log count -inf.

    """
    work = torch.float64 if k.dtype == torch.float64 else torch.float32
    sizes = plan.k_sizes.clamp(min=0).expand(plan.batch, plan.heads, -1).to(work)
    # A mean over one key at least: empty blocks divide their zero sum by one.
    weight = sizes.clamp(min=1).reciprocal()[..., None]
    return _sums(k, plan, work) * weight, _sums(v, plan, work) * weight, sizes.log()


def _sums(x: Tensor, plan: BlockPlan, work: torch.dtype) -> Tensor:
    """``[B, H, Nk, D]``: sum over the readable keys of every block."""
    batch, length, heads, dim = x.shape
    x = x.transpose(1, 2)
    if plan.k_order is not None:
        x = x.gather(2, plan.k_order.expand(batch, heads, -1)[..., None].expand(-1, -1, -1, dim))
    if plan.key_lengths is not None:
        positions = torch.arange(length, device=x.device)
        # Padding may hold anything, NaN included: it is replaced, not multiplied by zero.
        x = x.masked_fill((positions >= plan.key_lengths[:, None])[:, None, :, None], 0)
    blocks = plan.num_k_blocks
    if plan.k_starts is None:
        full = length // plan.block_k
        head = x[:, :, : full * plan.block_k].unflatten(2, (full, plan.block_k)).sum(3, dtype=work)
        rest = x[:, :, full * plan.block_k :].sum(2, keepdim=True, dtype=work)
        return head if full == blocks else torch.cat([head, rest], 2)
    positions = torch.arange(length, device=x.device).expand(*plan.k_edges.shape[:2], -1).contiguous()
    owner = torch.searchsorted(plan.k_edges[..., 1:].contiguous(), positions, right=True)
    sums = torch.zeros(batch, heads, blocks, dim, dtype=work, device=x.device)
    return sums.scatter_add_(2, owner.expand(batch, heads, -1)[..., None].expand(-1, -1, -1, dim), x.to(work))
