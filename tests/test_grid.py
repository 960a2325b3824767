"""VideoGrid and Call: where tokens sit, and what they refuse."""

import pytest

from dsattn.grid import Call, VideoGrid


@pytest.mark.parametrize(
    ("grid", "tokens", "video", "exact"),
    [
        (VideoGrid(5, 7, 9), 315, (0, 315), ()),
        (VideoGrid(5, 7, 9, text=11), 326, (0, 315), ((315, 326),)),
        (VideoGrid(5, 7, 9, text=11, text_first=True), 326, (11, 326), ((0, 11),)),
        (VideoGrid(5, 7, 9, prefix=6), 321, (6, 321), ((0, 6),)),
        (VideoGrid(5, 7, 9, text=11, prefix=6), 332, (6, 321), ((0, 6), (321, 332))),
        (VideoGrid(5, 7, 9, text=11, text_first=True, prefix=6), 332, (17, 332), ((0, 17),)),
        (VideoGrid(1, 1, 1), 1, (0, 1), ()),
    ],
)
def test_segments(grid, tokens, video, exact):
    assert grid.tokens == tokens
    assert (grid.video_start, grid.video_end) == video
    assert grid.exact_segments == exact


@pytest.mark.parametrize("values", [{"frames": 0}, {"height": -1}, {"text": -1}, {"width": 2.0}, {"frames": True}])
def test_bad_grid_names_the_field(values):
    with pytest.raises(ValueError, match=f"VideoGrid.{next(iter(values))} must be an integer"):
        VideoGrid(**{"frames": 2, "height": 2, "width": 2, **values})


def test_bad_call():
    with pytest.raises(ValueError, match=r"Call.step must be an integer >= 0, got -1"):
        Call(0, -1, VideoGrid(1, 1, 1))
