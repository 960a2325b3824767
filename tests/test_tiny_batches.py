"""Batches of training: pairs, stills, tokens that are kept, and held-out clips."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dsattn.pipelines.tiny import batches, data
from dsattn.pipelines.tiny.codec import chosen_patches, to_patches
from dsattn.pipelines.tiny.loader import WEIGHTS, load_codec


@pytest.fixture(scope="module")
def clips() -> batches.Clips:
    return batches.Clips(load_codec(WEIGHTS), seed=5, tokens_per_step=1500)


@pytest.mark.parametrize("grid", [(3, 8, 8), (5, 7, 9), (1, 1, 1)])
@pytest.mark.parametrize("keep", [1, 40, 10_000])
def test_positions_are_blocks_of_the_grid(grid: batches.Grid, keep: int) -> None:
    positions = batches.pick_positions(np.random.default_rng(0), grid, keep)
    assert positions.shape[1] == 3 and len(positions.unique(dim=0)) == len(positions)
    assert torch.all(positions >= 0) and torch.all(positions < torch.tensor(grid))
    if keep >= math.prod(grid):
        order = torch.cartesian_prod(*(torch.arange(n) for n in grid)).reshape(-1, 3)
        assert torch.equal(positions, order)
    else:
        assert len(positions) <= keep + 3
        kept = {tuple(p) for p in positions.tolist()}
        for f, y, x in kept:  # whole blocks, as far as the grid goes
            block = {(f, y // 2 * 2 + i, x // 2 * 2 + j) for i in (0, 1) for j in (0, 1)}
            assert {b for b in block if b[1] < grid[1] and b[2] < grid[2]} <= kept


@pytest.mark.parametrize("step", range(6))
def test_batches_follow_from_seed_and_step_whatever_the_number_of_workers(clips: batches.Clips, step: int) -> None:
    whole = clips.batch(step, 0.3)
    again = batches.Clips(clips.codec, 5, 1500).batch(step, 0.3)
    for name in ("latents", "noise", "positions", "tokens", "level"):
        assert torch.equal(getattr(whole, name), getattr(again, name)), name
    parts = [batches.Clips(clips.codec, 5, 1500, rank, 2).batch(step, 0.3) for rank in (0, 1)]
    shared = min(2 * len(parts[0].level), len(whole.level)) // 2
    assert shared >= 1
    for rank, part in enumerate(parts):
        for name in ("latents", "noise", "tokens", "level"):
            assert torch.equal(getattr(part, name)[:shared], getattr(whole, name)[rank::2][:shared]), name


def test_pairs_share_noise_and_level_and_differ_in_motion_or_shape(clips: batches.Clips) -> None:
    batch = clips.batch(3, 0.0, (5, 8, 8))
    assert len(batch.level) >= 4
    assert torch.equal(batch.noise[0], batch.noise[1]) and batch.level[0] == batch.level[1]
    assert not torch.equal(batch.noise[1], batch.noise[2])
    assert not torch.equal(batch.latents[0], batch.latents[1])


def test_pairs_of_stills_differ_in_shape(clips: batches.Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "other_motion", lambda *_: pytest.fail("a still does not show a motion"))
    for step in range(4):
        batch = clips.batch(step, 0.0, (1, 12, 12))
        assert batch.latents.shape[2] == 144 and len(batch.level) == 10
        assert not torch.equal(batch.latents[0], batch.latents[1])


def test_held_out_clips_are_the_same_in_every_run(clips: batches.Clips) -> None:
    other = batches.Clips(clips.codec, clips.seed + 1, tokens_per_step=100)
    ours, theirs = (c.held_out(2, (2, 6, 6), (0.5,))[0] for c in (clips, other))
    for name in ("latents", "noise", "tokens", "level"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_tokens_of_a_part_are_those_of_the_whole(clips: batches.Clips) -> None:
    scenes = [data.sample_scene(np.random.default_rng(i)) for i in range(2)]
    grid, level = (3, 6, 8), torch.tensor([0.5, 0.5])
    everything = batches.pick_positions(np.random.default_rng(0), grid, 1000)
    some = batches.pick_positions(np.random.default_rng(1), grid, 40)
    noise = torch.zeros(2, 32, 1)
    whole = clips.encode(scenes, ["", "a red circle"], grid, everything, level, noise)
    part = clips.encode(scenes, ["", "a red circle"], grid, some, level, noise)
    index = (everything[None] == some[:, None]).all(2).int().argmax(1)
    assert torch.equal(part.latents, whole.latents[:, :, index])


def test_every_phase_and_grid_is_reached() -> None:
    rng = np.random.default_rng(0)
    early, late = ([batches.pick_grid(rng, fraction) for _ in range(400)] for fraction in (0.1, 0.99))
    assert {g for g, _ in early} == {*batches.SMALL, *batches.MIDDLE, *batches.LARGE, *batches.STILL}
    assert {keep for g, keep in early if g[0] > 1} == {batches.GROWING[0].kept, math.prod((5, 8, 8))}
    assert all(keep == math.prod(g) for g, keep in [*early, *late] if g[0] == 1)
    assert {g for g, keep in late if keep < math.prod(g)} >= {(9, 32, 32), (7, 40, 40)}
    assert {g for g, keep in late if keep == math.prod(g)} >= {*batches.SMALL, *batches.FULL, *batches.STILL}
    assert all(math.isclose(sum(p.shares), 1) for p in batches.GROWING) and math.isinf(batches.GROWING[-1].until)


@pytest.mark.parametrize("tokens", [1, 256, 1280, 9216, 10**6])
def test_more_tokens_bear_more_noise(tokens: int) -> None:
    levels = batches.sample_noise_levels(20_000, tokens, torch.Generator().manual_seed(0))
    assert levels.min() > 0 and levels.max() < 1
    more = min(1.0, max(-1.0, 0.5 * math.log(tokens / 1280)))
    # Above a logit of 3 + more lie the normals above (2 - ln 5) / 0.9, of four samples in five, and hardly any other.
    want = 0.8 * 0.5 * math.erfc((2 - math.log(5)) / 0.9 / math.sqrt(2))
    want += 0.2 * 0.5 * math.erfc((2.7 + more) / math.sqrt(2))
    got = (torch.logit(levels) > 3 + more).float().mean().item()
    assert abs(got - want) < 4 * math.sqrt(want * (1 - want) / 20_000)


def test_many_clips_are_seen_in_part_at_first(clips: batches.Clips) -> None:
    def picked(step: int) -> batches.Grid:
        return batches.pick_grid(np.random.default_rng((clips.seed, step)), 0.0)[0]

    step = next(s for s in range(20) if picked(s) in batches.MIDDLE)
    early, late = clips.batch(step, 0.0), clips.batch(step, 0.99)
    assert early.latents.shape[2] <= 384 and len(early.level) == max(1, round(1500 / early.latents.shape[2]))
    assert late.latents.shape[2] > early.latents.shape[2]


def test_batches_drawn_ahead_are_the_same(clips: batches.Clips) -> None:
    loader = batches.Loader(clips, first_step=4, processes=1)
    try:
        for step in (4, 5):
            got, want = loader.next(0.2), clips.batch(step, 0.2)
            for name in ("latents", "noise", "positions", "tokens", "mask", "level"):
                assert torch.equal(getattr(got, name), getattr(want, name)), name
    finally:
        loader.close()


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_chosen_patches_are_those_of_the_whole_clip(frames: int) -> None:
    clip = torch.rand(frames, 24, 40, 3, generator=torch.Generator().manual_seed(0))
    patches = to_patches(clip.permute(3, 0, 1, 2)[None])[0]
    places = torch.cartesian_prod(*(torch.arange(n) for n in patches.shape[:3])).reshape(-1, 3)[::2].flip(0)
    assert torch.equal(chosen_patches(clip, places), patches[tuple(places.unbind(1))])
