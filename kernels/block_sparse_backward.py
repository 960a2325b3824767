"""Backward pass of block-sparse attention on the GPU, for plans of equal blocks without token order and tail.

Two kernels, both without atomics: dQ walks the key blocks of a query block as the forward pass does; dK and dV walk
the query blocks that read a key block (``BlockPlan.key_lists``). Weights are made anew from the log-sum-exp.
Formulas: see ``kernels.autograd``.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.errors import ImplUnavailableError
from dsattn.kernels.launch import LOG2E, Tiles, architecture, backend, matrix_unit, precision

# Lengths and strides of the plan change from call to call: compiling for their divisibility would gain nothing.
_UNSPECIALIZED = (
    "stride_cb", "stride_ch", "stride_ib", "stride_ih", "stride_ii",
    "q_len", "k_len", "heads", "block_q", "block_k",
)  # fmt: skip


@triton.jit
def _tile(X, positions, in_range, dims, stride_s, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows ``positions`` of one head's ``[S, D]`` matrix; zeros outside of it."""
    mask = in_range[:, None]
    if BLOCK_D != D:
        mask = mask & (dims < D)[None, :]
    return tl.load(X + positions.to(tl.int64)[:, None] * stride_s + dims[None, :] * stride_d, mask=mask, other=0.0)


@triton.jit
def _store(X, values, positions, in_range, dims, stride_s, D: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    mask = in_range[:, None]
    if BLOCK_D != D:
        mask = mask & (dims < D)[None, :]
    pointers = X + positions.to(tl.int64)[:, None] * stride_s + dims[None, :]
    tl.store(pointers, values.to(X.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _backward_q(  # type: ignore[no-untyped-def]
    Q, K, V, GradOut, Lse, Delta, GradQ, Counts, Indices, KeyLengths,
    stride_qb, stride_qs, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_ob, stride_os, stride_oh, stride_od,
    stride_gb, stride_gs, stride_gh,
    stride_cb, stride_ch, stride_ib, stride_ih, stride_ii,
    q_len, k_len, heads, block_q, block_k, scale, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES_Q: tl.constexpr, TILES_K: tl.constexpr,
    HAS_KEY_LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid ``(query tiles, heads, batch)``. Lse in base 2."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    block = tl.program_id(0) // TILES_Q
    start = block * block_q + (tl.program_id(0) % TILES_Q) * BLOCK_M
    end = tl.minimum((block + 1) * block_q, q_len)
    if start >= end:
        return
    rows = start + tl.arange(0, BLOCK_M)
    in_block = rows < end
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    q = _tile(Q + b * stride_qb + h * stride_qh, rows, in_block, dims, stride_qs, stride_qd, D, BLOCK_D)
    do = _tile(GradOut + b * stride_ob + h * stride_oh, rows, in_block, dims_v, stride_os, stride_od, DV, BLOCK_DV)
    per_row = (b * heads + h) * q_len + rows
    lse = tl.load(Lse + per_row, mask=in_block, other=float("inf"))
    delta = tl.load(Delta + per_row, mask=in_block, other=0.0)
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    Indices += b * stride_ib + h * stride_ih + block.to(tl.int64) * stride_ii
    count = tl.load(Counts + b * stride_cb + h * stride_ch + block)
    readable = k_len
    if HAS_KEY_LENGTHS:
        readable = tl.minimum(tl.load(KeyLengths + b), k_len)
    columns = tl.arange(0, BLOCK_N)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for t in range(count * TILES_K):
        j = tl.load(Indices + t // TILES_K).to(tl.int32)
        keys = j * block_k + (t % TILES_K) * BLOCK_N + columns
        in_range = keys < tl.minimum((j + 1) * block_k, readable)
        k = _tile(K, keys, in_range, dims, stride_ks, stride_kd, D, BLOCK_D)
        v = _tile(V, keys, in_range, dims_v, stride_vs, stride_vd, DV, BLOCK_DV)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = tl.where(in_range[None, :], p * (dp - delta[:, None]), 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    _store(GradQ + b * stride_gb + h * stride_gh, dq * scale, rows, in_block, dims, stride_gs, D, BLOCK_D)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _backward_kv(  # type: ignore[no-untyped-def]
    Q, K, V, GradOut, Lse, Delta, GradK, GradV, Counts, Indices, KeyLengths,
    stride_qb, stride_qs, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_ob, stride_os, stride_oh, stride_od,
    stride_gb, stride_gs, stride_gh,
    stride_wb, stride_ws, stride_wh,
    stride_cb, stride_ch, stride_ib, stride_ih, stride_ii,
    q_len, k_len, heads, block_q, block_k, scale, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES_Q: tl.constexpr, TILES_K: tl.constexpr,
    HAS_KEY_LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid ``(key tiles, heads, batch)``; the lists go from key blocks to query blocks. Lse in base 2."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    block = tl.program_id(0) // TILES_K
    start = block * block_k + (tl.program_id(0) % TILES_K) * BLOCK_N
    end = tl.minimum((block + 1) * block_k, k_len)
    if start >= end:
        return
    readable = end
    if HAS_KEY_LENGTHS:
        readable = tl.minimum(tl.load(KeyLengths + b), end)
    keys = start + tl.arange(0, BLOCK_N)
    in_range = keys < readable
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    k = _tile(K + b * stride_kb + h * stride_kh, keys, in_range, dims, stride_ks, stride_kd, D, BLOCK_D)
    v = _tile(V + b * stride_vb + h * stride_vh, keys, in_range, dims_v, stride_vs, stride_vd, DV, BLOCK_DV)
    Q += b * stride_qb + h * stride_qh
    GradOut += b * stride_ob + h * stride_oh
    Lse += (b * heads + h) * q_len
    Delta += (b * heads + h) * q_len
    Indices += b * stride_ib + h * stride_ih + block.to(tl.int64) * stride_ii
    count = tl.load(Counts + b * stride_cb + h * stride_ch + block)
    queries = tl.arange(0, BLOCK_M)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for t in range(count * TILES_Q):
        i = tl.load(Indices + t // TILES_Q).to(tl.int32)
        rows = i * block_q + (t % TILES_Q) * BLOCK_M + queries
        in_block = rows < tl.minimum((i + 1) * block_q, q_len)
        q = _tile(Q, rows, in_block, dims, stride_qs, stride_qd, D, BLOCK_D)
        do = _tile(GradOut, rows, in_block, dims_v, stride_os, stride_od, DV, BLOCK_DV)
        # Rows outside of the block have weight exp2(-inf) = 0; so have keys that may not be read, by the mask.
        lse = tl.load(Lse + rows, mask=in_block, other=float("inf"))
        delta = tl.load(Delta + rows, mask=in_block, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - lse[None, :])
        p = tl.where(in_range[:, None], p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    in_block = keys < end
    _store(GradK + b * stride_gb + h * stride_gh, dk * scale, keys, in_block, dims, stride_gs, D, BLOCK_D)
    _store(GradV + b * stride_wb + h * stride_wh, dv, keys, in_block, dims_v, stride_ws, DV, BLOCK_DV)


# Tiles without spills by kind of matrix unit and padded head_dim, for (dQ, dK and dV); scripts/aot_report.py shows
# what each needs. Tiles name queries first, keys second.
_HALF = {
    "mma": {64: (Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 2)), 128: (Tiles(64, 32, 4, 2), Tiles(32, 64, 8, 2))},
    "wgmma": {64: (Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)), 128: (Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 2))},
    "mfma": {64: (Tiles(64, 64, 4, 1), Tiles(32, 64, 4, 1)), 128: (Tiles(64, 32, 4, 1), Tiles(32, 64, 4, 1))},
}
_WIDE = {
    "mma": (Tiles(32, 16, 4, 1), Tiles(32, 32, 8, 1)),
    "wgmma": (Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)),
    "mfma": (Tiles(32, 16, 4, 1), Tiles(16, 32, 4, 1)),
}
_SINGLE = {
    64: (Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)),
    128: (Tiles(16, 16, 8, 1), Tiles(16, 16, 4, 1)),
    256: (Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
}
_INTERPRETER = (Tiles(64, 64, 1, 1),) * 2


def pick_tiles(block_q: int, block_k: int, head_dim: int, dtype: torch.dtype, arch: int | str) -> tuple[Tiles, Tiles]:
    """Tile shapes of dQ and of dK and dV; same arguments and refusals as ``kernels.launch.pick_tiles``."""
    if head_dim > 256:
        raise ImplUnavailableError(f"impl='triton' takes head_dim up to 256, got {head_dim}; pass impl='torch'")
    padded = max(64, triton.next_power_of_2(head_dim))
    if arch == "interpreter":
        pair = _INTERPRETER
    elif dtype == torch.float32:
        pair = _SINGLE[padded]
    else:
        pair = _HALF[matrix_unit(arch)].get(padded, _WIDE[matrix_unit(arch)])

    def fit(tiles: Tiles) -> Tiles:
        block_m = min(tiles.block_m, max(16, triton.next_power_of_2(block_q)))
        block_n = min(tiles.block_n, max(16, triton.next_power_of_2(block_k)))
        # Smaller tiles need fewer warps to hold them.
        warps = tiles.warps if (block_m, block_n) == tiles[:2] else min(tiles.warps, 4)
        return Tiles(block_m, block_n, warps, tiles.stages)

    return fit(pair[0]), fit(pair[1])


def gradients(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, d_out: Tensor, plan: BlockPlan, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; same contract as ``kernels.autograd.gradients``, for float16, bfloat16 and float32.

    ``plan.why_not_plain`` must be None.
    """
    dtypes = q.dtype, k.dtype, v.dtype
    if backend() == "interpreter" and q.dtype == torch.bfloat16:  # which the interpreter multiplies as integers
        q, k, v, d_out = q.float(), k.float(), v.float(), d_out.float()
    batch, q_len, heads, dim = q.shape
    k_len, dim_v = k.shape[1], v.shape[-1]
    d_out = d_out.to(q.dtype)
    lse, delta = (lse * LOG2E).contiguous(), delta.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    tiles_q, tiles_kv = pick_tiles(plan.block_q, plan.block_k, max(dim, dim_v), q.dtype, architecture(q.device))

    def lists(counts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        counts, indices = counts.contiguous(), indices.contiguous()
        return counts.expand(batch, heads, -1), indices.expand(batch, heads, -1, -1)

    def shape(tiles: Tiles) -> dict[str, object]:
        return {
            "D": dim, "DV": dim_v,
            "BLOCK_D": max(16, triton.next_power_of_2(dim)), "BLOCK_DV": max(16, triton.next_power_of_2(dim_v)),
            "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
            "TILES_Q": triton.cdiv(plan.block_q, tiles.block_m), "TILES_K": triton.cdiv(plan.block_k, tiles.block_n),
            "HAS_KEY_LENGTHS": plan.key_lengths is not None, "PRECISION": precision(q.dtype, backend()),
            "num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True,
        }  # fmt: skip

    inputs = (q, k, v, d_out, lse, delta)
    strides = tuple(stride for x in inputs[:4] for stride in x.stride())
    sizes = (q_len, k_len, heads, plan.block_q, plan.block_k, scale, scale * LOG2E)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        counts, indices = lists(plan.counts, plan.indices)
        _backward_q[(plan.num_q_blocks * triton.cdiv(plan.block_q, tiles_q.block_m), heads, batch)](
            *inputs, dq, counts, indices, plan.key_lengths, *strides, *dq.stride()[:3],
            *counts.stride()[:2], *indices.stride()[:3], *sizes, **shape(tiles_q),
        )  # fmt: skip
        counts, indices = lists(*plan.key_lists)
        _backward_kv[(plan.num_k_blocks * triton.cdiv(plan.block_k, tiles_kv.block_n), heads, batch)](
            *inputs, dk, dv, counts, indices, plan.key_lengths, *strides, *dk.stride()[:3], *dv.stride()[:3],
            *counts.stride()[:2], *indices.stride()[:3], *sizes, **shape(tiles_kv),
        )  # fmt: skip
    return dq.to(dtypes[0]), dk.to(dtypes[1]), dv.to(dtypes[2])
