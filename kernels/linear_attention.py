"""Linear attention over all keys on the GPU: features never reach memory, the result is added where it belongs.

One kernel sums ``phi(k) v.T`` and ``phi(k)`` over slices of the sequence, the slices are added up and projected, and a
second kernel adds ``phi(q) H / (EPSILON + phi(q) Z) + bias`` to the result of the softmax. Forward only.
Products take fp32 operands: TF32 for half-precision inputs, close to IEEE for fp32.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsattn.block_plan import BlockPlan, LinearTail
from dsattn.kernels.feature_maps import EPSILON
from dsattn.kernels.launch import Tiles, backend

# Slices of the sequence that are summed apart, at most, and their shortest length.
SLICES, SLICE_LENGTH = 16, 1024


@triton.jit
def _features(x, dims, D: tl.constexpr, FEATURE_MAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Feature map of the rows of x ``[N, BLOCK_D]`` fp32; zeros behind D."""
    if FEATURE_MAP == "softmax":
        x = tl.where((dims < D)[None, :], x, float("-inf"))
        x = tl.exp(x - tl.max(x, 1)[:, None])
        return x / tl.sum(x, 1)[:, None]
    if FEATURE_MAP == "elu":
        x = tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))
        return tl.where((dims < D)[None, :], x, 0.0)
    return tl.maximum(x, 0.0)


@triton.jit(do_not_specialize=("k_len", "heads", "slices", "length"))
def _sum_keys(  # type: ignore[no-untyped-def]
    K, V, State, Norm, KeyLengths,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    k_len, heads, slices, length,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
    FEATURE_MAP: tl.constexpr, HAS_KEY_LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid ``(slices * value columns / BLOCK_C, heads, batch)``; State ``[B, H, slices, D, DV]``, Norm ``[.., D]``."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    part = tl.program_id(0) % slices
    chunk = tl.program_id(0) // slices
    dims = tl.arange(0, BLOCK_D)
    dims_v = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    end = tl.minimum((part + 1) * length, k_len)
    if HAS_KEY_LENGTHS:
        end = tl.minimum(end, tl.load(KeyLengths + b))
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    state = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    norm = tl.zeros([BLOCK_D], tl.float32)
    for first in range(part * length, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        exists = tokens < end
        rows = tokens.to(tl.int64)[:, None]
        k_mask = exists[:, None] & (dims < D)[None, :]
        k = tl.load(K + rows * stride_ks + dims[None, :] * stride_kd, mask=k_mask, other=0.0).to(tl.float32)
        v_mask = exists[:, None] & (dims_v < DV)[None, :]
        v = tl.load(V + rows * stride_vs + dims_v[None, :] * stride_vd, mask=v_mask, other=0.0).to(tl.float32)
        phi = tl.where(exists[:, None], _features(k, dims, D, FEATURE_MAP), 0.0)
        state = tl.dot(tl.trans(phi), v, state, input_precision=PRECISION)
        norm += tl.sum(phi, 0)
    slot = (b * heads + h) * slices + part
    state_mask = (dims < D)[:, None] & (dims_v < DV)[None, :]
    tl.store(State + slot * (D * DV) + dims[:, None] * DV + dims_v[None, :], state, mask=state_mask)
    if chunk == 0:
        tl.store(Norm + slot * D + dims, norm, mask=dims < D)


@triton.jit(do_not_specialize=("q_len", "heads", "epsilon"))
def _add_queries(  # type: ignore[no-untyped-def]
    Q, Out, State, Norm, Bias,
    stride_qb, stride_qs, stride_qh, stride_qd,
    stride_ob, stride_os, stride_oh,
    q_len, heads, epsilon,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
    FEATURE_MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid ``(query tiles, heads, batch)``; State ``[B, H, D, DV]``, Norm ``[B, H, D]``, Bias ``[DV]``, all fp32."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = tokens < q_len
    rows = tokens.to(tl.int64)[:, None]
    dims = tl.arange(0, BLOCK_D)
    q_mask = exists[:, None] & (dims < D)[None, :]
    Q += b * stride_qb + h * stride_qh
    q = tl.load(Q + rows * stride_qs + dims[None, :] * stride_qd, mask=q_mask, other=0.0).to(tl.float32)
    phi = _features(q, dims, D, FEATURE_MAP)
    norm = tl.load(Norm + (b * heads + h) * D + dims, mask=dims < D, other=0.0)
    total = tl.sum(phi * norm[None, :], 1) + epsilon
    State += (b * heads + h) * (D * DV)
    Out += b * stride_ob + h * stride_oh
    for first in range(0, DV, BLOCK_C):
        dims_v = first + tl.arange(0, BLOCK_C)
        state_mask = (dims < D)[:, None] & (dims_v < DV)[None, :]
        state = tl.load(State + dims[:, None] * DV + dims_v[None, :], mask=state_mask, other=0.0)
        linear = tl.dot(phi, state, input_precision=PRECISION) / total[:, None]
        linear += tl.load(Bias + dims_v, mask=dims_v < DV, other=0.0)[None, :]
        mask = exists[:, None] & (dims_v < DV)[None, :]
        pointers = Out + rows * stride_os + dims_v[None, :]
        softmax = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        tl.store(pointers, (softmax + linear).to(Out.dtype.element_ty), mask=mask)


def pick_tiles(head_dim: int, dtype: torch.dtype) -> tuple[Tiles, Tiles]:
    """Tiles of the two kernels: (value columns, keys) and (queries, value columns) at a time.

    Args:
        head_dim: the larger of D and Dv, at most 256.
        dtype: of q, k, v; fp32 needs registers for three products instead of one.

    """
    padded = max(16, triton.next_power_of_2(head_dim))
    warps = 4 if padded <= 64 else 8
    queries = 64 if padded <= 128 else 32
    columns = 16 if dtype == torch.float32 and padded > 64 else 32
    keys = Tiles(min(padded, 64), 32, warps, 2)
    if dtype == torch.float32 and padded > 128:
        keys = Tiles(32, 16, warps, 1)
    return keys, Tiles(queries, min(padded, columns), warps, 1)


def add_linear(out: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, tail: LinearTail) -> Tensor:
    """``out`` plus projected linear attention over all keys, in place where the hardware can.

    Same contract as ``kernels.reference.linear_attention`` otherwise.

    Args:
        out: ``[B, Sq, H, Dv]``, last dimension contiguous.
        q, k, v: ``[B, S, H, D]``, any strides, on one GPU.
        plan: says which keys may be read.
        tail: with ``blocks=None`` and any feature map but ``hedgehog``.

    """
    if backend() == "interpreter" and q.dtype == torch.bfloat16:  # which the interpreter does not round
        return add_linear(out.float(), q.float(), k.float(), v.float(), plan, tail).to(out.dtype)
    batch, k_len, heads, dim = k.shape
    dim_v = v.shape[-1]
    for_sums, for_queries = pick_tiles(max(dim, dim_v), q.dtype)
    slices = min(SLICES, triton.cdiv(k_len, SLICE_LENGTH))
    length = triton.cdiv(k_len, slices)
    state = torch.empty(batch, heads, slices, dim, dim_v, dtype=torch.float32, device=q.device)
    norm = torch.empty(batch, heads, slices, dim, dtype=torch.float32, device=q.device)
    options = {
        "D": dim, "DV": dim_v, "BLOCK_D": max(16, triton.next_power_of_2(dim)), "FEATURE_MAP": tail.feature_map,
        "PRECISION": precision(q.dtype, backend()), "enable_fp_fusion": True,
    }  # fmt: skip
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        _sum_keys[(slices * triton.cdiv(dim_v, for_sums.block_m), heads, batch)](
            k, v, state, norm, plan.key_lengths, *k.stride(), *v.stride(), k_len, heads, slices, length,
            BLOCK_C=for_sums.block_m, BLOCK_N=for_sums.block_n, HAS_KEY_LENGTHS=plan.key_lengths is not None,
            num_warps=for_sums.warps, num_stages=for_sums.stages, **options,
        )  # fmt: skip
        state = (state.sum(2) @ tail.weight.float().T).contiguous()
        norm = norm.sum(2)
        _add_queries[(triton.cdiv(q.shape[1], for_queries.block_m), heads, batch)](
            q, out, state, norm, tail.bias.float(), *q.stride(), *out.stride()[:3], q.shape[1], heads, EPSILON,
            BLOCK_M=for_queries.block_m, BLOCK_C=for_queries.block_n,
            num_warps=for_queries.warps, num_stages=for_queries.stages, **options,
        )  # fmt: skip
    return out


def precision(dtype: torch.dtype, backend: str) -> str:
    """How fp32 operands are multiplied: TF32 holds as many digits as half precision has."""
    if backend != "cuda":
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"
