"""``spatial_temporal``: every head is spatial or temporal; either way the mass lies in a band of the right token order.

Source: Sparse VideoGen (SVG1), ICML 2025 (arXiv 2502.01776): a band in frame-major order for spatial heads, the same
band in patch-major order for temporal heads, classified online on sampled rows.
Differs in: rows are sampled over all video tokens (the repository draws from the first 10,000) and judged by the very
blocks that are computed; the sink is the first frame for both classes (the repository's temporal sink is a strip of
every frame); ``density`` counts sink, text and diagonal; no S × S mask is ever built.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dsattn.block_plan import TAILS, BlockPlan, Tail
from dsattn.config import require, require_budget, require_choice
from dsattn.grid import Call, VideoGrid
from dsattn.methods.base import Memory, Method, keep_exact_segments
from dsattn.methods.estimate import sample_rows
from dsattn.methods.ranked import Ranked

BLOCKS = (16, 32, 64, 128)


@dataclass(frozen=True)
class SpatialTemporalConfig:
    """Options of ``spatial_temporal``.

    Args:
        density: share of block pairs that are kept, in (0, 1]; sink, text and diagonal included, and kept whatever
            it says.
        block: tokens per block, one of 16, 32, 64, 128.
        sink: every query reads the whole first frame.
        rows: sampled query rows that decide a head's class; at least 1.
        tail: what skipped blocks contribute, ``"none"`` (as published), ``"pooled"`` or ``"pooled_block"``.
        seed: draws the rows.

    """

    density: float = 0.3
    block: int = 64
    sink: bool = True
    rows: int = 64
    tail: Tail = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        require_budget(0.3, density=self.density)
        require_choice("block", self.block, BLOCKS)
        require("sink", self.sink, bool)
        require("rows", self.rows, int, low=1)
        require_choice("tail", self.tail, TAILS)
        require("seed", self.seed, int)


@dataclass(frozen=True)
class Band:
    """One class: token orders ``[S]``, and the density from which on a block is read, ``[N, N]`` over them."""

    q_order: Tensor
    k_order: Tensor
    share: Tensor

    def mask(self, density: float) -> Tensor:
        """``[N, N]`` bool: the blocks that are read."""
        return self.share <= density

    def pairs(self, rows: Tensor, block: int, density: float) -> Tensor:
        """``[R, S]`` bool in the given token order: keys that the queries ``rows [R]`` read."""
        q_place, k_place = self.q_order.argsort(), self.k_order.argsort()
        return self.mask(density)[q_place[rows] // block][:, k_place // block]


def plan(q: Tensor, k: Tensor, v: Tensor, call: Call, config: SpatialTemporalConfig, memory: Memory) -> BlockPlan:
    """Plan from the grid and the class of every head.

    Args:
        q, k, v: ``[B, S, H, D]`` after norm and RoPE; S must equal ``call.grid.tokens``.

    """
    return rank(q, k, v, call, config, memory).at(config.density)


def rank(q: Tensor, k: Tensor, v: Tensor, call: Call, config: SpatialTemporalConfig, memory: Memory) -> Ranked:
    """Blocks by their distance from the band's middle; ``config.density`` only decides the class of every head."""
    batch, length, heads, _ = q.shape
    bands = _bands(call.grid, config.block, config.sink, q.device)
    temporal = classify(q, k, v, bands, call.grid, config) == 1
    spatial, other = bands

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(temporal.view(*temporal.shape, *(1,) * a.ndim), b, a)

    q_order, k_order = choose(spatial.q_order, other.q_order), choose(spatial.k_order, other.k_order)

    def make(keep: Tensor) -> BlockPlan:
        return BlockPlan.from_mask(
            keep,
            length,
            length,
            batch=batch,
            heads=heads,
            block_q=config.block,
            block_k=config.block,
            q_order=q_order,
            k_order=k_order,
            tail=config.tail,
        )

    return Ranked(choose(spatial.share, other.share), make)


def classify(
    q: Tensor, k: Tensor, v: Tensor, bands: tuple[Band, Band], grid: VideoGrid, config: SpatialTemporalConfig
) -> Tensor:
    """``[B, H]`` int64: which band computes the sampled rows with the smaller squared error; 0 on a tie."""
    rows = sample_rows(grid, config.rows, config.seed).to(q.device, non_blocking=True)
    logits = torch.einsum("brhd,bshd->bhrs", q[:, rows].float(), k.float()) * q.shape[-1] ** -0.5
    values = v.float().transpose(1, 2)
    exact = logits.softmax(-1) @ values
    errors = []
    for band in bands:
        approximate = (
            logits.masked_fill(~band.pairs(rows, config.block, config.density), -torch.inf).softmax(-1) @ values
        )
        errors.append((approximate - exact).square().mean((2, 3)))
    return torch.stack(errors).argmin(0)


@lru_cache(maxsize=16)
def _bands(grid: VideoGrid, block: int, sink: bool, device: torch.device) -> tuple[Band, Band]:
    frame_major = torch.arange(grid.tokens, device=device)
    video = torch.arange(grid.video_tokens, device=device).view(grid.frames, grid.frame_tokens)
    patch_major = video.T.flatten()
    # The sink stands first among the keys, so that whole blocks hold it.
    keys = torch.cat([video[0], video[1:].T.flatten()]) if sink else patch_major

    def with_rest(order: Tensor) -> Tensor:
        full = frame_major.clone()
        full[grid.video_start : grid.video_end] = order + grid.video_start
        return full

    # Where a token lies along the order, in tokens; a patch of the first frame lies with its patch.
    along = torch.arange(grid.tokens, device=device, dtype=torch.float32)
    patch = torch.zeros(grid.tokens, device=device)
    patch[grid.video_start : grid.video_end] = torch.arange(grid.video_tokens, device=device) % grid.frame_tokens
    q_order, k_order = with_rest(patch_major), with_rest(keys)
    spatial = Band(frame_major, frame_major, _band_share(along, along, grid, block, sink))
    scaled = patch * grid.frames
    return spatial, Band(q_order, k_order, _band_share(scaled[q_order], scaled[k_order], grid, block, sink))


def _band_share(q_along: Tensor, k_along: Tensor, grid: VideoGrid, block: int, sink: bool) -> Tensor:
    """``[N, N]`` fp32: -1 for blocks always kept, then density as the nearest of the others are taken in."""
    q_centre, k_centre = _block_means(q_along, block), _block_means(k_along, block)
    distance = (q_centre[:, None] - k_centre).abs()
    always = torch.zeros(distance.shape, dtype=torch.bool, device=distance.device)
    # The nearest key block of every query block: no row is empty.
    always.scatter_(1, distance.argmin(1, keepdim=True), True)
    if sink:
        first, last = grid.video_start, grid.video_start + grid.frame_tokens
        always[:, first // block : -(-last // block)] = True
    keep_exact_segments(always, grid, block, block)
    ranked = distance.masked_fill(always, -1.0).flatten().sort(stable=True).indices
    place = torch.empty(ranked.shape, device=ranked.device)
    place[ranked] = (torch.arange(len(ranked), device=ranked.device) + 0.5) / len(ranked)
    return place.view_as(distance).masked_fill(always, -1.0)


def _block_means(x: Tensor, block: int) -> Tensor:
    sums = torch.nn.functional.pad(x, (0, -len(x) % block)).view(-1, block).sum(1)
    sizes = (len(x) - torch.arange(0, len(x), block, device=x.device)).clamp(max=block)
    return sums / sizes


METHOD = Method(
    name="spatial_temporal",
    config=SpatialTemporalConfig,
    plan=plan,
    rank=rank,
    summary="a band in frame-major or patch-major order, chosen per head on sampled rows",
    source="Sparse VideoGen 2502.01776",
)
