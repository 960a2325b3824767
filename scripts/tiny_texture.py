"""Which of the background families a clip shows, by texture statistics.

The object is masked out of every frame and the frames are averaged; of what is left, statistics are taken: how much a
plane explains, the gradients' common direction (structure tensor), energy by spatial frequency and by angle, the
highest repeat in the autocorrelation, the distribution of levels. A small forest of random trees, fitted on rendered
backgrounds each time it is needed, turns them into a family. It is fitted on seeds of its own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dsattn.pipelines.tiny import data
from dsattn.pipelines.tiny.render import render_background

SIDE = 64
"""Shorter side of the picture whose texture is measured, in pixels."""
BANDS = (0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 7.0, 9.0, 12.0, 24.0)
"""Borders of the frequency bands, cycles per shorter side."""
FIT_SEED, FIT_EACH, TREES = 7_000_003, 150, 150
PATTERNS = ("striped", "checkered", "dotted")
"""Families that repeat: uneven light leaves them what they are."""
MIN_SHARE = 0.35
"""Share of the trees that must agree; below it the background is "none"."""
MIN_CONTRAST = 0.012
"""Least standard deviation of the levels; a flatter picture has no texture."""


def plate(video: NDArray[np.float32], labels: NDArray[np.int8]) -> NDArray[np.float32]:
    """Mean grey background `[SIDE, ...]` or `[..., SIDE]` in [0, 1]; what the object never uncovers is filled in.

    Args:
        video: [frames, height, width, 3] in [0, 1].
        labels: of `label_colours`, negative on the background.

    """
    height, width = labels.shape[1:]
    reach = 2 * max(2, min(height, width) // 40) + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach))
    free = np.stack([cv2.dilate((frame >= 0).astype(np.uint8), kernel) == 0 for frame in labels])
    grey = (video[..., 0] + video[..., 1] + video[..., 2]) / 3
    total = (grey * free).sum(axis=0)
    count = free.sum(axis=0).astype(np.float32)
    return fill(total / np.maximum(count, 1), count > 0)


def fill(grey: NDArray[np.float32], known: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Scale `[height, width]` to `SIDE` and paint over what is not known."""
    scale = SIDE / min(grey.shape)
    size = (round(grey.shape[1] * scale), round(grey.shape[0] * scale))
    share = cv2.resize(known.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    small = cv2.resize((grey * known).astype(np.float32), size, interpolation=cv2.INTER_AREA)
    small = np.clip(small / np.maximum(share, 1e-3), 0, 1)
    hole = (share < 0.3).astype(np.uint8)
    if hole.any() and not hole.all():
        small = cv2.inpaint((small * 255).astype(np.uint8), hole, 3, cv2.INPAINT_TELEA).astype(np.float32) / 255
    return np.asarray(small, np.float32)


def _flattened(grey: NDArray[np.float32]) -> tuple[NDArray[np.float64], float]:
    """The picture without its best plane, and the share of the variance that the plane explains."""
    y, x = np.mgrid[-1 : 1 : grey.shape[0] * 1j, -1 : 1 : grey.shape[1] * 1j]
    base = np.stack([np.ones_like(x), x, y], axis=-1).reshape(-1, 3)
    weights, *_ = np.linalg.lstsq(base, grey.reshape(-1).astype(np.float64), rcond=None)
    rest = grey - (base @ weights).reshape(grey.shape)
    return rest, 1 - float(rest.var() / max(grey.var(), 1e-12))


def _spectrum(rest: NDArray[np.float64]) -> list[float]:
    """Energy by band; the second and fourth harmonic of energy over angle; the share of the strongest waves."""
    window = np.outer(np.hanning(rest.shape[0]), np.hanning(rest.shape[1]))
    power = np.abs(np.fft.fft2((rest - rest.mean()) * window)) ** 2
    fy, fx = (np.fft.fftfreq(n) * SIDE for n in rest.shape)
    radius, angle = np.hypot(fy[:, None], fx[None]), np.arctan2(fy[:, None], fx[None])
    power = power / max(power.sum(), 1e-12)
    bands = [float(power[(radius >= a) & (radius < b)].sum()) for a, b in zip(BANDS[:-1], BANDS[1:], strict=True)]
    middle = (radius > 1.5) & (radius < 12)
    energy = power[middle] / max(power[middle].sum(), 1e-12)
    second, fourth = (complex((energy * np.exp(1j * n * angle[middle])).sum()) for n in (2, 4))
    strongest = np.cumsum(np.sort(energy)[::-1])[[3, 15, 40]]
    mean_radius = float((energy * radius[middle]).sum())
    spread = float((energy * (radius[middle] - mean_radius) ** 2).sum())
    return [*bands, abs(second), abs(fourth), fourth.real, fourth.imag, *strongest, mean_radius, spread]


def _repeat(rest: NDArray[np.float64]) -> list[float]:
    """Height of the highest autocorrelation beyond the first fall below zero, and the lowest value."""
    centred = rest - rest.mean()
    padded = np.fft.rfft2(centred, s=[2 * n for n in rest.shape])
    overlap = np.fft.rfft2(np.ones_like(centred), s=[2 * n for n in rest.shape])
    shape = [2 * n for n in rest.shape]
    correlation = np.fft.irfft2(np.abs(padded) ** 2, s=shape)
    weight = np.fft.irfft2(np.abs(overlap) ** 2, s=shape)
    correlation = np.fft.fftshift(correlation / np.maximum(weight, 1) / max(float(centred.var()), 1e-12))
    y, x = (np.arange(2 * n) - n for n in rest.shape)
    radius = np.hypot(y[:, None], x[None])
    ring = (radius > SIDE / 7) & (radius < SIDE * 0.6)
    return [float(correlation[ring].max()), float(correlation[radius < SIDE * 0.6].min())]


def statistics(grey: NDArray[np.float32]) -> NDArray[np.float64]:
    """Texture statistics of a grey picture whose shorter side is `SIDE`."""
    rest, plane = _flattened(grey)
    smooth = cv2.GaussianBlur(rest, (0, 0), 1.0)
    gy, gx = np.gradient(smooth)
    tensor = np.array([(gx * gx).mean(), (gx * gy).mean(), (gy * gy).mean()])
    coherence = np.hypot(tensor[0] - tensor[2], 2 * tensor[1]) / max(tensor[0] + tensor[2], 1e-12)
    levels = (smooth - smooth.mean()) / max(smooth.std(), 1e-9)
    moments = [float((levels**n).mean()) for n in (3, 4)]
    tails = [float(v) for v in np.percentile(levels, (2, 10, 25, 50, 75, 90, 98))]
    return np.array([plane, coherence, *moments, *tails, *_spectrum(rest), *_repeat(rest)], np.float64)


def _smooth(rng: np.random.Generator, shape: tuple[int, int], reach: float) -> NDArray[np.float32]:
    """Smooth noise in about [-reach, reach], a few bumps a side."""
    coarse = rng.uniform(-1, 1, (int(rng.integers(3, 7)), int(rng.integers(3, 7)))).astype(np.float32)
    return np.asarray(cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC) * np.float32(reach))


def _example(kind: str, rng: np.random.Generator) -> NDArray[np.float32]:
    """A background as clips show it, those of a model too: bent, soft, noisy, unevenly lit, with holes.

    A model's stripes are not straight and its light is not even, and they are stripes still.
    """
    height, width = ((96, 96), (96, 160), (160, 128), (128, 176), (128, 128))[int(rng.integers(5))]
    side = min(height, width)
    image = render_background(kind, int(rng.integers(2**31)), height, width).mean(axis=-1)
    if rng.random() < 0.6:
        bend = side * rng.uniform(0, 0.05)
        x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
        x, y = x + _smooth(rng, x.shape, bend), y + _smooth(rng, x.shape, bend)
        image = cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        if kind in PATTERNS:
            image = image + _smooth(rng, image.shape, rng.uniform(0, 0.06))
    image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.1, 2.5)))
    image = image + rng.normal(0, rng.uniform(0, 0.02), image.shape).astype(np.float32)
    known = np.ones(image.shape, np.uint8)
    for _ in range(int(rng.integers(3))):
        at = (int(rng.uniform(0.1, 0.9) * width), int(rng.uniform(0.1, 0.9) * height))
        axes = (int(rng.uniform(0.05, 0.26) * side), int(rng.uniform(0.05, 0.26) * side))
        cv2.ellipse(known, at, axes, 0, 0, 360, 0, -1)
    return fill(np.asarray(image, np.float32), known > 0)


@lru_cache(maxsize=1)
def fitted() -> Any:
    """The trees, fitted on rendered backgrounds; the same every time."""
    from sklearn.ensemble import ExtraTreesClassifier

    rng = np.random.default_rng(FIT_SEED)
    kinds = [kind for kind in data.BACKGROUNDS for _ in range(FIT_EACH)]
    examples = np.stack([statistics(_example(kind, rng)) for kind in kinds])
    return ExtraTreesClassifier(TREES, max_features=0.4, random_state=0).fit(examples, kinds)


def tell_background(video: NDArray[np.float32], labels: NDArray[np.int8]) -> str:
    """The background family of a clip; "none" where nothing is left of it, it is flat, or the trees disagree."""
    if (labels < 0).mean() < 0.1:
        return "none"
    grey = plate(video, labels)
    if grey.std() < MIN_CONTRAST:
        return "none"
    trees = fitted()
    # Tree by tree: the forest's own way costs five times as much for one picture.
    row = statistics(grey)[None].astype(np.float32)
    shares = np.mean([tree.predict_proba(row, check_input=False)[0] for tree in trees.estimators_], axis=0)
    return str(trees.classes_[shares.argmax()]) if shares.max() >= MIN_SHARE else "none"
