"""Static token orders: permutations of the video tokens that bring neighbours into one block.

Text and prefix tokens stay where they are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from dsattn.grid import VideoGrid

OrderName = Literal["raster", "tile"]
ORDERS: tuple[OrderName, ...] = ("raster", "tile")
TILE = 8


@lru_cache(maxsize=64)
def token_order(grid: VideoGrid, name: OrderName, device: torch.device) -> Tensor | None:
    """Token at each position, ``[S]`` int64; None for the given order.

    ``"tile"`` runs through a frame in patches of 8 × 8 tokens (cut at the border), so that 64 consecutive
    positions are a square of the picture instead of two and a half lines of it.
    """
    if name == "raster":
        return None
    index = torch.arange(grid.frame_tokens, device=device).view(grid.height, grid.width)
    patches = [tile.flatten() for band in torch.split(index, TILE, 0) for tile in torch.split(band, TILE, 1)]
    frame = torch.cat(patches)
    frames = torch.arange(grid.frames, device=device)[:, None] * grid.frame_tokens
    order = torch.arange(grid.tokens, device=device)
    order[grid.video_start : grid.video_end] = (frames + frame).flatten() + grid.video_start
    return order
