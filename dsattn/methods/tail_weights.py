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
# kept, and its limit. Chosen among .35 to 1 and 1 to 3 on one prompt of the shipped model; flat from .65 to .8.
SHARE = 0.75
LIMIT = 3.0
# Elements of the largest tensor of one chunk of keys.
ELEMENTS = 1 << 24


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
    centres = clusters.means(features)
    batch, length, heads, dim = features.shape
    step = max(1, ELEMENTS // (batch * heads * dim))
    logits, second = [], []
    for start in range(0, length, step):
        chunk = slice(start, start + step)
        logits.append(torch.einsum("bshd,bhd->bhs", k[:, chunk].float(), mean_query) * scale)
        labels = clusters.labels[:, :, chunk, None].expand(-1, -1, -1, dim)
        spread = features[:, chunk].transpose(1, 2).float() - centres.gather(2, labels)
        second.append(spread.square().sum(-1) * scale**2)
    logit = torch.cat(logits, 2)
    centre = clusters.means(logit.transpose(1, 2)[..., None])[..., 0]
    exponent = logit - centre.gather(2, clusters.labels) + torch.cat(second, 2) / 2
    weights: Tensor = (SHARE * exponent).clamp(-LIMIT, LIMIT).exp()
    return weights
