"""Score the clips of a run: what each shows in itself, and how far it is from the dense clip."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from dsattn.errors import DsattnError, UsageError
from dsattn.metrics import (
    LPIPS_SIDE,
    MS_SSIM_SIDE,
    SSIM_WINDOW,
    Fidelity,
    Frames,
    Lpips,
    motion,
    ms_ssim,
    psnr,
    ssim,
    temporal_flickering,
)
from dsattn.quality.arms import DENSE, check_alike
from dsattn.quality.clips import Clip, ClipError, kept_frames, load_clip
from dsattn.quality.folder import Folder
from dsattn.quality.suites import items
from dsattn.quality.vbench import DIMENSIONS, Scores, full_info, read_results, run_official
from dsattn.report import write_json

Metrics = dict[str, tuple[int, Callable[[Frames, Frames], Fidelity]]]

PROXIES = ("proxy_flow", "proxy_dynamic", "proxy_warp_error")


@dataclass
class Evaluation:
    """Everything :func:`evaluate` found.

    Args:
        clips: by arm, those that could be read.
        problems: ``(file, why)`` of the others, and of what else failed.
        official: dimensions of the vbench package by arm.
        missing: metrics that were not computed, and why.
        on: what fidelity was measured on.

    """

    settings: dict[str, Any]
    reference: str
    clips: dict[str, list[Clip]] = field(default_factory=dict)
    expected: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)
    official: dict[str, dict[str, Scores]] = field(default_factory=dict)
    official_facts: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    on: set[str] = field(default_factory=set)


def evaluate(
    folder: Folder,
    arms: Sequence[str] | None = None,
    *,
    reference: str = DENSE,
    lpips: Lpips | str = "not asked for",
    device: torch.device | str = "cpu",
    told: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Score every clip of a run with what needs no weights, and against the reference arm.

    A clip that is missing, empty, truncated, damaged, of another size or of one frame is noted as a problem, and the
    rest is scored.

    Args:
        arms: names; None takes all of the run.
        reference: the arm that others are compared with.
        lpips: the metric, or why it is not here.
        device: where SSIM and MS-SSIM are computed.
        told: hears a line per item.

    Raises:
        UsageError: the folder holds no run, or not these arms.
        ArmsDifferError: two clips of one item differ in something other than attention.

    """
    settings = folder.settings()
    names = _arms(folder, arms, reference)
    result = Evaluation(settings, reference, {name: [] for name in names})
    if isinstance(lpips, str):
        result.missing["lpips"] = lpips
    flickering = {e["prompt_en"] for e in settings["entries"] if "temporal_flickering" in e["dimension"]}
    metrics = _metrics(lpips, device)
    wanted = items(settings["entries"], settings["samples"], settings["seed"])
    result.expected = len(wanted)
    for number, item in enumerate(wanted, 1):
        told(f"{number}/{len(wanted)}  {item.name}")
        base: tuple[Frames, Clip] | None = None
        # The reference comes first, the others are measured against it.
        for name in sorted(names, key=lambda arm: arm != reference):
            try:
                clip, frames = load_clip(folder, name, item, settings)
                if base is not None:
                    check_alike(base[1].sidecar, clip.sidecar, (reference, name))
                _score(result, clip, frames, settings["fps"], item.prompt in flickering)
                result.clips[name].append(clip)
                if base is not None:
                    _compare(result, folder, (base[1], clip), (base[0], frames), metrics)
            except (ClipError, UsageError) as error:
                result.problems.append((str(folder.video(name, item)), str(error)))
                continue
            if name == reference:
                base = frames, clip
    return result


def add_results(result: Evaluation, arm: str, path: Path) -> None:
    """Take an arm's dimensions from a file that the vbench package wrote elsewhere.

    Raises:
        UsageError: there is no such arm, or the file is no such file or scores videos of another run.

    """
    if arm not in result.clips:
        raise UsageError(f"--results must be ARM=FILE with an arm of the run ({', '.join(result.clips)}), got {arm!r}")
    found = read_results(path)
    known = {clip.path.name for clip in result.clips[arm]}
    for dimension, scores in found.items():
        if strange := sorted(scores.videos.keys() - known):
            raise UsageError(
                f"{path} scores videos for {dimension} that {arm} of this run does not have, such as {strange[0]!r}"
            )
    result.official.setdefault(arm, {}).update(found)


def score_official(
    folder: Folder,
    result: Evaluation,
    python: Path,
    dimensions: Sequence[str],
    *,
    device: str = "cpu",
    stand_in: bool = False,
    told: Callable[[str], None] = lambda line: None,
) -> None:
    """Have the ``vbench`` package score the clips that could be read; a dimension that fails becomes a problem.

    Raises:
        UsageError: there is no such dimension, or the interpreter cannot be run.

    """
    if unknown := [name for name in dimensions if name not in DIMENSIONS]:
        raise UsageError(f"VBench has no dimension {', '.join(unknown)}; it has {', '.join(DIMENSIONS)}")
    for arm in result.clips:
        info = write_info(folder, result, arm)
        for dimension in dimensions:
            told(f"vbench {dimension}  {arm}")
            log = folder.root / "vbench" / f"{arm}_{dimension}.log"
            if not any(dimension in entry["dimension"] for entry in info):
                result.missing[dimension] = f"no clip of a prompt for it in the suite {result.settings['suite']}"
                continue
            try:
                path = folder.root / "vbench" / f"{arm}_full_info.json"
                scores, facts = run_official(python, dimension, path, device=device, log=log, stand_in=stand_in)
            except UsageError:
                raise
            except DsattnError as error:
                result.problems.append((f"{arm}/{dimension}", str(error)))
                continue
            result.official.setdefault(arm, {})[dimension] = scores
            result.official_facts = facts


def write_info(folder: Folder, result: Evaluation, arm: str) -> list[dict[str, Any]]:
    """Write an arm's ``*_full_info.json`` in VBench's form; its entries."""
    videos: dict[str, list[Path]] = {}
    for clip in result.clips[arm]:
        videos.setdefault(clip.item.prompt, []).append(clip.path.absolute())
    info = full_info(result.settings["entries"], videos)
    write_json(folder.root / "vbench" / f"{arm}_full_info.json", info)
    return info


def dimensions_of(result: Evaluation, arm: str) -> dict[str, Scores]:
    """VBench's dimensions of an arm: the package's where it ran, else our own."""
    name = "temporal_flickering"
    own = {clip.path.name: clip.scores[name] for clip in result.clips[arm] if name in clip.scores}
    ours = {name: Scores(fmean(own.values()), own)} if own else {}
    return {**ours, **result.official.get(arm, {})}


def _arms(folder: Folder, arms: Sequence[str] | None, reference: str) -> list[str]:
    known = folder.arms()
    names = known if arms is None else list(dict.fromkeys([reference, *arms]))
    if unknown := [name for name in [reference, *names] if name not in known]:
        raise UsageError(f"{folder.root} has no arm {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    return names


def _score(result: Evaluation, clip: Clip, frames: Frames, fps: float, flickering: bool) -> None:
    if flickering:
        clip.scores["temporal_flickering"] = temporal_flickering(frames)
    try:
        clip.scores |= dataclasses.asdict(motion(frames, fps))
    except UsageError as error:
        result.missing |= dict.fromkeys(PROXIES, str(error))


def _metrics(lpips: Lpips | str, device: torch.device | str) -> Metrics:
    """By name: pixels a side that a metric needs, and the metric."""
    found: Metrics = {
        "psnr": (1, psnr),
        "ssim": (SSIM_WINDOW, partial(ssim, device=device)),
        "ms_ssim": (MS_SSIM_SIDE, partial(ms_ssim, device=device)),
    }
    return found if isinstance(lpips, str) else {**found, "lpips": (LPIPS_SIDE, lpips)}


def _compare(
    result: Evaluation, folder: Folder, clips: tuple[Clip, Clip], decoded: tuple[Frames, Frames], metrics: Metrics
) -> None:
    """Fidelity of the second clip to the first, on frames before encoding if both were kept."""
    one, other = clips
    kept = [kept_frames(folder, clip) for clip in clips]
    if kept[0] is not None and kept[1] is not None:
        a, b = kept[0], kept[1]
        result.on.add("uint8 frames before encoding")
    else:
        a, b = decoded
        result.on.add("decoded mp4 files, whose losses are in it (sample with --keep-frames to leave them out)")
    other.identical = bool(np.array_equal(a, b))
    least = min(a.shape[1:3])
    for name, (side, metric) in metrics.items():
        if least < side:
            result.missing[name] = f"frames have {least} pixels a side, it needs {side}"
        elif (mean := metric(a, b).mean) is not None:
            other.fidelity[name] = mean
