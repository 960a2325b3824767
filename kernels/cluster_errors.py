"""What pooling a key cluster would cost: its softmax mass and its error, seen from the centres of query clusters.

Source: SVG-EAR (arXiv 2603.08982), error-aware routing: squared error of the softmax weights. Differs in: weights are
those of the softmax over all keys, so they cannot overflow; the error of the output, with values, beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsattn.kernels.kmeans import Clusters
from dsattn.kernels.pooling import runs_triton, segment_sums

# Keys of one cluster that stand side by side; clusters are padded to a multiple of it.
TILE = 16
# Elements of the largest tensor of one chunk of query clusters.
CHUNK_ELEMENTS = {"cpu": 1 << 21, "other": 1 << 26}

Kind = Literal["weight", "output"]


def cluster_errors(
    queries: Tensor, k: Tensor, v: Tensor, clusters: Clusters, kind: Kind, scale: float
) -> tuple[Tensor, Tensor]:
    """Mass of every key cluster and squared error of its pooled stand-in, for every query.

    With ``p_k`` the softmax over all keys and ``p̄_j = exp(scale q·k̄_j) / Z`` the weight of cluster j's mean key:
    ``"weight"`` is ``Σ_{k in j} (p_k - p̄_j)²``; ``"output"`` is ``|Σ_{k in j} (p_k - p̄_j) (v_k - o)|²``, how far the
    output o moves, to first order, if j alone is pooled (``n_j p̄_j`` weighs the mean value then).

    Cost per head, for C queries: ``2 C S D`` FLOPs (``"output"``: three times that); chunks of queries, never
    ``S x S``. On a GPU it runs in Triton (``kernels.cluster_errors_triton``).

    Args:
        queries: ``[B, H, C, D]`` fp32, for example centroids.
        k, v: ``[B, S, H, D]``, the clustered tokens.
        clusters: of these tokens; only labels, order and sizes are used.
        kind: which error.
        scale: factor on q·k.

    Returns:
        ``mass [B, H, C, N]`` (rows sum to 1) and ``error [B, H, C, N]`` fp32; 0 for empty clusters.

    """
    if runs_triton(k, v) and k.dtype == v.dtype:
        from dsattn.kernels import cluster_errors_triton

        return cluster_errors_triton.cluster_errors(queries, k, v, clusters, kind, scale)
    tiles = _Tiles.of(clusters)
    keys, values = tiles.gather(k), tiles.gather(v)
    means = clusters.means(k)
    largest = max(keys[..., 0].numel(), values.numel() // TILE if kind == "output" else 0)
    step = max(1, CHUNK_ELEMENTS.get(k.device.type, CHUNK_ELEMENTS["other"]) // largest)
    parts = []
    for start in range(0, queries.shape[2], step):
        chunk = queries[:, :, start : start + step] * scale
        logits = (chunk @ keys.flatten(2, 3).mT).masked_fill(~tiles.exists.flatten(2)[:, :, None], -torch.inf)
        log_total = logits.logsumexp(-1, keepdim=True)
        flat = (logits - log_total).exp()
        # [B, H, tiles, c, T]: weights of the keys of every tile.
        weights = flat.unflatten(-1, (-1, TILE)).transpose(2, 3)
        # [B, H, N, c]: weight of every cluster's mean key.
        pooled = (chunk @ means.mT - log_total).exp().mT
        near = pooled.gather(2, tiles.owner.clamp(max=pooled.shape[2] - 1)[..., None].expand_as(weights[..., 0]))
        missing = (weights - near[..., None]).masked_fill(~tiles.exists[:, :, :, None], 0)
        if kind == "weight":
            error = tiles.sum(missing.square().sum(-1))
        else:
            out = flat @ values.flatten(2, 3)
            moved = tiles.sum((missing @ values).flatten(3)).unflatten(-1, out.shape[2:])
            error = (moved - tiles.sum(missing.sum(-1))[..., None] * out[:, :, None]).square().sum(-1)
        mass = tiles.sum(weights.sum(-1))
        parts.append((mass.mT, error.mT))
    mass, error = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    return mass, error


@dataclass(frozen=True)
class _Tiles:
    """Clusters cut into tiles of ``TILE`` tokens; their number is bounded by shapes, surplus tiles own nothing.

    tokens, exists: ``[B, H, tiles, TILE]``, token of every slot, and whether there is one.
    owner: ``[B, H, tiles]``, cluster of every tile, N for surplus tiles. count: N.
    """

    tokens: Tensor
    exists: Tensor
    owner: Tensor
    count: int

    @classmethod
    def of(cls, clusters: Clusters) -> _Tiles:
        batch, heads, count = clusters.sizes.shape
        length = clusters.labels.shape[-1]
        device = clusters.sizes.device
        per_cluster = (clusters.sizes + TILE - 1) // TILE
        last = per_cluster.cumsum(-1)
        ids = torch.arange(length // TILE + count, device=device).expand(batch, heads, -1).contiguous()
        owner = torch.searchsorted(last, ids, right=True)
        which = owner.clamp(max=count - 1)
        ends = clusters.sizes.cumsum(-1)
        start = (ends - clusters.sizes - (last - per_cluster) * TILE).gather(-1, which) + ids * TILE
        positions = start[..., None] + torch.arange(TILE, device=device)
        exists = (positions < ends.gather(-1, which)[..., None]) & (owner < count)[..., None]
        tokens = clusters.order.gather(-1, positions.clamp(max=length - 1).flatten(2)).view_as(positions)
        return cls(tokens, exists, owner, count)

    def gather(self, x: Tensor) -> Tensor:
        """``[B, H, tiles, TILE, D]`` fp32 from ``x [B, S, H, D]``; zero where there is no token."""
        index = self.tokens.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
        found = x.transpose(1, 2).gather(2, index).view(*self.tokens.shape, -1).float()
        return found.masked_fill(~self.exists[..., None], 0)

    def sum(self, x: Tensor) -> Tensor:
        """``[B, H, N, F]``: sum of ``x [B, H, tiles, F]`` over the tiles of every cluster."""
        return segment_sums(x.transpose(1, 2), self.owner, self.count)
