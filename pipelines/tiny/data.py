"""Scenes of the small model's training clips: shapes that move over textured, muted backgrounds, and their captions.

A clip is drawn from a `Scene`, a plain record of every attribute, so the caption and the pixels (`render.py`) cannot
disagree. All sizes and speeds are relative to the frame: the same scene can be rendered at any height, width and frame
count.

Caption grammar (words in [] are optional, | separates alternatives)::

    caption    := [prefix] objects place [pillar] [camera] | [prefix] place objects [pillar] [camera]
    prefix     := "a video of" | "a clip of"
    objects    := object [shadow] motion {"and" object motion}                   (one to three)
    object     := ("a" | "an") [size] colour shape
    size       := small | tiny | little | large | big | huge
    shape      := circle | disc | square | triangle | star | diamond | rhombus
    shadow     := "with a shadow" | "casting a shadow"                           (then all objects have one)
    motion     := verb direction | "stays still" | "does not move" | "rests"
                | circles turn | "moves in a circle" turn
                | "bounces up and down" | "hops up and down" | "bounces left and right" | "bounces from side to side"
    verb       := moves | slides | drifts | glides | travels
    direction  := left | "to the left" | right | "to the right" | up | upwards | down | downwards
                | [diagonally] vertical "and" horizontal | "towards the" (upper | lower) (left | right) [corner]
    turn       := clockwise | anticlockwise | counterclockwise
    place      := relation "a" background (background | backdrop)
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
"""Radius, as a fraction of the shorter side of the frame."""
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up-left": (-1, -1),
    "up-right": (1, -1),
    "down-left": (-1, 1),
    "down-right": (1, 1),
}
TURNS = {"clockwise": 1, "anticlockwise": -1}
BOUNCES = ("bounce-vertical", "bounce-horizontal")
MOVING = (*DIRECTIONS, *TURNS, *BOUNCES)
MOTIONS = (*MOVING, "still")
AXES = tuple(d for d, step in DIRECTIONS.items() if 0 in step)
DIAGONALS = tuple(d for d in DIRECTIONS if d not in AXES)
MOTION_SHARES: dict[tuple[str, ...], float] = {("still",): 0.06, AXES: 0.28, DIAGONALS: 0.24, (*TURNS, *BOUNCES): 0.42}
"""How often something in training moves in each way; what turns is nearly half, because it takes longest to learn."""
OPPOSITE = {
    a: b
    for a in DIRECTIONS
    for b in DIRECTIONS
    if all(x == -y for x, y in zip(DIRECTIONS[a], DIRECTIONS[b], strict=True))
}
OPPOSITE |= {"clockwise": "anticlockwise", "anticlockwise": "clockwise"}
OPPOSITE |= {"bounce-vertical": "bounce-horizontal", "bounce-horizontal": "bounce-vertical"}
TRAVEL = (0.38, 0.52)
"""Extent of a path, as a fraction of the frame: length of a straight one, diameter of a circle, height of a bounce."""
BACKGROUNDS = ("striped", "checkered", "cloudy", "gradient", "dotted")

VERBS = ("moves", "slides", "drifts", "glides", "travels")
SIZE_WORDS = {"small": ("small", "small", "tiny", "little"), "large": ("large", "large", "big", "huge")}
SHAPE_WORDS = {s: (s,) for s in SHAPES} | {
    "circle": ("circle", "circle", "disc"),
    "diamond": ("diamond", "diamond", "rhombus"),
}
STILL_PHRASES = ("stays still", "does not move", "rests")
STRAIGHT_PHRASES = {
    "left": ("left", "to the left"),
    "right": ("right", "to the right"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
}
TURN_WORDS = {"clockwise": ("clockwise",), "anticlockwise": ("anticlockwise", "counterclockwise")}
BOUNCE_PHRASES = {
    "bounce-vertical": ("bounces up and down", "hops up and down"),
    "bounce-horizontal": ("bounces left and right", "bounces from side to side"),
}
SHADOW_PHRASES = ("with a shadow", "casting a shadow")
RELATIONS = ("over", "on", "across", "in front of")
PREFIXES = ("a video of", "a clip of")
MAX_WORDS = 46
"""Longest caption; a longer one is worded anew, more briefly."""

DEFAULT_PROMPT = "a large red circle moves left over a striped background"
"""A prompt in the grammar, used where a command or example needs one."""


@dataclass(frozen=True)
class ShapeSpec:
    """One moving shape. `centre` is the middle of its path, `travel` the extent of the path, in fractions of the frame.

    `phase` (0 to 1) is where on its path a circling or bouncing shape starts; straight paths ignore it.
    """

    colour: str
    shape: str
    size: str
    motion: str
    radius: float
    centre: tuple[float, float]
    travel: float
    angle: float
    phase: float = 0.0

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
    shadow: bool
    caption: str


def is_held_out(colour: str, shape: str, motion: str) -> bool:
    """Whether this combination is never shown in training (about one in eight, by a fixed hash)."""
    digest = hashlib.sha256(f"{colour}/{shape}/{motion}".encode()).digest()
    return motion != "still" and digest[0] % 8 == 0


def held_out_combinations() -> list[tuple[str, str, str]]:
    """All (colour, shape, motion) triples of the held-out split, in a fixed order."""
    return [(c, s, m) for c in COLOURS for s in SHAPES for m in MOTIONS if is_held_out(c, s, m)]


# ---- paths ---------------------------------------------------------------------------------------------------------


def path(motion: str, travel: float, phase: float, frames: int) -> FloatArray:
    """Offsets (x, y) from the middle of a path, `[frames, 2]`, in fractions of the frame; y points down.

    A single frame is where the path begins.
    """
    time = np.linspace(0.0, 1.0, frames, dtype=np.float32)
    if motion in DIRECTIONS:
        step = np.asarray(DIRECTIONS[motion], np.float32)
        return np.asarray((time[:, None] - 0.5) * travel * step / np.linalg.norm(step), np.float32)
    if motion in TURNS:
        angle = 2 * np.pi * (phase + TURNS[motion] * time)
        return np.asarray(travel / 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1), np.float32)
    if motion == "bounce-vertical":  # two hops; the shape stands on the ground where the sine is zero
        height = np.abs(np.sin(np.pi * (2 * time + phase)))
        return np.asarray(np.stack([np.zeros_like(time), travel * (0.5 - height)], axis=1), np.float32)
    if motion == "bounce-horizontal":  # there and back at constant speed, once and a half
        wave = np.abs(((1.5 * time + phase) % 1.0) * 2 - 1)
        return np.asarray(np.stack([travel * (wave - 0.5), np.zeros_like(time)], axis=1), np.float32)
    if motion == "still":
        return np.zeros((frames, 2), np.float32)
    raise ValueError(f"motion must be one of {', '.join(MOTIONS)}; got {motion!r}")


def shape_centres(spec: ShapeSpec, frames: int) -> FloatArray:
    """Centre (x, y) of a shape in every frame, `[frames, 2]`, in fractions of the width and height."""
    return np.asarray(
        np.asarray(spec.centre, np.float32) + path(spec.motion, spec.travel, spec.phase, frames), np.float32
    )


def _room(motion: str, radius: float, travel: float) -> tuple[float, float]:
    """How far from the middle of the frame the middle of a path may lie (x, y) for the shape to stay inside."""
    reach = np.abs(path(motion, travel, 0.0, 65)).max(axis=0)
    return max(0.49 - radius - float(reach[0]), 0.0), max(0.49 - radius - float(reach[1]), 0.0)


# ---- captions ------------------------------------------------------------------------------------------------------


def _choice(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def _direction(rng: np.random.Generator, motion: str, brief: bool) -> str:
    if motion in STRAIGHT_PHRASES:
        return _choice(rng, STRAIGHT_PHRASES[motion])
    vertical, horizontal = motion.split("-")
    if brief or rng.random() < 0.4:
        return f"{vertical} and {horizontal}"
    if rng.random() < 0.5:
        first, second = (_choice(rng, STRAIGHT_PHRASES[d]) for d in (vertical, horizontal))
        return f"diagonally {first} and {second}"
    corner = " corner" if rng.random() < 0.5 else ""
    return f"towards the {'upper' if vertical == 'up' else 'lower'} {horizontal}{corner}"


def _motion(rng: np.random.Generator, motion: str, brief: bool) -> str:
    if motion == "still":
        return _choice(rng, STILL_PHRASES)
    if motion in TURNS:
        return f"{_choice(rng, ('circles', 'moves in a circle'))} {_choice(rng, TURN_WORDS[motion])}"
    if motion in BOUNCES:
        return _choice(rng, BOUNCE_PHRASES[motion])
    return f"{_choice(rng, VERBS)} {_direction(rng, motion, brief)}"


def _describe(rng: np.random.Generator, spec: ShapeSpec, shadow: bool, brief: bool) -> str:
    size = f"{_choice(rng, SIZE_WORDS[spec.size])} " if not brief and rng.random() < 0.8 else ""
    article = "an" if not size and spec.colour == "orange" else "a"
    cast = f" {_choice(rng, SHADOW_PHRASES)}" if shadow else ""
    shape = _choice(rng, SHAPE_WORDS[spec.shape])
    return f"{article} {size}{spec.colour} {shape}{cast} {_motion(rng, spec.motion, brief)}"


def _caption(rng: np.random.Generator, scene: Scene) -> str:
    """Words for a scene; tried again in brief wording where it comes out too long."""
    for brief in (False, True):
        # The first object alone names the shadow: all have one or none has.
        objects = [_describe(rng, s, scene.shadow and i == 0, brief) for i, s in enumerate(scene.shapes)]
        noun = "background" if brief or rng.random() < 0.85 else "backdrop"
        parts = [" and ".join(objects), f"{_choice(rng, RELATIONS)} a {scene.background} {noun}"]
        if rng.random() < 0.15:
            parts.reverse()
        elif rng.random() < 0.15:
            parts.insert(0, _choice(rng, PREFIXES))
        if scene.pillar:
            parts.append("behind a grey pillar")
        if scene.pan:
            parts.append(f"while the camera pans {scene.pan}")
        caption = " ".join(parts)
        if len(caption.split()) <= MAX_WORDS:
            break
    return caption


# ---- scenes --------------------------------------------------------------------------------------------------------


def _draw_shape(rng: np.random.Generator, colour: str, shape: str, motion: str) -> ShapeSpec:
    size = _choice(rng, tuple(SIZES))
    radius = float(rng.uniform(*SIZES[size]))
    travel = 0.0 if motion == "still" else float(rng.uniform(*TRAVEL))
    room_x, room_y = _room(motion, radius, travel)
    centre = (0.5 + float(rng.uniform(-room_x, room_x)), 0.5 + float(rng.uniform(-room_y, room_y)))
    angle, phase = float(rng.uniform(-0.25, 0.25)), float(rng.random())
    return ShapeSpec(colour, shape, size, motion, radius, centre, travel, angle, phase)


def _draw_motion(rng: np.random.Generator, simple: bool) -> str:
    kinds, shares = tuple(MOTION_SHARES), tuple(MOTION_SHARES.values())
    motion = _choice(rng, kinds[int(rng.choice(len(kinds), p=shares))])
    return _draw_motion(rng, simple) if simple and motion == "still" else motion


def _draw_combinations(rng: np.random.Generator, count: int, simple: bool) -> list[tuple[str, str, str]]:
    """`count` training combinations with different colours."""
    combos: list[tuple[str, str, str]] = []
    while len(combos) < count:
        combo = (_choice(rng, tuple(COLOURS)), _choice(rng, SHAPES), _draw_motion(rng, simple))
        if not is_held_out(*combo) and all(combo[0] != other[0] for other in combos):
            combos.append(combo)
    return combos


def sample_scene(rng: np.random.Generator, held_out: bool = False, simple: bool = False) -> Scene:
    """Draw one scene.

    Args:
        rng: the only source of randomness.
        held_out: draw the first shape from the held-out combinations (training scenes never contain one).
        simple: one moving shape, no shadow, pillar or camera pan (what the evaluation uses).

    """
    if held_out:
        options = held_out_combinations()
        combos = [options[int(rng.integers(len(options)))]]
    else:
        count = 1 if simple else 1 + int(rng.choice(3, p=(0.72, 0.20, 0.08)))
        combos = _draw_combinations(rng, count, simple)
    shapes = tuple(_draw_shape(rng, *combo) for combo in combos)
    background = _choice(rng, BACKGROUNDS)
    pillar = not simple and rng.random() < 0.06
    pan = _choice(rng, ("left", "right")) if not simple and rng.random() < 0.08 else ""
    shadow = not simple and rng.random() < 0.20
    scene = Scene(shapes, background, int(rng.integers(2**31)), pillar, pan, shadow, "")
    return replace(scene, caption=_caption(rng, scene))


def other_motion(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene with every shape moving elsewhere: the opposite way where training may show that, else any other.

    Everything else (colours, sizes, background, middle of the path as far as it allows) stays, so a pair of such
    scenes differs in what the words for the motion mean and in nothing besides.
    """
    turned = []
    for spec in scene.shapes:
        allowed = [m for m in MOVING if m != spec.motion and not is_held_out(spec.colour, spec.shape, m)]
        opposite = OPPOSITE.get(spec.motion, "")
        motion = opposite if opposite in allowed else _choice(rng, allowed or ["still"])
        travel = 0.0 if motion == "still" else spec.travel or float(rng.uniform(*TRAVEL))
        room_x, room_y = _room(motion, spec.radius, travel)
        x, y = (0.5 + min(max(c - 0.5, -r), r) for c, r in zip(spec.centre, (room_x, room_y), strict=True))
        turned.append(replace(spec, motion=motion, travel=travel, centre=(x, y)))
    other = replace(scene, shapes=tuple(turned))
    return replace(other, caption=_caption(rng, other))


def other_shape(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene with every shape drawn as another one; colours, paths, sizes and background stay."""
    turned = []
    for spec in scene.shapes:
        allowed = [s for s in SHAPES if s != spec.shape and not is_held_out(spec.colour, s, spec.motion)]
        turned.append(replace(spec, shape=_choice(rng, allowed or [spec.shape])))
    other = replace(scene, shapes=tuple(turned))
    return replace(other, caption=_caption(rng, other))


def clips(seed: int, held_out: bool = False, simple: bool = False) -> Iterator[Scene]:
    """An endless, seed-determined stream of scenes; render each with `render.render`."""
    rng = np.random.default_rng(seed)
    while True:
        yield sample_scene(rng, held_out=held_out, simple=simple)


def vocabulary() -> list[str]:
    """Every word of the caption grammar, sorted."""
    phrases = [*COLOURS, *BACKGROUNDS, *VERBS, *STILL_PHRASES, *RELATIONS, *PREFIXES, *SHADOW_PHRASES]
    for table in (SIZE_WORDS, SHAPE_WORDS, STRAIGHT_PHRASES, TURN_WORDS, BOUNCE_PHRASES):
        phrases += [phrase for options in table.values() for phrase in options]
    phrases += ["a an and diagonally towards the upper lower corner circles moves in a circle", "background backdrop"]
    phrases += ["behind a grey pillar while the camera pans"]
    return sorted({word for phrase in phrases for word in phrase.split()})
