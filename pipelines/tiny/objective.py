"""What the small models are trained to reduce: the error of the predicted velocity, clip by clip and pair by pair."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from dsattn.pipelines.tiny.batches import Batch
from dsattn.pipelines.tiny.codec import PatchCodec


def velocity_error(model: Callable[..., Tensor], batch: Batch) -> Tensor:
    """Predicted minus true velocity, `[B, z, n]`."""
    s = batch.level.view(-1, 1, 1)
    noisy = (1 - s) * batch.latents + s * batch.noise
    got = model(noisy, batch.level, batch.tokens, batch.mask, batch.positions)
    return got - (batch.noise - batch.latents)


def squared_error(error: Tensor) -> Tensor:
    """Mean square of an error, one value per sample."""
    return error.square().flatten(1).mean(1)


def component_weights(codec: PatchCodec, power: float) -> Tensor:
    """Weights of the codec's components in the loss, `[z, 1]`, of mean 1: `latents_std` ** `power`.

    Latents are whitened half-way. At power 0 an error counts as in the latents, at 2 as in pixels.
    """
    weights = torch.tensor(codec.config.latents_std) ** power
    return (weights / weights.mean())[:, None]


def pair_loss(error: Tensor, weight: float, components: Tensor | float = 1.0) -> Tensor:
    """Mean square of what a pair's two errors share, plus `weight` times that of what they differ in.

    At weight 1 that is the mean squared error. Neighbours are pairs; over several workers clips are dealt in turn, so
    one's other half may be elsewhere. A clip without one is its own. Squares are weighted with `components`, `[z, 1]`.
    Only the gradient is that loss's, not the value.
    """
    rank, world, everyone = 0, 1, [error.detach()]
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
        everyone = [torch.empty_like(error) for _ in range(world)]
        dist.all_gather(everyone, error.detach().contiguous())
    dealt = torch.stack(everyone, dim=1).flatten(0, 1)
    other = (torch.arange(len(dealt), device=error.device) ^ 1).clamp(max=len(dealt) - 1)
    # With shared = (a + b) / 2 and differing = (a - b) / 2: half of the gradient is shared + weight differing.
    pull = (1 + weight) * error.detach() + (1 - weight) * dealt[other][rank::world]
    return (error * pull * components).mean()
