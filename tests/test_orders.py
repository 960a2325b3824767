"""Token orders: permutations that leave text and prefix alone."""

import pytest
import torch

from dsattn.grid import VideoGrid
from dsattn.orders import token_order

CPU = torch.device("cpu")


GRIDS = [
    VideoGrid(3, 17, 9),
    VideoGrid(2, 8, 8, text=5, text_first=True, prefix=4),
    VideoGrid(1, 1, 1),
    VideoGrid(4, 30, 45, text=7),
]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["tile", "morton", "hilbert"])
def test_orders_are_permutations_that_leave_text_and_prefix_alone(name, grid):
    order = token_order(grid, name, CPU)
    assert torch.equal(order.sort().values, torch.arange(grid.tokens))
    outside = [t for a, b in grid.exact_segments for t in range(a, b)]
    assert order[outside].tolist() == outside


@pytest.mark.parametrize("grid", GRIDS)
def test_tile_stays_within_frames(grid):
    order = token_order(grid, "tile", CPU)
    video = order[grid.video_start : grid.video_end].view(grid.frames, -1) - grid.video_start
    assert torch.equal(video // grid.frame_tokens, torch.arange(grid.frames)[:, None].expand_as(video))


def test_tile_blocks_are_squares():
    order = token_order(VideoGrid(1, 16, 24), "tile", CPU)
    rows, columns = order[64:128] // 24, order[64:128] % 24
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 7, 8, 15)


def test_raster_is_the_given_order():
    assert token_order(VideoGrid(2, 3, 4), "raster", CPU) is None


def places(order: torch.Tensor, grid: VideoGrid) -> torch.Tensor:
    return torch.stack([order // grid.frame_tokens, order % grid.frame_tokens // grid.width, order % grid.width], -1)


@pytest.mark.parametrize("side", [2, 4, 8, 16])
def test_hilbert_steps_to_a_neighbour_every_time(side):
    grid = VideoGrid(side, side, side)
    steps = places(token_order(grid, "hilbert", CPU), grid).diff(dim=0).abs().sum(-1)
    assert bool((steps == 1).all())


def test_morton_counts_in_the_bits_of_frame_row_and_column():
    grid = VideoGrid(2, 4, 4)
    at = places(token_order(grid, "morton", CPU), grid).tolist()
    assert at[:9] == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1], [0, 0, 2]]


@pytest.mark.parametrize("name", ["morton", "hilbert"])
def test_curves_cut_a_cube_into_cubes(name):
    """64 consecutive positions, aligned, are 4 frames × 4 rows × 4 columns."""
    grid = VideoGrid(8, 16, 16)
    at = places(token_order(grid, name, CPU), grid).view(-1, 64, 3)
    assert bool((at.amax(1) - at.amin(1) == 3).all())
