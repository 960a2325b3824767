"""Reading the clips of a run back, with everything checked that can be wrong with a file."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dsattn.errors import DsattnError, UsageError
from dsattn.metrics import Frames
from dsattn.quality.folder import Folder, read_json, sha256
from dsattn.quality.suites import Item
from dsattn.video import read_mp4

Key = tuple[str, int]


class ClipError(DsattnError):
    """A video cannot be scored; the message names it."""


@dataclass
class Clip:
    """One clip that could be read.

    Args:
        scores: by metric, of the clip alone.
        fidelity: by metric, against the reference clip; a metric that is infinite is left out.
        identical: all frames equal those of the reference clip.

    """

    item: Item
    path: Path
    sidecar: dict[str, Any]
    scores: dict[str, float] = field(default_factory=dict)
    fidelity: dict[str, float] = field(default_factory=dict)
    identical: bool = False

    @property
    def key(self) -> Key:
        """What pairs it with other arms' clips."""
        return self.item.prompt, self.item.index


def read_clip(path: Path, shape: Mapping[str, int] | None = None) -> Frames:
    """Frames of a video, checked.

    Args:
        shape: expected ``height``, ``width`` and ``frames``; None expects two frames or more of any size.

    Raises:
        ClipError: naming the file, what was expected and what came.

    """
    if not path.is_file():
        raise ClipError(f"{path} is missing; run vbench_sample again to make it")
    if path.stat().st_size == 0:
        raise ClipError(f"{path} is empty (0 bytes); remove it and run vbench_sample again")
    try:
        frames = read_mp4(path)
    except UsageError as error:
        raise ClipError(f"{error} (damaged or truncated); remove it and run vbench_sample again") from error
    if len(frames) < 2:
        raise ClipError(f"{path} has 1 frame, expected at least 2: nothing can be said about motion")
    if shape is not None:
        # H.264 needs even sides; the writer repeats an odd edge.
        want = (shape["frames"], shape["height"] + shape["height"] % 2, shape["width"] + shape["width"] % 2)
        if frames.shape[:3] != want:
            got = "x".join(map(str, frames.shape[:3]))
            raise ClipError(
                f"{path} is {got} (frames x height x width), expected {'x'.join(map(str, want))}: it is truncated or "
                "of another run"
            )
    return frames


def load_clip(folder: Folder, arm: str, item: Item, settings: Mapping[str, Any]) -> tuple[Clip, Frames]:
    """A clip of a run and its frames, checked against its sidecar and the run.

    Raises:
        ClipError: naming the file and what is wrong with it.

    """
    path, described = folder.video(arm, item), folder.sidecar(arm, item)
    sidecar = read_json(described) if described.is_file() else None
    shape = None if sidecar is None else sidecar["shape"]
    frames = read_clip(path, shape)
    if sidecar is None:
        raise ClipError(f"{path} has no sidecar {described}: its seed and settings are unknown; sample it again")
    if sha256(path) != sidecar.get("sha256"):
        raise ClipError(
            f"{path} is not what was written there: its SHA-256 differs from its sidecar's; sample it again"
        )
    if sidecar["seed"] != item.seed:
        raise ClipError(f"{path} was made with the seed {sidecar['seed']}, expected {item.seed}: it is of another run")
    asked = {name: settings["job"].get(name) for name in ("height", "width", "frames")}
    for name, value in asked.items():
        if value is not None and value != sidecar["shape"][name]:
            raise ClipError(f"{path} has {name} {sidecar['shape'][name]}, the run asked for {value}")
    return Clip(item, path, sidecar), frames


def kept_frames(folder: Folder, clip: Clip) -> Frames | None:
    """Frames of a clip before encoding; None if they were not kept.

    Raises:
        ClipError: the file is damaged.

    """
    path = folder.frames(clip.path.parent.name, clip.item)
    if not path.is_file():
        return None
    try:
        with np.load(path) as file:
            frames: Frames = file["frames"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ClipError(f"{path} cannot be read: {error}; remove it, and its video, and sample it again") from error
    return frames
