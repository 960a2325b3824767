"""Batched k-means over the tokens of every head: assignment by nearest centroid, update by the mean.

The rules are SVG2's (arXiv 2505.18875): squared Euclidean distance, ties to the lowest index, an empty cluster keeps
its centroid, warm start from centroids of an earlier step. Differs in: a fixed number of iterations (no host
synchronisation to stop early), first centroids drawn without replacement from a seeded generator, fp32 throughout.

On a GPU each iteration runs in Triton (``kernels.kmeans_triton``); the torch code here is its specification, but for
half-precision tokens there: before the last iteration they meet centroids rounded to their dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dsattn.kernels.pooling import runs_triton, segment_sums

# Scores (token, centroid) held at a time: on a CPU they should stay in the cache between product and maximum.
SCORES = {"cpu": 1 << 19, "other": 1 << 26}


@dataclass(frozen=True)
class Clusters:
    """Result of k-means.

    labels: ``[B, H, S]`` int64 in ``[0, C)``.
    order: ``[B, H, S]`` int64, the tokens sorted by label, equal labels in their given order.
    centroids: ``[B, H, C, D]`` fp32, the means of the tokens with that label (an empty cluster: its last centroid).
    sizes: ``[B, H, C]`` int64.
    """

    labels: Tensor
    order: Tensor
    centroids: Tensor
    sizes: Tensor

    def means(self, x: Tensor, empty: Tensor | None = None) -> Tensor:
        """Mean of any ``x [B, S, H, D]`` over every cluster, ``[B, H, C, D]`` fp32; ``empty`` fills empty clusters."""
        if runs_triton(x):
            from dsattn.kernels.segments_triton import segment_means

            starts = torch.nn.functional.pad(self.sizes.cumsum(-1), (1, 0)).to(torch.int32)
            return segment_means(x, self.sizes.shape[2], order=self.order, starts=starts, empty=empty)
        sums = segment_sums(x, self.labels, self.sizes.shape[2])
        return _means(sums, self.sizes, torch.zeros_like(sums) if empty is None else empty)


def kmeans(x: Tensor, centroids: Tensor, iterations: int) -> Clusters:
    """Lloyd's iterations from given centroids.

    Args:
        x: ``[B, S, H, D]``; computed in fp32.
        centroids: ``[B, H, C, D]``.
        iterations: at least 1.

    """
    centroids = centroids.float()
    if runs_triton(x):
        from dsattn.kernels import kmeans_triton

        for left in reversed(range(iterations)):
            labels, order, centroids, sizes = kmeans_triton.iterate(x, centroids, coarse=left > 0)
        return Clusters(labels, order, centroids, sizes)
    x = x.float()
    for _ in range(iterations):
        labels = assign(x, centroids)
        sizes = torch.zeros(centroids.shape[:3], dtype=torch.int64, device=x.device)
        sizes.scatter_add_(2, labels, torch.ones_like(labels))
        centroids = _means(segment_sums(x, labels, centroids.shape[2]), sizes, centroids)
    return Clusters(labels, labels.argsort(dim=-1, stable=True), centroids, sizes)


def _means(sums: Tensor, sizes: Tensor, empty: Tensor) -> Tensor:
    return torch.where(sizes[..., None] > 0, sums / sizes.clamp(min=1)[..., None], empty)


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid, ``[B, H, S]`` int64; never holds more than ``SCORES`` distances at a time.

    Args:
        x: ``[B, S, H, D]`` fp32.
        centroids: ``[B, H, C, D]`` fp32.

    """
    batch, length, heads, _ = x.shape
    flat = centroids.flatten(0, 1)
    # argmin |x - c|^2 = argmax x.c - |c|^2 / 2.
    offset = flat.square().sum(-1)[:, None]
    step = max(1, SCORES.get(x.device.type, SCORES["other"]) // offset.numel())
    labels = torch.empty(batch * heads, length, dtype=torch.int64, device=x.device)
    for start in range(0, length, step):
        part = x[:, start : start + step].transpose(1, 2).flatten(0, 1)
        scores = torch.baddbmm(offset.expand(-1, part.shape[1], -1), part, flat.mT, beta=-0.5)
        labels[:, start : start + step] = scores.argmax(-1)
    return labels.view(batch, heads, length)


def first_centroids(x: Tensor, count: int, seed: int) -> Tensor:
    """``count`` different tokens of every head, ``[B, H, C, D]`` fp32; the same ones for every head and device.

    Args:
        x: ``[B, S, H, D]`` with S at least ``count``.
        count: number of clusters.
        seed: seeds the draw.

    """
    return x[:, draw_tokens(x.shape[1], count, seed, x.device)].transpose(1, 2).float()


@lru_cache(maxsize=64)
def draw_tokens(length: int, count: int, seed: int, device: torch.device) -> Tensor:
    """``[count]`` int64: different tokens out of ``length`` (all, if there are fewer), drawn by the seed alone."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:count].to(device)
