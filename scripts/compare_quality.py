"""Fidelity against cost of several methods and targets: Pareto table, JSON and picture.

    python scripts/compare_quality.py --out out/sweep --methods topk,semantic --targets 0.05,0.1,0.2

    python scripts/compare_quality.py --out out/sweep --existing

Generates a suite with every method at every target (a density; the cost of `auto`) and densely, resumable as
vbench_sample.py is, and compares each with dense. `--existing` makes nothing and takes the arms a folder has.
Writes pareto.json, pareto.md and pareto.png into the folder.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from dsattn.cli import options
from dsattn.cli.app import run
from dsattn.cli.defaults import FPS
from dsattn.cli.output import print_json
from dsattn.errors import DsattnError, UsageError
from dsattn.measure import Job
from dsattn.metrics import find_lpips
from dsattn.quality.arms import DENSE
from dsattn.quality.evaluate import evaluate
from dsattn.quality.folder import Folder
from dsattn.quality.sampling import Plan, sample_with_pipeline
from dsattn.quality.suites import SAMPLES, SUITES, entries
from dsattn.quality.summary import save
from dsattn.quality.sweep import COSTS, arms_of, draw, points, rows
from dsattn.quality.tables import markdown_table, print_rows
from dsattn.report import write_json

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=__doc__)
def main(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("out/sweep"),
    existing: Annotated[bool, typer.Option("--existing", help="Take the arms of the folder, make nothing.")] = False,
    methods: Annotated[str, typer.Option(help="Names, with commas.")] = "semantic,topk,spatial_temporal",
    targets: Annotated[str, typer.Option(help="Densities, with commas.")] = "0.05,0.1,0.2,0.4",
    arm: Annotated[list[str] | None, typer.Option(help="More arms, as of vbench_sample.")] = None,
    against: Annotated[str, typer.Option(help=f"Cost: {', '.join(COSTS)}.")] = "density",
    suite: Annotated[str, typer.Option(help=f"{', '.join(SUITES)}.")] = "smoke",
    prompts: Annotated[Path | None, typer.Option(help="VBench_full_info.json.")] = None,
    model: options.Model = None,
    steps: options.Steps = None,
    height: options.Height = None,
    width: options.Width = None,
    frames: options.Frames = None,
    guidance: options.Guidance = None,
    negative_prompt: options.NegativePrompt = None,
    seed: Annotated[int, typer.Option(help="Decides the seed of every clip, by a hash.")] = 0,
    fps: options.Fps = FPS,
    dtype: options.Dtype = None,
    device: options.Device = None,
    impl: options.Impl = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    options.check_numbers(context.params)
    if against not in COSTS:
        raise UsageError(f"--against must be one of {', '.join(COSTS)}; got {against!r}")
    command = shlex.join(["python", "scripts/compare_quality.py", *context.obj])
    folder = Folder(out)
    if not existing:
        job = Job("", 0, negative_prompt, height, width, frames, steps, guidance)
        plan = Plan(suite, entries(suite, prompts), SAMPLES.get(suite, 1), seed, job, fps)
        swept = arms_of(_words(methods), [_number(text) for text in _words(targets)], impl)
        arms = [DENSE, *swept, *(arm or ())]
        # Encoding would cover small differences.
        folder, _ = sample_with_pipeline(out, plan, arms, context.params, command, keep_frames=True)
    found = evaluate(folder, lpips=find_lpips())
    report = save(folder, found, command)
    places = points(report, against)
    table = rows(places, against)
    write_json(out / "pareto.json", {"command": command, "against": against, "points": places, "env": report["env"]})
    (out / "pareto.md").write_text(markdown_table(table), encoding="utf-8")
    draw(places, against, out / "pareto.png", f"{report['run']['model']['id']}, suite {report['run']['suite']}")
    if json:
        print_json({"against": against, "points": places})
    else:
        print_rows(table)
        typer.echo(f"saved {out}/pareto.json, pareto.md, pareto.png, quality.json")
    if found.problems:
        raise DsattnError(f"{len(found.problems)} videos could not be scored; the first: {found.problems[0][1]}")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--targets must be numbers with commas between them, got {text!r}") from None


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], app, "compare_quality"))
