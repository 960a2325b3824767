"""The report of an evaluation: means, intervals, paired differences and VBench's totals, as plain values."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

from dsattn.metrics import DEFINITIONS, Interval, mean_interval, paired_interval
from dsattn.quality.clips import Key
from dsattn.quality.evaluate import PROXIES, Evaluation, dimensions_of, write_info
from dsattn.quality.folder import Folder
from dsattn.quality.vbench import DIMENSIONS, totals, write_results
from dsattn.report import environment, write_json

# Described by quality.schema.json.
SCHEMA = "dsattn.quality/1"
FIDELITY = ("psnr", "ssim", "ms_ssim", "lpips")
# VBench is for clips below this; VBench-Long for the others.
VBENCH_SECONDS = 5.0


def save(folder: Folder, result: Evaluation, command: str) -> dict[str, Any]:
    """Write the report ``quality.json`` and VBench's files; the report."""
    for arm, clips in result.clips.items():
        if clips:
            write_info(folder, result, arm)
            write_results(
                folder.root / "vbench" / f"{arm}_eval_results.json",
                dimensions_of(result, arm),
                folder.root / "videos" / arm,
            )
    report = build(result, command)
    write_json(folder.root / "quality.json", report)
    return report


def build(result: Evaluation, command: str) -> dict[str, Any]:
    """The report as plain values."""
    settings = result.settings
    arms = {name: _arm(result, name) for name in result.clips}
    shown = {metric for arm in arms.values() for metric in (*arm["scores"], *arm["fidelity"])}
    seconds = [c.sidecar["shape"]["frames"] / settings["fps"] for clips in result.clips.values() for c in clips]
    notes = []
    if seconds and max(seconds) >= VBENCH_SECONDS:
        notes.append(f"clips of {max(seconds):.2f} s: VBench is for clips below 5 s, VBench-Long for longer ones")
    if settings["suite"] != "full":
        notes.append(f"suite {settings['suite']}: not comparable to published VBench results, which take all prompts")
    notes.append("temporal_flickering is without VBench's static filter, on every clip of its prompts")
    return {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "sampled_by": sorted(
            {c.sidecar["command"] for clips in result.clips.values() for c in clips if "command" in c.sidecar}
        ),
        "env": environment(),
        "run": {key: settings[key] for key in ("suite", "samples", "seed", "job", "fps", "model")},
        "prompts": len({entry["prompt_en"] for entry in settings["entries"]}),
        "reference": result.reference,
        "fidelity_on": sorted(result.on),
        "vbench_package": result.official_facts or None,
        "arms": arms,
        "missing": result.missing,
        "problems": [{"file": file, "why": why} for file, why in result.problems],
        "definitions": {name: text for name, text in DEFINITIONS.items() if name in shown or name == "interval"},
        "notes": notes,
        "videos": [
            {
                "arm": arm,
                "file": clip.path.name,
                "prompt": clip.item.prompt,
                "index": clip.item.index,
                "seed": clip.sidecar["seed"],
                "scores": clip.scores,
                "fidelity": clip.fidelity,
                "identical": clip.identical,
            }
            for arm, clips in result.clips.items()
            for clip in clips
        ],
    }


def values_of(result: Evaluation, arm: str) -> dict[str, dict[Key, float]]:
    """Every score of an arm's single clips: metric to (prompt, index) to value."""
    clips = result.clips[arm]
    keys = {clip.path.name: clip.key for clip in clips}
    proxies = {m: {clip.key: clip.scores[m] for clip in clips if m in clip.scores} for m in PROXIES}
    vbench = {
        dimension: {keys[file]: value for file, value in scores.videos.items() if file in keys}
        for dimension, scores in dimensions_of(result, arm).items()
    }
    return {**proxies, **vbench}


def _arm(result: Evaluation, name: str) -> dict[str, Any]:
    clips, vbench = result.clips[name], dimensions_of(result, name)
    own, base = values_of(result, name), values_of(result, result.reference)
    fidelity = {m: {c.key: c.fidelity[m] for c in clips if m in c.fidelity} for m in FIDELITY}
    return {
        "videos": len(clips),
        "expected": result.expected,
        "config": next((clip.sidecar.get("config") for clip in clips), None),
        "identical_to_reference": sum(clip.identical for clip in clips),
        "density": _mean([clip.sidecar["density"]["all_calls"] for clip in clips]),
        "denoise_s": _median([clip.sidecar["times_s"]["denoise"] for clip in clips]),
        "fallbacks": sum(f["calls"] for clip in clips for f in clip.sidecar["fallbacks"]),
        "scores": {
            metric: {
                "score": vbench[metric].score if metric in vbench else _mean(list(values.values())),
                "by": "vbench" if metric in result.official.get(name, {}) else "dsattn",
                "videos": len(values),
                "interval": _plain(mean_interval(_by_prompt(values))),
                "difference": None
                if name == result.reference
                else _plain(paired_interval(base.get(metric, {}), values)),
            }
            for metric, values in own.items()
            if values or metric in vbench
        },
        "fidelity": {m: _plain(mean_interval(_by_prompt(values))) for m, values in fidelity.items() if values},
        "totals": _totals(result, name),
    }


def _totals(result: Evaluation, name: str) -> dict[str, Any]:
    """VBench's group scores; a Total only of all dimensions, on all videos of the full suite."""
    group = totals({dimension: scores.score for dimension, scores in dimensions_of(result, name).items()})
    suite, videos = result.settings["suite"], len(result.clips[name])
    why = [] if group.dimensions == len(DIMENSIONS) else [f"{group.dimensions}/{len(DIMENSIONS)} dimensions"]
    why += [] if suite == "full" else [f"suite {suite}"]
    why += [] if videos == result.expected else [f"{videos}/{result.expected} videos"]
    return {
        "quality": group.quality,
        "semantic": group.semantic,
        "total": None if why else group.total,
        "dimensions": group.dimensions,
        "total_why": f"n/a ({', '.join(why)})" if why else None,
    }


def _by_prompt(values: Mapping[Key, float]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for (prompt, _), value in sorted(values.items()):
        found.setdefault(prompt, []).append(value)
    return found


def _plain(interval: Interval | None) -> dict[str, Any] | None:
    return None if interval is None else dataclasses.asdict(interval)


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def _median(values: list[float]) -> float | None:
    return median(values) if values else None
