"""The linear branch of sparse-linear attention: one sum over keys per block, matrix products otherwise.

Source: SLA (arXiv 2509.24006).
Differs in: the projection is applied to the sums, not to the result, which saves a product over all tokens; sums over
some of the blocks are added up directly instead of subtracted from the total, which would lose digits where little is
left.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsattn.block_plan import BlockPlan, LinearTail
from dsattn.kernels import autograd, reference
from dsattn.kernels.feature_maps import EPSILON, feature_map

# Numbers held at a time: heads are taken in groups that need no more.
LIMIT = 1 << 27


def add_linear(out: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, tail: LinearTail, *, impl: str) -> Tensor:
    """``out``, the result of a plan's softmax, plus the linear branch, in out's dtype.

    Args:
        out: ``[B, Sq, H, Dv]``; with ``impl="triton"`` it is overwritten where nothing asks for a gradient.
        q, k, v: ``[B, S, H, D]``.
        plan, tail: the plan and its ``linear``.
        impl: ``"reference"``, ``"triton"`` (a kernel over all keys, else as torch), any other name for torch.

    """
    if impl == "reference":
        return (out + reference.linear_attention(q, k, v, plan, tail)).to(out.dtype)
    recorded = autograd.needed(q, k, v, out, tail.weight, tail.bias)
    if impl == "triton" and not recorded and tail.blocks is None and tail.feature_map != "hedgehog":
        from dsattn.kernels import linear_attention as kernel

        return kernel.add_linear(out, q, k, v, plan, tail)
    return (out + linear_attention(q, k, v, plan, tail)).to(out.dtype)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, tail: LinearTail) -> Tensor:
    """Projected linear attention of a plan; same contract as ``kernels.reference.linear_attention``.

    Differentiable in q, k, v and the projection: products of tokens and ``[D, D]`` matrices both ways, for which matrix
    libraries are at their best, so no kernel of our own stands behind the backward pass. The work is ``S * D * D`` per
    head, and ``Nq * Nk * D * D`` more where the tail names its blocks.
    """
    features = q.shape[-1] * (2 if tail.feature_map == "hedgehog" else 1)
    per_head = (q.shape[1] + k.shape[1]) * (features + v.shape[-1])
    if tail.blocks is not None:
        per_head += (plan.num_q_blocks + plan.num_k_blocks) * features * v.shape[-1]
    step = max(1, LIMIT // (q.shape[0] * per_head))
    parts = []
    for first in range(0, plan.heads, step):
        heads = slice(first, first + step)
        blocks = tail.blocks
        if blocks is not None and blocks.shape[1] > 1:
            blocks = blocks[:, heads]
        call = partial(_some_heads, q[:, :, heads], k[:, :, heads], v[:, :, heads], plan, tail, blocks)
        # Features and sums are cheap to make anew, and in fp32 several times as large as q, k and v.
        recorded = autograd.needed(q, k, v, tail.weight, tail.bias)
        parts.append(checkpoint(call, use_reentrant=False, preserve_rng_state=False) if recorded else call())
    return torch.cat(parts, 2)


def _some_heads(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, tail: LinearTail, blocks: Tensor | None) -> Tensor:
    """``[B, Sq, h, Dv]`` of some heads; ``blocks`` is the tail's mask for them."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries, keys, values = (x.transpose(1, 2).to(work) for x in (q, k, v))
    if plan.key_lengths is not None:
        hidden = (torch.arange(plan.k_len, device=k.device) >= plan.key_lengths[:, None])[:, None, :, None]
        # Padding may hold anything, NaN included: it is replaced, not multiplied by zero.
        keys, values = keys.masked_fill(hidden, 0), values.masked_fill(hidden, 0)
    phi_q, phi_k = feature_map(queries, tail.feature_map), feature_map(keys, tail.feature_map)
    if plan.key_lengths is not None:
        phi_k = phi_k.masked_fill(hidden, 0)
    weight, bias = tail.weight.to(work), tail.bias.to(work)
    if blocks is None:
        state, norm = _sums(phi_k, values, weight)
        out = phi_q @ state / (EPSILON + phi_q @ norm) + bias
        return out.transpose(1, 2)

    phi_q, phi_k, values = (
        _split(x, size) for x, size in ((phi_q, plan.block_q), (phi_k, plan.block_k), (values, plan.block_k))
    )
    state, norm = _sums(phi_k, values, weight)
    # Every query block adds up the sums of its key blocks: one product with the mask.
    mask = blocks.to(work)
    state = (mask @ state.flatten(3)).unflatten(3, state.shape[3:])
    norm = (mask @ norm.flatten(3))[..., None]
    out = phi_q @ state / (EPSILON + phi_q @ norm) + bias
    return out.flatten(2, 3)[:, :, : plan.q_len].transpose(1, 2)


def _sums(phi_k: Tensor, values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Projected sums of ``phi(k) v.T``, ``[..., F, Dv]``, and sums of ``phi(k)``, ``[..., F, 1]``, over the tokens."""
    return phi_k.mT @ values @ weight.T, phi_k.sum(-2)[..., None]


def _split(x: Tensor, block: int) -> Tensor:
    """``[B, h, S, D]`` as ``[B, h, N, block, D]``, zeros behind the end."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))
