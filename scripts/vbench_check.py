"""Does our temporal flickering equal that of the official package? Runs both on one folder of `vbench_sample.py`.

    python scripts/vbench_check.py out/smoke --vbench-python /tmp/vb/venv/bin/python --stand-in --json check.json

The environment needs vbench==0.1.5, torch, numpy<2, opencv, decord, pillow and tqdm. vbench imports torchvision for
its other dimensions; `--stand-in` puts an empty module in its place where it cannot be had.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dsattn.cli.app import run
from dsattn.errors import DsattnError
from dsattn.quality.evaluate import evaluate, score_official
from dsattn.quality.folder import Folder
from dsattn.report import environment, write_json

DIMENSION = "temporal_flickering"
TOLERANCE = 1e-6

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=__doc__)
def main(
    folder: Annotated[Path, typer.Argument(help="Folder of vbench_sample.")],
    vbench_python: Annotated[Path, typer.Option(help="Interpreter of an environment with vbench.")],
    stand_in: Annotated[bool, typer.Option("--stand-in", help="An empty module stands in for torchvision.")] = False,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    found = evaluate(Folder(folder))
    ours = {
        f"{arm}/{clip.path.name}": clip.scores[DIMENSION]
        for arm, clips in found.clips.items()
        for clip in clips
        if DIMENSION in clip.scores
    }
    score_official(Folder(folder), found, vbench_python, [DIMENSION], stand_in=stand_in)
    theirs = {
        f"{arm}/{name}": value
        for arm, dimensions in found.official.items()
        for name, value in dimensions[DIMENSION].videos.items()
    }
    if found.problems or not theirs or theirs.keys() != ours.keys():
        raise DsattnError(found.problems[0][1] if found.problems else "vbench scored other videos than ours")
    largest = max(abs(ours[name] - theirs[name]) for name in ours)
    videos = [{"file": name, "ours": ours[name], "vbench": theirs[name]} for name in sorted(ours)]
    result = {
        "dimension": DIMENSION,
        "tolerance": TOLERANCE,
        "largest_difference": largest,
        "agrees": largest <= TOLERANCE,
        "run": {name: found.settings[name] for name in ("suite", "job", "fps", "seed")},
        "vbench": found.official_facts,
        "env": environment(),
        "videos": videos,
    }
    if json_out is not None:
        write_json(json_out, result)
    typer.echo(f"{len(videos)} videos, largest difference {largest:.2e}, allowed {TOLERANCE:.0e}")
    if not result["agrees"]:
        raise DsattnError(f"our {DIMENSION} differs from vbench's by up to {largest:.2e}")


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], app, "vbench_check"))
