"""The table of what the shipped models draw, from the committed results of `scripts/eval_tiny.py`."""

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
