"""What the page of a scored suite shows, as texts, numbers and clips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsattn import report_view
from dsattn.html import parts
from dsattn.quality.tables import tables
from dsattn.wording import seconds

Embed = Callable[[str | None], str | None]
# Bytes of all clips together that a page carries; the rows of the others say so.
LARGEST_IN_ALL = 64 * 2**20
MIB = 2**20
_NAMES = {"psnr": "PSNR", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "lpips": "LPIPS"}


class _Media:
    """Clips that the page carries, each once; after the first that does not fit, none."""

    def __init__(self, embed: Embed, limit: int) -> None:
        self.uris: list[str] = []
        self.full = False
        self._embed, self._left, self._places = embed, limit, dict[str, int]()

    def pair(self, names: tuple[str, str]) -> tuple[int, int] | str:
        """Places of two clips, or why they are not carried."""
        if self.full:
            return "left out"
        found = {name: self._embed(name) for name in names if name not in self._places}
        if None in found.values():
            return "file not found"
        new = {name: uri for name, uri in found.items() if uri is not None}
        # Base64 has four letters for three bytes.
        size = sum(len(uri) * 3 // 4 for uri in new.values())
        if size > self._left:
            self.full = True
            return "left out"
        self._left -= size
        for name, uri in new.items():
            self._places[name] = len(self.uris)
            self.uris.append(uri)
        return self._places[names[0]], self._places[names[1]]


def quality_view(
    report: dict[str, Any], embed: Embed, limit: int = LARGEST_IN_ALL
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values for the template, and for the script.

    Args:
        report: valid, see ``dsattn.report_file``.
        embed: data URI of a file beside the report, None if there is none.
        limit: bytes of all clips together that the page may carry.

    """
    run, reference = report["run"], report["reference"]
    others = [name for name in report["arms"] if name != reference]
    media = _Media(embed, limit)
    rows, pairs = _clips(report, others, media)
    problems = [problem["why"] for problem in report["problems"]]
    title = f"{', '.join(others)} against {reference}" if others else f"{reference} alone"
    page = {
        "kind": "quality",
        "compare": False,
        "title": f"{title} · suite {run['suite']} · dsattn quality",
        "prompt": f"{title} on {_number(report['prompts'], 'prompt')}",
        "where": _where(report),
        "cards": _cards(report, others),
        "reasons": [f"{_number(len(problems), 'clip or dimension', 'clips or dimensions')}: see Problems"]
        if problems
        else [],
        "reasons_title": "Not everything could be scored",
        "links": [
            *([("video", "Clips")] if others else []),
            ("scores", "Scores"),
            ("prompts", "Prompts"),
            *([("problems", "Problems")] if problems else []),
            ("settings", "Settings"),
        ],
        "reference": reference,
        "others": others,
        "pairs": [pair["name"] for pair in pairs],
        "not_shown": _not_shown(rows, limit),
        "tables": [_table(report, name, text) for name, text in zip(others or [None], tables(report), strict=True)],
        "not_computed": [f"{metric} n/a: {why}" for metric, why in report["missing"].items()],
        "interval": report["definitions"].get("interval", ""),
        "columns": [*_columns(report, "fidelity"), *_columns(report, "scores")],
        "clips": rows,
        "problems": problems,
        "command": "\n".join([*report.get("sampled_by", []), report["command"]]),
        "settings": _settings(report),
        "notes": _notes(report),
        "version": report["env"]["dsattn"],
        "created": report["created"],
    }
    return page, {"fps": run["fps"], "frames": 1, "panels": [], "bins": 1, "media": media.uris, "pairs": pairs}


def _where(report: dict[str, Any]) -> str:
    run, job = report["run"], report["run"]["job"]
    sizes = [job.get(name) for name in ("width", "height", "frames")]
    size = "" if None in sizes else f"{sizes[0]} × {sizes[1]} × {sizes[2]} frames, "
    steps = f"{job['steps']} steps, " if job.get("steps") else ""
    where = report_view.hardware({"env": report["env"], "model": run["model"]})
    return (
        f"{run['model']['id']} ({run['model']['pipeline']}), suite {run['suite']}, {size}{steps}seed {run['seed']}, "
        f"{run['model']['dtype']}; scored on {where}"
    )


def _cards(report: dict[str, Any], others: list[str]) -> list[dict[str, Any]]:
    arms, reference = report["arms"], report["reference"]
    scored, wanted = (sum(arm[name] for arm in arms.values()) for name in ("videos", "expected"))
    clips = f"{_number(report['prompts'], 'prompt')} × {report['run']['samples']}, {_number(len(arms), 'arm')}"
    cards = [
        {"name": "clips scored", "value": f"{scored} of {wanted}", "note": clips, "bad": scored < wanted},
    ]
    closest = {name: arms[name]["fidelity"]["psnr"] for name in others if "psnr" in arms[name]["fidelity"]}
    same = [name for name in others if arms[name]["videos"] and arms[name]["identical_to_reference"]]
    if closest:
        name = max(closest, key=lambda one: closest[one]["mean"])
        found = closest[name]
        ends = "one prompt" if found["low"] is None else f"95 %: {found['low']:.2f} to {found['high']:.2f} dB"
        title = f"PSNR against {reference}" + (", the closest arm" if len(others) > 1 else "")
        cards.append({"name": title, "value": f"{found['mean']:.2f} dB", "note": f"{name}; {ends}", "bad": False})
    elif same:
        cards.append(
            {"name": f"against {reference}", "value": "identical", "note": "every frame is equal", "bad": False}
        )
    if density := [arms[name]["density"] for name in others if arms[name]["density"] is not None]:
        low, high = f"{100 * min(density):.0f}", f"{100 * max(density):.0f}"
        value = f"{low} %" if low == high else f"{low} to {high} %"
        cards.append(
            {"name": "density", "value": value, "note": "of all query-key pairs computed, all calls", "bad": False}
        )
    totals = arms[others[0] if others else reference]["totals"]
    total = "n/a" if totals["total"] is None else f"{100 * totals['total']:.2f} %"
    note = totals["total_why"].removeprefix("n/a (").removesuffix(")") if totals["total_why"] else others[:1]
    cards.append({"name": "VBench Total", "value": total, "note": note if isinstance(note, str) else "", "bad": False})
    return cards


def _table(report: dict[str, Any], name: str | None, text: list[list[str]]) -> dict[str, Any]:
    """Scores of an arm beside those of the reference, in the words of the printed table."""
    rows = []
    for row in text[1:]:
        metric = row[0].removesuffix(f" to {report['reference']}") if name else row[0]
        gap = (report["arms"][name]["scores"].get(metric) or {}).get("difference") if name else None
        notes, plot = [] if not name else [_number(int(row[4]), "prompt")], None
        if gap is not None and gap["low"] is not None:
            top = max(abs(gap["low"]), abs(gap["high"])) or 1.0
            ends = [round(50 + 48 * gap[end] / top, 1) for end in ("low", "mean", "high")]
            plot = {"left": ends[0], "width": round(ends[2] - ends[0], 1), "at": ends[1]}
            if gap["low"] <= 0 <= gap["high"]:
                notes.append("not told apart")
        rows.append(
            {
                "name": row[0],
                "meaning": report["definitions"].get(metric, ""),
                "cells": row[1:4] if name else row[1:],
                "note": ", ".join(notes),
                "plot": plot,
            }
        )
    return {"arm": name or report["reference"], "head": text[0][1:4] if name else text[0][1:], "rows": rows}


def _columns(report: dict[str, Any], part: str) -> list[tuple[str, str]]:
    """What is known of single clips: ``(part, metric)``."""
    return [(part, m) for m in dict.fromkeys(metric for video in report["videos"] for metric in video[part])]


def _clips(
    report: dict[str, Any], others: list[str], media: _Media
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of all clips, one for each arm that is compared, and the pairs that can be played."""
    reference = report["reference"]
    by_key: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for video in report["videos"]:
        by_key.setdefault((video["prompt"], video["index"]), {})[video["arm"]] = video
    columns = [*_columns(report, "fidelity"), *_columns(report, "scores")]
    rows: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    for (prompt, index), found in by_key.items():
        base = found.get(reference)
        seed = next(iter(found.values()))["seed"]
        for name in others or [reference]:
            row: dict[str, Any] = {
                "prompt": prompt,
                "note": f"clip {index}, seed {seed}",
                "arm": name,
                "pair": None,
                "why": "",
            }
            row["cells"] = [_cell(part, metric, base, found.get(name), bool(others)) for part, metric in columns]
            rows.append(row)
            if not others:
                continue
            if base is None or name not in found:
                row["why"] = f"{reference if base is None else name} could not be scored"
                continue
            places = media.pair((_path(base), _path(found[name])))
            if isinstance(places, str):
                row["why"] = places
                continue
            row["pair"] = len(pairs)
            title = f"{prompt}, clip {index}" + (f", {name}" if len(others) > 1 else "")
            words = _words(found[name], seed)
            pairs.append({"name": title, "arm": name, "dense": places[0], "sparse": places[1], "words": words})
    return rows, pairs


def _path(video: dict[str, Any]) -> str:
    return f"videos/{video['arm']}/{video['file']}"


def _cell(part: str, metric: str, base: dict[str, Any] | None, own: dict[str, Any] | None, both: bool) -> str:
    if part == "fidelity":
        if own is not None and own["identical"]:
            return "identical"
        return _figure(metric, own, part)
    if not both:
        return _figure(metric, own, part)
    return f"{_figure(metric, base, part)} → {_figure(metric, own, part)}"


def _figure(metric: str, video: dict[str, Any] | None, part: str) -> str:
    value = None if video is None else video[part].get(metric)
    return "n/a" if value is None else f"{value:.2f}" if metric == "psnr" else f"{value:.4f}"


def _words(video: dict[str, Any], seed: int) -> str:
    """A pair's figures for the line below the players."""
    if video["identical"]:
        return f"Seed {seed}. Both clips are identical."
    known = [
        f"{_NAMES.get(m, m)} {_figure(m, video, 'fidelity')}{' dB' if m == 'psnr' else ''}" for m in video["fidelity"]
    ]
    return f"Seed {seed}. {'; '.join(known)} (means of frames)." if known else f"Seed {seed}."


def _not_shown(rows: list[dict[str, Any]], limit: int) -> list[str]:
    found = []
    if count := sum(row["why"] == "file not found" for row in rows):
        found.append(
            f"{_number(count, 'pair is', 'pairs are')} not shown: the files were not found in videos/ beside "
            "quality.json, or are too large to carry."
        )
    if count := sum(row["why"] == "left out" for row in rows):
        found.append(
            f"{_number(count, 'pair is', 'pairs are')} left out: the clips of one page are at most "
            f"{limit / MIB:.0f} MiB. They lie in videos/ beside quality.json."
        )
    return found


def _notes(report: dict[str, Any]) -> list[str]:
    on = report["fidelity_on"]
    return [*([f"fidelity is measured on {' and '.join(on)}"] if on else []), *report["notes"]]


def _settings(report: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    run = report["run"]
    model = {name: value for name, value in run["model"].items() if name != "scheduler"}
    found = [("Run", parts.facts({**model, **{k: run[k] for k in ("suite", "samples", "seed", "fps")}, **run["job"]}))]
    for name, arm in report["arms"].items():
        group = arm["totals"]
        facts = {
            **(arm.get("config") or {}),
            "clips": f"{arm['videos']} of {arm['expected']}",
            "identical clips": arm["identical_to_reference"],
            "density of all calls": "n/a" if arm["density"] is None else f"{arm['density']:.3f}",
            "denoising, median": seconds(arm["denoise_s"]),
            "calls that fell back to dense": arm["fallbacks"],
            "VBench Quality": "n/a" if group["quality"] is None else f"{group['quality']:.4f}",
            "VBench Semantic": "n/a" if group["semantic"] is None else f"{group['semantic']:.4f}",
            "VBench Total": group["total_why"] if group["total"] is None else f"{group['total']:.4f}",
        }
        found.append((f"Arm {name}", parts.facts(facts)))
    found.append(("Environment of the scores", parts.facts(report["env"])))
    if report["vbench_package"]:
        found.append(("VBench's package", parts.facts(report["vbench_package"])))
    return found


def _number(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
