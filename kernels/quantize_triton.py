"""Keys to INT8 and values to FP8 on the GPU: one pass for the statistics of both, one that writes them.

The specification is the torch code in ``kernels.quantize``. Both passes are bound by memory: they read k and v once
each and write half (bf16) of what they read in the second.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.kernels.launch import backend
from dsattn.kernels.quantize import FP8_MAX, TINY, KeyTiles, Quantized

# Positions that one program of the first pass takes in, and how many of them side by side.
CHUNK, BLOCK_S = 512, 32


@triton.jit
def to_int8(x):  # type: ignore[no-untyped-def]
    """Nearest integer of x in [-127, 127], ties away from zero."""
    return (x + tl.where(x >= 0, 0.5, -0.5)).to(tl.int8)


@triton.jit
def to_fp8(x, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Nearest e4m3 of x in [-448, 448], ties to even."""
    if INTERPRETED:
        # The interpreter's conversion does not round: this leaves it numbers that e4m3 has.
        step = tl.exp2(tl.maximum(tl.floor(tl.log2(tl.maximum(tl.abs(x), 1e-30))), -6.0) - 3.0)
        x = (x + step * 12582912.0) - step * 12582912.0
    return x.to(tl.float8e4nv)


@triton.jit
def _load(  # type: ignore[no-untyped-def]
    X, Order, positions, in_range, dims, stride_s, stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """Rows of one head's ``[S, D]`` matrix at some positions, fp32; zeros outside of it."""
    tokens = positions
    if HAS_ORDER:
        tokens = tl.load(Order + positions, mask=in_range, other=0)
    mask = in_range[:, None]
    if BLOCK_D != D:
        mask = mask & (dims < D)[None, :]
    pointers = X + tokens.to(tl.int64)[:, None] * stride_s + dims[None, :] * stride_d
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=("stride_kob", "stride_koh", "length"))
def _statistics(  # type: ignore[no-untyped-def]
    K, V, Sums, Peaks, KOrder, KeyLengths,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_kob, stride_koh, length,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_S: tl.constexpr, INT8_QK: tl.constexpr, FP8_PV: tl.constexpr,
    HAS_K_ORDER: tl.constexpr, HAS_KEY_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Grid ``(chunks, heads, batch)``: sums of keys ``[B, H, chunks, D]`` and largest magnitudes of values.

    Cost: reads ``B H S (D + Dv)`` elements once; an addition or a comparison per element.
    """
    chunk = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    end = tl.minimum((chunk + 1) * CHUNK, length)
    if HAS_KEY_LENGTHS:
        end = tl.minimum(end, tl.load(KeyLengths + b))
    items = tl.arange(0, BLOCK_S)
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    if HAS_K_ORDER:
        KOrder += b * stride_kob + h * stride_koh
    total = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    peak = tl.zeros([BLOCK_S, BLOCK_DV], tl.float32)
    for first in range(chunk * CHUNK, end, BLOCK_S):
        positions = first + items
        in_range = positions < end
        if INT8_QK:
            pointer = K + b * stride_kb + h * stride_kh
            total += _load(pointer, KOrder, positions, in_range, dims, stride_ks, stride_kd, D, BLOCK_D, HAS_K_ORDER)
        if FP8_PV:
            pointer = V + b * stride_vb + h * stride_vh
            v = _load(pointer, KOrder, positions, in_range, dims_v, stride_vs, stride_vd, DV, BLOCK_DV, HAS_K_ORDER)
            peak = tl.maximum(peak, tl.abs(v))
    row = (b * tl.num_programs(1) + h) * tl.num_programs(0) + chunk
    if INT8_QK:
        tl.store(Sums + row * D + dims, tl.sum(total, 0), mask=dims < D)
    if FP8_PV:
        tl.store(Peaks + row * DV + dims_v, tl.max(peak, 0), mask=dims_v < DV)


@triton.jit(do_not_specialize=("stride_kob", "stride_koh", "stride_tb", "stride_th"))
def _quantize(  # type: ignore[no-untyped-def]
    K, V, Mean, VScale, K8, KScale, V8, Start, Stop, KOrder,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_kob, stride_koh, stride_tb, stride_th,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TILE: tl.constexpr, INT8_QK: tl.constexpr, FP8_PV: tl.constexpr, HAS_K_ORDER: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid ``(tiles, heads, batch)``; every slot is written, with 0 where nothing may be read.

    Cost: reads ``B H S (D + Dv)`` elements, writes ``B H T TILE (D* + Dv*)`` bytes; about 5 operations per element.
    """
    tile = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    head = b * tl.num_programs(1) + h
    slot = head * tl.num_programs(0) + tile
    start = tl.load(Start + b * stride_tb + h * stride_th + tile)
    stop = tl.load(Stop + b * stride_tb + h * stride_th + tile)
    items = tl.arange(0, TILE)
    in_range = start + items < stop
    if HAS_K_ORDER:
        KOrder += b * stride_kob + h * stride_koh
    if INT8_QK:
        dims = tl.arange(0, BLOCK_D)
        pointer = K + b * stride_kb + h * stride_kh
        k = _load(pointer, KOrder, start + items, in_range, dims, stride_ks, stride_kd, D, BLOCK_D, HAS_K_ORDER)
        mean = tl.load(Mean + head * D + dims, mask=dims < D, other=0.0)
        k = tl.where(in_range[:, None], k - mean[None, :], 0.0)
        scale = tl.maximum(tl.max(tl.max(tl.abs(k), 1), 0), 1e-10) / 127.0
        tl.store(K8 + (slot * TILE + items)[:, None] * BLOCK_D + dims[None, :], to_int8(k / scale))
        tl.store(KScale + slot, scale)
    if FP8_PV:
        dims_v = tl.arange(0, BLOCK_DV)
        pointer = V + b * stride_vb + h * stride_vh
        v = _load(pointer, KOrder, start + items, in_range, dims_v, stride_vs, stride_vd, DV, BLOCK_DV, HAS_K_ORDER)
        v_scale = tl.load(VScale + head * DV + dims_v, mask=dims_v < DV, other=1.0)
        # The division may end a rounding above the largest number.
        v = tl.minimum(tl.maximum(v / v_scale[None, :], -448.0), 448.0)
        # Transposed: the keys of a tile stand next to each other, as an 8-bit product wants its operands.
        pointers = V8 + (slot * BLOCK_DV + dims_v)[:, None] * TILE + items[None, :]
        tl.store(pointers, tl.trans(to_fp8(v, INTERPRETED)))


def warps_for(head_dim: int) -> int:
    """Warps of both passes: as many as hold a tile without spills."""
    return 4 if head_dim <= 128 else 8


def quantize(k: Tensor, v: Tensor, plan: BlockPlan, *, int8_qk: bool, fp8_pv: bool) -> Quantized:
    """Same contract as ``kernels.quantize.quantize``, for float16, bfloat16 and float32; D at most 256."""
    batch, length, heads, dim = k.shape
    dim_v, device = v.shape[-1], k.device
    tiles = KeyTiles.of(plan)
    chunks, count = triton.cdiv(length, CHUNK), tiles.start.shape[-1]
    padded, padded_v = (max(32, triton.next_power_of_2(x)) for x in (dim, dim_v))
    start, stop = (x.contiguous().expand(batch, heads, -1) for x in (tiles.start, tiles.stop))
    order = None if plan.k_order is None else plan.k_order.contiguous().expand(batch, heads, -1)

    def empty(wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return torch.empty(batch, heads, *shape, dtype=dtype, device=device) if wanted else None

    sums, peaks = empty(int8_qk, chunks, dim), empty(fp8_pv, chunks, dim_v)
    k8, k_scale = empty(int8_qk, count, tiles.size, padded, dtype=torch.int8), empty(int8_qk, count)
    v8 = empty(fp8_pv, count, padded_v, tiles.size, dtype=torch.float8_e4m3fn)
    mean = v_scale = None
    shape = {
        "D": dim, "DV": dim_v, "BLOCK_D": padded, "BLOCK_DV": padded_v, "INT8_QK": int8_qk, "FP8_PV": fp8_pv,
        "HAS_K_ORDER": order is not None, "num_warps": warps_for(max(dim, dim_v)),
    }  # fmt: skip
    strides = (*k.stride(), *v.stride(), *((0, 0) if order is None else order.stride()[:2]))
    with torch.cuda.device(device) if k.is_cuda else nullcontext():
        _statistics[(chunks, heads, batch)](
            k, v, sums, peaks, order, plan.key_lengths, *strides, length,
            CHUNK=CHUNK, BLOCK_S=BLOCK_S, HAS_KEY_LENGTHS=plan.key_lengths is not None, **shape,
        )  # fmt: skip
        if sums is not None:
            readable = length if plan.key_lengths is None else plan.key_lengths.clamp(max=length)[:, None, None]
            mean = (sums.sum(2) / readable).contiguous()
        if peaks is not None:
            v_scale = peaks.amax(2).clamp(min=TINY) / FP8_MAX
        _quantize[(count, heads, batch)](
            k, v, mean, v_scale, k8, k_scale, v8, start, stop, order, *strides, *start.stride()[:2],
            TILE=tiles.size, INTERPRETED=backend() == "interpreter", **shape,
        )  # fmt: skip
    return Quantized(tiles, k8, k_scale, mean, v8, v_scale)
