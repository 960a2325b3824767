"""Teach the small models' codec to decode: the learnt part of its decoder, on freshly drawn training clips.

    python scripts/train_codec.py --weights pipelines/tiny/weights --weights pipelines/tiny/weights_joint --minutes 15

Encoding stays as it is, so transformers trained on the codec's latents stay valid. Latents get a little noise, since
generated ones are never exact. The codec in every `--weights` is replaced at the end, if it has become better.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import typer
from torch import Tensor

from dsattn.pipelines.tiny import data
from dsattn.pipelines.tiny.codec import PatchCodec, to_patches
from dsattn.pipelines.tiny.loader import load_codec, replace_codec, verify
from dsattn.pipelines.tiny.render import render

SIZES = ((17, 128, 128), (17, 192, 192), (17, 256, 256), (9, 256, 256), (17, 96, 128), (5, 320, 320))
NOISE = 0.03
"""Standard deviation of the noise on normalised latents."""


def draw(stream: Iterator[data.Scene], size: tuple[int, int, int]) -> Tensor:
    """One clip `[1, 3, F, H, W]` in [-1, 1]."""
    return torch.from_numpy(render(next(stream), *size)).permute(3, 0, 1, 2)[None] * 2 - 1


@torch.no_grad()
def psnr(codec: PatchCodec, count: int = 12) -> float:
    """PSNR in dB on held-out clips of 17 frames of 256 x 256 (mean squared error over all, range 1)."""
    stream = data.clips(4242, held_out=True)
    clips = [draw(stream, (17, 256, 256)) for _ in range(count)]
    errors = [float((codec.decode(codec.encode(c)).sample - c).square().mean()) / 4 for c in clips]
    return -10 * math.log10(sum(errors) / len(errors))


def with_refiner(codec: PatchCodec, width: int) -> PatchCodec:
    """The same codec with a learnt part of `width`; one that has it already goes on with it."""
    if codec.config.refine_width == width:
        return codec
    config = {k: v for k, v in codec.config.items() if not k.startswith("_")} | {"refine_width": width}
    fresh = PatchCodec(**config)
    fresh.mean.copy_(codec.mean)
    fresh.components.copy_(codec.components)
    return fresh


def train(codec: PatchCodec, minutes: float, steps: int, seed: int, peak: float) -> list[dict[str, float]]:
    """Train the learnt part in place, for so many minutes or steps; returns the loss over time."""
    torch.manual_seed(seed)
    stream, log, losses = data.clips(seed + 31), [], []
    optimizer = torch.optim.AdamW(codec.refine.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.0)
    started, step = time.monotonic(), 0
    while True:
        done = step / steps if steps else (time.monotonic() - started) / (60 * minutes)
        if done >= 1:
            return log
        rate = peak * min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * done)) + 1e-5
        for group in optimizer.param_groups:
            group["lr"] = rate
        video = draw(stream, SIZES[step % len(SIZES)])
        latents = codec.encode(video)
        scale = latents.new_tensor(codec.config.latents_std).view(1, -1, 1, 1, 1)
        noisy = latents + NOISE * scale * torch.randn_like(latents)
        loss = (codec.decode_patches(noisy) - to_patches(video)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        losses.append(loss.item())
        if step % 50 == 0:
            log.append(
                {"step": step, "seconds": round(time.monotonic() - started, 1), "loss": sum(losses) / len(losses)}
            )
            typer.echo(json.dumps(log[-1]), err=True)
            losses = []


def main(
    weights: list[Path] = typer.Option(..., help="Folders of the models that use it; the first one's is trained."),
    minutes: float = typer.Option(0.0, help="Wall-clock budget (0: use --steps)."),
    steps: int = typer.Option(0, help="Budget in clips (0: use --minutes)."),
    width: int = typer.Option(128, help="Width of the learnt part."),
    peak: float = typer.Option(2e-3, help="Peak learning rate."),
    seed: int = typer.Option(0),
    threads: int = typer.Option(2),
) -> None:
    """Train, compare on held-out clips and keep the better codec."""
    if (minutes > 0) == (steps > 0):
        raise typer.BadParameter("give exactly one of --minutes and --steps")
    torch.set_num_threads(threads)
    for folder in weights:
        verify(folder)  # before the training, not after it
    codec = load_codec(weights[0])
    before = psnr(codec)
    codec = with_refiner(codec, width)
    train(codec, minutes, steps, seed, peak)
    after = psnr(codec)
    typer.echo(f"held-out clips of 17 x 256 x 256: {before:.2f} dB before, {after:.2f} dB after")
    if after <= before:
        raise typer.Exit(1)
    for folder in weights:
        replace_codec(folder, codec)
        typer.echo(f"codec replaced in {folder}")


if __name__ == "__main__":
    typer.run(main)
