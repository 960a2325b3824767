"""The specification of quantised block-sparse attention: what its kernel computes, in plain torch, on any device.

It emulates the arithmetic exactly (INT8 products and their sums are exact in fp32 and in INT32 alike), so that its
error can be measured on any machine. It computes every pair (query, key), so it is no faster than dense attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.kernels.pooling import pool_blocks, pool_tail
from dsattn.kernels.quantize import FP8_MAX, Quantized, quantize, restore, round_fp8, round_int8

# Logits held at a time.
LOGITS = 1 << 24


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float,
    int8_qk: bool,
    fp8_pv: bool,
    quantized: Quantized | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the kept blocks with quantised products, plus the plan's tail in full precision.

    With m the mean key: ``q·k = q·(k - m) + q·m``. The softmax does not see the second term, which is the same for all
    keys of a row; the log-sum-exp does, so it is added there, and taken from the logits of the tail. Weights in FP8 are
    ``exp(s - peak) * 448`` with the row's largest logit (a kernel: its largest so far); the denominator is theirs
    before they are rounded.

    Args:
        q, k, v: ``[B, S, H, D]``.
        plan: pattern, as in `reference`.
        scale: factor on q·k before the softmax.
        int8_qk: q (a scale per query) and k less its mean (a scale per tile) in INT8.
        fp8_pv: softmax weights (times 448) and v (a scale per channel) in e4m3.
        quantized: keys and values that are already quantised.

    Returns:
        As `reference`: ``out [B, Sq, H, Dv]`` in q's dtype, ``lse [B, H, Sq]`` in fp32 (fp64).

    """
    if quantized is None:
        quantized = quantize(k, v, plan, int8_qk=int8_qk, fp8_pv=fp8_pv)
    keys, values = restore(quantized, k, v, plan)
    exact_q = q.transpose(1, 2).to(keys.dtype)
    queries, shift = exact_q, exact_q.new_zeros(exact_q.shape[:3])
    if quantized.k_mean is not None:
        whole, step = round_int8(exact_q, -1)
        queries = whole.to(keys.dtype) * step
        shift = (exact_q * quantized.k_mean[:, :, None]).sum(-1) * scale
    tail = None if plan.tail == "none" else _Tail(q, k, v, plan, scale)
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(*shift.shape, dtype=keys.dtype, device=q.device)
    rows_at_once = max(1, LOGITS // (plan.batch * plan.heads * plan.k_len))
    for rows in torch.arange(plan.q_len, device=q.device).split(rows_at_once):
        logits = queries[:, :, rows] @ keys.mT * scale
        logits = logits.masked_fill(~plan.rows_to_dense(rows), -torch.inf)
        # Finite, so that a row that reads no key has weights of zero, not NaN.
        peak = logits.amax(-1, keepdim=True).clamp(min=-1e30)
        weights = (logits - peak).exp()
        total = weights.sum(-1, keepdim=True)
        weights = round_fp8(weights * FP8_MAX).to(keys.dtype) / FP8_MAX if fp8_pv else weights.to(q.dtype)
        found = weights.to(keys.dtype) @ values
        if tail is not None:
            tail_logits = tail.logits(rows) - shift[:, :, rows, None]
            new_peak = torch.maximum(peak, tail_logits.amax(-1, keepdim=True))
            decay, weights = (peak - new_peak).exp(), (tail_logits - new_peak).exp()
            found, total = found * decay + weights @ tail.values, total * decay + weights.sum(-1, keepdim=True)
            peak = new_peak
        nothing = total == 0
        out[:, rows] = (found / total.masked_fill(nothing, 1)).transpose(1, 2).to(q.dtype)
        lse[:, :, rows] = (peak + total.log()).masked_fill(nothing, -torch.inf)[..., 0] + shift[:, :, rows]
    return out, lse


class _Tail:
    """A plan's tail as more keys, in full precision: values ``[B, H, T, Dv]`` and the logits of some rows."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> None:
        self.plan, self.scale = plan, scale
        if plan.tail == "pooled":
            self.queries = q.transpose(1, 2)
            self.keys, self.values, self.bias = pool_blocks(k, v, plan)
        else:
            self.values, self.bias = pool_tail(q, k, v, plan, scale)

    def logits(self, rows: Tensor) -> Tensor:
        """``[B, H, R, T]``; T are key blocks, or query blocks of which a row reads its own."""
        if self.plan.tail == "pooled":
            logits = self.queries[:, :, rows].to(self.keys.dtype) @ self.keys.mT * self.scale + self.bias[:, :, None]
            return logits.masked_fill(self.plan.kept_blocks(rows), -torch.inf)
        block = self.plan.q_block_of_token.expand(self.plan.batch, self.plan.heads, -1)[..., rows, None]
        own = block == torch.arange(self.plan.num_q_blocks, device=rows.device)
        return self.bias[:, :, None].expand(own.shape).masked_fill(~own, -torch.inf)
