"""Contact sheets of the small model's clips: frames under their prompt, and what was seen in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dsattn.pipelines.tiny import data

PICKS, SIDE, TEXT = 5, 128, 34
"""Frames of a clip, height of each, height of the text above them, in pixels."""
RIGHT, WRONG, PLAIN = (0, 120, 0), (200, 0, 0), (0, 0, 0)


def write_strip(path: Path, video: NDArray[np.float32]) -> None:
    """Keep frames of a clip `[frames, height, width, 3]` in [0, 1], side by side, as a PNG."""
    frames = video[np.linspace(0, len(video) - 1, PICKS).round().astype(int)]
    width = round(SIDE * video.shape[2] / video.shape[1])
    strip = np.concatenate([cv2.resize(frame, (width, SIDE), interpolation=cv2.INTER_AREA) for frame in frames], axis=1)
    fresh = path.with_suffix(".tmp.png")
    cv2.imwrite(str(fresh), np.clip(strip[..., ::-1] * 255, 0, 255).round().astype(np.uint8))
    fresh.replace(path)


def read_strip(path: Path) -> NDArray[np.uint8]:
    """A strip `[SIDE, width, 3]`, RGB; a grey one if the file is not there."""
    strip = cv2.imread(str(path))
    return np.full((SIDE, PICKS * SIDE, 3), 128, np.uint8) if strip is None else np.asarray(strip[..., ::-1], np.uint8)


def _write(canvas: NDArray[np.uint8], at: tuple[int, int], text: str, ink: tuple[int, int, int]) -> int:
    """Write a text and say where the next one may start."""
    cv2.putText(canvas, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.38, ink, 1, cv2.LINE_AA)
    return at[0] + cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.38, 1)[0][0] + 8


def _row(scene: data.Scene, row: dict[str, Any], strip: NDArray[np.uint8]) -> NDArray[np.uint8]:
    canvas = np.full((TEXT + SIDE + 4, max(strip.shape[1], 640), 3), 255, np.uint8)
    canvas[TEXT : TEXT + SIDE, : strip.shape[1]] = strip
    _write(canvas, (2, 12), scene.caption, PLAIN)
    seen = {name: row[name] for name in ("colour", "shape", "size", "motion", "background")}
    seen |= {"direction": f"goes {row['direction']}", "one object": f"{row['objects']} seen"}
    x = 2
    for name, value in seen.items():
        if name == "direction" and scene.shapes[0].motion not in data.DIRECTIONS:
            continue
        x = _write(canvas, (x, 28), str(value), WRONG if name in row["wrong"] else RIGHT)
    return canvas


def contact_sheet(
    path: Path, scenes: list[data.Scene], rows: list[dict[str, Any]], strips: list[NDArray[np.uint8]]
) -> None:
    """Two columns of clips as a PNG: caption, what was seen (green where right, red where wrong), frames."""
    cells = [_row(scene, row, strip) for scene, row, strip in zip(scenes, rows, strips, strict=True)]
    if not cells:
        return
    if len(cells) % 2:
        cells.append(np.full_like(cells[0], 255))
    half = len(cells) // 2
    sheet = np.concatenate([np.concatenate(cells[:half]), np.concatenate(cells[half:])], axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.ascontiguousarray(sheet[..., ::-1]))
