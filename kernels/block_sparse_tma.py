"""Block-sparse attention for Hopper and datacenter Blackwell: tiles come by TMA, warps have roles of their own.

The same softmax as in `block_sparse_kernel`, for the plans that allow it: blocks of equal size, cut into whole tiles.
A token order is applied to q, k and v beforehand, and undone on the result, so that every tile is one box of a
tensor. Descriptors are made on the device: they end at the last readable key of their batch row, and what lies
behind it arrives as zeros, whatever it holds.
Source: FlashAttention-3 (arXiv 2407.08608), producer and consumer warps.
Differs in: which warp does what is left to Triton's ``warp_specialize``.
"""

from __future__ import annotations

import contextvars
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.kernels.block_sparse_kernel import _absorb
from dsattn.kernels.launch import LOG2E, Specialized, Tiles, backend
from dsattn.kernels.permute import permute
from dsattn.kernels.pooling import pool_blocks
from dsattn.kernels.program_order import order_of_blocks

_UNSPECIALIZED = (
    "stride_cb", "stride_ch", "stride_ib", "stride_ih", "stride_ii",
    "stride_mb", "stride_mh", "stride_mq", "q_len", "k_len", "q_blocks", "k_blocks", "heads", "block_q", "block_k",
)  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _forward_tma(  # type: ignore[no-untyped-def]
    Q, K, V, Out, Lse, Counts, Indices, ProgramOrder, KeyLengths, TailValue, TailWeight, LogCount, Kept,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh,
    stride_cb, stride_ch, stride_ib, stride_ih, stride_ii, stride_mb, stride_mh, stride_mq,
    q_len, k_len, q_blocks, k_blocks, heads, block_q, block_k, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES_Q: tl.constexpr, TILES_K: tl.constexpr,
    HAS_KEY_LENGTHS: tl.constexpr, HAS_BLOCK_TAIL: tl.constexpr, HAS_TAIL: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Grid: one program per tile of every query block in ``ProgramOrder``; ``scale`` includes log2(e).

    With ``HAS_TAIL``, the pooled keys of all blocks stand behind the ``k_len`` keys of a head, and nothing but zeros
    behind the readable ones; ``LogCount`` holds logarithms in units of logits.
    """
    row = tl.load(ProgramOrder + tl.program_id(0) // TILES_Q)
    block = row % q_blocks
    h = (row // q_blocks % heads).to(tl.int64)
    b = (row // q_blocks // heads).to(tl.int64)
    start = block * block_q + (tl.program_id(0) % TILES_Q) * BLOCK_M
    readable = k_len
    if HAS_KEY_LENGTHS:
        readable = tl.minimum(tl.load(KeyLengths + b), k_len)

    end = readable
    if HAS_TAIL:
        end = k_len + k_blocks
    queries = tl.make_tensor_descriptor(
        Q + b * stride_qb + h * stride_qh, shape=[q_len, D], strides=[stride_qs, 1], block_shape=[BLOCK_M, BLOCK_D]
    )
    keys = tl.make_tensor_descriptor(
        K + b * stride_kb + h * stride_kh, shape=[end, D], strides=[stride_ks, 1], block_shape=[BLOCK_N, BLOCK_D]
    )
    values = tl.make_tensor_descriptor(
        V + b * stride_vb + h * stride_vh, shape=[end, DV], strides=[stride_vs, 1], block_shape=[BLOCK_N, BLOCK_DV]
    )
    results = tl.make_tensor_descriptor(
        Out + b * stride_ob + h * stride_oh, shape=[q_len, DV], strides=[stride_os, 1], block_shape=[BLOCK_M, BLOCK_DV]
    )

    q = queries.load([start, 0])
    peak = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    Indices += b * stride_ib + h * stride_ih + block.to(tl.int64) * stride_ii
    count = tl.load(Counts + b * stride_cb + h * stride_ch + block)
    # The last block may have fewer tiles. A return here would keep the compiler from giving warps roles.
    count = tl.where(start < q_len, count, 0)
    columns = tl.arange(0, BLOCK_N)
    exact = count * TILES_K
    tiles = exact
    if HAS_TAIL:
        tiles += tl.where(start < q_len, tl.cdiv(k_blocks, BLOCK_N), 0)
        LogCount += (b * heads + h) * k_blocks
        Kept += b * stride_mb + h * stride_mh + block.to(tl.int64) * stride_mq
    # One loop for kept blocks and tail: with two, the compiler gives no roles.
    for t in tl.range(0, tiles, warp_specialize=SPECIALIZE):
        item = t // TILES_K
        if HAS_TAIL:
            item = tl.minimum(item, tl.maximum(count - 1, 0))
        j = tl.load(Indices + item).to(tl.int32)
        k_start = j * block_k + (t % TILES_K) * BLOCK_N
        k_end = readable
        if HAS_TAIL:
            first = (t - exact) * BLOCK_N
            is_tail = first >= 0
            k_start = tl.where(is_tail, k_len + first, k_start)
            k_end = tl.where(is_tail, end, readable)
        k = keys.load([k_start, 0])
        logits = tl.dot(q, k.T)
        in_range = columns < k_end - k_start
        if HAS_TAIL:
            pooled = in_range & (first + columns >= 0)
            kept = tl.load(Kept + first + columns, mask=pooled, other=0)
            bias = tl.load(LogCount + first + columns, mask=pooled, other=0.0)
            bias = tl.where(in_range & (kept == 0), bias, float("-inf"))
            logits = logits + bias[None, :]
        else:
            logits = tl.where(in_range[None, :], logits, float("-inf"))
        v = values.load([k_start, 0])
        peak, total, acc = _absorb(logits, scale, v, peak, total, acc, "ieee")

    # One key for what the block skips, as in `block_sparse_kernel`.
    if HAS_BLOCK_TAIL:
        own = (b * heads + h) * q_blocks + block
        weight = tl.load(TailWeight + own)
        dims = tl.arange(0, BLOCK_DV)
        value = tl.load(TailValue + own * DV + dims, mask=dims < DV, other=0.0)
        new_peak = tl.maximum(peak, weight)
        decay = tl.exp2(peak - new_peak)
        share = tl.exp2(weight - new_peak)
        total = total * decay + share
        acc = acc * decay[:, None] + share[:, None] * value[None, :]
        peak = new_peak

    nothing = total == 0
    out = acc / tl.where(nothing, 1.0, total)[:, None]
    lse = tl.where(nothing, float("-inf"), (peak + tl.log2(total)) * 0.6931471805599453)
    results.store([start, 0], out.to(Out.dtype.element_ty))
    rows = start + tl.arange(0, BLOCK_M)
    tl.store(Lse + (b * heads + h) * q_len + rows, lse, mask=rows < q_len)


def why_not(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, tiles: Tiles) -> str | None:
    """What keeps a plan or its tensors from this kernel, or None."""
    if plan.q_starts is not None or plan.k_starts is not None:
        return "blocks of variable size"
    if plan.block_q % tiles.block_m or plan.block_k % tiles.block_n:
        return f"blocks of {plan.block_q} x {plan.block_k}, which are no whole tiles"
    copied = plan.k_order is not None or plan.tail == "pooled"
    for name, x, copy in zip("qkv", (q, k, v), (plan.q_order is not None, copied, copied), strict=True):
        if not _is_aligned(x, copy):
            return f"rows of {name} that are not aligned to 16 bytes"
    return None


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float,
    how: Specialized,
    tail: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as ``block_sparse.block_sparse_attention`` for plans that `why_not` lets pass.

    Args:
        q, k, v: ``[B, S, H, D]`` of one dtype out of float16, bfloat16 (the interpreter takes float32, too).
        plan: blocks of equal size, whole tiles.
        scale: factor on q·k before the softmax, positive.
        how: from ``launch.pick_specialized``.
        tail: what ``block_tail`` made for a plan with ``tail="pooled_block"``.

    """
    tiles = how.tiles
    batch, q_len, heads, dim = q.shape
    dim_v, lead = v.shape[-1], (batch, heads)
    k_len = k.shape[1]
    log_count = kept = None
    if plan.tail == "pooled":
        k, v, log_count = _with_pooled(k, v, plan)
        log_count = (log_count / scale).contiguous()
        kept = plan.block_mask.view(torch.uint8).expand(*lead, -1, -1)
    else:
        k, v = permute(k, plan.k_order), permute(v, plan.k_order)
    q = permute(q, plan.q_order)
    counts, indices = plan.counts.expand(*lead, -1), plan.indices.expand(*lead, -1, -1)
    order = order_of_blocks(plan)
    out = torch.empty(batch, q_len, heads, dim_v, dtype=q.dtype, device=q.device)
    if not _is_aligned(out):  # a head_dim that fills no 16 bytes
        out = torch.empty(batch, q_len, heads, -(-dim_v // 8) * 8, dtype=q.dtype, device=q.device)[..., :dim_v]
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    tail_value, tail_weight = (None, None) if tail is None else tail
    tiles_q = plan.block_q // tiles.block_m

    def launch() -> None:
        # In a context of its own: whoever else sets an allocator keeps theirs.
        triton.set_allocator(_allocate)
        _forward_tma[(plan.num_q_blocks * tiles_q * heads * batch,)](
            q, k, v, out, lse, counts, indices, order, plan.key_lengths, tail_value, tail_weight, log_count, kept,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            *counts.stride()[:2], *indices.stride()[:3], *((0, 0, 0) if kept is None else kept.stride()[:3]),
            q_len, k_len, plan.num_q_blocks, plan.num_k_blocks, heads, plan.block_q, plan.block_k, scale * LOG2E,
            D=dim, DV=dim_v,
            BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_DV=max(16, triton.next_power_of_2(dim_v)),
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, TILES_Q=tiles_q, TILES_K=plan.block_k // tiles.block_n,
            HAS_KEY_LENGTHS=plan.key_lengths is not None, HAS_BLOCK_TAIL=tail is not None,
            HAS_TAIL=kept is not None, SPECIALIZE=how.roles,
            num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True,
        )  # fmt: skip

    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        contextvars.copy_context().run(launch)
    if plan.q_order is None:
        return out, lse
    out = permute(out, plan.q_order, back=True)
    # Element [b, h, p] belongs to token order[b, h, p].
    return out, torch.empty_like(lse).scatter_(-1, plan.q_order.expand(*lead, -1), lse)


def _with_pooled(k: Tensor, v: Tensor, plan: BlockPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values in the plan's order with the pooled ones of all blocks behind them, and log-counts.

    Returns:
        k and v as ``[B, S + Nk, H, D]``, contiguous per head, zeros behind the key lengths; ``[B, H, Nk]`` fp32.

    """
    pooled_k, pooled_v, log_count = pool_blocks(k, v, plan)
    both = []
    for x, pooled in ((k, pooled_k), (v, pooled_v)):
        batch, length, heads, dim = x.shape
        y = torch.empty(batch, heads, length + plan.num_k_blocks, dim, dtype=x.dtype, device=x.device)
        y[:, :, :length] = permute(x, plan.k_order).transpose(1, 2)
        if plan.key_lengths is not None:
            behind = torch.arange(length, device=x.device) >= plan.key_lengths[:, None]
            y[:, :, :length].masked_fill_(behind[:, None, :, None], 0)
        y[:, :, length:] = pooled
        both.append(y.transpose(1, 2))
    return both[0], both[1], log_count


def _is_aligned(x: Tensor, copied: bool = False) -> bool:
    """Whether TMA can read x as it is, or a contiguous copy."""
    if copied:
        return x.shape[-1] * x.element_size() % 16 == 0
    strides = all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
    return strides and x.stride(3) == 1 and x.data_ptr() % 16 == 0


def _allocate(size: int, alignment: int, stream: Any) -> Tensor:
    """Memory for the descriptors of one launch; the caching allocator keeps it for this stream."""
    device = "cpu" if backend() == "interpreter" else torch.device("cuda", torch.cuda.current_device())
    return torch.empty(size, dtype=torch.int8, device=device)
