"""Does the small model follow its prompt? Measures colour, motion and direction on held-out prompts, and codec PSNR.

    python scripts/eval_tiny.py --steps 12 --grid 33x256x256 --json scores.json --sheet sheet.png

Every prompt names a (colour, shape, motion) combination that training never showed. The measurement is plain vision:
saturated (or near-white) pixels are labelled with the nearest palette hue, the most frequent label is the object's
colour, and the centroid of its largest connected region is tracked through the clip. The same measurement is first
applied to rendered clips of the same prompts, whose truth is known.
"""

from __future__ import annotations

import colorsys
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import typer
from numpy.typing import NDArray

from dsattn.pipelines.tiny import data
from dsattn.pipelines.tiny.codec import PatchCodec
from dsattn.pipelines.tiny.loader import load_tiny
from dsattn.pipelines.tiny.render import render

PROMPT_SEED = 20_260
MIN_AREA = 0.004
"""Smallest object, as a fraction of the frame."""
MIN_TRAVEL = 0.12
"""Smallest displacement over the clip that counts as motion, as a fraction of the frame (clips have 0.38 to 0.52)."""


@dataclass
class Measured:
    """What a clip shows: the dominant object colour, its displacement over the clip (fractions) and its direction."""

    colour: str
    dx: float
    dy: float
    direction: str


def label_colours(frame: NDArray[np.float32]) -> NDArray[np.int64]:
    """Palette index of every pixel of `[H, W, 3]` in [0, 1]; -1 where the pixel is muted (background)."""
    names = list(data.COLOURS)
    hues = np.array([colorsys.rgb_to_hsv(*data.COLOURS[n])[0] * 360 for n in names], np.float32)
    hues[names.index("white")] = np.inf
    hue = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2HSV)[..., 0]
    gap = np.abs(hue[..., None] - hues)
    labels: NDArray[np.int64] = np.argmin(np.minimum(gap, np.abs(360 - gap)), axis=-1)
    high, low = frame.max(axis=-1), frame.min(axis=-1)
    white = low > 0.80
    labels[white] = names.index("white")
    labels[(high - low < 0.28) & ~white] = -1
    return labels


def measure(video: NDArray[np.float32]) -> Measured:
    """Measure one clip `[F, H, W, 3]` in [0, 1]; a clip without an object has colour 'none'."""
    names = list(data.COLOURS)
    labels = np.stack([label_colours(frame) for frame in video])
    counts = np.array([(labels == i).sum() for i in range(len(names))])
    area = labels[0].size
    best = int(counts.argmax())
    if counts[best] < MIN_AREA * area * len(video) / 2:
        return Measured("none", 0.0, 0.0, "none")
    times, centres = [], []
    for time_index, frame in enumerate(labels):
        mask = (frame == best).astype(np.uint8)
        count, _, stats, centroids = cv2.connectedComponentsWithStats(mask, connectivity=8)
        if count > 1:
            largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
            if stats[largest, cv2.CC_STAT_AREA] >= MIN_AREA * area:
                times.append(time_index / max(len(video) - 1, 1))
                centres.append(centroids[largest] / np.array([frame.shape[1], frame.shape[0]]))
    if len(times) < max(3, len(video) // 3):
        return Measured(names[best], 0.0, 0.0, "none")
    dx, dy = (float(v) for v in np.polyfit(times, np.array(centres), 1)[0])
    if max(abs(dx), abs(dy)) < MIN_TRAVEL:
        return Measured(names[best], dx, dy, "still")
    if abs(dx) > abs(dy):
        return Measured(names[best], dx, dy, "right" if dx > 0 else "left")
    return Measured(names[best], dx, dy, "down" if dy > 0 else "up")


def held_out_scenes(count: int) -> list[data.Scene]:
    """The evaluation prompts, always the same."""
    stream = data.clips(PROMPT_SEED, held_out=True, simple=True)
    return [next(stream) for _ in range(count)]


def score(scenes: list[data.Scene], found: list[Measured]) -> dict[str, float]:
    """Fractions of clips whose colour, motion and direction are right."""
    colour = [m.colour == s.shapes[0].colour for s, m in zip(scenes, found, strict=True)]
    moves = [m.direction not in ("none", "still") for m in found]
    direction = [m.direction == s.shapes[0].motion for s, m in zip(scenes, found, strict=True)]
    return {k: float(np.mean(v)) for k, v in (("colour", colour), ("moves", moves), ("direction", direction))}


def codec_psnr(codec: PatchCodec, scenes: list[data.Scene], frames: int, height: int, width: int) -> float:
    """PSNR in dB of the codec on rendered held-out clips (mean squared error over all clips, range 1)."""
    errors = []
    for scene in scenes:
        clip = torch.from_numpy(render(scene, frames, height, width)).permute(3, 0, 1, 2)[None]
        back = codec.decode(codec.encode(clip * 2 - 1), return_dict=False)[0]
        errors.append(float(((back + 1) / 2 - clip).square().mean()))
    return float(-10 * np.log10(np.mean(errors)))


def contact_sheet(
    path: Path, scenes: list[data.Scene], videos: list[NDArray[np.float32]], found: list[Measured]
) -> None:
    """One row per clip: five frames under its prompt; green text when colour and direction are right."""
    rows = []
    for scene, video, m in zip(scenes, videos, found, strict=True):
        picks = video[np.linspace(0, len(video) - 1, 5).round().astype(int)]
        strip = np.concatenate([cv2.resize(f, (128, 128), interpolation=cv2.INTER_AREA) for f in picks], axis=1)
        canvas = np.full((148, strip.shape[1], 3), 255, np.uint8)
        canvas[20:] = np.clip(strip * 255, 0, 255)
        good = m.colour == scene.shapes[0].colour and m.direction == scene.shapes[0].motion
        text, ink = f"{scene.caption} -> {m.colour} {m.direction}", (0, 128, 0) if good else (200, 0, 0)
        cv2.putText(canvas, text, (2, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.36, ink, 1, cv2.LINE_AA)
        rows.append(canvas)
    if len(rows) % 2:
        rows.append(np.full_like(rows[0], 255))
    half = len(rows) // 2
    sheet = np.concatenate([np.concatenate(rows[:half]), np.concatenate(rows[half:])], axis=1)
    cv2.imwrite(str(path), np.ascontiguousarray(sheet[..., ::-1]))


def main(
    steps: int = typer.Option(20, help="Denoising steps."),
    grid: str = typer.Option("33x256x256", help="frames x height x width in pixels."),
    limit: int = typer.Option(48, help="How many prompts."),
    guidance: float = typer.Option(0.0, help="Guidance scale (0: the model's default)."),
    batch: int = typer.Option(1, help="Prompts per pipeline call."),
    dtype: str = typer.Option("float32", help="float32 or bfloat16."),
    threads: int = typer.Option(2),
    seed: int = typer.Option(0, help="Clip i is drawn from a generator seeded with seed + i."),
    weights: Path | None = typer.Option(None, help="Weights folder (default: the packaged one)."),
    json_out: Path | None = typer.Option(None, "--json", help="Write the scores and every measurement here."),
    sheet: Path | None = typer.Option(None, help="Write a contact sheet (PNG) here."),
) -> None:
    """Generate the held-out prompts densely, measure them and print the scores."""
    torch.set_num_threads(threads)
    frames, height, width = (int(v) for v in grid.split("x"))
    scenes = held_out_scenes(limit)
    pipe = load_tiny(getattr(torch, dtype), weights_dir=weights)
    pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": guidance} if guidance else {}
    truth = score(scenes, [measure(render(s, frames, height, width)) for s in scenes])
    typer.echo("measurement on rendered clips: " + ", ".join(f"{k} {v:.1%}" for k, v in truth.items()))
    psnr = codec_psnr(load_tiny(weights_dir=weights).vae, scenes, frames, height, width)
    typer.echo(f"codec PSNR on held-out clips: {psnr:.2f} dB")
    videos: list[NDArray[np.float32]] = []
    started = time.perf_counter()
    for first in range(0, limit, batch):
        part = scenes[first : first + batch]
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
        result = pipe(
            [s.caption for s in part],
            num_frames=frames,
            height=height,
            width=width,
            num_inference_steps=steps,
            generator=generators,
            **options,
        )
        videos += [np.asarray(v, np.float32) for v in result.frames]
        typer.echo(f"{len(videos)}/{limit} clips, {time.perf_counter() - started:.0f} s", err=True)
    found = [measure(v) for v in videos]
    scores = score(scenes, found)
    typer.echo(f"generated, {steps} steps at {grid}: " + ", ".join(f"{k} {v:.1%}" for k, v in scores.items()))
    if sheet:
        contact_sheet(sheet, scenes, videos, found)
    if json_out:
        rows = [
            {"prompt": s.caption, "seed": seed + i} | asdict(m)
            for i, (s, m) in enumerate(zip(scenes, found, strict=True))
        ]
        report = {
            "scores": scores,
            "rendered": truth,
            "codec_psnr_db": psnr,
            "steps": steps,
            "grid": grid,
            "clips": rows,
        }
        json_out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
