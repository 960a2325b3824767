"""Runs on disk for tests of sampling and scoring, with drawn clips in the place of a model's."""

import hashlib

import numpy as np

from dsattn.errors import UsageError
from dsattn.measure import Job
from dsattn.quality.arms import parse_arms
from dsattn.quality.folder import Folder
from dsattn.quality.sampling import Plan, sample
from dsattn.quality.vbench import QUALITY

SHAPE = (5, 32, 48)
MODEL = {"id": "drawn", "revision": None, "pipeline": "Pipe", "dtype": "float32", "device": "cpu"}
ARMS = ["dense", "topk:density=0.3"]


def entries(prompts):
    return [{"prompt_en": prompt, "dimension": list(QUALITY)} for prompt in prompts]


def plan(prompts=("a", "b", "c"), samples=1, seed=0):
    frames, height, width = SHAPE
    return Plan("smoke", entries(prompts), samples, seed, Job("", height=height, width=width, frames=frames), 8.0)


def clip(arm, seed):
    """A block that moves over a smooth texture; the sparse arm has noise on it."""
    frames, height, width = SHAPE
    rng = np.random.default_rng(seed % 2**32)
    y, x = np.mgrid[:height, :width]
    ground = 110 + 60 * np.sin(x / rng.uniform(4, 9) + rng.uniform(0, 6)) * np.cos(y / rng.uniform(4, 9))
    out = np.repeat(ground[None, ..., None], 3, axis=-1).repeat(frames, axis=0)
    for t in range(frames):
        out[t, 8:20, 4 + 3 * t : 16 + 3 * t] = (230, 40, 40)
    if arm != "dense":
        out += rng.normal(size=out.shape) * 6
    return np.clip(out, 0, 255).astype(np.uint8)


def make(arm, item):
    """What a pipeline would: frames and sidecar."""
    frames = clip(arm.name, item.seed)
    return frames, {
        "prompt": item.prompt,
        "negative_prompt": None,
        "seed": item.seed,
        "model": MODEL,
        "shape": dict(zip(("frames", "height", "width"), frames.shape[:3], strict=True)) | {"fps": 8.0, "steps": 2},
        "method": "dense" if arm.config is None else arm.config.method,
        "density": {"all_calls": 1.0 if arm.config is None else 0.3},
        "times_s": {"denoise": 2.0 if arm.config is None else 1.0},
        "fallbacks": [],
        "env": {"torch": "0", "gpu": []},
    }


def run(root, prompts=("a", "b", "c"), *, samples=1, seed=0, arms=ARMS, make=make, **options):
    """Sample drawn clips into a folder; what was done."""
    return sample(Folder(root), plan(prompts, samples, seed), parse_arms(arms), MODEL, make, **options)


def videos(root):
    """State of every video file: name to digest, inode and time."""
    found = {}
    for path in sorted((root / "videos").rglob("*")):
        if path.is_file():
            stat = path.stat()
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(root / "videos"))] = (digest, stat.st_ino, stat.st_mtime_ns)
    return found


def refuse(arm, item):
    raise UsageError("nothing is to be made here")
