"""Scores of block pairs: how much softmax mass a key block probably holds for a query block."""

from __future__ import annotations

import torch
from torch import Tensor


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
