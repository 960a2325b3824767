"""Head profiles of any size, made of random curves."""

from __future__ import annotations

import numpy as np
import torch

from dsattn.grid import VideoGrid
from dsattn.head_profile import DENSITIES, HeadProfile, LayerProfile
from dsattn.profile_report import Panel, ProfileReport, Timeline
from dsattn.profiler import allocate

CANDIDATES = ("semantic", "topk", "spatial_temporal")


def layer_profile(heads: int, batch: int = 1, seed: int = 0) -> LayerProfile:
    """Curves that fall and rise with density as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(CANDIDATES), 1, batch, heads)
    ladder = torch.tensor(DENSITIES)[None, :, None, None]
    density = ladder.expand(len(CANDIDATES), -1, batch, heads).clone()
    hard = torch.rand(shape, generator=generator) * 3
    recall = ladder ** (0.1 + 0.3 * torch.rand(shape, generator=generator))
    error = 0.3 * hard * (1 - recall)
    weight = torch.rand(batch, heads, generator=generator)
    return LayerProfile(0, CANDIDATES, error, recall, density, density + 0.01, weight / weight.sum(1, keepdim=True))


def head_profile(layers: int, heads: int, branches: tuple[str, ...] = ("cond",), batch: int = 1) -> HeadProfile:
    """A profile whose choices are made."""
    found = {}
    for b, branch in enumerate(branches):
        own = [layer_profile(heads, batch, seed=100 * b + i) for i in range(layers)]
        allocate(own, target=0.1)
        found |= {("transformer", branch, i): layer for i, layer in enumerate(own)}
    return HeadProfile(found, VideoGrid(21, 8, 8, text=20), 20, {"scheduler": "Flow shift=5"})


def report(layers: int, heads: int, dense_layers: int = 0, steps: int = 20) -> ProfileReport:
    """Something to draw, without a model."""
    profile = head_profile(layers, heads)
    rng = np.random.default_rng(0)
    distance = np.abs(np.arange(48)[:, None] - np.arange(48))
    band = np.stack([np.exp(-distance / (1 + 10 * rng.random())) for _ in range(heads)])
    own = {i: None if i < dense_layers else profile.layers["transformer", "cond", i] for i in range(layers)}
    maps = {i: band for i in range(dense_layers, layers)}
    panel = Panel("cond", "transformer", "cond", 0, profile.grid, own, maps)
    dense = [0, 1, 2]
    density = {
        i: [1.0 if s in dense or i < dense_layers else 0.1 + 0.2 * rng.random() for s in range(steps)] for i in own
    }
    error = {i: [0.1 * rng.random() if s % 4 == 2 and s > 2 else float("nan") for s in range(steps)] for i in own}
    return ProfileReport([panel], Timeline(list(range(steps)), dense, density, error, 0.1))
