"""Grids and random q, k, v that the tests of methods share, and dense attention to compare with."""

import torch

from dsattn.grid import VideoGrid

GRIDS = [
    VideoGrid(5, 9, 11),
    VideoGrid(5, 9, 11, text=19),
    VideoGrid(4, 9, 11, text=70, text_first=True),
    VideoGrid(4, 9, 11, prefix=30, text=5),
    VideoGrid(1, 1, 3),
]


def tensors(grid: VideoGrid, batch: int = 1, heads: int = 2, dim: int = 32, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, grid.tokens, heads, dim, generator=generator) for _ in range(3)]


def dense(qkv: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)
