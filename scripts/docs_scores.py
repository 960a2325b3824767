"""Tables of what the shipped models draw and how they learnt it, from committed results and training logs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Table = Callable[..., str]


def results(folder: Path, model: str) -> dict[str, dict[str, Any]]:
    """Committed results of a model by file name, larger grids first; `folder` holds one folder for every machine."""
    found = {
        path.relative_to(folder.parent.parent).as_posix(): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob(f"*/eval_{model}_*.json"))
    }

    def pixels(name: str) -> int:
        frames, height, width = (int(v) for v in found[name]["settings"]["grid"].split("x"))
        return -frames * height * width

    return {name: found[name] for name in sorted(found, key=pixels)}


def model_scores(folder: Path, model: str, table: Table) -> str:
    """Scores of a model, one column for every grid that was measured; a sentence where none was."""
    found = list(results(folder, model).items())
    if not found:
        return f"Not measured in this version: no `eval_{model}_*.json` is among the results."
    names = list(dict.fromkeys(name for _, one in found for name in one["scores"]))
    rows = [(name, *(_share(one["scores"].get(name)) for _, one in found), _chance(found, name)) for name in names]
    last = (
        ("temporal flickering", "flickering", ".4f"),
        ("the same of rendered clips", "rendered_flickering", ".4f"),
        ("codec, dB", "codec_psnr_db", ".1f"),
    )
    rows += [(label, *(format(one[key], form) for _, one in found), "") for label, key, form in last]
    header = ("score", *(_head(one) for _, one in found), "guessing")
    return "\n\n".join((table(header, rows), *(_source(name, one) for name, one in found)))


CURVE = ("colour", "shape", "direction", "motion", "background", "one object")
"""Scores that a training curve shows."""


def training_curve(folder: Path, model: str, table: Table) -> str:
    """Held-out loss of a model over its last training, and scores of the checkpoints that were scored.

    The log is `train_<model>.jsonl` in `folder`, scores are `checkpoints/eval_<model>_<step>.json` there.

    Raises:
        ValueError: the log holds no held-out loss.

    """
    lines = (folder / f"train_{model}.jsonl").read_text(encoding="utf-8").splitlines()
    losses = {found["step"]: found["held_out"] for found in map(json.loads, lines) if "held_out" in found}
    if not losses:
        raise ValueError(f"train_{model}.jsonl holds no held-out loss")
    scored = {
        int(path.stem.rsplit("_", 1)[1]): json.loads(path.read_text(encoding="utf-8"))
        for path in folder.glob(f"checkpoints/eval_{model}_*.json")
    }
    levels = list(next(iter(losses.values())))
    every = max(1, len(losses) // 8)
    shown = sorted({*list(losses)[every - 1 :: every], *(s for s in losses if s in scored or s == 0), max(losses)})
    rows = []
    for step in shown:
        found = scored.get(step, {}).get("scores", {})
        shares = (f"{found[name]['share']:.0%}" if name in found else "" for name in CURVE)
        rows.append((f"{step:,}", *(f"{losses[step][level]:.3f}" for level in levels), *(shares if scored else ())))
    header = ("step", *(f"loss at {level}" for level in levels), *(CURVE if scored else ()))
    sources = [f"Source: `benchmarks/results/{folder.name}/train_{model}.jsonl`"]
    if scored:
        one = next(iter(scored.values()))
        sources.append(
            f"scores of {one['clips_done']} clips, {_head(one)}: `checkpoints/eval_{model}_*.json` beside it"
        )
    return f"{table(header, rows, left=0)}\n\n{'; '.join(sources)}."


def caption_curve(folder: Path, model: str, table: Table) -> str:
    """How often a clip's own caption is preferred to another one, by training step: `classify_<model>.json`."""
    found = json.loads((folder / f"classify_{model}.json").read_text(encoding="utf-8"))
    first = next(iter(found["weights"].values()))
    header = ("step", *(f"{row['word']}, noise {row['level']:g}" for row in first))
    rows = [
        (f"{int(step):,}", *(f"{row['right']:.0%}" for row in answers)) for step, answers in found["weights"].items()
    ]
    frames, height, width = found["grid"]
    clips = f"{first[0]['clips']} held-out clips of {frames} × {height} × {width} tokens for each word; guessing: 50 %"
    return (
        f"{table(header, rows, left=0)}\n\n{clips}. Source: `benchmarks/results/{folder.name}/classify_{model}.json`."
    )


def _share(row: dict[str, Any] | None) -> str:
    return "–" if row is None else f"{row['share']:.1%} ({row['low']:.0%}–{row['high']:.0%})"


def _chance(found: list[tuple[str, dict[str, Any]]], name: str) -> str:
    chance = next((one["scores"][name]["chance"] for _, one in found if name in one["scores"]), None)
    return "" if chance is None else f"{chance:.0%}"


def _head(one: dict[str, Any]) -> str:
    frames, height, width = one["settings"]["grid"].split("x")
    return f"{frames} × {height} × {width}, {one['settings']['steps']} steps"


def _source(name: str, one: dict[str, Any]) -> str:
    env, truth = one["env"], one["validation"]
    least = min((row["share"], score) for table in truth.values() for score, row in table.items() if score != "all")
    device = ", ".join(env["gpu"]) if one["settings"]["device"] != "cpu" else env["cpu"]
    clips = f"{one['clips_done']} of {one['clips_wanted']} clips, {one['settings']['dtype']}"
    trust = f"the measurement is right on at least {least[0]:.1%} of rendered clips (least: {least[1]})"
    return f"{_head(one)}: {clips}, {device}, torch {env['torch']}; {trust}. `{one['command']}`. Source: `{name}`."
