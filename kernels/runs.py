"""Runs of positions of unequal length, cut into tiles of equal length: what batched products need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsattn.kernels.pooling import segment_sums


@dataclass(frozen=True)
class Runs:
    """Runs in tiles of T tokens; the number of tiles is bounded by shapes, surplus ones own nothing.

    tokens, exists: ``[B, H, tiles, T]``, token of every slot, and whether there is one.
    owner: ``[B, H, tiles]``, run of every tile, N for surplus tiles. count: N.
    """

    tokens: Tensor
    exists: Tensor
    owner: Tensor
    count: int

    @classmethod
    def of(cls, order: Tensor, sizes: Tensor, tile: int) -> Runs:
        """Tiles of runs that follow one another.

        Args:
            order: ``[B, H, S]`` int64, token at every position.
            sizes: ``[B, H, N]`` int64, positions per run; S in all, or fewer.
            tile: T.

        """
        batch, heads, count = sizes.shape
        length = order.shape[-1]
        per_run = (sizes + tile - 1) // tile
        last = per_run.cumsum(-1)
        ids = torch.arange(length // tile + count, device=sizes.device).expand(batch, heads, -1).contiguous()
        owner = torch.searchsorted(last, ids, right=True)
        which = owner.clamp(max=count - 1)
        ends = sizes.cumsum(-1)
        start = (ends - sizes - (last - per_run) * tile).gather(-1, which) + ids * tile
        positions = start[..., None] + torch.arange(tile, device=sizes.device)
        exists = (positions < ends.gather(-1, which)[..., None]) & (owner < count)[..., None]
        tokens = order.gather(-1, positions.clamp(max=length - 1).flatten(2)).view_as(positions)
        return cls(tokens, exists, owner, count)

    def gather(self, x: Tensor) -> Tensor:
        """``[B, H, tiles, T, D]`` fp32 from ``x [B, S, H, D]``; zero where there is no token."""
        index = self.tokens.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
        found = x.transpose(1, 2).gather(2, index).view(*self.tokens.shape, -1).float()
        return found.masked_fill(~self.exists[..., None], 0)

    def columns(self, x: Tensor) -> Tensor:
        """``[B, H, tiles, R, T]`` from ``x [B, H, R, S]``; zero where there is no token."""
        index = self.tokens.flatten(2)[:, :, None].expand(-1, -1, x.shape[2], -1)
        found = x.gather(3, index).unflatten(3, self.tokens.shape[2:]).transpose(2, 3)
        return found.masked_fill(~self.exists[:, :, :, None], 0)

    def sum(self, x: Tensor) -> Tensor:
        """``[B, H, N, F]``: sum of ``x [B, H, tiles, F]`` over the tiles of every run."""
        return segment_sums(x.transpose(1, 2), self.owner, self.count)
