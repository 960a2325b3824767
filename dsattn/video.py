"""Videos on disk and side by side. Everything here works on uint8 frames ``[frames, height, width, 3]``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsattn.errors import DsattnError, UsageError
from dsattn.metrics import Frames, check_frames

DIFFERENCE_GAIN = 4
MIN_PANEL_WIDTH = 320
CAPTION_HEIGHT = 28


class SaveError(DsattnError, OSError):
    """A finished video could not be written where it was wanted; the message names where it is instead."""


def to_uint8(video: NDArray[Any]) -> Frames:
    """Frames in [0, 1] as uint8, rounded to nearest.

    Args:
        video: ``[frames, height, width, 3]`` floating point, or uint8 already.

    Raises:
        DsattnError: values are not finite, so the run has failed.

    """
    if video.dtype == np.uint8:
        same: Frames = video
        return same
    if not np.isfinite(video).all():
        raise DsattnError(
            f"the pipeline produced frames that are not finite ({video.dtype}); expected values in [0, 1]; "
            "try --dtype float32 or another method"
        )
    rounded: Frames = np.rint(np.clip(video, 0, 1) * 255).astype(np.uint8)
    return rounded


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Path of a temporary file in the same folder that replaces ``path`` when the block succeeds.

    The folder is made if need be; on failure nothing is left behind and an older ``path`` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Make sure that ``path`` can be written later, before any work is done; leaves nothing behind.

    Raises:
        UsageError: it is a folder, or its folder cannot be made or written.

    """
    if path.is_dir():
        raise UsageError(f"output {path} is a folder, expected the name of a file to write")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UsageError(f"output {path} cannot be written: {folder} is a file, expected a folder")
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".dsattn-"):
            pass
    except OSError as error:
        raise UsageError(
            f"output {path} cannot be written: {folder}: {error.strerror}; choose another place with -o or --out"
        ) from error


def write_mp4(path: Path, frames: Frames, fps: float) -> None:
    """Write an H.264 mp4 atomically; an odd edge is repeated once, because the format needs even sizes.

    Args:
        path: ends in ``.mp4``.
        frames: ``[frames, height, width, 3]`` uint8.
        fps: frames per second, above 0.

    Raises:
        SaveError: writing failed; the frames were saved as ``.npy`` in the system's temporary folder.

    """
    check_frames(frames, frames)
    even = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    try:
        with (
            atomic(path) as part,
            closing(_open(part, fps)) as writer,
        ):
            for frame in even:
                writer.append_data(frame)
    except (OSError, RuntimeError) as error:
        rescued = _rescue(path, frames)
        raise SaveError(f"{path} could not be written ({_first_line(error)}); the frames are in {rescued}") from error


def read_mp4(path: Path) -> Frames:
    """Frames of a video file ``[frames, height, width, 3]``.

    Raises:
        UsageError: the file cannot be read as a video.

    """
    import imageio.v2 as imageio

    try:
        reader: Any = imageio.get_reader(path, format="FFMPEG")
        with closing(reader):
            return np.stack([np.asarray(frame) for frame in reader])
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{path} cannot be read as a video: {_first_line(error)}") from error


def side_by_side(dense: Frames, sparse: Frames, captions: tuple[str, str, str]) -> Frames:
    """Three panels: dense, sparse and their absolute difference amplified ``DIFFERENCE_GAIN`` times.

    Small frames are enlarged by a whole factor so that the captions fit.

    Args:
        dense, sparse: ``[frames, height, width, 3]`` uint8 of one shape.
        captions: text above each panel.

    """
    check_frames(dense, sparse)
    difference = np.abs(dense.astype(np.int16) - sparse.astype(np.int16)) * DIFFERENCE_GAIN
    panels = np.concatenate([dense, sparse, np.minimum(difference, 255).astype(np.uint8)], axis=2)
    factor = max(1, -(-MIN_PANEL_WIDTH // dense.shape[2]))
    panels = panels.repeat(factor, axis=1).repeat(factor, axis=2)
    bar = _caption_bar(captions, dense.shape[2] * factor)
    return np.concatenate([np.broadcast_to(bar, (len(panels), *bar.shape)), panels], axis=1)


def _open(path: Path, fps: float) -> Any:
    import imageio.v2 as imageio

    return imageio.get_writer(path, format="FFMPEG", mode="I", fps=fps, codec="libx264", quality=8, macro_block_size=2)


def _caption_bar(captions: tuple[str, str, str], panel_width: int) -> Frames:
    """``[height, 3 * panel_width, 3]``: the captions, each in the largest font size that fits its panel."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (3 * panel_width, CAPTION_HEIGHT), (24, 24, 24))
    draw = ImageDraw.Draw(image)
    for position, caption in enumerate(captions):
        for size in range(16, 5, -1):
            font = ImageFont.load_default(size=size)
            if draw.textlength(caption, font=font) <= panel_width - 12:
                break
        draw.text((position * panel_width + 6, CAPTION_HEIGHT // 2), caption, fill="white", font=font, anchor="lm")
    return np.asarray(image)


def _rescue(path: Path, frames: Frames) -> str:
    """Save frames that could not be encoded where a temporary file can be made; the place in words."""
    try:
        with tempfile.NamedTemporaryFile(prefix=f"{path.stem}-", suffix=".npy", delete=False) as file:
            np.save(file, frames)
        return file.name
    except OSError as error:
        return f"no place: saving them to {tempfile.gettempdir()} failed too ({_first_line(error)})"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
