"""Statistics of attention weights against closed forms: even weights, one key, spatial, temporal and local weights."""

from __future__ import annotations

import math

import pytest
import torch

from dsattn import VideoGrid
from dsattn.orders import token_order

from .bench_scripts import module

statistics = module("attention_statistics")

GRID = VideoGrid(5, 8, 12)
TEXT = VideoGrid(5, 8, 12, text=20, text_first=True, prefix=4)


def rows(grid: VideoGrid) -> torch.Tensor:
    return torch.arange(grid.video_start, grid.video_end)


def even(grid: VideoGrid) -> torch.Tensor:
    return torch.full((grid.video_tokens, grid.tokens), 1 / grid.tokens)


def only(mask: torch.Tensor) -> torch.Tensor:
    """Even weights on the keys of a mask."""
    return mask.float() / mask.sum(1, keepdim=True)


def coordinates(grid: VideoGrid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    token = torch.arange(grid.video_tokens)
    return token // grid.frame_tokens, token % grid.frame_tokens // grid.width, token % grid.width


def character(weights: torch.Tensor, grid: VideoGrid = GRID) -> dict[str, float]:
    found = statistics.character(weights, statistics.Places.of(grid, rows(grid)))
    return {name: float(value.nanmean()) for name, value in found.items()}


@pytest.mark.parametrize("grid", [GRID, TEXT], ids=["video", "with text"])
def test_even_weights(grid):
    found = statistics.concentration(even(grid))
    near = pytest.approx
    for name, wanted in {"entropy": 1, "effective": 1, "above_mean": 0, "tiny": 0}.items():
        assert float(found[name].mean()) == near(wanted, abs=1e-4), name
    for density in statistics.DENSITIES:
        assert float(found[f"keys@{density:g}"].mean()) == near(density, abs=1e-5)
    for level in statistics.LEVELS:
        assert float(found[f"keys_for@{level:g}"].mean()) == near(level, abs=1e-5)
    share = grid.frame_tokens / grid.tokens
    where = character(even(grid), grid)
    assert where["own_frame"] == near(share, abs=1e-5) == near(where["first_frame"], abs=1e-5)
    assert where["distance"] == near(1, abs=1e-5)
    assert where["text"] == near(1 - grid.video_tokens / grid.tokens, abs=1e-5)
    assert where["window"] == near(math.prod(statistics.window_sizes(grid)) / grid.tokens, abs=1e-5)
    # The area of the band, over all rows; text is read by every row.
    band = where["text"] + (1 - where["text"]) * statistics.BAND
    assert where["spatial"] == near(band, abs=0.002) and where["temporal"] == near(band, abs=0.002)
    places = statistics.Places.of(grid, rows(grid))
    assert statistics.by_frame_distance(even(grid), places).tolist() == near([1.0] * grid.frames, abs=1e-4)
    distances = statistics.by_distance(even(grid), places)
    assert distances[:6].tolist() == near([1.0] * 6, abs=1e-4) and distances[6].isnan()
    assert statistics.common_keys(even(grid), share=0.05) == near(round(0.05 * grid.tokens) / grid.tokens, abs=1e-5)


def test_one_key():
    found = statistics.concentration(torch.eye(GRID.tokens))
    assert float(found["entropy"].abs().max()) == 0
    assert torch.allclose(found["effective"], torch.full((GRID.tokens,), 1 / GRID.tokens))
    assert float(found["keys@0.01"].min()) == 1 and float(found["keys_for@0.99"].max()) < 1 / GRID.tokens
    assert float(found["above_mean"].mean()) == pytest.approx(1 / GRID.tokens)
    where = character(torch.eye(GRID.tokens))
    assert where["own_frame"] == where["window"] == where["spatial"] == where["temporal"] == 1
    assert where["same_place"] == where["distance"] == where["first_frame"] == 0


def test_entropy_is_exact():
    weights = torch.tensor([[0.5, 0.25, 0.125, 0.125], [1.0, 0.0, 0.0, 0.0]])
    assert statistics.entropy(weights).tolist() == pytest.approx([1.75 * math.log(2), 0.0])


def test_spatial_and_temporal_weights():
    frame, y, x = coordinates(GRID)
    same_frame = frame[:, None] == frame
    same_place = (y[:, None] == y) & (x[:, None] == x)
    spatial, temporal = character(only(same_frame)), character(only(same_place & ~same_frame))
    assert spatial["own_frame"] == pytest.approx(1) and spatial["same_place"] == 0
    assert temporal["own_frame"] == 0 and temporal["same_place"] == pytest.approx(1)
    assert temporal["distance"] == 0 and spatial["distance"] == pytest.approx(1)
    # The band is wider than half a frame to either side, and in its own order than all frames of a place.
    assert spatial["spatial"] > 0.7 > 0.45 > spatial["temporal"]
    assert temporal["temporal"] == pytest.approx(1) and temporal["spatial"] < 0.3
    assert spatial["first_frame"] == 0 and temporal["first_frame"] == pytest.approx(1 / (GRID.frames - 1))
    places = statistics.Places.of(GRID, rows(GRID))
    by_frame = statistics.by_frame_distance(only(same_frame), places)
    assert by_frame[0] == pytest.approx(GRID.frames, abs=1e-4) and float(by_frame[1:].abs().max()) == 0
    by_place = statistics.by_distance(only(same_place), places)
    assert by_place[0] == pytest.approx(GRID.frame_tokens, abs=1e-3) and float(by_place[1:6].abs().max()) == 0


def test_band_is_that_of_sparse_videogen():
    """In patch-major order the band of a query is a range of place-major indices, by the definition itself."""
    frame, y, x = coordinates(GRID)
    along = (y * GRID.width + x) * GRID.frames + frame
    inside = (along[:, None] - along).abs() <= statistics.band_width(GRID.video_tokens)
    where = character(only(inside))
    assert where["temporal"] == pytest.approx(1, abs=1e-5) and where["spatial"] < 0.5
    assert float(inside.double().mean()) == pytest.approx(statistics.BAND, abs=0.002)


def test_box_around_the_query():
    frame, y, x = coordinates(GRID)
    sizes = statistics.window_sizes(GRID)
    assert sizes == (3, 4, 6)
    inside = torch.ones(GRID.tokens, GRID.tokens, dtype=torch.bool)
    for own, size, n in ((frame, sizes[0], 5), (y, sizes[1], 8), (x, sizes[2], 12)):
        start = (own - size // 2).clamp(0, n - size)[:, None]
        inside &= (own >= start) & (own < start + size)
    assert (inside.sum(1) == math.prod(sizes)).all() and inside.diagonal().all()
    assert character(only(inside))["window"] == pytest.approx(1)
    assert character(only(~inside))["window"] == 0


def test_sinks_are_common_keys_and_own_surroundings_are_not():
    sink = torch.eye(GRID.tokens) * 0.6
    sink[:, 7] += 0.4
    assert statistics.common_keys(sink) == pytest.approx(0.4, abs=0.01)
    assert statistics.common_keys(torch.eye(GRID.tokens)) < 0.02


def test_blocks_hold_what_their_keys_hold():
    weights = torch.rand(9, GRID.tokens, generator=torch.Generator().manual_seed(0)).softmax(1)
    for name in ("raster", "tile"):
        order = token_order(GRID, name, torch.device("cpu"))
        mass, sizes = statistics.block_mass(weights, order, 64)
        assert sizes.tolist() == [64] * 7 + [32] and torch.allclose(mass.sum(1), torch.ones(9))
        tokens = torch.arange(GRID.tokens) if order is None else order
        assert torch.allclose(mass[:, 3], weights[:, tokens[192:256]].sum(1))
        # The last block is half as large: at the price per key it comes in first here.
        lifted = mass.clone()
        lifted[:, 7] = mass.max() * 0.9
        assert statistics.Curve.of(lifted, sizes).density[:, 1].tolist() == pytest.approx([32 / GRID.tokens] * 9)
    # Blocks of one key are keys.
    single = statistics.Curve.of(weights, torch.ones(GRID.tokens))
    plain = statistics.Curve.of(weights)
    assert torch.allclose(single.mass, plain.mass, atol=1e-6) and torch.allclose(single.density, plain.density)


def test_curve_reads_both_ways():
    curve = statistics.Curve.of(torch.tensor([[1.0, 4.0, 2.0, 3.0]]))
    assert curve.mass_at((0.25, 0.5, 0.375, 1.0))[0].tolist() == pytest.approx([0.4, 0.7, 0.55, 1.0])
    assert curve.density_for((0.4, 0.7, 0.55, 1.0))[0].tolist() == pytest.approx([0.25, 0.5, 0.375, 1.0])


def test_overlap():
    weights = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
    best = weights.topk(2, 1).indices
    assert statistics.overlap(best, weights) == pytest.approx((0.7, 1.0))
    assert statistics.overlap(best.flip(0), weights) == pytest.approx((0.3, 3 / 7))


def test_rank_correlation():
    a = [1.0, 2.0, 3.0, 5.0]
    assert statistics.rank_correlation(a, [10.0, 20.0, 21.0, 400.0]) == pytest.approx(1)
    assert statistics.rank_correlation(a, [3.0, 2.0, 1.0, 0.0]) == pytest.approx(-1)
    assert statistics.rank_correlation(a, [1.0, 3.0, 2.0, 4.0]) == pytest.approx(0.8)
    assert statistics.rank_correlation(a, [1.0] * 4) is None and statistics.rank_correlation(a[:2], a[:2]) is None
