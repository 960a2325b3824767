"""Inputs with structure, engines and what is read off them, for the tests of ``temporal``."""

import torch

from dsattn import Engine, VideoGrid
from dsattn.methods.temporal import BITS
from dsattn.verdict import unpack_bits

from .method_inputs import dense

GRID = VideoGrid(9, 8, 16, text=13)
SMALL = {"block_q": 16, "block_k": 16}


def local(grid: VideoGrid = GRID, batch: int = 1, seed: int = 0, places: int = 0, strength: float = 3.0):
    """q, k, v of two heads whose queries look at their neighbours in space and time (``places`` seeds where)."""
    generator, where = (torch.Generator().manual_seed(s) for s in (seed, 1000 + places))
    axes = (torch.arange(n).float() for n in (grid.frames, grid.height, grid.width))
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3) / torch.tensor([1.5, 4.0, 4.0])
    phase = place @ torch.randn(batch, 2, 3, 16, generator=where)
    video = torch.cat([phase.cos(), phase.sin()], -1) * strength * 32**0.25 / 4
    base = torch.zeros(batch, grid.tokens, 2, 32)
    base[:, grid.video_start : grid.video_end] = video.transpose(1, 2)
    noise = [torch.randn(base.shape, generator=generator) for _ in range(3)]
    return [base + 0.3 * noise[0], base + 0.3 * noise[1], base + noise[2]]


def engine(**options) -> Engine:
    return Engine("temporal", **{"impl": "torch", **options})


def bits(engine: Engine, layer: int = 0, branch: str = "cond") -> torch.Tensor:
    """``[B, H, Nq, Nk]`` bool: tiles not dropped."""
    entry = engine.state.entries["transformer", layer, branch]
    return unpack_bits(entry.memory[BITS], entry.plan.num_k_blocks)


def density(engine: Engine) -> list[float]:
    return [float(record.density.mean()) for record in engine.stats.records]


def error(out: torch.Tensor, qkv: list[torch.Tensor]) -> float:
    want = dense(qkv)
    return float((out - want).norm() / want.norm())
