"""``dsattn compare``: dense and sparse with one seed, and a report of what it gained and cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dsattn.cli import models, options
from dsattn.cli.defaults import FPS
from dsattn.cli.errors import QualityGateError
from dsattn.cli.output import describe, print_json, sidecar
from dsattn.cli.progress import watching
from dsattn.cli.table import print_report
from dsattn.compare import Comparison, compare
from dsattn.errors import DsattnError, UsageError
from dsattn.html.page import write_page
from dsattn.measure import Run
from dsattn.report import build_report, write_json
from dsattn.video import DIFFERENCE_GAIN, SaveError, check_writable, side_by_side, write_mp4

Out = Annotated[Path, typer.Option("--out", help="Folder for report, videos and details.")]
Repeats = Annotated[int, typer.Option(help="Measured runs of each mode, in turns.")]
Html = Annotated[
    bool, typer.Option("--html", help="Also write report.html: one file with videos, charts and maps, for a browser.")
]
MinPsnr = Annotated[float | None, typer.Option(help="Exit with code 5 if the mean PSNR (dB) is lower.")]

FILES = {
    "report": "report.json",
    "side_by_side": "side_by_side.mp4",
    "dense": "dense.mp4",
    "sparse": "sparse.mp4",
    "masks": "masks.png",
    "dense_details": "meta/dense.json",
    "sparse_details": "meta/sparse.json",
}
PAGE = {"html": "report.html"}


@options.with_shared
def command(
    request: options.Request,
    out: Out = Path("out"),
    repeats: Repeats = 2,
    html: Html = False,
    min_psnr: MinPsnr = None,
    method: options.Method = None,
    profile: options.Profile = None,
    fps: options.Fps = FPS,
) -> None:
    """Run dense and sparse attention with one seed, in turns, and report speed, density and fidelity."""
    if request.config.method == "dense":
        raise UsageError("--method must be a sparse method, got 'dense'; see 'dsattn methods'")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file, expected a folder")
    files = {**FILES, **(PAGE if html else {})}
    for name in files.values():
        check_writable(out / name)
    request, loaded = models.prepare(request)
    json, quiet = request.params["json"], request.params["quiet"]

    problems: list[SaveError] = []

    def save(name: str, run: Run) -> None:
        # At once, so that a later failure cannot take a finished video with it.
        try:
            if run.frames is not None:
                write_mp4(out / FILES[name], run.frames, fps)
        except SaveError as error:
            problems.append(error)
        write_json(sidecar(out / FILES[name]), describe(run, request, loaded.info))

    with watching(quiet or json) as watch:
        result = compare(loaded.pipe, request.job, request.config, repeats=repeats, watch=watch, finished=save)
    report = build_report(
        result,
        request.job,
        model=loaded.info,
        fps=fps,
        command=request.command,
        load_s=loaded.load_s,
        files=files,
    )
    # Shown before it is saved: a full disk must not cost the figures.
    print_json(report) if json else print_report(report, out)
    write_json(out / FILES["report"], report)
    if result.maps is not None:
        result.maps.write_masks(out / FILES["masks"])
    _save_panels(out / FILES["side_by_side"], result, report)
    if html:
        write_page(out / PAGE["html"], report, out)
    if problems:
        raise DsattnError("; ".join(str(problem) for problem in problems))
    _check_quality(report, min_psnr)


def _save_panels(path: Path, result: Comparison, report: dict[str, Any]) -> None:
    dense, sparse = result.dense[0].frames, result.sparse[0].frames
    if dense is None or sparse is None:
        return
    runs, fidelity = report["runs"], report["fidelity"]["psnr"]
    distance = "identical" if fidelity["identical"] else f"PSNR {fidelity['mean']:.1f} dB"
    captions = (
        f"dense ({report['protocol']['baseline']})  {runs['dense']['e2e']['median']:.1f} s",
        f"{runs['sparse']['method']}  {runs['sparse']['e2e']['median']:.1f} s  {report['speedup']['headline']}",
        f"difference x{DIFFERENCE_GAIN}  {distance}",
    )
    write_mp4(path, side_by_side(dense, sparse, captions), report["shape"]["fps"])


def _check_quality(report: dict[str, Any], limit: float | None) -> None:
    psnr = report["fidelity"]["psnr"]
    if limit is not None and not psnr["identical"] and psnr["mean"] < limit:
        raise QualityGateError(
            f"mean PSNR against dense is {psnr['mean']:.2f} dB, --min-psnr asks for {limit:g}; raise the density or "
            "--dense-steps, or choose another method"
        )
