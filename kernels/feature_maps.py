"""Feature maps of linear attention: what stands for exp(q·k) as a product phi(q)·phi(k)."""

from __future__ import annotations

import torch
from torch import Tensor

from dsattn.block_plan import FeatureMap

# Added to the denominator of linear attention, as in the published code: no key at all then gives zero.
EPSILON = 1e-5


def feature_map(x: Tensor, name: FeatureMap) -> Tensor:
    """Non-negative features of queries or keys.

    ``softmax``: softmax over the head dimension. ``elu``: elu(x) + 1. ``relu``: max(x, 0). ``hedgehog``: softmax of
    x and -x side by side, twice as many features.

    Source: SLA (arXiv 2509.24006), Hedgehog (arXiv 2402.04347).
    Differs in: hedgehog has no learned weights, its linear map is the identity.

    Args:
        x: ``[..., D]``.
        name: which map.

    Returns:
        ``[..., D]``, or ``[..., 2 * D]`` for ``hedgehog``, in x's dtype.

    """
    if name == "softmax":
        return x.softmax(-1)
    if name == "elu":
        return torch.nn.functional.elu(x) + 1
    if name == "relu":
        return x.relu()
    return torch.cat([x, -x], -1).softmax(-1)
