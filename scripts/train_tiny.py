"""Train the small text-to-video model that ships with dsattn.

    python scripts/train_tiny.py --run runs/tiny --minutes 100 --export pipelines/tiny/weights

Flow matching in diffusers' convention: x_s = (1 - s) x0 + s noise, target noise - x0, timestep 1000 s. Clips are
drawn on the fly; every random number of a step depends only on (seed, step), so a resumed run continues exactly where
it stopped. The schedule (learning rate, grid mix) is a function of the fraction of the budget that is used up.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsattn.pipelines.tiny import codec as patch_codec
from dsattn.pipelines.tiny import data
from dsattn.pipelines.tiny.loader import export_weights
from dsattn.pipelines.tiny.model import FLOW_SHIFT, MAX_TEXT, build_text_encoder, build_tokenizer, build_transformer
from dsattn.pipelines.tiny.render import render
from dsattn.pipelines.tiny.training import CpuTrainingProcessor, Optimizer, gradient

Z_DIM = 32
Grid = tuple[int, int, int]
SMALL: tuple[Grid, ...] = (
    (5, 8, 8),
    (7, 8, 8),
    (9, 8, 8),
    (5, 8, 10),
    (6, 10, 8),
    (5, 10, 10),
    (5, 12, 12),
    (9, 12, 12),
)
MIDDLE: tuple[Grid, ...] = ((9, 16, 16), (7, 20, 20), (9, 16, 20), (9, 20, 16))
LARGE: tuple[Grid, ...] = ((9, 24, 24), (9, 24, 24), (9, 32, 32))
FULL: tuple[Grid, ...] = ((9, 24, 24), (9, 32, 32), (9, 32, 32))
# (until this fraction of the budget, share of each grid family in *steps*)
MIX = (
    (0.40, (0.92, 0.08, 0.0, 0.0)),
    (0.65, (0.60, 0.36, 0.04, 0.0)),
    (0.85, (0.30, 0.55, 0.15, 0.0)),
    (2.0, (0.1, 0.3, 0.0, 0.6)),
)
NOISE_BINS = (0.0, 0.3, 0.6, 0.8, 0.9, 0.95, 0.98, 1.001)


def learning_rate(fraction: float, peak: float) -> float:
    """Warm up for 2 % of the budget, hold, then fall linearly to 2 % over the last 45 %."""
    return peak * min(1.0, fraction / 0.02 + 1e-3, max(0.02, (1.0 - fraction) / 0.45))


def pick_grid(rng: np.random.Generator, fraction: float) -> Grid:
    shares = next(shares for until, shares in MIX if fraction < until)
    family = (SMALL, MIDDLE, LARGE, FULL)[int(rng.choice(4, p=shares))]
    return family[int(rng.integers(len(family)))]


def sample_noise_levels(batch: int, generator: torch.Generator) -> Tensor:
    """Logit-normal with the scheduler's shift; a quarter of the samples is unshifted so that detail is learnt too."""
    normal = torch.randn(batch, generator=generator)
    shifted = normal * 1.1 + math.log(FLOW_SHIFT) + 0.6
    plain = normal + 0.3
    keep = torch.rand(batch, generator=generator) < 0.75
    return torch.sigmoid(torch.where(keep, shifted, plain)).clamp(0.002, 0.9995)


@dataclass
class Batch:
    latents: Tensor  # [B, z, f, h, w], normalised
    tokens: Tensor  # [B, 32]
    mask: Tensor  # [B, 32]
    level: Tensor  # [B], noise level in (0, 1)
    noise: Tensor  # like latents

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, f.name).to(device) for f in fields(self)))


class Clips:
    """Draws, renders and encodes the clips of one step."""

    def __init__(
        self, codec: patch_codec.PatchCodec, seed: int, tokens_per_step: int, rank: int = 0, world: int = 1
    ) -> None:
        self.codec, self.seed, self.tokens_per_step = codec, seed, tokens_per_step
        self.rank, self.world = rank, world
        self.tokenizer = build_tokenizer()

    @staticmethod
    def pair(rng: np.random.Generator) -> tuple[data.Scene, data.Scene]:
        scene = data.sample_scene(rng)
        return scene, data.other_motion(scene, rng)

    def batch(self, step: int, fraction: float, grid: Grid | None = None) -> Batch:
        rng = np.random.default_rng((self.seed, step))
        frames, height, width = grid or pick_grid(rng, fraction)
        count = max(1, round(self.tokens_per_step / (frames * height * width * self.world))) * self.world
        # In pairs that differ in the motion alone, noise included: what the two gradients share cancels, and what is
        # left is about the words for the direction, the last thing this model learns.
        pairs = -(-count // 2)
        scenes = [s for _ in range(pairs) for s in self.pair(rng)][:count]
        captions = ["" if rng.random() < 0.1 else s.caption for s in scenes]
        # Drawn for the whole batch and then shared out, so that a step does not depend on the number of workers.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        level = sample_noise_levels(pairs, generator).repeat_interleave(2)[:count]
        noise = torch.randn(pairs, Z_DIM, frames, height, width, generator=generator).repeat_interleave(2, 0)[:count]
        mine = slice(self.rank, None, self.world)
        scenes, captions = scenes[mine], captions[mine]
        videos = [render(s, 4 * frames - 3, 8 * height, 8 * width) for s in scenes]
        video = torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3) * 2 - 1
        encoded = self.tokenizer(
            captions, padding="max_length", max_length=MAX_TEXT, truncation=True, return_tensors="pt"
        )
        latents = self.codec.normalise(self.codec.encode(video))
        return Batch(latents, encoded.input_ids, encoded.attention_mask, level[mine], noise[mine])


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


class Model(nn.Module):
    """Text encoder and transformer, trained jointly."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.random.manual_seed(seed)
            self.text_encoder = build_text_encoder(len(build_tokenizer()))
            self.transformer = build_transformer(Z_DIM)
        nn.init.zeros_(self.transformer.proj_out.weight)

    def forward(self, noisy: Tensor, level: Tensor, batch: Batch, autocast: bool) -> Tensor:
        text = self.text_encoder(batch.tokens, batch.mask).last_hidden_state * batch.mask[..., None]
        context = torch.autocast(noisy.device.type, torch.bfloat16) if autocast else nullcontext()
        with context:
            out: Tensor = self.transformer(noisy, level * 1000, text, return_dict=False)[0]
        return out.float()


def training_step(model: Model, optimizer: Optimizer, batch: Batch, rate: float) -> dict[str, Any]:
    """One update; returns the loss and the per-sample (noise level, loss) pairs of this worker."""
    batch = batch.to(next(model.parameters()).device)
    s = batch.level.view(-1, 1, 1, 1, 1)
    noisy = (1 - s) * batch.latents + s * batch.noise
    target = batch.noise - batch.latents
    error = (model(noisy, batch.level, batch, autocast=True) - target).square().flatten(1).mean(1)
    loss = error.mean()
    params = list(optimizer.params.values())
    for p in params:
        p.grad = None
    loss.backward()
    if dist.is_initialized():
        flat = torch.cat([gradient(p).flatten() for p in params])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for p, grad in zip(params, torch.split(flat, [p.numel() for p in params]), strict=True):
            p.grad = grad.view_as(p)
    norm = nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step(rate)
    pairs = list(zip(batch.level.tolist(), error.detach().tolist(), strict=True))
    return {"loss": loss.item(), "grad_norm": float(norm), "pairs": pairs}


class Run:
    """Model, optimizer, EMA and counters of a run, with checkpoints that hold nothing but safetensors and JSON."""

    def __init__(self, folder: Path, seed: int, device: str, codec_clips: int) -> None:
        self.folder, self.seed, self.step, self.seconds = folder, seed, 0, 0.0
        self.codec = fit_codec(seed, codec_clips)
        self.model = Model(seed).to(device)
        if device == "cpu":
            self.model.transformer.set_attn_processor(CpuTrainingProcessor())
        self.optimizer = Optimizer(self.model)
        self.ema = {n: p.detach().clone() for n, p in self.optimizer.params.items()}
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "state.json").exists():
            self.load()

    @torch.no_grad()
    def update_ema(self) -> None:
        decay = min(0.998, (1 + self.step) / (10 + self.step))
        names = list(self.ema)
        torch._foreach_lerp_([self.ema[n] for n in names], [self.optimizer.params[n] for n in names], 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        out = {f"model/{n}": p.detach() for n, p in self.optimizer.params.items()}
        out |= {f"ema/{n}": p for n, p in self.ema.items()}
        return out | {f"optimizer/{n}": p for n, p in self.optimizer.state.items()}

    def save(self) -> None:
        fresh = self.folder / "state.tmp"
        save_file({n: t.contiguous() for n, t in self.tensors().items()}, fresh)
        fresh.replace(self.folder / "state.safetensors")
        state = {"step": self.step, "seconds": self.seconds, "seed": self.seed, "updates": self.optimizer.count}
        (self.folder / "state.json").write_text(json.dumps(state) + "\n")

    @torch.no_grad()
    def load(self) -> None:
        state = json.loads((self.folder / "state.json").read_text())
        if state["seed"] != self.seed:
            raise ValueError(f"{self.folder} was trained with seed {state['seed']}, not {self.seed}; use another --run")
        stored = load_file(self.folder / "state.safetensors")
        for name, tensor in self.tensors().items():
            tensor.copy_(stored[name])
        self.step, self.seconds, self.optimizer.count = state["step"], state["seconds"], state["updates"]

    def export(self, folder: Path) -> None:
        """Write the EMA weights in the layout the loader reads."""
        export_weights(folder, self.codec, {n: t.cpu() for n, t in self.ema.items()})


def binned(pairs: list[tuple[float, float]]) -> dict[str, float]:
    out = {}
    for low, high in zip(NOISE_BINS, NOISE_BINS[1:], strict=False):
        inside = [e for s, e in pairs if low <= s < high]
        if inside:
            out[f"{low:g}"] = round(sum(inside) / len(inside), 4)
    return out


@dataclass
class Settings:
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


def train(rank: int, settings: Settings) -> None:
    """The loop of one worker; worker 0 keeps the clock, the log and the checkpoints."""
    torch.set_num_threads(settings.threads)
    if settings.workers > 1:
        store = dist.FileStore(str(settings.run / "rendezvous"), settings.workers)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=settings.workers)
    state = Run(settings.run, settings.seed, settings.device, settings.codec_clips)
    tokens = settings.tokens or (65536 if settings.device == "cuda" else 5760)
    clips = Clips(state.codec, settings.seed, tokens, rank, settings.workers)
    state.model.train()
    last_save, last_log, session, pairs = time.monotonic(), time.monotonic(), 0, []
    while True:
        started = time.monotonic()
        used = state.seconds / (60 * settings.minutes) if settings.minutes else state.step / settings.steps
        clock = torch.tensor([used], dtype=torch.float64)
        if settings.workers > 1:
            dist.broadcast(clock, 0)
        fraction = clock.item()
        if fraction >= 1.0 or (settings.stop_after and session >= settings.stop_after):
            break
        rate = learning_rate(fraction, settings.peak)
        record = training_step(state.model, state.optimizer, clips.batch(state.step, fraction), rate)
        state.step, session = state.step + 1, session + 1
        state.update_ema()
        state.seconds += time.monotonic() - started
        pairs += record.pop("pairs")
        if rank == 0 and (time.monotonic() - last_log > 20 or session == 1):
            record |= {
                "step": state.step,
                "seconds": round(state.seconds, 1),
                "rate": rate,
                "fraction": round(fraction, 4),
            }
            record |= {"mean": round(sum(e for _, e in pairs) / len(pairs), 4), "by_noise": binned(pairs)}
            with (settings.run / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            last_log, pairs = time.monotonic(), []
        if rank == 0 and time.monotonic() - last_save > 60 * settings.save_minutes:
            state.save()
            if settings.export:
                state.export(settings.export)
            last_save = time.monotonic()
    if rank == 0:
        state.save()
        if settings.export:
            state.export(settings.export)
        typer.echo(f"step {state.step}, {state.seconds / 60:.1f} min, checkpoint in {settings.run}")
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
) -> None:
    """Train until the budget is used up."""
    if (minutes > 0) == (steps > 0):
        raise typer.BadParameter("give exactly one of --minutes and --steps")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    run.mkdir(parents=True, exist_ok=True)
    (run / "rendezvous").unlink(missing_ok=True)
    settings = Settings(
        run, minutes, steps, stop_after, peak, tokens, seed, threads, workers, save_minutes, export, device
    )
    if workers > 1:
        torch.multiprocessing.spawn(train, args=(settings,), nprocs=workers)
    else:
        train(0, settings)


if __name__ == "__main__":
    typer.run(main)
