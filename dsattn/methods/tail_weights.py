"""What each key counts for in the pool of its cluster: a pooled tail to second order.

A pooled tail lets the mean k̄ of a skipped cluster stand for its keys: e^(s q·k) = e^(s q·k̄) e^(s q·δ) with δ = k - k̄
becomes e^(s q·k̄). The mean of the second factor over all queries is more than 1 where keys are spread, and differs from
key to key; as a weight per key it costs the kernels nothing. It is estimated from the queries' first two moments.
Source: this project; the expansion of a cluster's softmax mass by moments is that of fast multipole methods.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsattn.kernels.kmeans import Clusters

# Only skipped pairs use the weights, and those are the ones with the smaller factors: share of the exponent that is
# kept, and its limit. Best of .35 to 1 and 1 to 4 on captures of the shipped model.
SHARE = 0.75
LIMIT = 3.0


def tail_weights(q: Tensor, k: Tensor, features: Tensor, clusters: Clusters) -> Tensor:
    """Weight of every key in its cluster's pool: ``exp(SHARE (s E[q]·δ + ½ s² δᵀ E[q qᵀ] δ))``.

    Args:
        q: ``[B, Sq, H, D]``, all queries.
        k: ``[B, S, H, D]``, the clustered keys.
        features: ``[B, S, H, F]`` whose squared differences are ``δᵀ E[q qᵀ] δ`` (``ClusterSpace``, ``"query"``).
        clusters: of the keys.

    Returns:
        ``[B, H, S]`` fp32.

    """
    scale = k.shape[-1] ** -0.5
    mean_query = q.mean(1, dtype=torch.float32)
    logits = torch.einsum("bshd,bhd->bhs", k.float(), mean_query) * scale
    centre = clusters.means(logits.transpose(1, 2)[..., None])[..., 0]
    spread = features.float() - _of_token(clusters.means(features), clusters.labels).transpose(1, 2)
    second = spread.square().sum(-1).transpose(1, 2) * scale**2
    exponent = logits - centre.gather(2, clusters.labels) + second / 2
    weights: Tensor = (SHARE * exponent).clamp(-LIMIT, LIMIT).exp()
    return weights


def _of_token(means: Tensor, labels: Tensor) -> Tensor:
    """``[B, H, S, F]`` from ``[B, H, C, F]``: its cluster's row for every token."""
    return means.gather(2, labels[..., None].expand(-1, -1, -1, means.shape[-1]))
