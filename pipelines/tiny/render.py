"""Pixels of a scene: textured, muted backgrounds and anti-aliased shapes with soft shadows.

Rendering is a function of the scene and the size alone, so a caption and its clip cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dsattn.pipelines.tiny.data import BACKGROUNDS, COLOURS, SHAPES, FloatArray, Scene, ShapeSpec, shape_centres

SHADOW_OFFSET = (0.030, 0.045)
"""Where a shadow falls (x, y), as a fraction of the shorter side."""
SHADOW_DEPTH = 0.5
"""Share of the light that a shadow takes away."""

Window = tuple[FloatArray, FloatArray, FloatArray]


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cells: int) -> FloatArray:
    """Bilinear value noise in [0, 1] with about `cells` cells along the shorter side."""
    side = min(height, width)
    rows, cols = max(2, round(cells * height / side) + 1), max(2, round(cells * width / side) + 1)
    lattice = rng.random((rows, cols), dtype=np.float32)
    y, x = np.linspace(0, rows - 1.001, height), np.linspace(0, cols - 1.001, width)
    y0, x0 = y.astype(np.int64), x.astype(np.int64)
    fy, fx = y - y0, x - x0
    fy, fx = (fy * fy * (3 - 2 * fy))[:, None], (fx * fx * (3 - 2 * fx))[None, :]
    a, b = lattice[y0][:, x0], lattice[y0][:, x0 + 1]
    c, d = lattice[y0 + 1][:, x0], lattice[y0 + 1][:, x0 + 1]
    return np.asarray((a * (1 - fx) + b * fx) * (1 - fy) + (c * (1 - fx) + d * fx) * fy, dtype=np.float32)


def _wave(phase: FloatArray, softness: float) -> FloatArray:
    """A square wave in [0, 1] with edges softened so that the patch codec can hold them."""
    return np.asarray(0.5 + 0.5 * np.tanh(np.sin(phase) * softness), dtype=np.float32)


def render_background(kind: str, seed: int, height: int, width: int, extra: int = 0) -> FloatArray:
    """A muted texture, `[height, width + extra, 3]` in [0, 1]; `extra` columns leave room for a camera pan."""
    rng = np.random.default_rng(seed)
    side = float(min(height, width))
    y = (np.arange(height, dtype=np.float32) / side)[:, None]
    x = (np.arange(width + extra, dtype=np.float32) / side)[None, :]
    angle, offset = rng.uniform(0, np.pi), rng.uniform(0, 6.28, size=2)
    u = np.asarray(np.cos(angle) * x + np.sin(angle) * y, dtype=np.float32)
    w = np.asarray(-np.sin(angle) * x + np.cos(angle) * y, dtype=np.float32)
    if kind == "striped":
        level = _wave(u * (6.28 * rng.uniform(3.0, 4.5)) + offset[0], 2.0)
    elif kind == "checkered":
        rate = 6.28 * rng.uniform(2.0, 3.0)
        product = np.sin(x * rate + offset[0]) * np.sin(y * rate + offset[1])
        level = np.asarray(0.5 + 0.5 * np.tanh(4.0 * product), dtype=np.float32)
    elif kind == "cloudy":
        level = 0.7 * _smooth_noise(rng, height, width + extra, 3) + 0.3 * _smooth_noise(rng, height, width + extra, 7)
    elif kind == "dotted":
        rate = 6.28 * rng.uniform(2.5, 3.5)
        bumps = np.cos(u * rate + offset[0]) + np.cos(w * rate + offset[1])
        level = np.asarray(0.5 + 0.5 * np.tanh(2.5 * (bumps - 0.9)), dtype=np.float32)
    elif kind == "gradient":
        level = np.asarray(0.5 + 0.6 * (u - u.mean()), dtype=np.float32)
        level = np.clip(level + 0.12 * (_smooth_noise(rng, height, width + extra, 14) - 0.5), 0, 1)
    else:
        raise ValueError(f"background must be one of {', '.join(BACKGROUNDS)}; got {kind!r}")
    dark, light = rng.uniform(0.22, 0.36), rng.uniform(0.46, 0.62)
    tint = 1.0 + 0.10 * (rng.random(3, dtype=np.float32) - 0.5)
    grey = dark + (light - dark) * level
    grain = 0.015 * (rng.random((height, width + extra), dtype=np.float32) - 0.5)
    return np.asarray((grey + grain)[..., None] * tint, dtype=np.float32)


def _polygon_distance(x: FloatArray, y: FloatArray, sides: int, turn: float) -> FloatArray:
    """Signed distance (negative inside) to the edge lines of a regular polygon with inradius 1."""
    theta = np.arange(sides) * (2 * np.pi / sides) + turn
    planes = [x * np.float32(np.cos(t)) + y * np.float32(np.sin(t)) for t in theta]
    return np.asarray(np.maximum.reduce(planes) - 1.0, dtype=np.float32)


def _signed_distance(shape: str, x: FloatArray, y: FloatArray) -> FloatArray:
    """Approximate signed distance in units of the radius; every shape covers a comparable area."""
    if shape == "circle":
        return np.asarray(np.sqrt(x * x + y * y) - 0.95, dtype=np.float32)
    if shape == "square":
        return np.asarray(np.maximum(np.abs(x), np.abs(y)) - 0.85, dtype=np.float32)
    if shape == "diamond":
        return np.asarray((np.abs(x) * 1.3 + np.abs(y)) / 1.64 - 0.68, dtype=np.float32)
    if shape == "triangle":
        return np.asarray(0.62 * _polygon_distance(x / 0.62, (y - 0.2) / 0.62, 3, np.pi / 2), dtype=np.float32)
    if shape == "star":
        theta = np.arctan2(x, -y)
        wedge = np.abs((theta / (2 * np.pi / 5)) % 1.0 - 0.5) * 2.0
        return np.asarray((np.sqrt(x * x + y * y) - (0.50 + 0.62 * wedge**1.4)) * 0.7, dtype=np.float32)
    raise ValueError(f"shape must be one of {', '.join(SHAPES)}; got {shape!r}")


def _windows(spec: ShapeSpec, video: FloatArray, offset: tuple[float, float], softness: float) -> Iterator[Window]:
    """Per frame: the pixels around a shape moved by `offset` (of the shorter side), its coverage and its vertical axis.

    Only a window around the shape is touched; coverage falls from 1 to 0 over `softness` pixels at the edge.
    """
    frames, height, width, _ = video.shape
    side = min(height, width)
    radius = spec.radius * side
    half = int(np.ceil(radius * 1.25 + softness)) + 2
    window = np.arange(-half, half + 1)
    sin, cos = np.float32(np.sin(spec.angle)), np.float32(np.cos(spec.angle))
    for frame, (fx, fy) in enumerate(shape_centres(spec, frames)):
        px, py = fx * width - 0.5 + offset[0] * side, fy * height - 0.5 + offset[1] * side
        columns, rows = window + int(round(px)), window + int(round(py))
        columns, rows = columns[(columns >= 0) & (columns < width)], rows[(rows >= 0) & (rows < height)]
        if not len(columns) or not len(rows):
            continue
        dx = ((columns - px) / radius).astype(np.float32)[None, :]
        dy = ((rows - py) / radius).astype(np.float32)[:, None]
        distance = _signed_distance(spec.shape, cos * dx + sin * dy, cos * dy - sin * dx)
        coverage = np.clip(0.5 - distance * (radius / softness), 0, 1)[..., None]
        yield video[frame, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], coverage, dy


def _paste_shadow(video: FloatArray, spec: ShapeSpec) -> None:
    """Darken what lies beside a shape, in place; blurred over a fifth of its radius."""
    softness = max(1.5, 0.2 * spec.radius * min(video.shape[1:3]))
    for region, coverage, _ in _windows(spec, video, SHADOW_OFFSET, softness):
        region *= 1.0 - SHADOW_DEPTH * coverage


def _paste(video: FloatArray, spec: ShapeSpec) -> None:
    """Draw one shape into `video` [F, H, W, 3] in place."""
    base = np.asarray(COLOURS[spec.colour], np.float32)
    for region, coverage, dy in _windows(spec, video, (0.0, 0.0), 1.5):
        shade = (1.0 - 0.10 * np.clip(dy, -1, 1))[..., None] if spec.colour != "white" else np.float32(1.0)
        region += coverage * (np.clip(base * shade, 0, 1) - region)


def render(scene: Scene, frames: int, height: int, width: int) -> FloatArray:
    """Render a scene to `[frames, height, width, 3]`, float32 in [0, 1]; the same scene gives the same pixels."""
    extra = round(0.35 * width) if scene.pan else 0
    canvas = render_background(scene.background, scene.texture_seed, height, width, extra)
    if extra:
        # The camera pans right: the view window moves right over the canvas, so the background moves left.
        shifts = np.linspace(0, extra - 1, frames) if scene.pan == "right" else np.linspace(extra - 1, 0, frames)
        whole = shifts.astype(np.int64)
        part = (shifts - whole).astype(np.float32)
        views = [
            (1 - p) * canvas[:, s : s + width] + p * canvas[:, s + 1 : s + 1 + width]
            for s, p in zip(whole, part, strict=True)
        ]
        video = np.stack(views)
    else:
        video = np.repeat(canvas[None], frames, axis=0)
    for spec in scene.shapes:
        if scene.shadow:
            _paste_shadow(video, spec)
        _paste(video, spec)
    if scene.pillar:
        rng = np.random.default_rng(scene.texture_seed + 1)
        bar = max(2, round(rng.uniform(0.08, 0.14) * width))
        left = int(rng.uniform(0.3, 0.6) * width)
        tone = rng.uniform(0.15, 0.25) + 0.15 * np.sin(np.linspace(0, np.pi, bar, dtype=np.float32))
        video[:, :, left : left + bar] = tone[:, None]
    return np.clip(video, 0.0, 1.0, out=video)
