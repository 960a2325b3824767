"""spatial_temporal: classes are found, bands are where they should be, budgets hold."""

import pytest
import torch

import dsattn
from dsattn.grid import Call, VideoGrid
from dsattn.methods.estimate import sample_rows
from dsattn.methods.spatial_temporal import _bands

from .method_inputs import GRIDS, dense, tensors


def plan(grid: VideoGrid, qkv, **options) -> dsattn.BlockPlan:
    return dsattn.plan(*qkv, Call(0, 0, grid), method="spatial_temporal", **options).validate()


@pytest.mark.parametrize("grid", GRIDS)
def test_everything_kept_is_dense_attention(grid):
    qkv = tensors(grid)
    torch.testing.assert_close(dsattn.attend(*qkv, plan(grid, qkv, density=1.0, block=32), impl="torch"), dense(qkv))


def planted(grid: VideoGrid) -> list[torch.Tensor]:
    """Head 0 sees its own frame, head 1 its own patch; values tell all tokens apart."""
    token = torch.arange(grid.tokens)
    frame = torch.nn.functional.one_hot(token // grid.frame_tokens, grid.tokens)
    patch = torch.nn.functional.one_hot(token % grid.frame_tokens, grid.tokens)
    code = torch.stack([frame, patch], 1).float()[None] * 20 * grid.tokens**0.25
    v = torch.randn(1, grid.tokens, 2, grid.tokens, generator=torch.Generator().manual_seed(0))
    return [code, code.clone(), v]


def test_heads_are_classified_and_computed_exactly_in_their_order():
    grid = VideoGrid(6, 4, 8)
    qkv = planted(grid)
    made = plan(grid, qkv, density=0.4, block=16)
    assert torch.equal(made.q_order[0, 0], torch.arange(grid.tokens))
    assert made.q_order[0, 1, : grid.frames].tolist() == [f * grid.frame_tokens for f in range(grid.frames)]
    out = dsattn.attend(*qkv, made, impl="torch")
    torch.testing.assert_close(out, dense(qkv), atol=1e-3, rtol=1e-3)
    # The wrong order does not hold the mass: swapping the heads' plans breaks both.
    swapped = [x.flip(2) for x in qkv[:2]] + [qkv[2]]
    wrong = dsattn.attend(*swapped, made, impl="torch")
    assert float((wrong - dense(swapped)).norm() / dense(swapped).norm()) > 0.1


@pytest.mark.parametrize("grid", GRIDS[:4])
@pytest.mark.parametrize("density", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("sink", [True, False])
def test_density_counts_everything_that_is_kept(grid, density, sink):
    for band in _bands(grid, 16, sink, torch.device("cpu")):
        mask = band.mask(density)
        assert bool(mask.any(1).all())
        always = band.mask(0).float().mean().item()
        assert mask.float().mean().item() == pytest.approx(max(density, always), abs=1 / mask.numel())


@pytest.mark.parametrize("grid", GRIDS[:4])
def test_sink_text_and_prefix_are_kept_in_both_classes(grid):
    for band in _bands(grid, 16, True, torch.device("cpu")):
        pairs = band.pairs(torch.arange(grid.tokens), 16, 0.01)
        assert bool(pairs[:, grid.video_start : grid.video_start + grid.frame_tokens].all())
        for start, stop in grid.exact_segments:
            assert bool(pairs[:, start:stop].all()) and bool(pairs[start:stop].all())


def test_rows_are_drawn_over_the_whole_clip_and_repeat():
    grid = VideoGrid(40, 30, 30, text=7, text_first=True)
    rows = sample_rows(grid, 64, 0)
    assert len(rows.unique()) == 64 and int(rows.min()) >= 7
    frames = (rows - 7) // grid.frame_tokens
    assert int(frames.min()) < 8 and int(frames.max()) >= 32
    assert torch.equal(rows, sample_rows(grid, 64, 0))
    assert len(sample_rows(VideoGrid(1, 2, 2), 64, 0)) == 4


def test_batch_of_two_is_two_batches_of_one():
    grid = GRIDS[1]
    qkv = tensors(grid, batch=2)
    both = plan(grid, qkv, block=16).to_dense()
    for b in range(2):
        assert torch.equal(both[b : b + 1], plan(grid, [x[b : b + 1] for x in qkv], block=16).to_dense())


@pytest.mark.parametrize("options", [{"density": 0}, {"block": 48}, {"rows": 0}, {"sink": 1}, {"tail": "delta"}])
def test_bad_options_are_named(options):
    with pytest.raises(dsattn.UsageError, match=next(iter(options))):
        plan(GRIDS[0], tensors(GRIDS[0]), **options)
