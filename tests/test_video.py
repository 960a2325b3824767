"""Files are whole or absent, and panels show what they claim."""

from pathlib import Path

import numpy as np
import pytest

from dsattn.errors import DsattnError, UsageError
from dsattn.video import (
    CAPTION_HEIGHT,
    SaveError,
    atomic,
    check_writable,
    read_mp4,
    side_by_side,
    to_uint8,
    write_mp4,
)


def smooth(frames: int = 7, height: int = 48, width: int = 64) -> np.ndarray:
    """A gradient that brightens with time: survives lossy coding."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    value = 40 + 8 * t + 60 * y / height + 80 * x / width
    return np.repeat(value[..., None], 3, axis=-1).astype(np.uint8)


def test_round_trip(tmp_path):
    frames = smooth()
    write_mp4(tmp_path / "new" / "clip.mp4", frames, fps=8)
    back = read_mp4(tmp_path / "new" / "clip.mp4")
    assert back.shape == frames.shape
    # Lossy: the error stays far below the 8 grey levels between frames.
    assert np.abs(back.astype(int) - frames).mean() < 3
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["clip.mp4"]


def test_odd_sizes_are_padded_to_even(tmp_path):
    write_mp4(tmp_path / "odd.mp4", smooth(3, 33, 47), fps=8)
    assert read_mp4(tmp_path / "odd.mp4").shape == (3, 34, 48, 3)


def test_one_frame(tmp_path):
    write_mp4(tmp_path / "one.mp4", smooth(1), fps=8)
    assert read_mp4(tmp_path / "one.mp4").shape[0] == 1


def test_atomic_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_unwritable_video_is_rescued(tmp_path):
    (tmp_path / "file").write_text("")
    frames = smooth(2)
    with pytest.raises(SaveError, match=r"the frames are in .*\.npy") as caught:
        write_mp4(tmp_path / "file" / "clip.mp4", frames, fps=8)
    rescued = Path(str(caught.value).rsplit(" ", 1)[1])
    assert np.array_equal(np.load(rescued), frames)
    rescued.unlink()


def test_check_writable(tmp_path):
    check_writable(tmp_path / "a" / "b" / "c.mp4")
    assert list(tmp_path.iterdir()) == [], "checking must leave nothing behind"
    with pytest.raises(UsageError, match="is a folder"):
        check_writable(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file, expected a folder"):
        check_writable(tmp_path / "file" / "c.mp4")
    with pytest.raises(UsageError, match="cannot be written"):
        check_writable(Path("/proc/no/c.mp4"))


def test_read_of_no_video(tmp_path):
    (tmp_path / "no.mp4").write_bytes(b"no video")
    with pytest.raises(UsageError, match="cannot be read as a video"):
        read_mp4(tmp_path / "no.mp4")


def test_to_uint8_rounds_and_refuses_nan():
    values = np.array([0, 0.4 / 255, 0.6 / 255, 1, 1.7, -0.2], np.float32).reshape(1, 1, 2, 3)
    assert to_uint8(values).flatten().tolist() == [0, 0, 1, 255, 255, 0]
    with pytest.raises(DsattnError, match="not finite"):
        to_uint8(np.full((1, 1, 1, 3), np.nan))


def test_side_by_side_panels():
    dense = smooth(2, 48, 400)
    sparse = dense.copy()
    sparse[:, 10:20, 10:20] += 5
    out = side_by_side(dense, sparse, ("dense", "topk", "difference"))
    assert out.shape == (2, 48 + CAPTION_HEIGHT, 1200, 3) and out.dtype == np.uint8
    body = out[:, CAPTION_HEIGHT:]
    assert np.array_equal(body[:, :, :400], dense)
    assert np.array_equal(body[:, :, 400:800], sparse)
    difference = body[:, :, 800:]
    assert (difference[:, 10:20, 10:20] == 20).all() and difference.sum() == 2 * 10 * 10 * 3 * 20
    bar = out[:, :CAPTION_HEIGHT]
    assert all(bar[:, :, start : start + 400].max() > 200 for start in (0, 400, 800)), "each panel has a caption"


def test_small_frames_are_enlarged():
    tiny = smooth(1, 16, 24)
    out = side_by_side(tiny, tiny, ("a caption that is much longer than its panel is wide " * 3, "b", "c"))
    assert out.shape == (1, 16 * 14 + CAPTION_HEIGHT, 3 * 24 * 14, 3)
    assert np.array_equal(out[:, CAPTION_HEIGHT::14, : 24 * 14 : 14], tiny)
