"""What a clip of the small model shows, by plain vision: the object's colour, shape, size and motion, and how many.

Nothing here is learned. Saturated (or near-white) pixels take the palette's nearest hue; the colour with most pixels is
the object's, and its largest region in every frame is the object. The outlines of all frames, laid over each other, are
compared with rendered shapes; the path of the region's middle is compared with the paths that the generator draws,
and its direction must agree with DIS optical flow. `look` does it all; the background is judged in `tiny_texture.py`.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from dsattn.pipelines.tiny import data
from dsattn.pipelines.tiny.render import render

Video = NDArray[np.float32]
"""[frames, height, width, 3] in [0, 1]."""

NAMES = tuple(data.COLOURS)
WHITE = NAMES.index("white")
NONE = "none"

MIN_CHROMA, MIN_WHITE = 0.28, 0.80
"""A pixel is an object's from this difference of its channels, or this smallest channel; backgrounds: 0.07, 0.66."""
MIN_RADIUS = 0.05
"""Smallest object, radius over the frame's shorter side; the smallest ones drawn have 0.12."""
MIN_TRAVEL = 0.12
"""Least extent of a path that counts as motion, in fractions of the frame; the shortest ones drawn have 0.27."""
MIN_EXPLAINED = 0.75
"""Share of the path's variance that the best kind of motion must explain."""
MIN_OVERLAP = 0.70
"""Intersection over union that the outline must have with the best rendered shape."""
SIZE_BORDER = (data.SIZES["small"][1] + data.SIZES["large"][0]) / 2
"""Radius over the shorter side that tells small from large."""
OUTLINE, OUTLINE_SCALE = 56, 24.0
"""Side of an outline's picture, and what the square root of its area is scaled to, in pixels."""
ANGLES = np.linspace(-0.30, 0.30, 13)
"""Rotations of the rendered shapes, radians; shapes are drawn with up to 0.25."""
SOFTNESS = (0.01, 0.07, 0.14, 0.21)
"""Blurs of the rendered shapes, standard deviation over radius: a small shape behind the codec has soft edges."""
PHASES = np.arange(0, 1, 1 / 32)
FLOW_SIDE, FLOW_PAIRS = 128, 8


@dataclass(frozen=True)
class Seen:
    """What a clip shows; "none" where nothing could be told.

    colour, shape, size, motion: as `data` names them. direction: the motion where it is one of the eight straight ones
    or "still". moves: the path has an extent. objects: median count of regions.
    dx, dy: displacement along the straight line that fits the path best, in fractions of the frame.
    """

    colour: str = NONE
    shape: str = NONE
    size: str = NONE
    motion: str = NONE
    direction: str = NONE
    moves: bool = False
    objects: int = 0
    dx: float = 0.0
    dy: float = 0.0


class Track(NamedTuple):
    """The object over time: frames in which it was seen, its middle in fractions of the frame, its area in pixels."""

    frames: NDArray[np.int64]
    centres: NDArray[np.float64]
    areas: NDArray[np.float64]
    outline: NDArray[np.float32]


# ---- regions -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _nearest_hue() -> NDArray[np.int8]:
    """Palette index by whole degree of hue, 0 to 360."""
    hues = np.array([colorsys.rgb_to_hsv(*data.COLOURS[name])[0] * 360 for name in NAMES])
    hues[WHITE] = np.inf
    gap = np.abs(np.arange(361)[:, None] - hues)
    return np.argmin(np.minimum(gap, np.abs(360 - gap)), axis=1).astype(np.int8)


def extremes(video: Video) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The largest and the smallest channel of every pixel (much faster than a reduction over an axis of three)."""
    red, green, blue = (video[..., i] for i in range(3))
    return np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)


def label_colours(video: Video) -> NDArray[np.int8]:
    """Palette index of every pixel, `[frames, height, width]`; -1 where the pixel is muted (background)."""
    hue = np.stack([cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2HSV)[..., 0] for frame in video])
    labels = _nearest_hue()[hue.astype(np.int16)]
    high, low = extremes(video)
    labels[high - low < MIN_CHROMA] = -1
    labels[low > MIN_WHITE] = WHITE
    return labels


def _min_area(video: NDArray[np.generic]) -> float:
    return float(np.pi * (MIN_RADIUS * min(video.shape[1:3])) ** 2)


def dominant(labels: NDArray[np.int8]) -> int:
    """Palette index of the colour with most pixels; -1 if it has less than half the least object's area."""
    counts = np.bincount(labels.ravel() + 1, minlength=len(NAMES) + 1)[1:]
    best = int(counts.argmax())
    return best if counts[best] >= _min_area(labels) * len(labels) / 2 else -1


def count_objects(labels: NDArray[np.int8]) -> int:
    """Median over frames of the number of connected regions of one colour, small ones left out."""
    least, counts = _min_area(labels), []
    for frame in labels:
        total = 0
        sizes = np.bincount(frame.ravel() + 1, minlength=len(NAMES) + 1)[1:]
        for index in np.flatnonzero(sizes >= least):
            _, _, stats, _ = cv2.connectedComponentsWithStats((frame == index).astype(np.uint8), connectivity=8)
            total += int((stats[1:, cv2.CC_STAT_AREA] >= least).sum())
        counts.append(total)
    return int(np.median(counts))


def coverage(video: Video, labels: NDArray[np.int8], colour: int) -> NDArray[np.float32]:
    """How much of every pixel the object covers, [frames, height, width] in [0, 1], from how strong its colour is."""
    inside, (high, low) = labels == colour, extremes(video)
    if colour == WHITE:
        ground = float(np.median(low[labels < 0])) if (labels < 0).any() else 0.0
        full = float(np.median(low[inside]))
        return np.clip((low - ground) / max(full - ground, 1e-3), 0, 1) * (high - low < MIN_CHROMA)
    chroma = high - low
    near = inside | (labels < 0)
    return np.clip(chroma / float(np.median(chroma[inside])), 0, 1) * near


def track(cover: NDArray[np.float32]) -> Track:
    """Follow the largest region of half-covered pixels, and lay its outlines over each other."""
    least = _min_area(cover)
    height, width = cover.shape[1:]
    frames, centres, areas = [], [], []
    outline = np.zeros((OUTLINE, OUTLINE), np.float32)
    for index, frame in enumerate(cover):
        _, regions, stats, middles = cv2.connectedComponentsWithStats((frame > 0.5).astype(np.uint8), connectivity=8)
        if len(stats) < 2:
            continue
        largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
        area = float(stats[largest, cv2.CC_STAT_AREA])
        if area < least:
            continue
        region = cv2.dilate((regions == largest).astype(np.uint8), np.ones((3, 3), np.uint8))
        outline += _outline(frame * region, middles[largest], area)
        frames.append(index)
        areas.append(area)
        centres.append((middles[largest] + 0.5) / (width, height))
    return Track(np.array(frames, np.int64), np.array(centres), np.array(areas), outline / max(len(frames), 1))


def _outline(frame: NDArray[np.float32], middle: NDArray[np.float64], area: float) -> NDArray[np.float32]:
    """The region in a picture of `OUTLINE` pixels a side, its middle in the centre, scaled to one area."""
    scale = OUTLINE_SCALE / area**0.5
    shift = (OUTLINE - 1) / 2 - scale * middle
    move = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
    return np.asarray(cv2.warpAffine(frame.astype(np.float32), move, (OUTLINE, OUTLINE), flags=cv2.INTER_LINEAR))


# ---- shape and size ------------------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """Rendered shapes: names, outlines [n, `OUTLINE`, `OUTLINE`], and their areas over their squared radius."""

    names: list[str]
    outlines: NDArray[np.float32]
    areas: NDArray[np.float64]


@lru_cache(maxsize=1)
def drawn_shapes() -> Drawn:
    """Every shape as the generator draws it and `track` sees it, at all angles and softnesses."""
    names, tracks, radius, side = [], [], 0.3, 160
    for shape in data.SHAPES:
        for angle in ANGLES:
            spec = data.ShapeSpec("red", shape, "large", "still", radius, (0.5, 0.5), 0.0, float(angle))
            image = render(data.Scene((spec,), "cloudy", 0, False, "", False, ""), 1, side, side)[0]
            for softness in SOFTNESS:
                video = cv2.GaussianBlur(image, (0, 0), softness * radius * side)[None]
                names.append(shape)
                tracks.append(track(coverage(video, label_colours(video), NAMES.index("red"))))
    areas = np.array([float(seen.areas[0]) for seen in tracks]) / (radius * side) ** 2
    return Drawn(names, np.stack([seen.outline for seen in tracks]), areas)


def tell_shape(seen: Track, side: int) -> tuple[str, str]:
    """Shape and size: the rendered outline that overlaps the object's most, and the radius that it has at this area.

    A shape that overlaps none well is "none", and its size is that of the nearest all the same.
    """
    names, outlines, areas = drawn_shapes()
    overlap = np.minimum(seen.outline, outlines).sum(axis=(1, 2)) / np.maximum(seen.outline, outlines).sum(axis=(1, 2))
    best = int(overlap.argmax())
    radius = (float(np.median(seen.areas)) / areas[best]) ** 0.5 / side
    return names[best] if overlap[best] >= MIN_OVERLAP else NONE, "small" if radius < SIZE_BORDER else "large"


# ---- motion --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _paths(frames: int) -> dict[str, NDArray[np.float64]]:
    """Paths [phases, frames, 2] of unit extent of the motions that are not straight."""
    return {
        motion: np.stack([data.path(motion, 1.0, float(phase), frames) for phase in PHASES]).astype(np.float64)
        for motion in (*data.TURNS, *data.BOUNCES)
    }


def tell_motion(seen: Track, frames: int) -> tuple[str, float, float]:
    """Kind of motion, and dx, dy of the straight line that fits best; a path that fits no kind is "none"."""
    middle = seen.centres - seen.centres.mean(axis=0)
    time = seen.frames / max(frames - 1, 1)
    time = time - time.mean()
    slope = (time @ middle) / (time @ time)
    if not moves(seen):
        return "still", *(float(v) for v in slope)
    total = float((middle**2).sum())
    explained = {"straight": float((slope**2).sum() * (time @ time)) / total}
    for motion, paths in _paths(frames).items():
        wanted = paths[:, seen.frames]
        wanted = wanted - wanted.mean(axis=1, keepdims=True)
        power = (wanted**2).sum(axis=(1, 2))
        share = (wanted * middle).sum(axis=(1, 2)).clip(min=0) ** 2 / np.maximum(power, 1e-9) / total
        explained[motion] = float(share.max())
    best = max(explained, key=explained.__getitem__)
    if explained[best] < MIN_EXPLAINED:
        best = NONE
    return sector(*slope) if best == "straight" else best, float(slope[0]), float(slope[1])


def moves(seen: Track) -> bool:
    """Whether the path has an extent, a tenth of the frames at either end of it left out."""
    low, high = np.percentile(seen.centres, (5, 95), axis=0)
    return bool((high - low).max() >= MIN_TRAVEL * 0.9)


def sector(dx: float, dy: float) -> str:
    """The nearest of the eight directions; y points down."""
    unit = {name: np.array(step) / np.hypot(*step) for name, step in data.DIRECTIONS.items()}
    return max(unit, key=lambda name: float(unit[name] @ (dx, dy)))


def object_flow(video: Video, cover: NDArray[np.float32], seen: Track) -> NDArray[np.float64]:
    """Sum (x, y) of DIS optical flow on the object from its first to its last frame, in fractions of the frame."""
    inside = cover > 0.5
    some = seen.frames[:: max(1, len(seen.frames) // 4)]
    contrast = np.abs(video[some][inside[some]].mean(axis=0) - video[some][cover[some] < 0.1].mean(axis=0))
    channel = video[..., int(contrast.argmax())]
    scale = min(1.0, FLOW_SIDE / min(channel.shape[1:]))
    picks = seen.frames[np.unique(np.linspace(0, len(seen.frames) - 1, FLOW_PAIRS + 1).round().astype(int))]
    grey = [cv2.resize(channel[i], None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) for i in picks]
    grey = [np.clip(255 * image, 0, 255).astype(np.uint8) for image in grey]
    estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    total = np.zeros(2)
    for at, before, after in zip(picks, grey[:-1], grey[1:], strict=False):
        flow = estimator.calc(before, after, None)
        mask = cv2.resize(inside[at].astype(np.uint8), before.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0
        if mask.any():
            total += flow[mask].mean(axis=0) / before.shape[::-1]
    return total


def tell_direction(dx: float, dy: float, flow: NDArray[np.float64]) -> str:
    """Direction of the path; "none" if optical flow on the object points elsewhere (more than 45 degrees off)."""
    size = np.hypot(dx, dy) * np.hypot(*flow)
    return sector(dx, dy) if size > 0 and (dx * flow[0] + dy * flow[1]) / size > 0.7071 else NONE


# ---- all of it -----------------------------------------------------------------------------------------------------


def look(video: Video, labels: NDArray[np.int8] | None = None) -> Seen:
    """Measure one clip `[frames, height, width, 3]` in [0, 1]; `labels` are those of `label_colours`, if at hand."""
    video = np.asarray(video, np.float32)
    labels = label_colours(video) if labels is None else labels
    colour = dominant(labels)
    if colour < 0:
        return Seen()
    objects = count_objects(labels)
    cover = coverage(video, labels, colour)
    seen = track(cover)
    if len(seen.frames) < max(3, len(video) // 3):
        return Seen(NAMES[colour], objects=objects)
    shape, size = tell_shape(seen, min(video.shape[1:3]))
    motion, dx, dy = tell_motion(seen, len(video))
    direction = "still" if motion == "still" else NONE
    if motion in data.DIRECTIONS:
        # A region that moves while the picture does not flow, or flows elsewhere, is no moving object.
        motion = direction = tell_direction(dx, dy, object_flow(video, cover, seen))
    return Seen(
        colour=NAMES[colour],
        shape=shape,
        size=size,
        motion=motion,
        direction=direction,
        moves=motion != "still",
        objects=objects,
        dx=round(dx, 3),
        dy=round(dy, 3),
    )
