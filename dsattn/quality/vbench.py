"""What is VBench's own: its dimensions, normalisation and totals, its JSON files, and running its package.

Source: VBench 0.1.5 (arXiv 2311.17982), ``scripts/constant.py`` and ``scripts/cal_final_score.py`` of its repository.
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsattn.errors import DsattnError, UsageError
from dsattn.report import write_json

# (lowest, highest, weight) by which a dimension enters its group's score.
QUALITY = {
    "subject_consistency": (0.1462, 1.0, 1.0),
    "background_consistency": (0.2615, 1.0, 1.0),
    "temporal_flickering": (0.6293, 1.0, 1.0),
    "motion_smoothness": (0.706, 0.9975, 1.0),
    "dynamic_degree": (0.0, 1.0, 0.5),
    "aesthetic_quality": (0.0, 1.0, 1.0),
    "imaging_quality": (0.0, 1.0, 1.0),
}
SEMANTIC = {
    "object_class": (0.0, 1.0, 1.0),
    "multiple_objects": (0.0, 1.0, 1.0),
    "human_action": (0.0, 1.0, 1.0),
    "color": (0.0, 1.0, 1.0),
    "spatial_relationship": (0.0, 1.0, 1.0),
    "scene": (0.0, 0.8222, 1.0),
    "appearance_style": (0.0009, 0.2855, 1.0),
    "temporal_style": (0.0, 0.364, 1.0),
    "overall_consistency": (0.0, 0.364, 1.0),
}
DIMENSIONS = (*QUALITY, *SEMANTIC)
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4.0, 1.0
# Single videos of these stand on another scale than their dataset score.
VIDEO_SCALE = {"imaging_quality": 0.01}

RUNNER = Path(__file__).with_name("vbench_runner.py")


@dataclass(frozen=True)
class Scores:
    """Dataset score of one dimension and the videos' own.

    Args:
        score: as VBench computes it, before normalisation.
        videos: value by file name, on the scale of ``score``; videos without a single number are left out.

    """

    score: float
    videos: dict[str, float]


@dataclass(frozen=True)
class Totals:
    """VBench's group scores; None where a dimension is missing, which VBench would silently count as 0."""

    quality: float | None
    semantic: float | None
    total: float | None
    dimensions: int


def normalised(dimension: str, score: float) -> float:
    """Share of the way from VBench's lowest to its highest score; not clamped, as VBench does not either."""
    low, high, _ = {**QUALITY, **SEMANTIC}[dimension]
    return (score - low) / (high - low)


def totals(scores: Mapping[str, float]) -> Totals:
    """Quality of 7, Semantic of 9 and Total of all 16 dimensions.

    Args:
        scores: dataset score by dimension; other names are left alone.

    """
    quality, semantic = _group(scores, QUALITY), _group(scores, SEMANTIC)
    total = None
    if quality is not None and semantic is not None:
        total = (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    return Totals(quality, semantic, total, sum(name in scores for name in DIMENSIONS))


def read_results(path: Path) -> dict[str, Scores]:
    """Dimensions of an ``*_eval_results.json``.

    Raises:
        UsageError: it cannot be read or has another form.

    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = {}
        for name, (score, *rest) in values.items():
            dimension = name.replace(" ", "_")
            scale = VIDEO_SCALE.get(dimension, 1.0)
            videos = {
                Path(video["video_path"]).name: float(video["video_results"]) * scale
                for video in (rest[0] if rest else ())
                if isinstance(video.get("video_results"), (int, float))
            }
            if not math.isfinite(score):
                raise ValueError(f"{name} has the score {score}")
            found[dimension] = Scores(float(score), videos)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UsageError(
            f"{path} cannot be read as VBench's results: {error}; expected an *_eval_results.json with "
            '{"dimension": [score, [{"video_path": ..., "video_results": ...}]]}'
        ) from error
    if unknown := sorted(found.keys() - set(DIMENSIONS)):
        raise UsageError(f"{path} holds dimensions VBench does not have: {', '.join(unknown)}")
    return found


def write_results(path: Path, results: Mapping[str, Scores], folder: Path) -> None:
    """Write dimensions in the form of VBench's ``*_eval_results.json``.

    Args:
        folder: where the videos lie.

    """
    values = {
        name: [
            scores.score,
            [
                {"video_path": str(folder / file), "video_results": value / VIDEO_SCALE.get(name, 1.0)}
                for file, value in scores.videos.items()
            ],
        ]
        for name, scores in results.items()
    }
    write_json(path, values)


def full_info(entries: Iterable[Mapping[str, Any]], videos: Mapping[str, Sequence[Path]]) -> list[dict[str, Any]]:
    """Entries with the videos of their prompts, as in VBench's ``*_full_info.json``; those without one are left out.

    Args:
        videos: paths by prompt.

    """
    return [
        {**entry, "video_list": [str(path) for path in videos[entry["prompt_en"]]]}
        for entry in entries
        if videos.get(entry["prompt_en"])
    ]


def run_official(
    python: Path, dimension: str, info: Path, *, device: str, log: Path, stand_in: bool = False
) -> tuple[Scores, dict[str, Any]]:
    """Have the ``vbench`` package of another environment compute a dimension; its scores, and what it ran on.

    A process per dimension: some end the interpreter, and none gives back its memory.

    Args:
        python: interpreter of an environment with ``vbench``.
        info: ``*_full_info.json`` that lists the videos.
        device: ``cpu`` or ``cuda``.
        log: what the package says is kept here.
        stand_in: put an empty module in the place of torchvision, for ``temporal_flickering``, which imports it and
            uses nothing of it.

    Raises:
        UsageError: there is no such interpreter.
        DsattnError: the package failed; the message names the log.

    """
    if stand_in and dimension != "temporal_flickering":
        raise UsageError(f"{dimension} uses torchvision: nothing can stand in for it")
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        # Isolated: neither our packages nor the modules beside the runner may take the place of its own.
        command = [str(python), "-I", str(RUNNER), dimension, str(info.absolute()), device, folder, str(int(stand_in))]
        try:
            with log.open("w", encoding="utf-8") as said:
                done = subprocess.run(command, stdout=said, stderr=subprocess.STDOUT, check=False)
        except OSError as error:
            raise UsageError(f"--vbench-python {python} cannot be run: {error.strerror}") from error
        result = Path(folder) / "run_eval_results.json"
        if done.returncode or not result.is_file():
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
            raise DsattnError(f"vbench could not compute {dimension}: {lines[-1].strip()} (all of it: {log})")
        facts = json.loads((Path(folder) / "facts.json").read_text(encoding="utf-8"))
        return read_results(result)[dimension], facts


def _group(scores: Mapping[str, float], group: Mapping[str, tuple[float, float, float]]) -> float | None:
    if not all(name in scores for name in group):
        return None
    weights = {name: weight for name, (_, _, weight) in group.items()}
    return sum(weights[name] * normalised(name, scores[name]) for name in group) / sum(weights.values())
