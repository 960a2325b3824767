"""How far a video is from the dense one of the same seed, frame by frame. Fidelity, not quality in itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dsattn.errors import UsageError
from dsattn.metrics.frames import Frames, check_frames, check_side

PEAK = 255
# Gaussian window of SSIM: sigma 1.5 cut at 3.5 sigma gives a radius of 5.
SSIM_SIGMA, SSIM_WINDOW = 1.5, 11
SSIM_C1, SSIM_C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
# Exponents of the five scales, finest first (Wang, Simoncelli and Bovik 2003).
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# The coarsest scale must still hold one window.
MS_SSIM_SIDE = SSIM_WINDOW * 2 ** (len(MS_SSIM_WEIGHTS) - 1)


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

    ``10 log10(255² / MSE)`` with the MSE over all pixels and channels of one frame. The mean is over the frames' dB
    values.

    Args:
        reference, other: ``[frames, height, width, 3]`` uint8.

    Raises:
        UsageError: shapes or dtypes differ.

    """
    check_frames(reference, other)
    values: list[float | None] = []
    for a, b in zip(reference, other, strict=True):
        # Squares of bytes are whole numbers: the sum is exact.
        error = int((_tensor(a).long() - _tensor(b).long()).square().sum())
        values.append(10 * math.log10(PEAK**2 * a.size / error) if error else None)
    return Fidelity(tuple(values))


def ssim(reference: Frames, other: Frames, *, device: torch.device | str = "cpu") -> Fidelity:
    """Structural similarity of every frame, in [-1, 1]; 1 for equal frames.

    As in Wang et al. 2004: Gaussian weights of sigma 1.5 over 11 × 11 pixels, population covariance, the mean over
    all windows inside the frame, per colour channel and averaged; in float64. The same as
    ``skimage.metrics.structural_similarity`` with ``gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    data_range=255, channel_axis=-1``.

    Args:
        reference, other: ``[frames, height, width, 3]`` uint8, height and width at least 11.
        device: where to compute.

    Raises:
        UsageError: shapes or dtypes differ, or frames are smaller than the window.

    """
    check_frames(reference, other)
    check_side(reference, SSIM_WINDOW, "SSIM")
    values = []
    for a, b in zip(reference, other, strict=True):
        luminance, structure = _similarity(_planes(a, device), _planes(b, device))
        values.append(float((luminance * structure).mean()))
    return Fidelity(tuple(values))


def ms_ssim(reference: Frames, other: Frames, *, device: torch.device | str = "cpu") -> Fidelity:
    """Multi-scale structural similarity of every frame, in [0, 1]; 1 for equal frames.

    Five scales, each half the one before (means of 2 × 2 pixels; an odd last row or column is left out). Per channel
    the product of the scales' mean contrast-structure terms, at the coarsest scale times luminance, each to its
    weight; then the mean over channels. A negative mean counts as 0, as it has no real power. Windows as in
    :func:`ssim`.

    Source: Wang, Simoncelli and Bovik, "Multiscale structural similarity for image quality assessment", 2003.

    Args:
        reference, other: ``[frames, height, width, 3]`` uint8, height and width at least 176.
        device: where to compute.

    Raises:
        UsageError: shapes or dtypes differ, or frames are too small for five scales.

    """
    check_frames(reference, other)
    check_side(reference, MS_SSIM_SIDE, "MS-SSIM")
    return Fidelity(
        tuple(_ms_ssim(_planes(a, device), _planes(b, device)) for a, b in zip(reference, other, strict=True))
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


def _ms_ssim(a: Tensor, b: Tensor) -> float:
    """One frame; ``[3, 1, height, width]`` float64."""
    product = torch.ones(a.shape[0], dtype=a.dtype, device=a.device)
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        if scale:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        luminance, structure = _similarity(a, b)
        coarsest = scale == len(MS_SSIM_WEIGHTS) - 1
        term = luminance * structure if coarsest else structure
        product *= term.mean(dim=(1, 2, 3)).clamp(min=0) ** weight
    return float(product.mean())


def _similarity(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance and contrast-structure terms of every window inside the frame, ``[3, 1, height - 10, width - 10]``."""
    offsets = torch.arange(SSIM_WINDOW, dtype=a.dtype, device=a.device) - SSIM_WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    weights = weights / weights.sum()
    stack = torch.cat([a, b, a * a, b * b, a * b])
    stack = F.conv2d(F.conv2d(stack, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    mean_a, mean_b, square_a, square_b, both = stack.chunk(5)
    variances = square_a - mean_a.square() + square_b - mean_b.square()
    luminance = (2 * mean_a * mean_b + SSIM_C1) / (mean_a.square() + mean_b.square() + SSIM_C1)
    return luminance, (2 * (both - mean_a * mean_b) + SSIM_C2) / (variances + SSIM_C2)


def _planes(frame: Frames, device: torch.device | str) -> Tensor:
    """``[3, 1, height, width]`` float64 of a frame ``[height, width, 3]``."""
    return _tensor(frame).to(device, torch.float64).permute(2, 0, 1)[:, None]


def _tensor(frame: Frames) -> Tensor:
    # Decoded frames may be read-only or strided backwards, which torch takes neither of.
    return torch.from_numpy(np.array(frame, copy=True))
