"""Procedural captioned clips: coloured shapes that move over textured, muted backgrounds.

A clip is drawn from a `Scene`, a plain record of every attribute, so the caption and the pixels cannot disagree.
All sizes and speeds are relative to the frame: the same scene can be rendered at any height, width and frame count.

Caption grammar (words in [] are optional, | separates alternatives)::

    caption    := [prefix] object motion [and object motion] relation "a" background "background" [pillar] [camera]
    prefix     := "a video of" | "a clip of"
    object     := ("a" | "an") [small | large] colour shape
    motion     := verb direction | "stays still" | "does not move" | "rests"
    verb       := moves | slides | drifts | glides | travels
    direction  := left | "to the left" | right | "to the right" | up | upwards | down | downwards
    relation   := over | on | across | "in front of"
    pillar     := "behind a grey pillar"
    camera     := "while the camera pans" (left | right)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.08, 0.08),
    "green": (0.08, 0.75, 0.12),
    "blue": (0.10, 0.20, 0.95),
    "yellow": (0.97, 0.92, 0.08),
    "purple": (0.62, 0.08, 0.80),
    "orange": (1.00, 0.50, 0.02),
    "cyan": (0.05, 0.85, 0.92),
    "white": (0.99, 0.99, 0.99),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond")
SIZES = {"small": (0.12, 0.15), "large": (0.19, 0.24)}
MOTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
TRAVEL = (0.38, 0.52)
"""Path length over the clip, as a fraction of the frame."""
BACKGROUNDS = ("striped", "checkered", "cloudy", "gradient", "dotted")

VERBS = ("moves", "slides", "drifts", "glides", "travels")
STILL_PHRASES = ("stays still", "does not move", "rests")
DIRECTION_PHRASES = {
    "left": ("left", "to the left"),
    "right": ("right", "to the right"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
}
RELATIONS = ("over", "on", "across", "in front of")
PREFIXES = ("a video of", "a clip of")

DEFAULT_PROMPT = "a large red circle moves left over a striped background"
"""A prompt in the grammar, used where a command or example needs one."""


@dataclass(frozen=True)
class ShapeSpec:
    """One moving shape. `centre` is its position at mid-clip, `travel` its path length, in fractions of the frame."""

    colour: str
    shape: str
    size: str
    motion: str
    radius: float
    centre: tuple[float, float]
    travel: float
    angle: float

    @property
    def combination(self) -> tuple[str, str, str]:
        """What the held-out split is made of: (colour, shape, motion)."""
        return (self.colour, self.shape, self.motion)


@dataclass(frozen=True)
class Scene:
    """Everything that decides one clip: its shapes, its background and the wording of its caption."""

    shapes: tuple[ShapeSpec, ...]
    background: str
    texture_seed: int
    pillar: bool
    pan: str
    caption: str


def is_held_out(colour: str, shape: str, motion: str) -> bool:
    """Whether this combination is never shown in training (about one in eight, by a fixed hash)."""
    digest = hashlib.sha256(f"{colour}/{shape}/{motion}".encode()).digest()
    return motion != "still" and digest[0] % 8 == 0


def held_out_combinations() -> list[tuple[str, str, str]]:
    """All (colour, shape, motion) triples of the held-out split, in a fixed order."""
    return [(c, s, m) for c in COLOURS for s in SHAPES for m in MOTIONS if is_held_out(c, s, m)]


def _choice(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def _room(motion: str, radius: float, travel: float) -> tuple[float, float]:
    """How far from the middle of the frame the centre at mid-clip may lie (x, y) for the path to stay inside."""
    dx, dy = MOTIONS[motion]
    return max(0.49 - radius - abs(dx) * travel / 2, 0.0), max(0.49 - radius - abs(dy) * travel / 2, 0.0)


def _draw_shape(rng: np.random.Generator, colour: str, shape: str, motion: str) -> ShapeSpec:
    size = _choice(rng, tuple(SIZES))
    radius = float(rng.uniform(*SIZES[size]))
    travel = 0.0 if motion == "still" else float(rng.uniform(*TRAVEL))
    room_x, room_y = _room(motion, radius, travel)
    centre = (0.5 + float(rng.uniform(-room_x, room_x)), 0.5 + float(rng.uniform(-room_y, room_y)))
    return ShapeSpec(colour, shape, size, motion, radius, centre, travel, float(rng.uniform(-0.25, 0.25)))


def _describe(rng: np.random.Generator, spec: ShapeSpec) -> str:
    size = f"{spec.size} " if rng.random() < 0.8 else ""
    if spec.motion == "still":
        motion = _choice(rng, STILL_PHRASES)
    else:
        motion = f"{_choice(rng, VERBS)} {_choice(rng, DIRECTION_PHRASES[spec.motion])}"
    article = "an" if not size and spec.colour == "orange" else "a"
    return f"{article} {size}{spec.colour} {spec.shape} {motion}"


def _caption(rng: np.random.Generator, shapes: Sequence[ShapeSpec], background: str, pillar: bool, pan: str) -> str:
    parts = [" and ".join(_describe(rng, s) for s in shapes), _choice(rng, RELATIONS), f"a {background} background"]
    if rng.random() < 0.15:
        parts.insert(0, _choice(rng, PREFIXES))
    if pillar:
        parts.append("behind a grey pillar")
    if pan:
        parts.append(f"while the camera pans {pan}")
    return " ".join(parts)


def sample_scene(rng: np.random.Generator, held_out: bool = False, simple: bool = False) -> Scene:
    """Draw one scene.

    Args:
        rng: the only source of randomness.
        held_out: draw the first shape from the held-out combinations (training scenes never contain one).
        simple: one moving shape, no pillar and no camera pan (what the evaluation uses).

    """
    motions = tuple(m for m in MOTIONS if m != "still")
    if held_out:
        options = held_out_combinations()
        combos = [options[int(rng.integers(len(options)))]]
    else:
        combos = []
        count = 2 if not simple and rng.random() < 0.10 else 1
        while len(combos) < count:
            motion = "still" if not simple and rng.random() < 0.08 else _choice(rng, motions)
            combo = (_choice(rng, tuple(COLOURS)), _choice(rng, SHAPES), motion)
            if not is_held_out(*combo) and all(combo[0] != other[0] for other in combos):
                combos.append(combo)
    shapes = tuple(_draw_shape(rng, *combo) for combo in combos)
    background = _choice(rng, BACKGROUNDS)
    pillar = not simple and rng.random() < 0.06
    pan = _choice(rng, ("left", "right")) if not simple and rng.random() < 0.06 else ""
    texture_seed = int(rng.integers(2**31))
    return Scene(shapes, background, texture_seed, pillar, pan, _caption(rng, shapes, background, pillar, pan))


def other_motion(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene with every shape moving elsewhere: the opposite way where training may show that, else any other.

    Everything else (colours, sizes, background, position at mid-clip as far as the path allows) stays, so a pair of
    such scenes differs in what the words for the direction mean and in nothing besides.
    """
    turned = []
    for spec in scene.shapes:
        dx, dy = MOTIONS[spec.motion]
        moving = [m for m in MOTIONS if m not in ("still", spec.motion)]
        allowed = [m for m in moving if not is_held_out(spec.colour, spec.shape, m)]
        opposite = [m for m in allowed if MOTIONS[m] == (-dx, -dy)]
        motion = _choice(rng, opposite or allowed or ["still"])
        travel = 0.0 if motion == "still" else spec.travel or float(rng.uniform(*TRAVEL))
        room_x, room_y = _room(motion, spec.radius, travel)
        x, y = (0.5 + min(max(c - 0.5, -r), r) for c, r in zip(spec.centre, (room_x, room_y), strict=True))
        turned.append(replace(spec, motion=motion, travel=travel, centre=(x, y)))
    caption = _caption(rng, turned, scene.background, scene.pillar, scene.pan)
    return replace(scene, shapes=tuple(turned), caption=caption)


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


def shape_centres(spec: ShapeSpec, frames: int) -> FloatArray:
    """Centre (x, y) of a shape in every frame, `[frames, 2]`, in fractions of the width and height."""
    time = np.linspace(-0.5, 0.5, frames, dtype=np.float32) if frames > 1 else np.zeros(1, np.float32)
    direction = np.asarray(MOTIONS[spec.motion], np.float32)
    return np.asarray(np.asarray(spec.centre, np.float32) + time[:, None] * spec.travel * direction, dtype=np.float32)


def _paste(video: FloatArray, spec: ShapeSpec) -> None:
    """Draw one shape into `video` [F, H, W, 3] in place, touching only a window around it."""
    frames, height, width, _ = video.shape
    radius = spec.radius * min(height, width)
    half = int(np.ceil(radius * 1.25)) + 2
    window = np.arange(-half, half + 1)
    base = np.asarray(COLOURS[spec.colour], np.float32)
    sin, cos = np.float32(np.sin(spec.angle)), np.float32(np.cos(spec.angle))
    for frame, (fx, fy) in enumerate(shape_centres(spec, frames)):
        px, py = fx * width - 0.5, fy * height - 0.5
        columns, rows = window + int(round(px)), window + int(round(py))
        columns, rows = columns[(columns >= 0) & (columns < width)], rows[(rows >= 0) & (rows < height)]
        if not len(columns) or not len(rows):
            continue
        dx = ((columns - px) / radius).astype(np.float32)[None, :]
        dy = ((rows - py) / radius).astype(np.float32)[:, None]
        distance = _signed_distance(spec.shape, cos * dx + sin * dy, cos * dy - sin * dx)
        alpha = np.clip(0.5 - distance * (radius / 1.5), 0, 1)[..., None]
        shade = (1.0 - 0.10 * np.clip(dy, -1, 1))[..., None] if spec.colour != "white" else np.float32(1.0)
        region = video[frame, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        region += alpha * (np.clip(base * shade, 0, 1) - region)


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
        _paste(video, spec)
    if scene.pillar:
        rng = np.random.default_rng(scene.texture_seed + 1)
        bar = max(2, round(rng.uniform(0.08, 0.14) * width))
        left = int(rng.uniform(0.3, 0.6) * width)
        tone = rng.uniform(0.15, 0.25) + 0.15 * np.sin(np.linspace(0, np.pi, bar, dtype=np.float32))
        video[:, :, left : left + bar] = tone[:, None]
    return np.clip(video, 0.0, 1.0)


def clips(seed: int, held_out: bool = False, simple: bool = False) -> Iterator[Scene]:
    """An endless, seed-determined stream of scenes; render each with `render`."""
    rng = np.random.default_rng(seed)
    while True:
        yield sample_scene(rng, held_out=held_out, simple=simple)


def vocabulary() -> list[str]:
    """Every word of the caption grammar, sorted."""
    phrases = [*COLOURS, *SHAPES, *SIZES, *BACKGROUNDS, *VERBS, *STILL_PHRASES, *RELATIONS, *PREFIXES]
    phrases += [p for options in DIRECTION_PHRASES.values() for p in options]
    phrases += ["a an and background behind a grey pillar while the camera pans left right"]
    return sorted({word for phrase in phrases for word in phrase.split()})
