"""``radial``: a static mask whose diagonal narrows as the distance between frames grows.

Source: Radial Attention, NeurIPS 2025 (arXiv 2506.19852) and its repository's mask rules.
Differs in: blocks are cut from the true sequence, so any frame size and length is covered (the original
drops the tail tokens of frames and sequence); a block that several frames share is judged once, on all its
tokens; text and prefix rows and columns are exact for every model. ``compat="original"`` gives the
repository's mask bit for bit where its blocks exist and keeps the remaining rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Literal

import torch
from torch import Tensor

from dsattn.block_plan import TAILS, BlockPlan, Tail
from dsattn.config import require, require_choice
from dsattn.grid import Call, VideoGrid
from dsattn.methods.base import Memory, Method, aligned_blocks, keep_exact_segments
from dsattn.methods.ranked import Ranked

# The original's constants: pairs of frames are thinned out below this window, a block is kept when more
# than DENSE_COLUMNS of its used columns are more than COLUMN_DENSITY full.
THINNING_WINDOW = 128
COLUMN_DENSITY = 1 / 3
DENSE_COLUMNS = 0.6
# What ``rank`` tells apart.
DECAYS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class RadialConfig:
    """Options of ``radial``.

    Args:
        decay: factor on the window of frames two or more apart, in [0, 1]; smaller is sparser.
        block: tokens per block, 32, 64 or 128; also the narrowest window.
        sink: every query reads the whole first frame (the original: yes for Wan, no for HunyuanVideo).
        compat: ``"original"`` reproduces the published mask, ``"corrected"`` covers every token.
        tail: what skipped blocks contribute, ``"none"`` (as published) or ``"pooled"``.

    """

    decay: float = 0.2
    block: int = 64
    sink: bool = True
    compat: Literal["corrected", "original"] = "corrected"
    tail: Tail = "none"

    def __post_init__(self) -> None:
        require("decay", self.decay, (int, float), low=0, high=1)
        require_choice("block", self.block, (32, 64, 128))
        require("sink", self.sink, bool)
        require_choice("compat", self.compat, ("corrected", "original"))
        require_choice("tail", self.tail, TAILS)


def plan(q: Tensor, k: Tensor, v: Tensor, call: Call, config: RadialConfig, memory: Memory) -> BlockPlan:
    """Static plan, shared by all heads and batch rows; made once per grid."""
    return _make(q, config, _mask(call.grid, config, q.device)[None, None])


def rank(q: Tensor, k: Tensor, v: Tensor, call: Call, config: RadialConfig, memory: Memory) -> Ranked:
    """Blocks by the smallest of ``DECAYS`` that reads them, as the density of that mask; without ``config.decay``."""
    return Ranked(_share(call.grid, config, q.device)[None, None], partial(_make, q, config))


def _make(q: Tensor, config: RadialConfig, mask: Tensor) -> BlockPlan:
    batch, length, heads, _ = q.shape
    return BlockPlan.from_mask(
        mask, length, length, batch=batch, heads=heads, block_q=config.block, block_k=config.block, tail=config.tail
    )


@lru_cache(maxsize=16)
def _share(grid: VideoGrid, config: RadialConfig, device: torch.device) -> Tensor:
    """``[N, N]`` fp32; the sparsest mask is always read, what no decay reads comes in at 1."""
    masks = [_mask(grid, replace(config, decay=decay), device) for decay in DECAYS]
    share = torch.ones(masks[0].shape, device=device)
    for mask in reversed(masks[1:]):
        share.masked_fill_(mask, float(mask.float().mean()))
    return share.masked_fill_(masks[0], -1.0)


@lru_cache(maxsize=16)
def _mask(grid: VideoGrid, config: RadialConfig, device: torch.device) -> Tensor:
    block, length = config.block, grid.tokens
    if config.compat == "original":
        blocks = -(-length // block)
        mask = torch.ones(blocks, blocks, dtype=torch.bool, device=device)
        video = original_mask(grid.frames, grid.frame_tokens, config, device)
        # The original has no text before the video and stops at the last whole block.
        first, covered = grid.video_start // block, video.shape[0]
        mask[first : first + covered, first : first + covered] = video
    else:
        mask = corrected_mask(grid, config, device)
    mask |= aligned_blocks(length, block, block, device)
    return keep_exact_segments(mask, grid, block, block)


def window(distance: int, frame_tokens: int, config: RadialConfig) -> float | None:
    """Half-width of the allowed diagonal between frames ``distance`` apart, in tokens; None if thinned out."""
    reach = 2 ** frame_tokens.bit_length() / 2 ** distance.bit_length()
    if distance <= 1:
        return float(frame_tokens)
    if reach < THINNING_WINDOW and distance % int(THINNING_WINDOW / reach) != 0:
        return None
    narrowed: float = max(reach * config.decay, float(config.block))
    return narrowed


def corrected_mask(grid: VideoGrid, config: RadialConfig, device: torch.device) -> Tensor:
    """``[N, N]`` bool over the blocks of the whole sequence; columns are counted over true tokens only.

    A full block that lies in one frame is judged by a table: against another such block the outcome depends only on
    the window and on how far apart the two start within their frames. The few blocks left over (on the border of
    two frames, beside text, the partial last one) are counted token by token.
    """
    block, size, start = config.block, grid.frame_tokens, grid.video_start
    blocks = -(-grid.tokens // block)
    half = _windows(grid, config, device)
    first = torch.arange(blocks, device=device) * block
    frame, place = (first - start).div(size, rounding_mode="floor"), (first - start) % size
    regular = (first >= start) & (first + block <= grid.video_end) & (place + block <= size)
    rest = (~regular).nonzero().squeeze(1)
    mask = torch.ones(blocks, blocks, dtype=torch.bool, device=device)
    inside = regular.nonzero().squeeze(1)
    if len(inside):
        widths, kind = torch.unique(half, return_inverse=True)
        table = _table(widths, size, block)
        frame, place = frame[inside], place[inside]
        distance = (frame[:, None] - frame).abs()
        kept = table[kind[distance], place - place[:, None] + size]
        if config.sink:
            kept |= frame == 0
        mask[inside[:, None], inside] = kept
    if not len(rest):
        return mask
    tokens = (rest[:, None] * block + torch.arange(block, device=device)).flatten()
    everything = torch.arange(blocks * block, device=device)
    mask[:, rest] = _count(grid, config, half, torch.arange(blocks, device=device), tokens)
    mask[rest] = _count(grid, config, half, rest, everything)
    return mask


def _windows(grid: VideoGrid, config: RadialConfig, device: torch.device) -> Tensor:
    """``[F]`` int64: half-width per distance between frames, in whole tokens; -1 allows nothing."""
    windows = [window(d, grid.frame_tokens, config) for d in range(grid.frames)]
    return torch.tensor([-1.0 if w is None else w for w in windows], device=device).floor().long()


def _table(widths: Tensor, size: int, block: int) -> Tensor:
    """``[W, 2 size]`` bool: whether a key block is kept that starts ``index - size`` places behind the query block."""
    place = (torch.arange(-size, size, device=widths.device)[:, None] + torch.arange(block, device=widths.device)).view(
        1, -1
    )
    reach = widths[:, None]
    allowed = (place + reach).clamp(max=block - 1) - (place - reach).clamp(min=0) + 1
    allowed = allowed.clamp(min=0) * (reach >= 0)
    return _blocks_worth_keeping(allowed, torch.full_like(reach, block), block)


def _count(grid: VideoGrid, config: RadialConfig, half: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """``[R, T / block]`` bool for block rows ``rows [R]`` and key tokens ``tokens [T]``, which form whole blocks."""
    block, size, start = config.block, grid.frame_tokens, grid.video_start
    video = (tokens >= start) & (tokens < grid.video_end)
    frame, place = (tokens - start).div(size, rounding_mode="floor"), (tokens - start) % size
    first_row = rows[:, None] * block
    height = (grid.tokens - first_row).clamp(max=block)
    allowed = torch.zeros(len(rows), len(tokens), dtype=torch.int32, device=rows.device)
    for i in range(grid.frames):
        # Rows of frame i inside each block, as places within the frame: [first, last].
        first = (first_row - start - i * size).clamp(min=0)
        last = (first_row + height - 1 - start - i * size).clamp(max=size - 1)
        touched = (last >= first).squeeze(1).nonzero().squeeze(1)
        reach = half[(frame - i).abs().clamp(max=grid.frames - 1)]
        if config.sink:
            reach = torch.where(frame == 0, size, reach)
        low = torch.maximum(first[touched], place - reach)
        high = torch.minimum(last[touched], place + reach)
        count = (high - low + 1).clamp(min=0) * (video & (reach >= 0))
        allowed[touched] += count.int()
    return _blocks_worth_keeping(allowed, height, block)


def original_mask(frames: int, size: int, config: RadialConfig, device: torch.device) -> Tensor:
    """The repository's block map ``[⌊F·s/B⌋, ⌊F·s/B⌋]`` for the video part, defects included.

    Every frame pair is drawn on a canvas of ``ceil(s/B)`` blocks at its offset within the block grid; what
    sticks out of the canvas is lost, and so are blocks behind the last whole one.
    """
    block = config.block
    total, canvas = frames * size // block, -(-size // block)
    mask = torch.zeros(total, total, dtype=torch.bool, device=device)
    for i in range(frames):
        for j in range(frames):
            reach = float(size) if config.sink and j == 0 else window(abs(i - j), size, config)
            if reach is None:
                continue
            tile = _canvas_blocks(size, int(reach), i * size % block, j * size % block, block, canvas, device)
            top, left = i * size // block, j * size // block
            mask[top : top + canvas, left : left + canvas] |= tile[: total - top, : total - left]
    return mask


@lru_cache(maxsize=4096)
def _canvas_blocks(
    size: int, reach: int, row_offset: int, column_offset: int, block: int, canvas: int, device: torch.device
) -> Tensor:
    """Kept blocks of one frame pair's canvas, ``[canvas, canvas]`` bool."""
    first = (torch.arange(canvas, device=device)[:, None] * block - row_offset).clamp(min=0)
    last = (torch.arange(1, canvas + 1, device=device)[:, None] * block - row_offset - 1).clamp(max=size - 1)
    place = torch.arange(canvas * block, device=device) - column_offset
    count = torch.minimum(last, place + reach) - torch.maximum(first, place - reach) + 1
    count = count.clamp(min=0) * ((place >= 0) & (place < size))
    return _blocks_worth_keeping(count, torch.full((canvas, 1), block, device=device), block)


def _blocks_worth_keeping(allowed: Tensor, rows: Tensor, block: int) -> Tensor:
    """``[N, M]`` bool from allowed rows per (block row, column token) and true rows per block row ``[N, 1]``."""
    columns = allowed.shape[1]
    pad = -columns % block
    share = torch.nn.functional.pad(allowed / rows, (0, pad)).view(allowed.shape[0], -1, block)
    used, dense = (share > 0).sum(-1), (share > COLUMN_DENSITY).sum(-1)
    return (used > 0) & (dense > DENSE_COLUMNS * used)


METHOD = Method(
    name="radial",
    config=RadialConfig,
    plan=plan,
    rank=rank,
    summary="static diagonals that narrow with the distance between frames",
    source="Radial Attention 2506.19852",
    static=True,
)
