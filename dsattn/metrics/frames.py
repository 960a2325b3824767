"""What the metrics work on: uint8 frames ``[frames, height, width, 3]`` in RGB."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsattn.errors import UsageError

Frames = NDArray[np.uint8]


def check_frames(reference: Frames, other: Frames) -> None:
    """Both videos are ``[frames, height, width, 3]`` uint8 of one shape.

    Raises:
        UsageError: naming what came.

    """
    for name, frames in (("reference", reference), ("other", other)):
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
            raise UsageError(
                f"{name} must be [frames, height, width, 3] uint8 and not empty, got {frames.shape} {frames.dtype}"
            )
    if reference.shape != other.shape:
        raise UsageError(f"the videos must have one shape, got {reference.shape} and {other.shape}")


def check_side(frames: Frames, least: int, metric: str) -> None:
    """Both sides of the frames have at least ``least`` pixels.

    Raises:
        UsageError: naming metric and size.

    """
    height, width = frames.shape[1:3]
    if min(height, width) < least:
        raise UsageError(f"{metric} needs frames of at least {least}x{least} pixels, got {height}x{width}")
