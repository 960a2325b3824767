"""Static token orders: permutations of the video tokens that bring neighbours into one block.

Text and prefix tokens stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from dsattn.grid import VideoGrid

OrderName = Literal["raster", "tile", "morton", "hilbert"]
ORDERS: tuple[OrderName, ...] = get_args(OrderName)
TILE = 8


@lru_cache(maxsize=64)
def token_order(grid: VideoGrid, name: OrderName, device: torch.device) -> Tensor | None:
    """Token at each position, ``[S]`` int64; None for the given order.

    ``"tile"`` runs through a frame in patches of 8 × 8 tokens (cut at the border), so that 64 consecutive
    positions are a square of the picture instead of two and a half lines of it. ``"morton"`` and ``"hilbert"`` run
    through space and time along those curves over the smallest enclosing cube, leaving out what lies outside the
    grid: 64 consecutive positions are about a cube of 4 × 4 × 4 tokens.
    """
    if name == "raster":
        return None
    order = torch.arange(grid.tokens, device=device)
    order[grid.video_start : grid.video_end] = _ORDERS[name](grid, device) + grid.video_start
    return order


def _tile(grid: VideoGrid, device: torch.device) -> Tensor:
    index = torch.arange(grid.frame_tokens, device=device).view(grid.height, grid.width)
    patches = [tile.flatten() for band in torch.split(index, TILE, 0) for tile in torch.split(band, TILE, 1)]
    frame = torch.cat(patches)
    frames = torch.arange(grid.frames, device=device)[:, None] * grid.frame_tokens
    return (frames + frame).flatten()


def _morton(grid: VideoGrid, device: torch.device) -> Tensor:
    axes, bits = _axes(grid, device)
    return _interleave(axes, bits).argsort()


def _hilbert(grid: VideoGrid, device: torch.device) -> Tensor:
    """Skilling's transform of coordinates (AIP Conf. Proc. 707, 2004), over all tokens at once."""
    axes, bits = _axes(grid, device)
    for bit in reversed(range(1, bits)):
        low = (1 << bit) - 1
        for i in range(len(axes)):
            # Where the bit is set the first axis is mirrored below it, elsewhere it swaps its low bits with axis i.
            high = (axes[i] >> bit & 1).bool()
            swap = torch.where(high, 0, (axes[0] ^ axes[i]) & low)
            axes[0] = torch.where(high, axes[0] ^ low, axes[0] ^ swap)
            axes[i] = axes[i] ^ swap if i else axes[0]
    for i in range(1, len(axes)):
        axes[i] = axes[i] ^ axes[i - 1]
    flip = torch.zeros_like(axes[0])
    for bit in reversed(range(1, bits)):
        flip = torch.where((axes[-1] >> bit & 1).bool(), flip ^ ((1 << bit) - 1), flip)
    return _interleave([axis ^ flip for axis in axes], bits).argsort()


def _axes(grid: VideoGrid, device: torch.device) -> tuple[list[Tensor], int]:
    """Frame, row and column of every video token, and the bits that the largest of them needs."""
    sizes = (grid.frames, grid.height, grid.width)
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in sizes), indexing="ij")
    return [axis.flatten() for axis in axes], max(1, (max(sizes) - 1).bit_length())


def _interleave(axes: list[Tensor], bits: int) -> Tensor:
    """One number per token from the bits of its coordinates, the first axis highest within each level."""
    code = torch.zeros_like(axes[0])
    for bit in reversed(range(bits)):
        for axis in axes:
            code = code << 1 | (axis >> bit & 1)
    return code


_ORDERS: dict[str, Callable[[VideoGrid, torch.device], Tensor]] = {
    "tile": _tile,
    "morton": _morton,
    "hilbert": _hilbert,
}
