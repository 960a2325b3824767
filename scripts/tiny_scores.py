"""Scores of the small model: which clips are right in what, with intervals; and whether the measurement can be trusted.

A clip is compared with the scene whose caption it was drawn for. A score is asked only where the caption says it: the
direction where the motion is one of the eight straight ones, the size where the caption has a word for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from tiny_texture import tell_background
from tiny_vision import label_colours, look

from dsattn.metrics import temporal_flickering
from dsattn.pipelines.tiny import data
from dsattn.pipelines.tiny.render import render

PROMPT_SEED = 20_260
CHANCE: dict[str, float | None] = {
    "colour": 1 / len(data.COLOURS),
    "shape": 1 / len(data.SHAPES),
    "direction": 1 / len(data.DIRECTIONS),
    "motion": 1 / len(data.MOVING),
    "background": 1 / len(data.BACKGROUNDS),
    "size": 1 / len(data.SIZES),
    "moves": None,
    "one object": None,
    "all": None,
}
"""Scores, in the order of tables, and what guessing one of the values evenly would give."""
CLASSIFIERS = ("colour", "shape", "direction", "motion", "background", "size", "moves", "one object")
TRUSTED = 0.98
"""Share of clips of known truth that every classifier must get right."""
CONDITIONS = ("rendered", "codec", "soft and noisy")
NOISE, BLUR = 0.03, 1 / 160
"""Of the last condition: standard deviations of the noise, range 1, and of the blur, over the frame's shorter side."""

Video = NDArray[np.float32]
Codec = Callable[[torch.Tensor], Any]


def held_out_scenes(count: int) -> list[data.Scene]:
    """The evaluation prompts, always the same; beyond the first 96 they are used to validate the measurement alone."""
    stream = data.clips(PROMPT_SEED, held_out=True, simple=True)
    return [next(stream) for _ in range(count)]


def measure(video: Video) -> dict[str, Any]:
    """All that is measured of one clip `[frames, height, width, 3]` in [0, 1], as plain values."""
    video = np.asarray(video, np.float32)
    labels = label_colours(video)
    found = asdict(look(video, labels))
    found["background"] = tell_background(video, labels)
    found["flickering"] = round(temporal_flickering((video * 255).round().astype(np.uint8)), 5)
    return found


def names_size(scene: data.Scene) -> bool:
    """Whether the caption has a word for the size."""
    words = {word for options in data.SIZE_WORDS.values() for word in options}
    return bool(words & set(scene.caption.split()))


def judge(scene: data.Scene, found: dict[str, Any]) -> dict[str, bool]:
    """What is right in a clip of this (simple) scene; only what its caption asks for."""
    spec = scene.shapes[0]
    right = {
        "colour": found["colour"] == spec.colour,
        "shape": found["shape"] == spec.shape,
        "direction": found["direction"] == spec.motion,
        "motion": found["motion"] == spec.motion,
        "background": found["background"] == scene.background,
        "size": found["size"] == spec.size,
        "moves": bool(found["moves"]),
        "one object": found["objects"] == 1,
    }
    if spec.motion not in data.DIRECTIONS:
        del right["direction"]
    if not names_size(scene):
        del right["size"]
    return right | {"all": all(right.values())}


def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; clips are taken as independent."""
    share, scale = right / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z / scale * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def scores(judgements: Iterable[dict[str, bool]]) -> dict[str, dict[str, Any]]:
    """Per score: how many clips are right of how many that were asked, the share, its interval, chance."""
    judgements, table = list(judgements), {}
    for name, chance in CHANCE.items():
        asked = [judgement[name] for judgement in judgements if name in judgement]
        if not asked:
            continue
        low, high = wilson(sum(asked), len(asked))
        table[name] = {
            "right": sum(asked),
            "clips": len(asked),
            "share": round(sum(asked) / len(asked), 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "chance": None if chance is None else round(chance, 4),
        }
    return table


def by_value(scenes: list[data.Scene], judgements: list[dict[str, bool]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Scores of the clips with each value of each attribute: {"colour red": {"shape": {...}, ...}, ...}."""
    groups: dict[str, list[dict[str, bool]]] = {}
    for scene, judgement in zip(scenes, judgements, strict=True):
        spec = scene.shapes[0]
        values = ("colour", spec.colour), ("shape", spec.shape), ("size", spec.size), ("motion", spec.motion)
        for name, value in (*values, ("background", scene.background)):
            groups.setdefault(f"{name} {value}", []).append(judgement)
    return {name: scores(groups[name]) for name in sorted(groups)}


# ---- can the measurement be trusted --------------------------------------------------------------------------------


def through_codec(video: Video, codec: Codec) -> Video:
    """The clip encoded and decoded; `codec` maps `[1, 3, F, H, W]` in [-1, 1] to an output with `.sample`."""
    with torch.no_grad():
        back = codec(torch.from_numpy(video).permute(3, 0, 1, 2)[None] * 2 - 1).sample
    return np.asarray((back[0].float().permute(1, 2, 3, 0).numpy() + 1) / 2, np.float32)


def soften(video: Video, seed: int) -> Video:
    """The clip blurred and with noise, clamped to [0, 1]."""
    blur = BLUR * min(video.shape[1:3])
    noise = np.random.default_rng(seed).normal(0, NOISE, video.shape).astype(np.float32)
    return np.clip(np.stack([cv2.GaussianBlur(frame, (0, 0), blur) for frame in video]) + noise, 0, 1)


def validate(scenes: list[data.Scene], size: tuple[int, int, int], codec: Codec, prompts: int) -> dict[str, Any]:
    """Judge clips whose truth is known: as rendered, behind the codec, and blurred with noise.

    Args:
        scenes: simple scenes to render; the first `prompts` are those of the evaluation.
        size: frames, height, width in pixels.
        codec: see `through_codec`.
        prompts: how many clips the flickering and the codec's PSNR are taken of.

    Returns:
        "scores" by condition; "flickering" of rendered clips; "codec_psnr_db" over all their pixels, range 1.

    """
    judgements: dict[str, list[dict[str, bool]]] = {name: [] for name in CONDITIONS}
    flickering, errors = [], []
    for index, scene in enumerate(scenes):
        clip = render(scene, *size)
        back = through_codec(clip, codec)
        for name, video in zip(CONDITIONS, (clip, back, soften(clip, index)), strict=True):
            found = measure(video)
            judgements[name].append(judge(scene, found))
            if name == CONDITIONS[0] and index < prompts:
                flickering.append(found["flickering"])
        if index < prompts:
            errors.append(float(np.square(back - clip).mean()))
    return {
        "scores": {name: scores(found) for name, found in judgements.items()},
        "flickering": round(float(np.mean(flickering)), 5),
        "codec_psnr_db": round(float(-10 * np.log10(np.mean(errors))), 2),
    }


def distrusted(validation: dict[str, Any]) -> list[str]:
    """What the measurement gets wrong too often to judge samples by it; empty if nothing."""
    return [
        f"{name} on clips '{condition}': {table[name]['right']} of {table[name]['clips']} right, "
        f"expected at least {TRUSTED:.0%}"
        for condition, table in validation["scores"].items()
        for name in CLASSIFIERS
        if name in table and table[name]["share"] < TRUSTED
    ]


def as_text(table: dict[str, dict[str, Any]]) -> str:
    """One line of scores: percent [interval] (right/asked)."""
    return ", ".join(
        f"{name} {row['share']:.1%} [{row['low']:.0%}, {row['high']:.0%}] ({row['right']}/{row['clips']})"
        for name, row in table.items()
    )
