"""Score a folder of `vbench_sample.py`: dense, sparse, and paired differences with 95 % intervals.

    python scripts/vbench_eval.py out/smoke

    python scripts/vbench_eval.py run --vbench-python /opt/vbench/bin/python --dimension subject_consistency

What needs no weights is computed here. Other dimensions of VBench are computed by its own package, from an
environment of its own (`pip install torch torchvision vbench==0.1.5 'setuptools<81'`), or read from a file that it
wrote elsewhere. Writes quality.json, quality.md and VBench's own JSON files into the folder. A video that cannot be
read is named, the rest is scored, and the exit code is 1. `dsattn report RUN/quality.json --html page.html` makes a
page of it.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from dsattn.cli import options
from dsattn.cli.app import run
from dsattn.cli.output import print_json
from dsattn.errors import DsattnError, UsageError
from dsattn.metrics import find_lpips
from dsattn.quality.arms import DENSE
from dsattn.quality.evaluate import add_results, evaluate, score_official
from dsattn.quality.folder import Folder
from dsattn.quality.summary import save
from dsattn.quality.tables import markdown, print_tables

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=__doc__)
def main(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder of vbench_sample.")],
    arm: Annotated[list[str] | None, typer.Option(help="Arms to score; all by default.")] = None,
    reference: Annotated[str, typer.Option(help="Arm that others are compared with.")] = DENSE,
    lpips_weights: Annotated[Path | None, typer.Option(help="Folder with the weights of LPIPS.")] = None,
    vbench_python: Annotated[Path | None, typer.Option(help="Interpreter of an environment with vbench.")] = None,
    dimension: Annotated[list[str] | None, typer.Option(help="Dimensions vbench computes.")] = None,
    device: options.Device = None,
    results: Annotated[
        list[str] | None, typer.Option(help="ARM=FILE: an *_eval_results.json that vbench wrote elsewhere.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Write the report to standard output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    if bool(dimension) != (vbench_python is not None):
        raise UsageError("--dimension and --vbench-python go together: the one says what, the other with what")

    def told(line: str) -> None:
        if not quiet:
            typer.echo(line, err=True)

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    run_folder, lpips = Folder(folder), find_lpips(lpips_weights, place)
    found = evaluate(run_folder, arm, reference=reference, lpips=lpips, device=place, told=told)
    for text in results or ():
        name, _, file = text.rpartition("=")
        add_results(found, name, Path(file))
    if vbench_python is not None:
        score_official(run_folder, found, vbench_python, dimension or [], device=place, told=told)
    report = save(run_folder, found, shlex.join(["python", "scripts/vbench_eval.py", *context.obj]))
    (folder / "quality.md").write_text(markdown(report), encoding="utf-8")
    print_json(report) if json else print_tables(report)
    if found.problems:
        raise DsattnError(
            f"{len(found.problems)} of the files or dimensions could not be scored: {found.problems[0][1]}"
            + (f" (and {len(found.problems) - 1} more, listed above)" if len(found.problems) > 1 else "")
        )


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], app, "vbench_eval"))
