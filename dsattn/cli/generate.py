"""``dsattn generate``: one video."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dsattn.cli import models, options
from dsattn.cli.defaults import FPS
from dsattn.cli.output import describe, print_json, sidecar
from dsattn.cli.progress import watching
from dsattn.engine import Engine
from dsattn.errors import UsageError
from dsattn.measure import generate
from dsattn.report import write_json
from dsattn.video import check_writable, write_mp4
from dsattn.wording import counts, seconds

Output = Annotated[Path, typer.Option("--output", "-o", help="The video, an .mp4.")]


@options.with_shared
def command(
    request: options.Request,
    output: Output = Path("out.mp4"),
    method: options.Method = None,
    profile: options.Profile = None,
    fps: options.Fps = FPS,
) -> None:
    """Generate a video with sparse attention, or --method dense."""
    if output.suffix.lower() != ".mp4":
        raise UsageError(f"--output must end in .mp4, got {str(output)!r}")
    check_writable(output)
    request, loaded = models.prepare(request)
    json, quiet = request.params["json"], request.params["quiet"]
    # The method "dense" is the plain pipeline, unless it is told to use another dense backend.
    plain = request.config.method == "dense" and request.config.dense is None
    with watching(quiet or json) as watch:
        engine = None if plain else Engine(request.config)
        run = generate(loaded.pipe, request.job, engine, watch=watch, label="denoising")
    description = describe(run, request, loaded.info)
    if run.frames is not None:
        write_mp4(output, run.frames, fps)
    write_json(sidecar(output), description)
    if json:
        print_json({**description, "output": str(output), "sidecar": str(sidecar(output))})
    else:
        _print(description, output)


def _print(run: dict[str, Any], output: Path) -> None:
    shape, times, density = run["shape"], run["times_s"], run["density"]
    size = f"{shape['width']}x{shape['height']}, {shape['frames']} frames, {shape['steps']} steps, seed {run['seed']}"
    lines = [("saved", f"{output}   {size}   (details: {sidecar(output)})")]
    if density["sparse_calls"] is None:
        lines.append(("method", f"{run['method']}, no sparse call"))
    else:
        shares = f"density {density['all_calls']:.2f} of all calls / {density['sparse_calls']:.2f} of sparse calls"
        lines.append(("method", f"{run['method']}   {shares}"))
    step = times["denoise"] / max(1, shape["steps"])
    parts = f"denoising {seconds(times['denoise'])}, {seconds(step)} a step; text {seconds(times['text'])}, decoding {seconds(times['vae'])}"  # noqa: E501
    compiling = f", {seconds(times['compile'])} for kernels of attention" if times["compile"] else ""
    lines.append(("time", f"{seconds(times['e2e'])}   ({parts}; compilation included{compiling})"))
    if run["impls"]:
        lines.append(("kernels", f"{counts(run['impls'])} calls"))
    for fallback in run["fallbacks"]:
        lines.append(("fallback", f"{fallback['calls']} calls ran dense: {fallback['reason']}"))
    for name, text in lines:
        typer.echo(f"{name:<9}{text}")
