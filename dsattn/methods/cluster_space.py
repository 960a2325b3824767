"""The space in which ``semantic`` clusters tokens: what makes two keys, or two queries, alike to attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsattn.kernels.kmeans import draw_tokens

Metric = Literal["euclidean", "query", "logit"]
METRICS: tuple[Metric, ...] = ("euclidean", "query", "logit")

# Tokens of the other side that stand for all in a metric.
METRIC_TOKENS = 4096
# Added to a metric, as a share of its mean eigenvalue: directions that the other side never takes keep a distance.
JITTER = 1e-4


@dataclass(frozen=True)
class ClusterSpace:
    """Linear map from tokens ``[B, S, H, D]`` (keys beside their values: ``D + Dv``) to the features k-means sees.

    The squared distance between two tokens is ``Δᵀ M Δ``, plus ``λ s² |Δv|²`` with values. M is the identity; or
    ``E[q qᵀ]`` for keys, which makes it the mean squared difference of their logits; or the covariance of the keys
    for queries: the same but for a shift of all logits of a row, which softmax does not see. ``s²`` is the variance
    of the keys under M over that of the values: at λ = 1 keys and values weigh the same.

    dim: D. root: ``[B, H, D, D]`` with ``root rootᵀ = M``, or None. value_factor: ``[B, H]``, ``√λ s``, or None.
    """

    dim: int
    root: Tensor | None = None
    value_factor: Tensor | None = None

    @classmethod
    def of_queries(cls, k: Tensor, metric: Metric, seed: int) -> ClusterSpace:
        """Space of the queries; k ``[B, S, H, D]``, the seed draws the keys that the metric is estimated on."""
        if metric != "logit":
            return cls(k.shape[-1])
        drawn = _draw(k, seed)
        return cls(k.shape[-1], _root(drawn - drawn.mean(1, keepdim=True)))

    @classmethod
    def of_keys(cls, q: Tensor, k: Tensor, v: Tensor, metric: Metric, values: float, seed: int) -> ClusterSpace:
        """Space of the keys; q, k, v ``[B, S, H, D]``, values is λ, at least 0; at 0 values are left out."""
        space = cls(k.shape[-1], None if metric == "euclidean" else _root(_draw(q, seed)))
        if values == 0:
            return space
        key_variance, value_variance = (x.float().var(1, correction=0).sum(-1) for x in (space(k), v))
        # Values that are all alike need no weight.
        ratio = torch.where(value_variance > 0, key_variance / value_variance, 0)
        return cls(space.dim, space.root, (values * ratio).sqrt())

    @property
    def changes(self) -> bool:
        """Whether features differ from tokens."""
        return self.root is not None or self.value_factor is not None

    def __call__(self, x: Tensor) -> Tensor:
        """Features of tokens x, of the same shape and dtype."""
        if not self.changes:
            return x
        keys, values = x[..., : self.dim].float(), x[..., self.dim :].float()
        if self.root is not None:
            keys = torch.einsum("bshd,bhde->bshe", keys, self.root)
        if self.value_factor is not None:
            values = values * self.value_factor[:, None, :, None]
        return torch.cat([keys, values], -1).to(x.dtype)


def _draw(x: Tensor, seed: int) -> Tensor:
    return x[:, draw_tokens(x.shape[1], METRIC_TOKENS, seed, x.device)].float()


def _root(x: Tensor) -> Tensor:
    """``[B, H, D, D]`` fp32: lower triangular root of ``E[x xᵀ]``; no host synchronisation, unlike eigenvectors."""
    moment = torch.einsum("bshd,bshe->bhde", x, x) / x.shape[1]
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    identity = torch.eye(x.shape[-1], device=x.device)
    # The second term keeps tokens that are all zero in bounds.
    root, failed = torch.linalg.cholesky_ex(moment + (JITTER * mean + 1e-20) * identity)
    return torch.where(failed[..., None, None] == 0, root, identity)
