"""Metrics of one video over time: VBench's temporal flickering, and motion measured by optical flow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsattn.errors import UsageError
from dsattn.metrics.frames import Frames, check_frames, check_side

# DIS flow looks at patches of 8 pixels on a pyramid.
FLOW_SIDE = 16
FLOW_FPS = 8


def temporal_flickering(frames: Frames) -> float:
    """VBench's ``temporal_flickering``: one minus the mean absolute change between neighbouring frames, in [0, 1].

    ``(255 - mean_t mean_pixels |I_t - I_{t+1}|) / 255``; the mean over time is of the pairs' means. Computed without
    rounding here; VBench averages pixels in float32, which agrees to about 1e-7. VBench means it for static scenes: a
    moving one scores lower.

    Source: ``vbench/temporal_flickering.py`` of VBench 0.1.5 (arXiv 2311.17982).

    Args:
        frames: ``[frames, height, width, 3]`` uint8, at least 2 frames.

    Raises:
        UsageError: not such frames, or one frame only.

    """
    _check_time(frames, "temporal_flickering")
    changes = [
        np.abs(a.astype(np.int16) - b).sum(dtype=np.int64) / a.size
        for a, b in zip(frames[:-1], frames[1:], strict=True)
    ]
    return float((255.0 - np.mean(changes)) / 255.0)


@dataclass(frozen=True)
class Motion:
    """Proxies for motion; never to be called by a VBench name.

    Args:
        proxy_flow: mean over frame pairs of the mean of the largest 5 % flow magnitudes, in pixels of a frame whose
            shorter side is 256.
        proxy_dynamic: 1 if the clip counts as moving by VBench's rule for ``dynamic_degree``, else 0.
        proxy_warp_error: mean absolute difference, in [0, 1], between a frame and the next one moved back along the
            flow: change that motion does not explain.

    """

    proxy_flow: float
    proxy_dynamic: float
    proxy_warp_error: float


def motion(frames: Frames, fps: float) -> Motion:
    """Motion proxies from OpenCV's DIS optical flow (medium preset) on luma.

    Looks at every ``max(1, round(fps / 8))``-th frame. A clip is moving when at least ``round(4 n / 16)`` pairs of
    the ``n`` frames looked at, and at least one, have a flow above ``6 min(height, width) / 256`` pixels.

    Source: the rule is that of VBench's ``dynamic_degree``.
    Differs in: VBench estimates flow with RAFT and trained weights, so figures cannot be compared with its own; it
    calls every clip of two or fewer looked-at frames moving.

    Args:
        frames: ``[frames, height, width, 3]`` uint8, at least 2 frames, sides of at least 16 pixels.
        fps: frames per second, above 0.

    Raises:
        UsageError: not such frames, or OpenCV is not installed.

    """
    _check_time(frames, "motion")
    check_side(frames, FLOW_SIDE, "motion")
    try:
        import cv2
    except ImportError as error:
        raise UsageError("motion needs OpenCV: pip install opencv-python-headless") from error
    step = max(1, round(fps / FLOW_FPS))
    kept = frames[::step] if len(frames) > step else frames[[0, -1]]
    grey = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in kept]
    estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    side = min(frames.shape[1:3])
    sizes, errors = [], []
    for before, after in zip(grey[:-1], grey[1:], strict=True):
        flow = estimator.calc(before, after, None)
        sizes.append(_largest(flow))
        at = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in before.shape[::-1])), axis=-1) + flow
        back = cv2.remap(after, at, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        errors.append(float(np.abs(before.astype(np.int16) - back).mean()) / 255)
    moving = sum(size > 6 * side / 256 for size in sizes)
    return Motion(
        proxy_flow=float(np.mean(sizes)) * 256 / side,
        proxy_dynamic=float(moving >= max(1, round(4 * len(grey) / 16))),
        proxy_warp_error=float(np.mean(errors)),
    )


def _largest(flow: NDArray[np.float32]) -> float:
    """Mean of the largest 5 % of the lengths of ``[height, width, 2]``."""
    lengths = np.sort(np.linalg.norm(flow, axis=-1), axis=None)
    return float(lengths[-max(1, int(lengths.size * 0.05)) :].mean())


def _check_time(frames: Frames, metric: str) -> None:
    check_frames(frames, frames)
    if len(frames) < 2:
        raise UsageError(f"{metric} compares neighbouring frames: needs at least 2 of them, got {len(frames)}")
