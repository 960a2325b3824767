"""Keep q, k, v of chosen attention calls of a video model: what `frontier.py` and `attention_study.py` measure on.

    python scripts/capture_qkv.py --out captures --steps 20 --at 4,15
    python scripts/capture_qkv.py --out captures --prompts prompts.txt --seeds 0,1 --branches cond,uncond

The model runs densely, over every prompt with every seed, up to the last step that is kept. What will be written is
said, and compared with the free space of the disk, at the first attention call of the first run.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import captures
import torch
import typer
from torch import Tensor

import dsattn
from dsattn.cli import models
from dsattn.cli.app import run as run_app
from dsattn.errors import UsageError
from dsattn.grid import Call, VideoGrid
from dsattn.measure import Job, Watch, generate

PROMPTS = (
    "a large red circle moves right over a gradient background",
    "a small blue square moves up over a checkered background",
    "a large yellow star moves left over a cloudy background",
)
STORES = {"float32": torch.float32, "float16": torch.float16}

app = typer.Typer(add_completion=False, help=__doc__)


@dataclass
class Wanted:
    """Which calls to keep, and how; no layers stands for all of them."""

    steps: tuple[int, ...]
    layers: tuple[int, ...] = ()
    branches: tuple[str, ...] = ("cond",)
    store: torch.dtype = torch.float32

    def has(self, branch: str, call: Call) -> bool:
        """Whether a branch of a call is to be kept."""
        return branch in self.branches and call.step in self.steps and (not self.layers or call.layer in self.layers)


def branches_of(call: Call, batch: int) -> dict[str, int]:
    """Guidance branches that a call computes, and the row of its batch that each is.

    Pipelines that run both branches in one call put the unconditional one first; some then take the rows one by one.
    """
    name, _, row = call.branch.partition("[")
    if name != "cond_uncond":
        return {name: batch - 1}
    return {("uncond", "cond")[int(row[:-1])]: batch - 1} if row else {"uncond": 0, "cond": batch - 1}


@dataclass
class Branch:
    """What one guidance branch of a run gave."""

    grid: VideoGrid
    calls: dict[captures.Key, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)


class Enough(Exception):
    """Everything that was wanted has come: the rest of the run would be for nothing."""


class Recorder(dsattn.Engine):
    """Dense attention that keeps the inputs of chosen calls, and ends the run when the last has come.

    Args:
        wanted: which ones.
        announce: called once, at the first attention call, with the call and the bytes it takes to keep one.

    """

    def __init__(self, wanted: Wanted, announce: Any = None) -> None:
        super().__init__("dense")
        self.wanted = wanted
        self.announce = announce
        self.found: dict[str, Branch] = {}
        self.seen: set[tuple[str, int, int]] = set()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **options: Any) -> Tensor:
        """Keep, then attend.

        Raises:
            Enough: the last wanted step is over.

        """
        if call.step > max(self.wanted.steps):
            raise Enough
        if self.announce is not None:
            size = sum(x[:1].numel() for x in (q, k, v)) * self.wanted.store.itemsize
            self.announce(call, size)
            self.announce = None
        for branch, row in branches_of(call, q.shape[0]).items():
            self.seen.add((branch, call.step, call.layer))
            if self.wanted.has(branch, call):
                self._keep(branch, row, (q, k, v), call, options.get("key_lengths"), options.get("scale"))
        return super().__call__(q, k, v, call, **options)

    def _keep(
        self,
        branch: str,
        row: int,
        qkv: tuple[Tensor, Tensor, Tensor],
        call: Call,
        key_lengths: Tensor | None,
        scale: float | None,
    ) -> None:
        tokens = qkv[0].shape[1]
        real = tokens if key_lengths is None else int(key_lengths[row])
        grid = call.grid
        if real < tokens:
            # Padded text stands behind everything else.
            grid = replace(grid, text=grid.text - (tokens - real))
        q, k, v = (captures.stored(x[row : row + 1, :real].detach().cpu(), self.wanted.store) for x in qkv)
        if scale is not None and not math.isclose(factor := scale * q.shape[-1] ** 0.5, 1.0):
            q = q * factor
        kept = self.found.setdefault(branch, Branch(grid))
        if kept.grid != grid:
            raise UsageError(f"calls of one run differ in their grid, {kept.grid} and {grid}: nothing can be compared")
        kept.calls[call.step, call.layer] = q, k, v

    def check(self) -> None:
        """Everything that was wanted has come.

        Raises:
            UsageError: naming what did not, and what did.

        """
        there = (sorted(set(part)) for part in zip(*self.seen, strict=True))
        asked = (self.wanted.branches, self.wanted.steps, self.wanted.layers)
        for option, names, ran in zip(("--branches", "--at", "--layers"), asked, there, strict=True):
            if lost := [x for x in names if x not in ran]:
                raise UsageError(
                    f"{option}: {', '.join(map(str, lost))} did not run; the model ran {', '.join(map(str, ran))}"
                )


def announcement(wanted: Wanted, runs: int, out: Path) -> Any:
    """Function that says what will be written, and refuses what does not fit on the disk."""

    def announce(call: Call, size: int) -> None:
        layers = len(wanted.layers) or call.num_layers or 1
        calls = runs * len(wanted.branches) * len(wanted.steps) * layers
        total, free = calls * size, shutil.disk_usage(out).free
        text = f"{calls} calls of {call.grid.tokens} tokens, {size / 1e6:.1f} MB each: {total / 1e9:.2f} GB in {out}"
        if total > free:
            raise UsageError(
                f"{text}, where {free / 1e9:.2f} GB are free; keep fewer steps, layers or prompts, or --store float16"
            )
        typer.echo(text, err=True)

    return announce


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers with commas between them.

    Raises:
        UsageError: something else.

    """
    try:
        found = tuple(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError:
        raise UsageError(f"{option} must be whole numbers with commas between them, got {text!r}") from None
    if any(number < 0 for number in found):
        raise UsageError(f"{option} must not be negative, got {text!r}")
    return found


def read_prompts(file: Path | None, first: int | None) -> list[str]:
    """Prompts of a file, one a line, or the default ones.

    Raises:
        UsageError: there is none, or one stands there twice.

    """
    lines = list(PROMPTS) if file is None else [line.strip() for line in file.read_text("utf-8").splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")][:first]
    if not prompts or len(set(prompts)) < len(prompts):
        raise UsageError(f"{file or '--first'} must leave at least one prompt, each once; got {prompts}")
    return prompts


def choose(steps: int, at: str, layers: str, branches: str, store: str) -> Wanted:
    """What the options ask for.

    Raises:
        UsageError: naming the option, what was expected and what came.

    """
    names = tuple(dict.fromkeys(name.strip() for name in branches.split(",")))
    if unknown := set(names) - {"cond", "uncond"}:
        raise UsageError(f"--branches must be cond, uncond or both with a comma, got {', '.join(sorted(unknown))}")
    if store not in STORES:
        raise UsageError(f"--store must be one of {', '.join(STORES)}; got {store!r}")
    wanted = Wanted(numbers(at, "--at"), numbers(layers, "--layers"), names, STORES[store])
    if not wanted.steps or max(wanted.steps) >= steps:
        raise UsageError(f"--at must name steps below --steps {steps}, got {at!r}")
    return wanted


def load(model: str | None, dtype: str | None, device: str | None) -> models.Loaded:
    """The model on its device, as the commands of dsattn load it.

    Raises:
        UsageError: it cannot be loaded, or an unknown number format.

    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    if name not in models.DTYPES:
        raise UsageError(f"--dtype must be one of {', '.join(models.DTYPES)}; got {name!r}")
    return models.load(None if model == "tiny" else model, name, where)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for one file per prompt, seed and branch.")],
    model: Annotated[
        str | None, typer.Option(help="Name of a shipped model, or folder or Hub id of a diffusers pipeline.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File with a prompt on each line; three of our own else.")
    ] = None,
    first: Annotated[int | None, typer.Option(help="Use the first so many prompts.", min=1)] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the initial noise; every prompt runs with each.")] = "0",
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 12,
    at: Annotated[str, typer.Option(help="Steps to keep.")] = "2,5,9",
    layers: Annotated[str, typer.Option(help="Layers to keep; all by default.")] = "",
    branches: Annotated[str, typer.Option(help="Guidance branches to keep: cond, uncond or both.")] = "cond",
    frames: Annotated[int | None, typer.Option(help="Frames of the video; the model's own number by default.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the model's own by default.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the model's own by default.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the model's own by default.")] = None,
    store: Annotated[str, typer.Option(help="float32, or float16 at half the size.")] = "float32",
    dtype: Annotated[str | None, typer.Option(help="The model runs in; float32 on a CPU, bfloat16 on a GPU.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; the first GPU if there is one.")] = None,
    threads: int = 2,
) -> None:
    """Run a model densely and keep q, k, v of chosen layers and steps."""
    torch.set_num_threads(threads)
    wanted = choose(steps, at, layers, branches, store)
    texts, all_seeds = read_prompts(prompts, first), numbers(seeds, "--seeds")
    if not all_seeds:
        raise UsageError("--seeds must name at least one seed")
    out.mkdir(parents=True, exist_ok=True)
    if left := sorted(out.glob("*.safetensors")):
        raise UsageError(f"{out} already holds {left[0].name}: captures of two runs must not mix; give another --out")
    loaded = load(model, dtype, device)
    announce = announcement(wanted, len(texts) * len(all_seeds), out)
    for number, text in enumerate(texts):
        for seed in all_seeds:
            job = Job(text, seed, None, height, width, frames, steps, guidance)
            models.check_size(loaded.pipe, job)
            recorder = Recorder(wanted, announce)
            announce = None
            with contextlib.suppress(Enough):
                generate(loaded.pipe, job, recorder, watch=Watch(), decode=False)
            recorder.check()
            scale = str(getattr(loaded.pipe, "guidance_scale", None))
            facts = {"prompt": text, "seed": str(seed), "steps": str(steps), "guidance": scale}
            facts |= {"model": str(loaded.info["id"]), "dtype": str(loaded.info["dtype"]), "stored": store}
            for branch, kept in recorder.found.items():
                path = out / f"{number:02d}-seed{seed}-{branch}.safetensors"
                size = captures.write(path, kept.calls, kept.grid, facts | {"branch": branch})
                typer.echo(
                    f"{path}: {len(kept.calls)} calls of {kept.grid.tokens} tokens, {size / 1e6:.0f} MB, {text!r}"
                )


if __name__ == "__main__":
    sys.exit(run_app(sys.argv[1:], app, "capture_qkv"))
