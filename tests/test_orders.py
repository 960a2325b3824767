"""Token orders: permutations that leave text and prefix alone."""

import pytest
import torch

from dsattn.grid import VideoGrid
from dsattn.orders import token_order

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "grid",
    [
        VideoGrid(3, 17, 9),
        VideoGrid(2, 8, 8, text=5, text_first=True, prefix=4),
        VideoGrid(1, 1, 1),
        VideoGrid(4, 30, 45, text=7),
    ],
)
def test_tile_is_a_permutation_within_frames(grid):
    order = token_order(grid, "tile", CPU)
    assert torch.equal(order.sort().values, torch.arange(grid.tokens))
    outside = [t for a, b in grid.exact_segments for t in range(a, b)]
    assert order[outside].tolist() == outside
    video = order[grid.video_start : grid.video_end].view(grid.frames, -1) - grid.video_start
    assert torch.equal(video // grid.frame_tokens, torch.arange(grid.frames)[:, None].expand_as(video))


def test_tile_blocks_are_squares():
    order = token_order(VideoGrid(1, 16, 24), "tile", CPU)
    rows, columns = order[64:128] // 24, order[64:128] % 24
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 7, 8, 15)


def test_raster_is_the_given_order():
    assert token_order(VideoGrid(2, 3, 4), "raster", CPU) is None
