"""What one training step of the small models sees: clips, captions, noise levels and the tokens that are kept.

A step's cost is its tokens; what it teaches about words is its clips. So most of a clip's tokens are left out, at
random and two by two: the positions and the content of a token are those of the whole grid, and many more clips fit
into a step. More is kept as the budget is used up, and whole grids follow at the end, because a model that never saw
neighbours on all sides does not use them well. After MaskDiT (https://arxiv.org/abs/2306.09305); differs in: what is
left out is not predicted, so no decoder is needed for it.

Some steps see nothing but stills: the first frame of a scene, seen whole. 50 of them fit where 10 clips do, and what a
shape looks like needs no more.
"""

from __future__ import annotations

import math
import multiprocessing
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsattn.pipelines.tiny import data
from dsattn.pipelines.tiny.codec import SPATIAL, TEMPORAL, PatchCodec, chosen_patches
from dsattn.pipelines.tiny.model import FLOW_SHIFT, MAX_TEXT, build_tokenizer
from dsattn.pipelines.tiny.render import render

Grid = tuple[int, int, int]
"""Latent frames, height and width."""

LAYOUT_TOKENS = 5 * 16 * 16
"""Tokens of 17 x 128 x 128 pixels, for which the noise levels of training were found."""

STILL: tuple[Grid, ...] = (
    (1, 12, 12),
    (1, 12, 12),
    (1, 16, 16),
    (1, 16, 16),
    (1, 10, 14),
    (1, 16, 12),
    (1, 20, 20),
    (1, 24, 24),
    (1, 32, 32),
)
SMALL: tuple[Grid, ...] = (
    (5, 12, 12),
    (5, 12, 12),
    (9, 12, 12),
    (9, 10, 14),
    (7, 14, 10),
    (5, 16, 16),
    (5, 8, 8),
    (3, 12, 12),
)
MIDDLE: tuple[Grid, ...] = ((9, 16, 16), (7, 20, 20), (9, 16, 20), (9, 20, 16), (13, 14, 14))
LARGE: tuple[Grid, ...] = ((9, 32, 32), (9, 32, 32), (9, 24, 24), (9, 24, 32), (7, 40, 40), (13, 20, 20))
FULL: tuple[Grid, ...] = ((9, 24, 24), (9, 24, 24), (9, 20, 28), (9, 32, 32))


@dataclass(frozen=True)
class Phase:
    """Up to `until` of the budget: shares of small, middle, large (`kept` tokens of each), full and still (whole)."""

    until: float
    kept: int
    shares: tuple[float, float, float, float, float]


GROWING = (
    Phase(0.60, 384, (0.25, 0.15, 0.10, 0.00, 0.50)),
    Phase(0.80, 768, (0.40, 0.20, 0.15, 0.00, 0.25)),
    Phase(0.92, 1536, (0.27, 0.20, 0.20, 0.08, 0.25)),
    Phase(math.inf, 2304, (0.25, 0.20, 0.20, 0.20, 0.15)),
)


def pick_grid(rng: np.random.Generator, fraction: float, phases: Sequence[Phase] = GROWING) -> tuple[Grid, int]:
    """A grid for a step at `fraction` of the budget, and how many of its tokens are kept."""
    phase = next(p for p in phases if fraction < p.until)
    families = (SMALL, MIDDLE, LARGE, FULL, STILL)
    family = families[int(rng.choice(len(families), p=phase.shares))]
    grid = family[int(rng.integers(len(family)))]
    whole = math.prod(grid)
    return grid, whole if family in (FULL, STILL) else min(whole, phase.kept)


def pick_positions(rng: np.random.Generator, grid: Grid, keep: int) -> Tensor:
    """About `keep` positions (frame, row, column) of a grid, in random blocks of 2 x 2 tokens; `[n, 3]`, in order."""
    frames, height, width = grid
    rows, cols = -(-height // 2), -(-width // 2)
    blocks = frames * rows * cols
    count = blocks if keep >= math.prod(grid) else min(blocks, max(1, round(keep / 4)))
    chosen = np.zeros(blocks, bool)
    chosen[rng.permutation(blocks)[:count]] = True
    kept = chosen.reshape(frames, rows, cols).repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width]
    return torch.from_numpy(np.argwhere(kept))


def sample_noise_levels(batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Noise levels for clips of which `tokens` tokens are seen; most are levels at which a clip's layout is settled.

    Logit-normal. The more tokens tell of an object, the more noise it takes to hide it: the mean of the logit grows by
    half the logarithm of their number, as the shift of Stable Diffusion 3 does (https://arxiv.org/abs/2403.03206), but
    by no more than one either way. A fifth of the samples is at lower levels, so that detail is learnt too.
    """
    normal = torch.randn(batch, generator=generator)
    more = min(1.0, max(-1.0, 0.5 * math.log(tokens / LAYOUT_TOKENS)))
    layout = 0.9 * normal + math.log(FLOW_SHIFT) + 1.0 + more
    detail = normal + 0.3
    keep = torch.rand(batch, generator=generator) < 0.8
    return torch.sigmoid(torch.where(keep, layout, detail)).clamp(0.002, 0.9995)


@dataclass
class Batch:
    """Inputs of one step. Latents and noise are `[B, z, n]`, the tokens at `positions` `[n, 3]` of the grid."""

    latents: Tensor
    noise: Tensor
    positions: Tensor
    tokens: Tensor  # [B, MAX_TEXT] of the caption
    mask: Tensor  # [B, MAX_TEXT]
    level: Tensor  # [B], noise level in (0, 1)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return Batch(*(getattr(self, f.name).to(device) for f in fields(self)))


class Clips:
    """Draws, renders and encodes the clips of one step; everything follows from (seed, step)."""

    def __init__(self, codec: PatchCodec, seed: int, tokens_per_step: int, rank: int = 0, world: int = 1) -> None:
        self.codec, self.seed, self.tokens_per_step = codec, seed, tokens_per_step
        self.rank, self.world = rank, world
        self.tokenizer = build_tokenizer()

    def batch(self, step: int, fraction: float, grid: Grid | None = None) -> Batch:
        """Draw the share of one worker in step `step`; a `grid` that is given is seen whole."""
        rng = np.random.default_rng((self.seed, step))
        picked, keep = (grid, math.prod(grid)) if grid else pick_grid(rng, fraction)
        positions = pick_positions(rng, picked, keep)
        count = max(1, round(self.tokens_per_step / (len(positions) * self.world))) * self.world
        # In pairs that differ in the motion alone, or in the shape alone, noise included: what the two gradients share
        # cancels, and what is left is about the words for it, the last ones such a model learns. A still has no motion.
        motions = 0.5 if picked[0] > 1 else 0.0
        pairs = -(-count // 2)
        scenes, captions, level, noise = [], [], [], []
        # Drawn for the whole batch and then shared out, pair by pair: a step is the same for any number of workers, but
        # for its last clips where the number of clips is rounded.
        for _ in range(pairs):
            scene = data.sample_scene(rng)
            other = data.other_motion if rng.random() < motions else data.other_shape
            pair = [scene, other(scene, rng)]
            scenes += pair
            captions += ["" if rng.random() < 0.1 else s.caption for s in pair]
            generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
            level.append(sample_noise_levels(1, len(positions), generator).expand(2))
            noise.append(torch.randn(1, self.codec.config.z_dim, len(positions), generator=generator).expand(2, -1, -1))
        mine = slice(self.rank, count, self.world)
        levels, noises = torch.cat(level)[mine], torch.cat(noise)[mine]
        return self.encode(scenes[mine], captions[mine], picked, positions, levels, noises)

    def encode(
        self,
        scenes: Sequence[data.Scene],
        captions: Sequence[str],
        grid: Grid,
        positions: Tensor,
        level: Tensor,
        noise: Tensor,
    ) -> Batch:
        """Render and encode scenes on `grid` and keep the tokens at `positions`."""
        frames, height, width = grid
        size = (TEMPORAL * (frames - 1) + 1, SPATIAL * height, SPATIAL * width)
        clips = (torch.from_numpy(render(s, *size)) for s in scenes)
        patches = torch.stack([chosen_patches(clip, positions) for clip in clips]) * 2 - 1
        latents = self.codec.normalise(self.codec.encode_patches(patches).movedim(-1, 1))
        text = self.tokenizer(
            list(captions), padding="max_length", max_length=MAX_TEXT, truncation=True, return_tensors="pt"
        )
        return Batch(latents, noise, positions, text.input_ids, text.attention_mask, level)

    def held_out(self, count: int, grid: Grid, levels: Sequence[float]) -> list[Batch]:
        """Held-out clips, the same for every seed, one batch per noise level: what the loss of runs is compared on."""
        stream = data.clips(977, held_out=True)
        scenes = [next(stream) for _ in range(count)]
        positions = pick_positions(np.random.default_rng(0), grid, math.prod(grid))
        noise = torch.randn(count, self.codec.config.z_dim, len(positions), generator=torch.Generator().manual_seed(0))
        captions = [s.caption for s in scenes]
        return [self.encode(scenes, captions, grid, positions, torch.full((count,), level), noise) for level in levels]


class Loader:
    """Batches of successive steps, drawn ahead by `processes` others; 0 draws each when it is asked for.

    A GPU takes batches faster than one core renders them. Drawn ahead, a batch is of the grids that its fraction of the
    budget stood for when it was ordered, a few dozen steps before.
    """

    def __init__(self, clips: Clips, first_step: int, processes: int = 0) -> None:
        self.clips, self.step, self.ahead = clips, first_step, 3 * processes
        self.orders: deque[Future[dict[str, NDArray[Any]]]] = deque()
        self.pool = None
        if processes:
            context = multiprocessing.get_context("spawn")  # a forked copy of a process with a GPU context would hang
            self.pool = ProcessPoolExecutor(processes, context, initializer=_keep, initargs=(clips,))

    def next(self, fraction: float) -> Batch:
        """The batch of the next step."""
        if self.pool is None:
            self.step += 1
            return self.clips.batch(self.step - 1, fraction)
        while len(self.orders) < self.ahead:
            self.orders.append(self.pool.submit(_draw, self.step, fraction))
            self.step += 1
        return Batch(**{name: torch.from_numpy(array) for name, array in self.orders.popleft().result().items()})

    def close(self) -> None:
        """Stop the processes; what they are drawing is thrown away."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


_kept: list[Clips] = []
"""In a process of a `Loader`: what it draws from."""


def _keep(clips: Clips) -> None:
    torch.set_num_threads(1)
    _kept.append(clips)


def _draw(step: int, fraction: float) -> dict[str, NDArray[Any]]:
    batch = _kept[0].batch(step, fraction)
    return {f.name: getattr(batch, f.name).numpy() for f in fields(batch)}
