"""Tail ``"pooled_block"`` on the GPU: what every query block skips, summed up as one key for all its rows.

It is flash attention of mean queries over pooled keys with the kept blocks masked, so that the scores of all block
pairs never lie in memory; `pooling.pool_tail` is the same in torch.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.kernels.pooling import pool_blocks, pool_queries

_UNSPECIALIZED = ("stride_mb", "stride_mh", "stride_mq", "q_blocks", "k_blocks", "heads")


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _block_tail(  # type: ignore[no-untyped-def]
    MeanQ, PooledK, PooledV, LogCount, Kept, TailValue, TailWeight,
    stride_mb, stride_mh, stride_mq,
    q_blocks, k_blocks, heads, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid ``(tiles of query blocks, heads, batch)``. ``scale`` includes log2(e); log-counts and weights are base 2."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < q_blocks
    own = (b * heads + h) * q_blocks + rows
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    q_mask = in_rows[:, None] & (dims < D)[None, :]
    q = tl.load(MeanQ + own[:, None] * D + dims[None, :], mask=q_mask, other=0.0)
    Kept += b * stride_mb + h * stride_mh + rows.to(tl.int64)[:, None] * stride_mq

    # The first peak is finite: a tile that is masked everywhere leaves zeros, never NaN.
    peak = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    pooled = (b * heads + h) * k_blocks
    for first_block in range(0, k_blocks, BLOCK_N):
        blocks = first_block + tl.arange(0, BLOCK_N)
        in_range = blocks < k_blocks
        kept = tl.load(Kept + blocks[None, :], mask=in_rows[:, None] & in_range[None, :], other=1)
        bias = tl.load(LogCount + pooled + blocks, mask=in_range, other=float("-inf"))
        pooled_rows = (pooled + blocks)[:, None]
        k_mask = in_range[:, None] & (dims < D)[None, :]
        v_mask = in_range[:, None] & (dims_v < DV)[None, :]
        k = tl.load(PooledK + pooled_rows * D + dims[None, :], mask=k_mask, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias[None, :]
        logits = tl.where((kept == 0) & (bias != float("-inf"))[None, :], logits, float("-inf"))
        v = tl.load(PooledV + pooled_rows * DV + dims_v[None, :], mask=v_mask, other=0.0)
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.exp2(logits - new_peak[:, None])
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        peak = new_peak

    nothing = total == 0
    value = acc / tl.where(nothing, 1.0, total)[:, None]
    weight = tl.where(nothing, float("-inf"), peak + tl.log2(total))
    tl.store(TailValue + own[:, None] * DV + dims_v[None, :], value, mask=in_rows[:, None] & (dims_v < DV)[None, :])
    tl.store(TailWeight + own, weight, mask=in_rows)


def block_tail(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale_log2: float,
    block_m: int,
    block_n: int,
    warps: int,
    stages: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """`pooling.pool_tail` with a weight in base 2.

    Args:
        q, k, v: ``[B, S, H, D]`` on a CUDA or ROCm device, any strides, of one dtype out of float16, bfloat16, float32.
        plan: its kept blocks are left out.
        scale_log2: factor on q·k, log2(e) included; positive.
        block_m, block_n: query blocks and key blocks of a tile.
        warps, stages, precision: how the kernel is compiled.

    Returns:
        ``value [B, H, Nq, Dv]`` and ``weight [B, H, Nq]`` fp32, the latter a logarithm of base 2.

    """
    batch, _, heads, dim = q.shape
    dim_v, q_blocks = v.shape[-1], plan.num_q_blocks
    mean_q = pool_queries(q, plan).to(q.dtype).contiguous()
    pooled_k, pooled_v, log_count = pool_blocks(k, v, plan)
    pooled_k, pooled_v = pooled_k.to(q.dtype).contiguous(), pooled_v.to(q.dtype).contiguous()
    log2_count = (log_count * 1.4426950408889634).contiguous()
    kept = plan.block_mask.view(torch.uint8).expand(batch, heads, -1, -1)
    value = torch.empty(batch, heads, q_blocks, dim_v, dtype=torch.float32, device=q.device)
    weight = torch.empty(batch, heads, q_blocks, dtype=torch.float32, device=q.device)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        _block_tail[(triton.cdiv(q_blocks, block_m), heads, batch)](
            mean_q, pooled_k, pooled_v, log2_count, kept, value, weight,
            *kept.stride()[:3],
            q_blocks, plan.num_k_blocks, heads, scale_log2,
            D=dim, DV=dim_v,
            BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_DV=max(16, triton.next_power_of_2(dim_v)),
            BLOCK_M=block_m, BLOCK_N=block_n, PRECISION=precision,
            num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
    return value, weight
