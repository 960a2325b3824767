"""Generate a suite of prompts with dense and sparse attention, named as VBench looks for them.

    python scripts/vbench_sample.py --out out/smoke --steps 4 --height 64 --width 64 --frames 9

    python scripts/vbench_sample.py --suite mini --prompts VBench_full_info.json --model A/B --shard 0/8 --out run

Run it again with the same options after any interruption: clips that are there are not made again. The folder is
described in dsattn/quality/folder.py; `vbench_eval.py` scores it.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from dsattn.cli import options
from dsattn.cli.app import run
from dsattn.cli.defaults import DEFAULTS, FPS
from dsattn.measure import Job
from dsattn.quality.sampling import Plan, sample_with_pipeline
from dsattn.quality.suites import SAMPLES, SUITES, entries, parse_shard, read_texts

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(help=__doc__)
def main(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("out/samples"),
    suite: Annotated[str, typer.Option(help=f"{', '.join(SUITES)}; all but smoke need VBench's prompts.")] = "smoke",
    arm: Annotated[
        list[str] | None,
        typer.Option(help="[NAME=]METHOD[:option=value,...], a preset or a YAML file; may be given several times."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="VBench_full_info.json; else that of an installed vbench.")
    ] = None,
    augmented: Annotated[
        Path | None, typer.Option(help="JSON of longer texts by prompt, to generate from under the prompt's name.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Clips per prompt; 5 for full, else 1.")] = None,
    shard: Annotated[str, typer.Option(help="i/n: make every n-th item from the i-th on.")] = "0/1",
    keep_frames: Annotated[bool, typer.Option("--keep-frames", help="Keep frames before encoding (lossless).")] = False,
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
    quiet: options.Quiet = False,
) -> None:
    options.check_numbers(context.params)
    part = parse_shard(shard)
    job = Job("", 0, negative_prompt, height, width, frames, steps, guidance)
    count = SAMPLES.get(suite, 1) if samples is None else samples
    chosen = entries(suite, prompts)
    texts = read_texts(augmented, chosen) if augmented is not None else {}
    plan = Plan(suite, chosen, count, seed, job, fps, texts)
    command = shlex.join(["python", "scripts/vbench_sample.py", *context.obj])
    arms = arm or ["dense", DEFAULTS["method"]]
    _, done = sample_with_pipeline(out, plan, arms, context.params, command, shard=part, keep_frames=keep_frames)
    typer.echo(f"{out}: {done.made} clips made, {done.found} were there; next: python scripts/vbench_eval.py {out}")


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], app, "vbench_sample"))
