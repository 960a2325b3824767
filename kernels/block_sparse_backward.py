"""Backward pass of block-sparse attention on the GPU, for plans of equal blocks without token order and tail.

Two passes of one kernel, both without atomics: dQ walks the key blocks of a query block as the forward pass does; dK
and dV walk the query blocks that read a key block (``BlockPlan.key_lists``). Weights are made anew from the
log-sum-exp. Half precision is multiplied as such and accumulated in fp32. Formulas: see ``kernels.autograd``.
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
def _backward(  # type: ignore[no-untyped-def]
    Q, K, V, GradOut, Lse, Delta, GradQ, GradK, GradV, Counts, Indices, KeyLengths,
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
    OF_KEYS: tl.constexpr, HAS_KEY_LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid ``(tiles, heads, batch)`` of queries (GradQ), or OF_KEYS of keys (GradK, GradV). Lse in base 2.

    The lists go from the side that owns the tiles to the other one; strides g and w belong to the gradients written.
    Cost per kept tile of M queries and N keys: 3 products of ``2 M N D`` FLOPs for GradQ, 4 for GradK and GradV.
    """
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    Q += b * stride_qb + h * stride_qh
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    GradOut += b * stride_ob + h * stride_oh
    Lse += (b * heads + h) * q_len
    Delta += (b * heads + h) * q_len
    readable = k_len
    if HAS_KEY_LENGTHS:
        readable = tl.minimum(tl.load(KeyLengths + b), k_len)
    OWN_TILES: tl.constexpr = TILES_K if OF_KEYS else TILES_Q
    block = tl.program_id(0) // OWN_TILES
    part = tl.program_id(0) % OWN_TILES
    Indices += b * stride_ib + h * stride_ih + block.to(tl.int64) * stride_ii
    Counts += b * stride_cb + h * stride_ch + block

    if OF_KEYS:
        keys = block * block_k + part * BLOCK_N + tl.arange(0, BLOCK_N)
        end = tl.minimum((block + 1) * block_k, k_len)
        if block * block_k + part * BLOCK_N >= end:
            return
        in_range = keys < tl.minimum(end, readable)
        k = _tile(K, keys, in_range, dims, stride_ks, stride_kd, D, BLOCK_D)
        v = _tile(V, keys, in_range, dims_v, stride_vs, stride_vd, DV, BLOCK_DV)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
        for t in range(tl.load(Counts) * TILES_Q):
            i = tl.load(Indices + t // TILES_Q).to(tl.int32)
            rows = i * block_q + (t % TILES_Q) * BLOCK_M + tl.arange(0, BLOCK_M)
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
    else:
        rows = block * block_q + part * BLOCK_M + tl.arange(0, BLOCK_M)
        end = tl.minimum((block + 1) * block_q, q_len)
        if block * block_q + part * BLOCK_M >= end:
            return
        in_block = rows < end
        q = _tile(Q, rows, in_block, dims, stride_qs, stride_qd, D, BLOCK_D)
        do = _tile(GradOut, rows, in_block, dims_v, stride_os, stride_od, DV, BLOCK_DV)
        lse = tl.load(Lse + rows, mask=in_block, other=float("inf"))
        delta = tl.load(Delta + rows, mask=in_block, other=0.0)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for t in range(tl.load(Counts) * TILES_K):
            j = tl.load(Indices + t // TILES_K).to(tl.int32)
            keys = j * block_k + (t % TILES_K) * BLOCK_N + tl.arange(0, BLOCK_N)
            in_range = keys < tl.minimum((j + 1) * block_k, readable)
            k = _tile(K, keys, in_range, dims, stride_ks, stride_kd, D, BLOCK_D)
            v = _tile(V, keys, in_range, dims_v, stride_vs, stride_vd, DV, BLOCK_DV)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - lse[:, None])
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            ds = tl.where(in_range[None, :], p * (dp - delta[:, None]), 0.0)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        _store(GradQ + b * stride_gb + h * stride_gh, dq * scale, rows, in_block, dims, stride_gs, D, BLOCK_D)


# Rows of one program of `_row_sums`, and its warps.
BLOCK_R, WARPS = 32, 4


@triton.jit(do_not_specialize=("length", "heads"))
def _row_sums(  # type: ignore[no-untyped-def]
    Out, GradOut, GradLse, Delta,
    stride_ob, stride_os, stride_oh, stride_od,
    stride_gb, stride_gs, stride_gh, stride_gd,
    stride_lb, stride_lh, stride_ls,
    length, heads,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid ``(row tiles, heads, batch)``. Cost: reads ``2 B H S Dv`` elements, writes ``4 B H S`` bytes."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = rows < length
    dims = tl.arange(0, BLOCK_DV)
    out = _tile(Out + b * stride_ob + h * stride_oh, rows, exists, dims, stride_os, stride_od, DV, BLOCK_DV)
    grad = _tile(GradOut + b * stride_gb + h * stride_gh, rows, exists, dims, stride_gs, stride_gd, DV, BLOCK_DV)
    pointers = GradLse + b * stride_lb + h * stride_lh + rows.to(tl.int64) * stride_ls
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1) - tl.load(pointers, mask=exists, other=0.0)
    tl.store(Delta + (b * heads + h) * length + rows, delta, mask=exists)


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


def row_sums(out: Tensor, d_out: Tensor, d_lse: Tensor) -> Tensor:
    """Delta of ``kernels.autograd`` in one pass: ``rowsum(d_out * out) - d_lse``, ``[B, H, Sq]`` fp32.

    Args:
        out, d_out: ``[B, Sq, H, Dv]``, any strides.
        d_lse: ``[B, H, Sq]`` fp32, any strides.

    """
    batch, length, heads, dim_v = out.shape
    if backend() == "interpreter":  # which reads bfloat16 as integers
        out, d_out = out.float(), d_out.float()
    delta = torch.empty(batch, heads, length, dtype=torch.float32, device=out.device)
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        _row_sums[(triton.cdiv(length, BLOCK_R), heads, batch)](
            out, d_out, d_lse, delta, *out.stride(), *d_out.stride(), *d_lse.stride(), length, heads,
            DV=dim_v, BLOCK_DV=max(16, triton.next_power_of_2(dim_v)), BLOCK_R=BLOCK_R, num_warps=WARPS,
        )  # fmt: skip
    return delta


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
    inputs = (q, k, v, d_out, lse, delta)
    strides = tuple(stride for x in inputs[:4] for stride in x.stride())
    sizes = (q_len, k_len, heads, plan.block_q, plan.block_k, scale, scale * LOG2E)

    def run(of_keys: bool, lists: tuple[Tensor, Tensor], tiles: Tiles, *grads: Tensor | None) -> None:
        counts, indices = (x.contiguous().expand(batch, heads, *x.shape[2:]) for x in lists)
        tiles_q, tiles_k = triton.cdiv(plan.block_q, tiles.block_m), triton.cdiv(plan.block_k, tiles.block_n)
        written = [x for x in grads if x is not None]
        programs = plan.num_k_blocks * tiles_k if of_keys else plan.num_q_blocks * tiles_q
        _backward[(programs, heads, batch)](
            *inputs, *grads, counts, indices, plan.key_lengths, *strides,
            *written[0].stride()[:3], *written[-1].stride()[:3], *counts.stride()[:2], *indices.stride()[:3], *sizes,
            D=dim, DV=dim_v,
            BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_DV=max(16, triton.next_power_of_2(dim_v)),
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, TILES_Q=tiles_q, TILES_K=tiles_k,
            OF_KEYS=of_keys, HAS_KEY_LENGTHS=plan.key_lengths is not None, PRECISION=precision(q.dtype, backend()),
            num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True,
        )  # fmt: skip

    for_q, for_kv = pick_tiles(plan.block_q, plan.block_k, max(dim, dim_v), q.dtype, architecture(q.device))
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        run(False, (plan.counts, plan.indices), for_q, dq, None, None)
        run(True, plan.key_lists, for_kv, None, dk, dv)
    return dq.to(dtypes[0]), dk.to(dtypes[1]), dv.to(dtypes[2])
