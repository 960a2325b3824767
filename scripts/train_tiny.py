"""Train the small text-to-video models that ship with dsattn.

    python scripts/train_tiny.py --run runs/tiny --minutes 100 --export pipelines/tiny/weights
    python scripts/train_tiny.py --run runs/joint --minutes 100 --kind tiny-joint --init pipelines/tiny/weights
    python scripts/train_tiny.py --run runs/gpu --minutes 9 --init pipelines/tiny/weights --loaders 16   # with a GPU

Flow matching in diffusers' convention: x_s = (1 - s) x0 + s noise, target noise - x0, timestep 1000 s. Clips are
drawn on the fly; every random number of a step depends only on (seed, step), so a resumed run continues exactly where
it stopped. The schedule (learning rate, grid mix) is a function of the fraction of the budget that is used up. On a CPU
one worker per core (`--workers`) is the fastest; `--init` starts from trained weights and their codec, in a new run.
At first few tokens of a clip are kept; trained weights can begin with more of them (`--grown`).
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import typer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsattn.pipelines.tiny import codec as patch_codec
from dsattn.pipelines.tiny import data
from dsattn.pipelines.tiny.batches import Batch, Clips, Loader
from dsattn.pipelines.tiny.loader import export_weights, load_codec
from dsattn.pipelines.tiny.objective import component_weights, pair_loss, squared_error, velocity_error
from dsattn.pipelines.tiny.render import render
from dsattn.pipelines.tiny.trainable import build_trainable
from dsattn.pipelines.tiny.training import Optimizer, gradient

Z_DIM = 32
NOISE_BINS = (0.0, 0.3, 0.6, 0.8, 0.9, 0.95, 0.98, 1.001)
HELD_OUT_GRID, HELD_OUT_LEVELS = (9, 12, 12), (0.5, 0.8, 0.9, 0.95)
"""What the loss of the averaged weights is measured on before and between steps, the same in every run."""


def learning_rate(fraction: float, peak: float, decay: float) -> float:
    """Warm up for 2 % of the budget, hold, then fall linearly to 2 % over the last `decay` of it."""
    return peak * min(1.0, fraction / 0.02 + 1e-3, max(0.02, (1.0 - fraction) / decay))


def fit_codec(seed: int, clips: int) -> patch_codec.PatchCodec:
    """Fit the codec on patches of freshly drawn training clips."""
    stream = data.clips(seed)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(clips):
        height, width = ((256, 256), (192, 192), (256, 256), (96, 128))[index % 4]
        video = torch.from_numpy(render(next(stream), 17, height, width)).permute(3, 0, 1, 2)[None] * 2 - 1
        patches = patch_codec.to_patches(video).flatten(0, 3)
        rows.append(patches[torch.randperm(len(patches), generator=generator)[:300]])
    return patch_codec.fit(torch.cat(rows), Z_DIM, seed)


def training_step(
    model: nn.Module,
    optimizer: Optimizer,
    batch: Batch,
    rate: float,
    pair_weight: float = 1.0,
    components: Tensor | float = 1.0,
) -> dict[str, Tensor]:
    """One update; returns noise level and loss of every sample of this worker, and the norm of the gradient.

    The tensors stay on the device: reading them here would make every step wait for it.
    """
    batch = batch.to(next(model.parameters()).device)
    error = velocity_error(model, batch)
    params = list(optimizer.params.values())
    for p in params:
        p.grad = None
    pair_loss(error, pair_weight, components).backward()
    if dist.is_initialized():
        flat = torch.cat([gradient(p).flatten() for p in params])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for p, grad in zip(params, torch.split(flat, [p.numel() for p in params]), strict=True):
            p.grad = grad.view_as(p)
    norm = nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step(rate)
    return {"levels": batch.level, "errors": squared_error(error.detach()), "grad_norm": norm}


@dataclass
class Settings:
    """One field for each option of the command line."""

    run: Path
    minutes: float
    steps: int
    stop_after: int
    peak: float
    tokens: int
    seed: int
    threads: int
    workers: int
    save_minutes: float
    export: Path | None
    device: str
    codec_clips: int = 400
    kind: str = "tiny"
    init: Path | None = None
    loaders: int = 0
    held_out: int = 8
    pair_weight: float = 4.0
    grown: float = 0.0
    decay: float = 0.45
    component_power: float = 0.0

    @property
    def tokens_per_step(self) -> int:
        """Latent tokens per step, of all workers."""
        return self.tokens or (65536 if self.device == "cuda" else 5760)

    def growth(self, fraction: float) -> float:
        """How far the growth of clips (`batches.GROWING`) is when a fraction of the budget is used up."""
        return self.grown + (1 - self.grown) * fraction


class Run:
    """Model, optimizer, EMA and counters of a run, with checkpoints that hold nothing but safetensors and JSON."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.seed, self.kind, self.step, self.seconds = folder, settings.seed, settings.kind, 0, 0.0
        resumed = (folder / "state.json").exists()
        init = None if resumed else settings.init
        if resumed:
            self.codec = stored_codec(folder)
        else:
            self.codec = fit_codec(self.seed, settings.codec_clips) if init is None else load_codec(init)
        self.model = build_trainable(self.kind, Z_DIM, self.seed, init).to(settings.device)
        if settings.device == "cpu":
            self.model.use_training_attention()
        self.optimizer = Optimizer(self.model)
        self.ema = {n: p.detach().clone() for n, p in self.optimizer.params.items()}
        folder.mkdir(parents=True, exist_ok=True)
        if resumed:
            self.load()

    @torch.no_grad()
    def update_ema(self) -> None:
        decay = min(0.998, (1 + self.step) / (10 + self.step))
        names = list(self.ema)
        torch._foreach_lerp_([self.ema[n] for n in names], [self.optimizer.params[n] for n in names], 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        out = {f"model/{n}": p.detach() for n, p in self.optimizer.params.items()}
        out |= {f"ema/{n}": p for n, p in self.ema.items()}
        out |= {f"optimizer/{n}": p for n, p in self.optimizer.state.items()}
        return out | {f"codec/{n}": p for n, p in self.codec.state_dict().items()}

    def save(self) -> None:
        fresh = self.folder / "state.tmp"
        save_file({n: t.contiguous() for n, t in self.tensors().items()}, fresh)
        fresh.replace(self.folder / "state.safetensors")
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "seed": self.seed,
            "kind": self.kind,
            "updates": self.optimizer.count,
            "codec": {k: v for k, v in self.codec.config.items() if not k.startswith("_")},
        }
        (self.folder / "state.json").write_text(json.dumps(state) + "\n")

    @torch.no_grad()
    def load(self) -> None:
        state = json.loads((self.folder / "state.json").read_text())
        for name in ("seed", "kind"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"{self.folder} holds a run with {name} {state[name]}, not {getattr(self, name)}; use another --run"
                )
        stored = load_file(self.folder / "state.safetensors")
        for name, tensor in self.tensors().items():
            tensor.copy_(stored[name])
        self.step, self.seconds, self.optimizer.count = state["step"], state["seconds"], state["updates"]

    def export(self, folder: Path) -> None:
        """Write the EMA weights in the layout the loader reads."""
        export_weights(folder, self.codec, {n: t.cpu() for n, t in self.ema.items()}, self.kind)

    @torch.no_grad()
    def held_out_error(self, batches: list[Batch]) -> dict[str, float]:
        """Mean squared error of the averaged weights on held-out clips, by noise level."""
        out = {}
        for batch in batches:
            batch = batch.to(next(self.model.parameters()).device)
            error = velocity_error(lambda *args: torch.func.functional_call(self.model, self.ema, args), batch)
            out[f"{batch.level[0]:g}"] = round(float(squared_error(error).mean()), 5)
        return out


def stored_codec(folder: Path) -> patch_codec.PatchCodec:
    """The codec of the run in `folder`."""
    codec = patch_codec.PatchCodec(**json.loads((folder / "state.json").read_text())["codec"])
    with safe_open(folder / "state.safetensors", "pt") as stored:
        codec.load_state_dict({n: stored.get_tensor(f"codec/{n}") for n in codec.state_dict()})
    return codec.eval()


def binned(pairs: list[tuple[float, float]]) -> dict[str, float]:
    out = {}
    for low, high in zip(NOISE_BINS, NOISE_BINS[1:], strict=False):
        inside = [e for s, e in pairs if low <= s < high]
        if inside:
            out[f"{low:g}"] = round(sum(inside) / len(inside), 4)
    return out


def summary(done: list[dict[str, Tensor]], facts: dict[str, Any]) -> dict[str, Any]:
    """A line of the log: the last of some steps, `facts` about it, and the mean over all samples of all of them."""
    levels, errors = (torch.cat([step[name] for step in done]).tolist() for name in ("levels", "errors"))
    last = {"loss": done[-1]["errors"].mean().item(), "grad_norm": done[-1]["grad_norm"].item()}
    mean = round(sum(errors) / len(errors), 4)
    return last | facts | {"mean": mean, "by_noise": binned(list(zip(levels, errors, strict=True)))}


class Journal:
    """What worker 0 keeps beside training: the log, and checkpoints with their loss on held-out clips."""

    def __init__(self, state: Run, settings: Settings, clips: Clips) -> None:
        self.state, self.settings, self.first_step = state, settings, state.step
        count = settings.held_out
        self.held_out = clips.held_out(count, HELD_OUT_GRID, HELD_OUT_LEVELS) if count else []
        self.done: list[dict[str, Tensor]] = []  # the steps since the last line of the log
        self.logged = self.saved = time.monotonic()
        if state.step == 0:
            self.log_held_out()  # of the weights it starts from

    def add(self, record: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take note of a step; a line of the log every 20 s, a checkpoint when it is time for one."""
        self.done.append(record)
        now = time.monotonic()
        if now - self.logged > 20 or self.state.step == self.first_step + 1:
            self.write(summary(self.done, self.when() | facts))
            self.logged = now
            self.done.clear()
        if now - self.saved > 60 * self.settings.save_minutes:
            self.checkpoint()
            self.saved = time.monotonic()

    def checkpoint(self) -> None:
        """Save the run, export its averaged weights and log what they score on held-out clips."""
        self.state.save()
        if self.settings.export:
            self.state.export(self.settings.export)
        self.log_held_out()

    def log_held_out(self) -> None:
        """A line with what the averaged weights score on held-out clips; none without such clips."""
        if self.held_out:
            self.write(self.when() | {"held_out": self.state.held_out_error(self.held_out)})

    def when(self) -> dict[str, Any]:
        return {"step": self.state.step, "seconds": round(self.state.seconds, 1)}

    def write(self, record: dict[str, Any]) -> None:
        with (self.settings.run / "log.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")


def budget_used(state: Run, settings: Settings) -> float:
    """The fraction of the budget that is used up, by the clock of worker 0."""
    used = state.seconds / (60 * settings.minutes) if settings.minutes else state.step / settings.steps
    clock = [used]
    if settings.workers > 1:
        dist.broadcast_object_list(clock, 0)
    return clock[0]


def train(rank: int, settings: Settings) -> None:
    """The loop of one worker; worker 0 keeps the clock and the journal."""
    torch.set_num_threads(settings.threads)
    if settings.workers > 1:
        store = dist.FileStore(str(settings.run / "rendezvous"), settings.workers)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=settings.workers)
    state = Run(settings.run, settings)
    clips = Clips(state.codec, settings.seed, settings.tokens_per_step, rank, settings.workers)
    loader = Loader(clips, state.step, settings.loaders)
    journal = Journal(state, settings, clips) if rank == 0 else None
    components = component_weights(state.codec, settings.component_power).to(settings.device)
    state.model.train()
    parent, first_step = os.getppid(), state.step
    while True:
        started = time.monotonic()
        fraction = budget_used(state, settings)
        if settings.workers > 1 and os.getppid() != parent:
            raise RuntimeError("the process that started this worker is gone")
        if fraction >= 1.0 or (settings.stop_after and state.step - first_step >= settings.stop_after):
            break
        rate = learning_rate(fraction, settings.peak, settings.decay)
        batch = loader.next(settings.growth(fraction))
        record = training_step(state.model, state.optimizer, batch, rate, settings.pair_weight, components)
        state.step += 1
        state.update_ema()
        state.seconds += time.monotonic() - started
        if journal:
            journal.add(record, {"rate": rate, "fraction": round(fraction, 4)})
    if journal:
        journal.checkpoint()
        typer.echo(f"step {state.step}, {state.seconds / 60:.1f} min, checkpoint in {settings.run}")
    loader.close()
    if settings.workers > 1:
        dist.destroy_process_group()


def main(
    run: Path = typer.Option(..., help="Folder for checkpoints and the log; an existing run is resumed."),
    minutes: float = typer.Option(0.0, help="Wall-clock budget over all resumptions (0: use --steps)."),
    steps: int = typer.Option(0, help="Budget in steps (0: use --minutes)."),
    stop_after: int = typer.Option(
        0, help="Stop this session after so many steps, keeping the schedule of the budget."
    ),
    peak: float = typer.Option(2e-3, help="Peak learning rate."),
    tokens: int = typer.Option(0, help="Latent tokens per step (0: 5760 on CPU, 65536 on CUDA)."),
    seed: int = typer.Option(0),
    threads: int = typer.Option(1, help="CPU threads per worker."),
    workers: int = typer.Option(1, help="Data-parallel processes; one per core is the fastest on a CPU."),
    save_minutes: float = typer.Option(5.0, help="Minutes between checkpoints."),
    export: Path | None = typer.Option(None, help="Also write the EMA weights here at every checkpoint."),
    device: str = typer.Option("auto"),
    kind: str = typer.Option("tiny", help="tiny or tiny-joint."),
    init: Path | None = typer.Option(None, help="Folder with weights to start from, of tiny or of this kind."),
    loaders: int = typer.Option(0, help="Processes that draw batches ahead; a GPU wants as many as there are cores."),
    held_out: int = typer.Option(8, help="Held-out clips whose loss is logged at every checkpoint (0: none)."),
    pair_weight: float = typer.Option(4.0, help="Weight of what the errors of a pair of clips differ in (1: plain)."),
    grown: float = typer.Option(0.0, min=0.0, max=1.0, help="Where the growth of clips begins (0: few tokens)."),
    decay: float = typer.Option(0.45, min=0.01, max=1.0, help="Last share of the budget, over which the rate falls."),
    component_power: float = typer.Option(
        0.0, min=0.0, max=2.0, help="Errors count by latents_std ** this (0: as in the latents; 2: as in pixels)."
    ),
) -> None:
    """Train until the budget is used up."""
    settings = Settings(**locals())
    if (minutes > 0) == (steps > 0):
        raise typer.BadParameter("give exactly one of --minutes and --steps")
    if device == "auto":
        settings.device = "cuda" if torch.cuda.is_available() else "cpu"
    run.mkdir(parents=True, exist_ok=True)
    (run / "rendezvous").unlink(missing_ok=True)
    if workers > 1:
        torch.multiprocessing.spawn(train, args=(settings,), nprocs=workers)
    else:
        train(0, settings)


if __name__ == "__main__":
    typer.run(main)
