"""What pooling a key cluster would cost: its softmax mass and its error, seen from the centres of query clusters.

Source: SVG-EAR (arXiv 2603.08982), error-aware routing: squared error of the softmax weights. Differs in: weights are
those of the softmax over all keys, so they cannot overflow; the error of the output, with values, beside it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dsattn.kernels.kmeans import Clusters
from dsattn.kernels.pooling import runs_triton
from dsattn.kernels.runs import Runs

# Keys of one cluster that stand side by side; clusters are padded to a multiple of it.
TILE = 16
# Elements of the largest tensor of one chunk of query clusters.
CHUNK_ELEMENTS = {"cpu": 1 << 21, "other": 1 << 26}

# Elements of a chunk of centred logits: it stays in the cache of a CPU. Squares of e to the largest fit into fp32.
_CENTRED_ELEMENTS = 1 << 19
_LARGEST = 40.0

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
    if kind == "weight" and k.device.type == "cpu" and k.dtype != torch.float64:
        found = _centred(queries, k, clusters, scale)
        if found is not None:
            return found
    tiles = Runs.of(clusters.order, clusters.sizes, TILE)
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


def _centred(queries: Tensor, k: Tensor, clusters: Clusters, scale: float) -> tuple[Tensor, Tensor] | None:
    """The weight errors with fewer passes over memory: by how much keys beside the mean k̄ change its weight.

    ``p_k = p̄_j e^x`` with x = scale q·(k - k̄_j), so mass and error are p̄_j times the sum of 1 + (e^x - 1), and p̄_j²
    times that of (e^x - 1)²; p̄ itself needs no pass over the keys before. None if some x is out of fp32's range.
    """
    batch, length, heads, dim = k.shape
    count = clusters.sizes.shape[2]
    means = clusters.means(k)
    labels = clusters.labels.gather(2, clusters.order).flatten(0, 1)
    keys = k.transpose(1, 2).gather(2, clusters.order[..., None].expand(-1, -1, -1, dim)).float()
    centres = means.flatten(0, 1).gather(1, labels[..., None].expand(-1, -1, dim))
    keys = keys.flatten(0, 1) - centres
    columns = (queries * scale).flatten(0, 1).mT
    rows = (torch.arange(batch * heads, device=k.device)[:, None] * count + labels).flatten()
    more, squares = torch.zeros(2, batch * heads * count, columns.shape[2], device=k.device)
    step = max(1, _CENTRED_ELEMENTS // columns.shape[2])
    for head, own in enumerate(keys):
        for start in range(0, length, step):
            x = own[start : start + step] @ columns[head]
            if float(x.amax()) > _LARGEST:
                return None
            target = rows[head * length + start :][: len(x)]
            more.index_add_(0, target, x.expm1_())
            squares.index_add_(0, target, x.square_())
    # From here on [B, H, N, C], clusters before queries.
    logits = means @ columns.unflatten(0, (batch, heads))
    sizes = clusters.sizes[..., None]
    logits = logits.masked_fill(sizes == 0, -torch.inf)
    more, squares = (x.view_as(logits) for x in (more, squares))
    # The sum of e^x over a cluster is at least its size, but for rounding.
    log_mass = logits + (sizes + more).clamp(min=torch.finfo(more.dtype).tiny).log()
    log_total = log_mass.logsumexp(2, keepdim=True)
    error = (2 * (logits - log_total) + squares.log()).exp()
    return (log_mass - log_total).exp().mT, error.mT
