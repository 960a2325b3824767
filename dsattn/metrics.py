"""What is measured: time and memory of a run, and how far its video is from the dense one of the same seed.

The latter is fidelity, not quality in itself.
"""

from __future__ import annotations

import math
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsattn.errors import UsageError

Frames = NDArray[np.uint8]

# Width of the SSIM window: sigma 1.5 cut at 3.5 sigma gives a radius of 5.
SSIM_WINDOW = 11

RSS_INTERVAL_S = 0.02
_STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class Fidelity:
    """One metric over the frames of a video.

    Args:
        per_frame: value of every frame; None where the metric is infinite because the frames are equal.

    """

    per_frame: tuple[float | None, ...]

    @property
    def identical(self) -> bool:
        """Every frame is infinite: the two videos are equal."""
        return all(value is None for value in self.per_frame)

    @property
    def mean(self) -> float | None:
        """Mean over the frames with a finite value; None if there is none."""
        finite = [value for value in self.per_frame if value is not None]
        return sum(finite) / len(finite) if finite else None

    @property
    def worst(self) -> float | None:
        """Lowest frame; None if every frame is infinite."""
        return min((value for value in self.per_frame if value is not None), default=None)

    @property
    def worst_frame(self) -> int | None:
        """Index of the lowest frame."""
        return None if self.worst is None else self.per_frame.index(self.worst)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        return {
            "mean": self.mean,
            "worst": self.worst,
            "worst_frame": self.worst_frame,
            "identical": self.identical,
            "per_frame": list(self.per_frame),
        }


def psnr(reference: Frames, other: Frames) -> Fidelity:
    """Peak signal-to-noise ratio of every frame, in dB.

    ``10 log10(255² / MSE)`` with the MSE over all pixels and channels of one frame
    (``skimage.metrics.peak_signal_noise_ratio``, ``data_range=255``). The mean is over the frames' dB values.

    Args:
        reference, other: ``[frames, height, width, 3]`` uint8.

    Raises:
        UsageError: shapes or dtypes differ.

    """
    from skimage.metrics import peak_signal_noise_ratio

    check_frames(reference, other)
    return Fidelity(
        tuple(
            None if np.array_equal(a, b) else float(peak_signal_noise_ratio(a, b, data_range=255))
            for a, b in zip(reference, other, strict=True)
        )
    )


def ssim(reference: Frames, other: Frames) -> Fidelity:
    """Structural similarity of every frame, in [-1, 1]; 1 for equal frames.

    As in Wang et al. 2004: Gaussian weights of sigma 1.5 over 11 × 11 pixels, population covariance, computed per
    colour channel and averaged (``skimage.metrics.structural_similarity`` with ``gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=255, channel_axis=-1``).

    Args:
        reference, other: ``[frames, height, width, 3]`` uint8, height and width at least 11.

    Raises:
        UsageError: shapes or dtypes differ, or frames are smaller than the window.

    """
    from skimage.metrics import structural_similarity

    check_frames(reference, other)
    if min(reference.shape[1:3]) < SSIM_WINDOW:
        raise UsageError(
            f"SSIM needs frames of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, got "
            f"{reference.shape[1]}x{reference.shape[2]}"
        )
    return Fidelity(
        tuple(
            float(
                structural_similarity(
                    a, b, data_range=255, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
                )
            )
            for a, b in zip(reference, other, strict=True)
        )
    )


def relative_l2(reference: Tensor, other: Tensor) -> float:
    """``‖other - reference‖ / ‖reference‖`` in fp64; 0 for equal tensors, inf against an all-zero reference.

    Raises:
        UsageError: shapes differ.

    """
    if reference.shape != other.shape:
        raise UsageError(f"tensors must have one shape, got {tuple(reference.shape)} and {tuple(other.shape)}")
    a, b = reference.detach().double().cpu(), other.detach().double().cpu()
    difference, scale = float((b - a).norm()), float(a.norm())
    if difference == 0:
        return 0.0
    return difference / scale if scale else math.inf


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


class Clock:
    """Time on a device: ``now`` waits for it, ``mark`` does not."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> float:
        """Seconds, after all work given to the device is done."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def mark(self) -> Any:
        """A point in the device's work, for ``between``."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    @staticmethod
    def between(a: Any, b: Any) -> float:
        """Seconds between two marks; the device must be past them."""
        return float(b - a if isinstance(a, float) else a.elapsed_time(b) / 1000)


class PeakMemory(AbstractContextManager["PeakMemory"]):
    """Peak memory in a block: the allocator's on CUDA, elsewhere the process's resident set, sampled."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _STATM.exists():
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.peaks["allocated"] = torch.cuda.max_memory_allocated(self.device)
            self.peaks["reserved"] = torch.cuda.max_memory_reserved(self.device)
        elif self._thread is not None:
            self._stop.set()
            self._thread.join()

    def _sample(self) -> None:
        import resource

        page = resource.getpagesize()
        while True:
            resident = int(_STATM.read_text().split()[1]) * page
            self.peaks["process_rss"] = max(resident, self.peaks.get("process_rss", 0))
            if self._stop.wait(RSS_INTERVAL_S):
                return
