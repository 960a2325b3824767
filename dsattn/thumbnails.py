"""Small pictures of block plans: which share of the keys each stretch of queries reads, in token order."""

from __future__ import annotations

import torch
from torch import Tensor

from dsattn.block_plan import BlockPlan

BINS = 48


def thumbnail(plan: BlockPlan, bins: int = BINS, samples: int = 4) -> Tensor:
    """``[B, H, n, m]`` fp32 on the CPU: share of the keys of bin m that queries of bin n read exactly.

    Bins are equal stretches of tokens in their original order, at most ``bins`` along each side.

    Args:
        samples: query tokens that stand for a bin; a few rows are read at a time, never all pairs.

    """
    q_edges, k_edges = (_edges(length, bins, plan.device) for length in (plan.q_len, plan.k_len))
    found = []
    for first, last in zip(q_edges[:-1].tolist(), q_edges[1:].tolist(), strict=True):
        rows = torch.linspace(first, last - 1, min(samples, last - first), device=plan.device).round().long()
        read = plan.rows_to_dense(rows).float().mean(2)
        total = torch.nn.functional.pad(read.cumsum(-1), (1, 0))
        found.append(total[..., k_edges].diff(dim=-1) / k_edges.diff())
    return torch.stack(found, 2).cpu()


def _edges(length: int, bins: int, device: torch.device) -> Tensor:
    return torch.linspace(0, length, min(bins, length) + 1, dtype=torch.float64, device=device).round().long()
