"""What the page of a comparison shows, as texts, numbers and charts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsattn import report_view
from dsattn.html import parts
from dsattn.html.charts import Series, fitted, line_chart, steps_axis
from dsattn.wording import counts, percent, seconds

Embed = Callable[[str | None], str | None]
OLD = "Not recorded: the report was made by an earlier version of dsattn."


def compare_view(report: dict[str, Any], embed: Embed) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values for the template, and for the script.

    Args:
        report: valid against ``report.schema.json``.
        embed: data URI of a file that the report names, None if there is none.

    """
    runs, shape, speed, psnr = report["runs"], report["shape"], report["speedup"], report["fidelity"]["psnr"]
    videos = {name: embed(report["files"].get(name)) for name in ("dense", "sparse")}
    maps = report.get("maps")
    timeline = report.get("timeline")
    page = {
        "kind": "compare",
        "compare": True,
        "title": f"{speed['headline']} · {runs['sparse']['method']} · dsattn compare",
        "prompt": report["prompt"],
        "where": _where(report),
        "cards": _cards(report),
        "reasons": speed["reasons"],
        "reasons_title": "Why it is not faster" if speed["e2e"] < 1.02 else "What to keep in mind",
        "links": [
            ("video", "Video"),
            ("speed", "Speed"),
            ("fidelity", "Fidelity"),
            ("maps", "Heads"),
            ("timeline", "Timeline"),
            ("settings", "Settings"),
        ],
        "videos": videos if all(videos.values()) else None,
        "videos_missing": _missing_videos(report),
        "dense_name": f"{report['protocol']['baseline']}, {seconds(runs['dense']['e2e']['median'])}",
        "sparse_name": f"{runs['sparse']['method']}, {seconds(runs['sparse']['e2e']['median'])}",
        "frames": shape["frames"],
        "baseline": report["protocol"]["baseline"],
        "method": runs["sparse"]["method"],
        "rows": [_speed_row(row) for row in report_view.rows(report)],
        "baseline_note": report_view.baseline(report),
        "psnr_chart": _psnr_chart(psnr["per_frame"]),
        "fidelity": _fidelity(report["fidelity"]),
        "per_frame": [
            (_db(a), "n/a" if b is None else f"{b:.4f}")
            for a, b in zip(psnr["per_frame"], report["fidelity"]["ssim"]["per_frame"], strict=False)
        ],
        "curves": None,
        **parts.maps(maps, embed, OLD if "maps" not in report else "No attention call reached dsattn in this run."),
        "step_charts": _step_charts(report),
        "timeline": parts.timeline(maps, timeline),
        "kinds": parts.KINDS,
        "calls": _calls(report),
        "fallbacks": report_view.fallbacks(report),
        "command": report["command"],
        "settings": _settings(report),
        "notes": report["protocol"]["notes"],
        "version": report["env"]["dsattn"],
        "created": report["created"],
    }
    data = {
        "fps": shape["fps"],
        "frames": shape["frames"],
        "psnr": psnr["per_frame"],
        "ssim": report["fidelity"]["ssim"]["per_frame"],
        **parts.script_data(maps),
    }
    return page, data


def _where(report: dict[str, Any]) -> str:
    shape, model = report["shape"], report["model"]
    return (
        f"{model['id']} ({model['pipeline']}), {shape['width']} × {shape['height']} × {shape['frames']} frames, "
        f"{shape['tokens']:,} tokens, {shape['steps']} steps, seed {report['seed']}, {model['dtype']}, "
        f"{report_view.hardware(report)}"
    )


def _cards(report: dict[str, Any]) -> list[dict[str, Any]]:
    speed, density, error = report["speedup"], report["density"], report["estimated_error"]
    found, runs = report["fidelity"], report["runs"]
    ratio, _, word = speed["headline"].partition(" ")
    psnr = found["psnr"]
    times = " → ".join(seconds(runs[mode]["e2e"]["median"]) for mode in ("dense", "sparse"))
    cards = [
        {
            "name": f"end to end {word}".strip(),
            "value": ratio.replace("x", "×"),
            "note": f"{times}, {runs['sparse']['method']} against dense",
            "bad": speed["e2e"] < 0.98,
        },
        {
            "name": "PSNR against dense",
            "value": "identical" if psnr["identical"] else _db(psnr["mean"]),
            "note": "every frame is equal" if psnr["identical"] else f"worst frame {_db(psnr['worst'])}",
            "bad": False,
        },
        {
            "name": "density",
            "value": f"{100 * density['all_calls']:.0f} %",
            "note": f"of all query-key pairs computed; {parts.sparse_share(density['sparse_calls'])}",
            "bad": False,
        },
    ]
    note = f"of the attention output, on {error['rows']} rows a head" if error["rows"] else "monitor was off"
    cards.append(
        {"name": "estimated error", "value": percent(error["overall"]).replace("%", " %"), "note": note, "bad": False}
    )
    return cards


def _missing_videos(report: dict[str, Any]) -> str:
    names = " and ".join(str(report["files"].get(name, f"{name}.mp4")) for name in ("dense", "sparse"))
    return f"Not shown: {names} were not found beside report.json, or are too large to carry."


def _speed_row(row: report_view.Row) -> dict[str, Any]:
    top = max(row.pair) if row.pair else 0
    bars = [round(100 * value / top, 1) for value in row.pair] if row.pair and top else None
    values = {name: getattr(row, name) for name in ("dense", "sparse", "ratio", "note", "level")}
    name = {"E2E": "End to end"}.get(row.name, row.name[0].upper() + row.name[1:])
    return {**values, "name": name, "bars": bars}


def _psnr_chart(values: list[float | None]) -> Any:
    if all(value is None for value in values):
        return None
    x = list(range(1, len(values) + 1))
    known = [value for value in values if value is not None]
    text = f"PSNR of {len(values)} frames, from {min(known):.1f} to {max(known):.1f} dB"
    up = fitted("PSNR per frame, dB (higher is closer to dense)", values)
    return line_chart(text, x, [Series("", values)], steps_axis("frame", x), up, name="psnr")


def _fidelity(found: dict[str, Any]) -> list[tuple[str, str]]:
    psnr, ssim = found["psnr"], found["ssim"]
    items = []
    if psnr["identical"]:
        items.append(("PSNR", "infinite: identical to dense"))
    else:
        worst = f"worst {_db(psnr['worst'])} in frame {psnr['worst_frame'] + 1}"
        items.append(("PSNR, mean of frames", f"{_db(psnr['mean'])}; {worst}"))
    if ssim["mean"] is not None:
        items.append(("SSIM, mean of frames", f"{ssim['mean']:.4f}; worst {ssim['worst']:.4f}"))
    latent = found["latent_relative_l2"]
    items.append(("Latents, relative L2", "not seen" if latent is None else f"{latent:.4f} ({found['latents_from']})"))
    items.append(("Dense against dense", report_view.noise_floor(found["noise_floor"])))
    items.append(("Measured on", found["on"]))
    return items


def _step_charts(report: dict[str, Any]) -> list[Any]:
    """Density and error over steps; of old reports too."""
    charts = []
    steps = [row["step"] for row in report["density"]["by_step"]]
    target = report["runs"]["sparse"]["config"].get("target_error")
    for part, key, name in (("density", "density", "Density"), ("estimated_error", "error", "Estimated error")):
        rows = report[part]["by_step"]
        if not rows:
            continue
        x = [row["step"] for row in rows]
        series = [Series(name if key == "error" else "", [100 * row[key] for row in rows])]
        if key == "error" and isinstance(target, (int, float)):
            series.append(Series("asked for", [100 * target] * len(x), 1, dots=False))
        values = [value for one in series for value in one.values]
        up = fitted(f"{name} over steps, % (all layers and heads)", values, zero=True)
        text = f"{name} by step: " + ", ".join(f"step {row['step']} {row[key]:.1%}" for row in rows)
        charts.append(line_chart(text, x, series, steps_axis("step", steps), up))
    return charts


def _calls(report: dict[str, Any]) -> list[tuple[str, str]]:
    sparse, timeline = report["runs"]["sparse"], report.get("timeline")
    items = [
        ("Calls of the sparse run", counts(sparse["calls"])),
        ("Dense by schedule", counts(sparse["dense_reasons"])),
        ("Implementations", counts(sparse["impls"])),
    ]
    if timeline is not None:
        items.append(("Plans made because of", counts(timeline["refresh_reasons"])))
    return items


def _settings(report: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    model, shape = report["model"], report["shape"]
    run = {
        "model": model["id"],
        "revision": model["revision"],
        "pipeline": model["pipeline"],
        "prompt": report["prompt"],
        "negative prompt": report["negative_prompt"],
        "seed": report["seed"],
        "guidance": shape["guidance"],
        "dtype": model["dtype"],
        "device": model["device"],
        "latent grid": " × ".join(map(str, shape["latent_thw"])),
        "text tokens": shape["text_tokens"],
        "layers, heads, head size": f"{shape['layers'] or 'n/a'}, {shape['heads']}, {shape['head_dim']}",
    }
    return [
        ("Run", parts.facts(run)),
        ("Method", parts.facts(report["runs"]["sparse"]["config"])),
        ("Environment", parts.facts(report["env"])),
        ("Equal in every run", parts.facts(report.get("inputs") or {})),
    ]


def _db(value: float | None) -> str:
    return "∞ dB" if value is None else f"{value:.1f} dB"
