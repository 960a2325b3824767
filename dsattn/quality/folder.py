"""The folder of a run, and how files get into it whole.

::

    run.json                     what every arm shares: suite, prompts, samples, model, shape, seed
    arms/<arm>.json              attention settings of an arm
    videos/<arm>/<prompt>-<i>.mp4    nothing but mp4 files, named as VBench looks for them
    meta/<arm>/<prompt>-<i>.json     sidecar of each video: seed, settings, times, density, SHA-256
    frames/<arm>/<prompt>-<i>.npz    frames before encoding, where they were kept
    vbench/                      files in VBench's forms
    tmp/<shard>/                 files that are being written

A video is renamed into its place as the last of its files. So it is there whole, with its sidecar, or not at all,
whenever the process was killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dsattn.errors import UsageError
from dsattn.metrics import Frames
from dsattn.quality.arms import DENSE, Arm
from dsattn.quality.suites import Item
from dsattn.report import write_json
from dsattn.video import write_mp4

SCHEMA = "dsattn.samples/1"


class Folder:
    """One run on disk.

    Args:
        root: the folder.

    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def video(self, arm: str, item: Item) -> Path:
        """Where a clip lies."""
        return self.root / "videos" / arm / f"{item.name}.mp4"

    def sidecar(self, arm: str, item: Item) -> Path:
        """Where the description of a clip lies."""
        return self.root / "meta" / arm / f"{item.name}.json"

    def frames(self, arm: str, item: Item) -> Path:
        """Where a clip's frames before encoding lie, if they were kept."""
        return self.root / "frames" / arm / f"{item.name}.npz"

    def arms(self) -> list[str]:
        """Names of the arms that were begun: dense first, then by name."""
        paths = (self.root / "arms").glob("*.json")
        return sorted((p.stem for p in paths if not p.name.startswith(".")), key=lambda name: (name != DENSE, name))

    def settings(self) -> dict[str, Any]:
        """What ``run.json`` holds.

        Raises:
            UsageError: the folder is not that of a run.

        """
        path = self.root / "run.json"
        if not path.is_file():
            raise UsageError(f"{self.root} is not the folder of a run: {path} is missing; make one with vbench_sample")
        value = read_json(path)
        if value.get("schema") != SCHEMA:
            raise UsageError(f"{path} must have the schema {SCHEMA!r}, got {value.get('schema')!r}")
        return value

    def open(self, settings: dict[str, Any], arms: list[Arm]) -> None:
        """Write down what this run is, or check that it is what the folder already holds.

        Raises:
            UsageError: the folder holds a run with other settings; the message names the first that differs.

        """
        self._claim(self.root / "run.json", {"schema": SCHEMA, **settings}, "this run")
        for arm in arms:
            self._claim(self.root / "arms" / f"{arm.name}.json", arm.to_dict(), f"the arm {arm.name}")

    def finished(self, arm: str, item: Item) -> dict[str, Any] | None:
        """Sidecar of a clip that is there as it was written; None of any other."""
        video, sidecar = self.video(arm, item), self.sidecar(arm, item)
        if not (video.is_file() and sidecar.is_file()):
            return None
        try:
            value = read_json(sidecar)
        except UsageError:
            return None
        return value if value.get("sha256") == sha256(video) else None

    def save(self, arm: str, item: Item, frames: Frames, sidecar: dict[str, Any], tmp: Path, *, keep: bool) -> None:
        """Put a clip in its place, the video last.

        Args:
            tmp: a folder on the same file system, of this process alone.
            keep: keep the frames as they were before encoding too.

        """
        # Short names: with its ending, a prompt may be as long as a file name can be.
        part = tmp / "clip.mp4"
        write_mp4(part, frames, sidecar["shape"]["fps"])
        write_json(tmp / "clip.json", {**sidecar, "sha256": sha256(part)})
        moves = [(tmp / "clip.json", self.sidecar(arm, item)), (part, self.video(arm, item))]
        if keep:
            np.savez_compressed(tmp / "clip.npz", frames=frames)
            moves.insert(0, (tmp / "clip.npz", self.frames(arm, item)))
        for source, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)

    @contextmanager
    def workplace(self, shard: tuple[int, int]) -> Iterator[Path]:
        """Empty folder for a shard's unfinished files; what a killed run left there is removed.

        Raises:
            UsageError: another process works on this shard.

        """
        place = self.root / "tmp" / f"{shard[0]}of{shard[1]}"
        place.mkdir(parents=True, exist_ok=True)
        with (place.parent / f"{place.name}.lock").open("w") as lock:
            # Freed by the system when the process ends, however it ends.
            if not _locked(lock.fileno()):
                raise UsageError(f"{self.root}: another process works on --shard {shard[0]}/{shard[1]}")
            shutil.rmtree(place)
            place.mkdir()
            yield place
            shutil.rmtree(place)

    def _claim(self, path: Path, value: dict[str, Any], what: str) -> None:
        # As JSON reads it back, so that tuples and lists do not count as different.
        value = json.loads(json.dumps(value))
        if not path.is_file():
            write_json(path, value)
        found = read_json(path)
        if found != value:
            name, was, now = _difference(found, value)
            raise UsageError(
                f"{path} was made with other settings than {what}: {name} was {was!r}, now {now!r}; use another --out, "
                "or the settings it was made with"
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UsageError: it cannot be read or is something else.

    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def sha256(path: Path) -> str:
    """Digest of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _difference(a: Any, b: Any, name: str = "") -> tuple[str, Any, Any]:
    """Path and both values of the first place where two plain values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            if a.get(key) != b.get(key):
                return _difference(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    if isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return f"the number of {name}", len(a), len(b)
        at = next(i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1])
        return _difference(a[at], b[at], f"{name}[{at}]")
    return name, a, b


def _locked(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:
        # Windows has no such locks: there the user keeps shards apart.
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
