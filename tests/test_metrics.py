"""Metrics against their formulas and against values worked out by hand."""

import math

import numpy as np
import pytest
import torch

from dsattn.errors import UsageError
from dsattn.metrics import Fidelity, psnr, relative_l2, ssim


def video(seed: int, frames: int = 3, height: int = 19, width: int = 23) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("shift", [1, 5, 40])
def test_psnr_of_a_constant_error(shift):
    a = np.full((2, 16, 16, 3), 100, np.uint8)
    result = psnr(a, a + np.uint8(shift))
    assert result.per_frame == pytest.approx([20 * math.log10(255 / shift)] * 2, abs=1e-9)
    assert not result.identical


def test_psnr_mean_and_worst_leave_equal_frames_out():
    a = video(0)
    b = a.copy()
    b[1] = np.where(b[1] < 128, b[1] + 2, b[1] - 2)
    b[2] = np.where(b[2] < 128, b[2] + 10, b[2] - 10)
    result = psnr(a, b)
    want = [20 * math.log10(255 / 2), 20 * math.log10(255 / 10)]
    assert result.per_frame[0] is None
    assert result.mean == pytest.approx(sum(want) / 2, abs=1e-9)
    assert (result.worst, result.worst_frame) == (pytest.approx(want[1], abs=1e-9), 2)
    assert not result.identical


def test_identical_videos():
    a = video(1)
    both = psnr(a, a.copy())
    assert both.identical and both.mean is None and both.worst is None and both.worst_frame is None
    assert ssim(a, a.copy()).per_frame == pytest.approx([1.0] * 3, abs=1e-12)


def test_ssim_against_the_definition():
    """The centre of an 11 x 11 grey image sees exactly one full window: compare the formula there."""
    rng = np.random.default_rng(2)
    a, b = (rng.integers(0, 256, (1, 11, 11, 3), dtype=np.uint8) for _ in range(2))
    weight = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weight = np.outer(weight, weight) / np.outer(weight, weight).sum()
    values = []
    for channel in range(3):
        x, y = (frames[0, ..., channel].astype(float) for frames in (a, b))
        mx, my = (weight * x).sum(), (weight * y).sum()
        vx, vy = (weight * x * x).sum() - mx**2, (weight * y * y).sum() - my**2
        cov = (weight * x * y).sum() - mx * my
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    # skimage averages over the pixels whose window lies inside: here the centre alone.
    assert ssim(a, b).per_frame[0] == pytest.approx(np.mean(values), abs=1e-9)


def test_ssim_falls_with_noise():
    a = np.tile(np.linspace(0, 255, 32).astype(np.uint8)[None, None, :, None], (1, 32, 1, 3))
    noise = np.random.default_rng(3).normal(size=a.shape)
    noisy = [np.clip(a + noise * level, 0, 255).astype(np.uint8) for level in (2, 10, 40)]
    means = [ssim(a, n).mean for n in noisy]
    assert 1 > means[0] > means[1] > means[2]


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [
        (video(0), video(0, frames=4), "one shape"),
        (video(0)[0], video(0)[0], "frames, height, width, 3"),
        (video(0).astype(float), video(0).astype(float), "uint8"),
        (video(0)[:0], video(0)[:0], "not empty"),
    ],
)
def test_wrong_frames(a, b, word):
    with pytest.raises(UsageError, match=word):
        psnr(a, b)


def test_frames_too_small_for_ssim():
    small = video(0, height=10)
    with pytest.raises(UsageError, match="at least 11x11"):
        ssim(small, small)


def test_relative_l2():
    a = torch.tensor([3.0, 4.0])
    assert relative_l2(a, torch.tensor([3.0, 4.5])) == pytest.approx(0.1, abs=1e-12)
    assert relative_l2(a, a) == 0
    assert relative_l2(torch.zeros(2), a) == math.inf
    assert relative_l2(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_l2(a.bfloat16(), a) == 0
    with pytest.raises(UsageError, match="one shape"):
        relative_l2(a, a[:1])


def test_to_dict_is_plain():
    assert Fidelity((None, 2.0)).to_dict() == {
        "mean": 2.0,
        "worst": 2.0,
        "worst_frame": 1,
        "identical": False,
        "per_frame": [None, 2.0],
    }
