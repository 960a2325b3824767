"""Block-sparse attention with a backward pass that keeps nothing but q, k, v, the result and its log-sum-exp.

Source: FlashAttention-2 (arXiv 2307.08691), restricted to the kept blocks as in SLA (arXiv 2509.24006).
With P = exp(S - lse), D = rowsum(dO * O) - dlse and dP = dO V.T: dS = P * (dP - D), dQ = scale * dS K,
dK = scale * dS.T Q, dV = P.T dO. Which blocks are kept is not differentiated.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsattn.block_plan import BlockPlan
from dsattn.errors import ImplUnavailableError
from dsattn.kernels import gather


def needed(*tensors: Tensor) -> bool:
    """Whether autograd records, and one of the tensors asks for a gradient."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    """Same contract as ``kernels.reference.block_sparse_attention``, differentiable once in q, k and v.

    Args:
        q, k, v: ``[B, S, H, D]``.
        plan: a plan without tail; with ``impl="triton"`` also of equal blocks and without token order.
        scale: factor on q·k before the softmax.
        impl: ``"triton"`` or ``"torch"``, for both passes.

    Raises:
        ImplUnavailableError: the plan is none of these.

    """
    if reason := plan.why_not_plain if impl == "triton" or plan.tail != "none" else None:
        raise ImplUnavailableError(f"impl={impl!r} has no backward pass for {reason}; use torch.no_grad()")
    out, lse = _Attention.apply(q, k, v, plan, scale, impl)
    return out, lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, impl: str
    ) -> tuple[Tensor, Tensor]:
        if impl == "triton":
            from dsattn.kernels import block_sparse

            out, lse = block_sparse.block_sparse_attention(q, k, v, plan, scale=scale)
        else:
            out, found = gather.block_sparse_attention(q, k, v, plan, scale=scale, need_lse=True)
            lse = cast(Tensor, found)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale, ctx.impl = plan, scale, impl
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        # A row that read nothing has lse = -inf: exp(S - inf) gives zero weights instead of NaN.
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        if ctx.impl == "triton":
            from dsattn.kernels import block_sparse_backward

            delta = block_sparse_backward.row_sums(out, d_out, d_lse)
            grads = block_sparse_backward.gradients(q, k, v, lse, delta, d_out, ctx.plan, scale=ctx.scale)
        else:
            delta = (d_out.to(lse.dtype) * out).sum(-1).transpose(1, 2) - d_lse
            grads = gradients(q, k, v, lse, delta, d_out, ctx.plan, scale=ctx.scale)
        return *grads, None, None, None


def gradients(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, d_out: Tensor, plan: BlockPlan, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v with nothing but torch, on any device, chunk by chunk like ``kernels.gather``.

    Args:
        q, k, v: ``[B, S, H, D]``; half precision is computed in fp32.
        lse, delta: ``[B, H, Sq]``, see the module; lse is inf where a row reads nothing.
        d_out: ``[B, Sq, H, Dv]``.
        plan: without tail.
        scale: factor on q·k.

    """
    work = lse.dtype
    q_rows, k_rows, v_rows, o_rows = (x.reshape(-1, x.shape[-1]) for x in (q, k, v, d_out))
    lse_rows, delta_rows = (x.transpose(1, 2).reshape(-1, 1) for x in (lse, delta))
    dq, dk, dv = (torch.zeros(x.shape, dtype=work, device=x.device) for x in (q_rows, k_rows, v_rows))
    limit = gather.CHUNK_ELEMENTS.get(q.device.type, gather.CHUNK_ELEMENTS["other"])
    for chunk in gather._Rows(plan).chunks(q.shape[-1], limit):
        qc, oc, lse_c, delta_c = (x[chunk.queries].to(work) for x in (q_rows, o_rows, lse_rows, delta_rows))
        kc, vc = (x[chunk.keys].to(work) for x in (k_rows, v_rows))
        used = chunk.query_exists[:, :, None] & chunk.key_exists[:, None]
        p = ((qc @ kc.mT) * scale - lse_c).masked_fill(~used, -torch.inf).exp()
        ds = p * (oc @ vc.mT - delta_c) * scale
        dq.index_add_(0, chunk.queries.flatten(), (ds @ kc).flatten(0, 1))
        dk.index_add_(0, chunk.keys.flatten(), (ds.mT @ qc).flatten(0, 1))
        dv.index_add_(0, chunk.keys.flatten(), (p.mT @ oc).flatten(0, 1))
    return dq.view(q.shape).to(q.dtype), dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype)
