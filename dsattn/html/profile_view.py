"""What the page of a profile shows, as texts, numbers and charts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from dsattn import report_view
from dsattn.html import parts
from dsattn.html.charts import Series, fitted, line_chart, log_axis
from dsattn.wording import counts, percent

Embed = Callable[[str | None], str | None]


def profile_view(report: dict[str, Any], embed: Embed) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values for the template, and for the script.

    Args:
        report: valid against ``profile_report.schema.json``.
        embed: data URI of a file that the report names, None if there is none.

    """
    grid, model, maps = report["grid"], report["model"], report.get("maps")
    size = " × ".join(str(grid[name]) for name in ("frames", "height", "width"))
    page = {
        "kind": "profile",
        "compare": False,
        "title": f"{model['id']} · dsattn profile",
        "prompt": report["prompt"],
        "where": f"{model['id']} ({model['pipeline']}), latent grid {size} ({report['tokens']:,} tokens), "
        f"{report['steps']} steps, seed {report['seed']}, {model['dtype']}, {report_view.hardware(report)}",
        "cards": _cards(report),
        "reasons": [],
        "reasons_title": "",
        "links": [
            ("maps", "Heads"),
            *([("candidates", "Candidates")] if report.get("curves") else []),
            ("timeline", "Timeline"),
            ("settings", "Settings"),
        ],
        **parts.maps(maps, embed, "Not recorded: the profile was made by an earlier version of dsattn."),
        "step_charts": [],
        "curves": [_curves(group) for group in report.get("curves", [])],
        "timeline": parts.timeline(maps, None),
        "kinds": parts.KINDS,
        "calls": [("Calls", counts(report["calls"]))],
        "fallbacks": report_view.fallbacks(report),
        "command": report["command"],
        "settings": _settings(report),
        "notes": [],
        "version": report["env"]["dsattn"],
        "created": report.get("created", "an unknown day"),
    }
    return page, parts.script_data(maps)


def _cards(report: dict[str, Any]) -> list[dict[str, Any]]:
    heads: Counter[str] = Counter()
    for layer in report["layers"]:
        heads.update(layer["methods"])
    density, error = report["density"], report["estimated_error"]
    name, number = heads.most_common(1)[0] if heads else ("none", 0)
    target, total = report["config"].get("target_error"), sum(heads.values())
    return [
        {"name": "chosen most often", "value": name, "note": f"{number} of {total} heads", "bad": False},
        {
            "name": "density",
            "value": f"{100 * density['all_calls']:.0f} %",
            "note": f"of all query-key pairs computed; {parts.sparse_share(density['sparse_calls'])}",
            "bad": False,
        },
        {
            "name": "estimated error",
            "value": percent(error).replace("%", " %"),
            "note": f"asked for {target:.1%}" if isinstance(target, (int, float)) else "cost was the budget",
            "bad": False,
        },
        {"name": "methods in use", "value": str(len(heads)), "note": counts(heads), "bad": False},
    ]


def _curves(group: dict[str, Any]) -> dict[str, Any]:
    """Error over density of every candidate, a chart per layer."""
    charts = []
    for layer in group["layers"]:
        ladder = [100 * value for value in layer["densities"]]
        across = log_axis("density, % (logarithmic)", ladder)
        lines = [
            Series(name, [None if v is None else 100 * v for v in values], i)
            for i, (name, values) in enumerate(layer["error"].items())
        ]
        up = fitted("error, %", [v for line in lines for v in line.values], zero=True, count=4)
        text = f"Estimated error over density, layer {layer['layer']}: {', '.join(layer['error'])}"
        charts.append((f"Layer {layer['layer']}", line_chart(text, ladder, lines, across, up)))
    return {"name": group["name"], "charts": charts}


def _settings(report: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    names = ("prompt", "negative_prompt", "seed", "steps", "guidance", "tokens")
    grid = report["grid"]
    shape = {
        "latent grid": " × ".join(str(grid[n]) for n in ("frames", "height", "width")),
        "text tokens": grid["text"],
    }
    return [
        ("Run", parts.facts({**report["model"], **{name: report[name] for name in names}, **shape})),
        ("Method", parts.facts(report["config"])),
        ("Environment", parts.facts(report["env"])),
        ("Pipeline", parts.facts(report["pipeline"])),
    ]
