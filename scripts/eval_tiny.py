"""Does the small model follow its prompt? Judges clips of held-out prompts by plain vision, and the judge first.

    python scripts/eval_tiny.py --grid 33x256x256 --steps 20 --json scores.json --sheet sheet.png

Every prompt names a (colour, shape, motion) combination that training never showed: one moving shape, dense attention.
First the measurement itself is applied to rendered clips whose truth is known, as rendered, behind the codec, and
blurred with noise. A classifier that is right on fewer than 98 % of any of them ends the run with exit code 1.

Scores are shares of clips, with Wilson's 95 % interval (clips taken as independent) and what even guessing would give:

- colour: the palette's nearest hue (or white) of most saturated pixels is the caption's.
- shape: the object's outline, all frames laid over each other, overlaps a rendered outline of the caption's shape most.
- direction (prompts with one of the eight directions): of all kinds of path a straight one fits best and points there,
  and optical flow on the object agrees to within 45 degrees.
- motion (all prompts): of the paths that the generator knows (eight straight ones, both circles, both bounces, still),
  the caption's fits best and explains at least 75 % of the path's variance.
- background: the family that texture statistics of what lies around the object tell.
- size (prompts with a word for it): small or large, by the radius that the outline's shape has at this area.
- moves: the object's path has an extent of at least 0.12 of the frame.
- one object: the median number of connected regions of palette colours is one.
- all: everything that was asked of the clip is right.

Finished clips are kept in a folder (`--parts`): the same command goes on where a killed one stopped, and gives the same
scores. `--minutes` stops in time and reports on what there is.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiny_scores
import tiny_texture
import tiny_vision
import torch
import typer
from tiny_sheet import contact_sheet, read_strip, write_strip

from dsattn.cli import models
from dsattn.errors import UsageError
from dsattn.pipelines.tiny import data, loader, render
from dsattn.report import environment

TINY = "tiny"


class Job(NamedTuple):
    """One clip: index of its prompt, seed of the evaluation, seed of its noise."""

    prompt: int
    seed: int
    noise: int

    @property
    def name(self) -> str:
        return f"{self.prompt:04d}_{self.seed}"


def jobs(prompts: int, seeds: int, first_seed: int = 0) -> list[Job]:
    """All clips, every prompt once before any twice, so that a run that stops early has seen them all alike."""
    return [Job(i, s, 100_000 * s + i) for s in range(first_seed, first_seed + seeds) for i in range(prompts)]


def open_pipeline(model: str, dtype: str, weights: Path | None, device: str) -> Any:
    """A shipped model by name, with other weights if they are given; or what the command line loads.

    Raises:
        UsageError: it cannot be loaded.

    """
    if weights is None:
        return models.load(None if model == TINY else model, dtype, torch.device(device)).pipe
    load = getattr(loader, f"load_{model.replace('-', '_')}", None)
    if load is None:
        raise UsageError(f"--weights goes with a shipped model, such as --model {TINY}; got --model {model}")
    try:
        return load(models.DTYPES[dtype], weights).to(device)
    except (OSError, ValueError) as error:
        raise UsageError(f"--weights {weights} cannot be loaded: {error}") from error


def fingerprint(pipe: Any) -> str:
    """Digest of the weights and of the code that judges: kept clips of another make must not be mixed in."""
    digest = hashlib.sha256()
    for module in (pipe.transformer, pipe.text_encoder, pipe.vae):
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    for source in (tiny_vision, tiny_texture, tiny_scores, data, render):
        digest.update(Path(source.__file__ or "").read_bytes())
    return digest.hexdigest()[:16]


class Parts:
    """What a run has finished, one file a clip; a file is there whole or not at all.

    Raises:
        UsageError: the folder holds clips of other settings.

    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        listing = folder / "settings.json"
        if listing.is_file() and (kept := json.loads(listing.read_text())) != settings:
            changed = ", ".join(n for n in sorted({*kept, *settings}) if kept.get(n) != settings.get(n))
            raise UsageError(
                f"{folder} holds clips of another run ({changed} differ); remove it or name another --parts"
            )
        self.write("settings", settings)

    def read(self, name: str) -> Any:
        """What was written under a name, or None."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def write(self, name: str, value: Any) -> None:
        """Keep a JSON value."""
        fresh = self.folder / f"{name}.json.tmp"
        fresh.write_text(json.dumps(value))
        fresh.replace(self.folder / f"{name}.json")


def generate(pipe: Any, scenes: list[data.Scene], batch: list[Job], options: dict[str, Any]) -> list[tiny_vision.Video]:
    """Clips of one batch, dense, each from its own noise."""
    generators = [torch.Generator().manual_seed(job.noise) for job in batch]
    result = pipe([scenes[job.prompt].caption for job in batch], generator=generators, **options)
    return [np.asarray(video, np.float32) for video in result.frames]


def make_clips(
    pipe: Any,
    scenes: list[data.Scene],
    batches: list[list[Job]],
    options: dict[str, Any],
    parts: Parts,
    sheet: set[Job],
) -> Iterator[int]:
    """Generate and measure what is missing, batch by batch; yields the number of finished clips."""
    done = 0
    for batch in batches:
        # A batch is made whole: what a clip looks like to the last bit may depend on its neighbours.
        if any(parts.read(job.name) is None for job in batch):
            for job, video in zip(batch, generate(pipe, scenes, batch, options), strict=True):
                if job in sheet:
                    write_strip(parts.folder / f"{job.name}.png", video)
                parts.write(job.name, tiny_scores.measure(video))
        done += len(batch)
        yield done


def report(
    settings: dict[str, Any],
    scenes: list[data.Scene],
    todo: list[Job],
    parts: Parts,
    validation: dict[str, Any],
    weights: Path | None = None,
) -> dict[str, Any]:
    """Everything measured so far, as it is written to the JSON file."""
    rows = [
        {"prompt": job.prompt, "seed": job.seed} | found for job in todo if (found := parts.read(job.name)) is not None
    ]
    judgements = [tiny_scores.judge(scenes[row["prompt"]], row) for row in rows]
    names = ("model", "grid", "steps", "batch", "dtype", "device")
    given = f" --guidance {settings['guidance']}" if settings["guidance"] != "default" else ""
    given += f" --weights {weights}" if weights else ""
    return {
        "command": "python scripts/eval_tiny.py "
        + " ".join(f"--{name} {settings[name]}" for name in names)
        + f"{given} --limit {len(scenes)} --seeds {len({job.seed for job in todo})}",
        "settings": settings,
        "env": environment(),
        "clips_wanted": len(todo),
        "clips_done": len(rows),
        "scores": tiny_scores.scores(judgements),
        "flickering": round(float(np.mean([row["flickering"] for row in rows])), 5) if rows else None,
        "rendered_flickering": validation["flickering"],
        "codec_psnr_db": validation["codec_psnr_db"],
        "validation": validation["scores"],
        "prompts": [scene.caption for scene in scenes],
        "clips": [
            row | {"wrong": [name for name, right in judgement.items() if not right and name != "all"]}
            for row, judgement in zip(rows, judgements, strict=True)
        ],
    }


def write_report(path: Path, found: dict[str, Any]) -> None:
    """JSON with one line for every entry of a list."""
    parts = []
    for name, value in found.items():
        if isinstance(value, list):
            lines = ",\n".join("  " + json.dumps(entry) for entry in value)
            parts.append(f" {json.dumps(name)}: [\n{lines}\n ]")
        elif name in ("scores", "validation"):
            lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items())
            parts.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def trusted_validation(pipe: Any, size: tuple[int, int, int], prompts: int, clips: int, parts: Parts) -> dict[str, Any]:
    """The measurement on clips of known truth, measured once a folder; ends the program if it cannot be trusted."""
    found: dict[str, Any] | None = parts.read("validation")
    if found is None:
        codec = copy.deepcopy(pipe.vae).float().cpu()
        scenes = tiny_scores.held_out_scenes(max(prompts, clips))
        found = tiny_scores.validate(scenes, size, codec, prompts)
        parts.write("validation", found)
    for condition, table in found["scores"].items():
        typer.echo(f"measurement on clips '{condition}': {tiny_scores.as_text(table)}")
    if wrong := tiny_scores.distrusted(found):
        typer.echo("error: the measurement cannot be trusted here, so no clip is judged:", err=True)
        for line in wrong:
            typer.echo(f"  {line}", err=True)
        (parts.folder / "validation.json").unlink()  # measured anew next time
        raise typer.Exit(1)
    typer.echo(f"codec PSNR on rendered clips: {found['codec_psnr_db']:.2f} dB")
    return found


def show(found: dict[str, Any], scenes: list[data.Scene], by: bool) -> None:
    """Print the scores, and with `by` those of every attribute's values."""
    typer.echo(
        f"generated, {found['clips_done']} of {found['clips_wanted']} clips: {tiny_scores.as_text(found['scores'])}"
    )
    if found["flickering"] is not None:
        typer.echo(f"temporal flickering: {found['flickering']:.4f}, rendered clips {found['rendered_flickering']:.4f}")
    if by:
        shown = [scenes[row["prompt"]] for row in found["clips"]]
        judgements = [tiny_scores.judge(scenes[row["prompt"]], row) for row in found["clips"]]
        for value, table in tiny_scores.by_value(shown, judgements).items():
            figures = "  ".join(f"{name} {row['share']:4.0%}" for name, row in table.items())
            typer.echo(f"{value:24} n {table['all']['clips']:3}  {figures}")


def main(
    model: str = typer.Option(TINY, help="tiny, another shipped model, or what `dsattn generate --model` takes."),
    steps: int = typer.Option(20, min=1, help="Denoising steps."),
    grid: str = typer.Option("33x256x256", help="frames x height x width in pixels."),
    limit: int = typer.Option(96, min=1, help="How many prompts."),
    seeds: int = typer.Option(2, min=1, help="Clips of every prompt."),
    first_seed: int = typer.Option(0, help="The first of the seeds."),
    guidance: float = typer.Option(0.0, help="Guidance scale (0: the model's default)."),
    batch: int = typer.Option(1, min=1, help="Prompts per pipeline call."),
    dtype: str = typer.Option("float32", help="float32 or bfloat16."),
    device: str = typer.Option("cpu", help="Where the model runs."),
    threads: int = typer.Option(2, min=1, help="CPU threads."),
    weights: Path | None = typer.Option(None, help="Weights folder (default: the packaged one)."),
    truth: int = typer.Option(
        150, min=1, help="Rendered clips to validate the measurement on; never fewer than prompts."
    ),
    minutes: float = typer.Option(0.0, help="Stop before this time is up and report on what is done (0: no limit)."),
    parts: Path | None = typer.Option(None, help="Folder of finished clips (default: under out/eval_tiny)."),
    json_out: Path | None = typer.Option(None, "--json", help="Write the scores and every measurement here."),
    sheet: Path | None = typer.Option(None, help="Write a contact sheet (PNG) here."),
    sheet_clips: int = typer.Option(24, min=1, help="Clips on the sheet: of the first seed, spread over the prompts."),
    by: bool = typer.Option(False, "--by", help="Also print scores by the value of every attribute."),
) -> None:
    """Validate the measurement, generate the held-out prompts densely, judge them and print the scores."""
    began = time.monotonic()
    torch.set_num_threads(threads)
    try:
        size = tuple(int(v) for v in grid.split("x"))
        frames, height, width = size
    except ValueError:
        raise typer.BadParameter(f"--grid is frames x height x width, such as 33x256x256; got {grid!r}") from None
    try:
        pipe = open_pipeline(model, dtype, weights, device)
        settings = {
            "model": model,
            "fingerprint": fingerprint(pipe),
            "grid": grid,
            "steps": steps,
            "guidance": guidance or "default",
            "batch": batch,
            "dtype": dtype,
            "device": device,
        }
        default = Path("out") / "eval_tiny" / "-".join(str(v).replace("/", "_") for v in settings.values())
        kept = Parts(parts or default, settings)
    except UsageError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    pipe.set_progress_bar_config(disable=True)
    scenes, todo = tiny_scores.held_out_scenes(limit), jobs(limit, seeds, first_seed)
    validation = trusted_validation(pipe, (frames, height, width), limit, truth, kept)
    # Batches are cut inside a seed, so that more seeds later leave the finished ones as they are.
    rounds = [todo[at : at + limit] for at in range(0, len(todo), limit)]
    batches = [found[at : at + batch] for found in rounds for at in range(0, limit, batch)]
    picked = {todo[i] for i in np.unique(np.linspace(0, limit - 1, min(sheet_clips, limit)).round().astype(int))}
    options = {
        "num_frames": frames,
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "output_type": "np",
    }
    options |= {"guidance_scale": guidance} if guidance else {}
    slowest, last = 0.0, time.monotonic()
    for done in make_clips(pipe, scenes, batches, options, kept, picked):
        now = time.monotonic()
        slowest, last = max(slowest, now - last), now
        typer.echo(f"{done}/{len(todo)} clips, {now - began:.0f} s", err=True)
        if minutes and now - began + slowest > 60 * minutes:
            break
    found = report(settings, scenes, todo, kept, validation, weights)
    show(found, scenes, by)
    if sheet:
        rows = [row for row in found["clips"] if any((row["prompt"], row["seed"]) == job[:2] for job in picked)]
        strips = [read_strip(kept.folder / f"{row['prompt']:04d}_{row['seed']}.png") for row in rows]
        contact_sheet(sheet, [scenes[row["prompt"]] for row in rows], rows, strips)
    if json_out:
        write_report(json_out, found)


if __name__ == "__main__":
    typer.run(main)
