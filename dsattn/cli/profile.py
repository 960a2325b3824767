"""``dsattn profile``: which method and density every head takes, as files for later runs, pictures and a table."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer

from dsattn.call_maps import CallMaps, call_maps
from dsattn.cli import models, options
from dsattn.cli.output import print_json
from dsattn.cli.progress import watching
from dsattn.cli.table import print_profile
from dsattn.errors import UsageError
from dsattn.head_profile import DENSITIES, HeadProfile
from dsattn.html.page import write_page
from dsattn.measure import generate
from dsattn.profile_pictures import draw_all, picture_names
from dsattn.profile_report import ProfileReport, layer_rows, profile_report
from dsattn.report import environment, write_json
from dsattn.video import check_writable

Out = Annotated[Path, typer.Option("--out", help="Folder for the profile and its pictures.")]

Html = Annotated[
    bool, typer.Option("--html", help="Also write report.html: one file with maps and charts, for a browser.")
]

SCHEMA = "dsattn.profile-report/2"
MASKS, PAGE = "masks.png", "report.html"


@options.with_shared
def command(request: options.Request, out: Out = Path("profile"), html: Html = False) -> None:
    """Run once with the method auto and keep what it measured of every head: JSON for --profile, and pictures."""
    if request.config.method != "auto":
        raise UsageError(f"'dsattn profile' runs the method auto, got {request.config.method!r}")
    if request.config.options.get("profile") is not None:
        raise UsageError("'dsattn profile' measures anew: leave the option profile out")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file, expected a folder")
    for name in ("profile.json", *([PAGE] if html else [])):
        check_writable(out / name)
    request, loaded = models.prepare(request)
    silent = request.params["quiet"] or request.params["json"]
    profile, report, maps, document = _run(request, loaded, silent)
    document["files"].update({"html": PAGE} if html else {})
    # Shown before it is saved: a full disk must not cost the figures.
    print_json(document) if request.params["json"] else print_profile(document, out)
    profile.save(out / "profile.json")
    write_json(out / "report.json", document)
    draw_all(report, out)
    if maps is not None:
        maps.write_masks(out / MASKS)
    if html:
        write_page(out / PAGE, document, out)


def _run(
    request: options.Request, loaded: models.Loaded, silent: bool
) -> tuple[HeadProfile, ProfileReport, CallMaps | None, dict[str, Any]]:
    """Run once, and gather what is kept, drawn and printed."""
    from dsattn.pipelines.adapter import enable

    try:
        handle = enable(loaded.pipe, request.config)
    except ValueError as error:
        raise UsageError(f"dsattn cannot be used on this {loaded.info['pipeline']}: {error}") from error
    try:
        with watching(silent) as watch:
            # The plans are wanted afterwards: enabled here, not by `generate`.
            run = generate(loaded.pipe, request.job, watch=watch, label="profiling", decode=False)
        profile = handle.head_profile()
        report = profile_report(profile, handle.engine)
        maps = call_maps(handle.engine)
        summary = handle.summary()
    finally:
        handle.remove()
    document = {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": request.command,
        "prompt": request.job.prompt,
        "negative_prompt": request.job.negative_prompt,
        "seed": request.job.seed,
        "model": loaded.info,
        "pipeline": profile.pipeline,
        "grid": asdict(profile.grid),
        "tokens": profile.grid.tokens,
        "steps": profile.steps,
        "guidance": run.guidance,
        "config": summary["config"],
        "density": {"all_calls": summary["density_all_calls"], "sparse_calls": summary["density_sparse_calls"]},
        "estimated_error": summary["estimated_error"],
        "calls": summary["calls"],
        "fallbacks": [{"reason": why, "calls": n} for why, n in summary["fallbacks"].items()],
        "layers": layer_rows(report),
        "curves": _curves(report),
        "maps": None if maps is None else maps.describe(MASKS),
        "files": {
            "profile": "profile.json",
            "curves": "profile.safetensors",
            "masks": MASKS,
            "pictures": picture_names(report),
        },
        "env": environment(),
    }
    return profile, report, maps, document


def _curves(report: ProfileReport) -> list[dict[str, Any]]:
    """Median error over heads of every candidate, by density, of every measured layer."""
    return [
        {
            "name": panel.name,
            "layers": [
                {
                    "layer": index,
                    "densities": list(DENSITIES),
                    "error": {
                        name: [float(f"{value:.4g}") if isfinite(value) else None for value in line]
                        for name, line in zip(
                            layer.candidates, layer.error[:, :, panel.row].median(-1).values.tolist(), strict=True
                        )
                    },
                }
                for index, layer in panel.layers.items()
                if layer is not None
            ],
        }
        for panel in report.panels
    ]
