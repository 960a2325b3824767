"""Block-sparse attention with INT8 products of queries and keys, FP8 products of weights and values, or both.

The specification is ``kernels.quantized_reference``. The key loop follows a `BlockPlan` as in ``kernels.block_sparse``,
over the tiles that ``kernels.quantize`` made; queries are quantised in registers, the tail is in full precision.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.errors import ImplUnavailableError
from dsattn.kernels.block_sparse_kernel import _absorb, _count_tiles
from dsattn.kernels.block_tail import block_tail
from dsattn.kernels.launch import LOG2E, Tiles, architecture, backend, matrix_unit, precision
from dsattn.kernels.launch import pick_tiles as pick_full_tiles
from dsattn.kernels.pooling import pool_blocks
from dsattn.kernels.program_order import tile_table
from dsattn.kernels.quantize import Quantized
from dsattn.kernels.quantize_triton import quantize, to_fp8, to_int8

# Lengths and strides of the plan change from call to call: compiling for their divisibility would gain nothing.
_UNSPECIALIZED = (
    "stride_cb", "stride_ch", "stride_ib", "stride_ih", "stride_ii", "stride_fb", "stride_fh",
    "stride_qob", "stride_qoh", "stride_kob", "stride_koh",
    "stride_tb", "stride_th", "stride_qsb", "stride_qsh", "stride_ksb", "stride_ksh",
    "stride_mb", "stride_mh", "stride_mq",
    "q_len", "k_len", "q_blocks", "k_blocks", "key_tiles", "heads", "block_q", "block_k",
)  # fmt: skip


@triton.jit
def _rows(X, tokens, in_range, dims, stride_s, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of one head's ``[S, D]`` matrix; zeros outside of it."""
    mask = in_range[:, None]
    if BLOCK_D != D:
        mask = mask & (dims < D)[None, :]
    return tl.load(X + tokens[:, None] * stride_s + dims[None, :] * stride_d, mask=mask, other=0.0)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _forward(  # type: ignore[no-untyped-def]
    Q, K, V, Out, Lse, K8, KScale, Mean, V8, VScale,
    Counts, Indices, First, TailValue, TailWeight,
    QOrder, KOrder, TileBlock, TileStart, QStarts, KStarts, KeyLengths,
    PooledK, PooledV, LogCount, Kept,
    stride_qb, stride_qs, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_ob, stride_os, stride_oh,
    stride_cb, stride_ch, stride_ib, stride_ih, stride_ii, stride_fb, stride_fh,
    stride_qob, stride_qoh, stride_kob, stride_koh,
    stride_tb, stride_th, stride_qsb, stride_qsh, stride_ksb, stride_ksh,
    stride_mb, stride_mh, stride_mq,
    q_len, k_len, q_blocks, k_blocks, key_tiles, heads, block_q, block_k, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, TILES_Q: tl.constexpr, TILES_K: tl.constexpr,
    INT8_QK: tl.constexpr, FP8_PV: tl.constexpr,
    HAS_Q_ORDER: tl.constexpr, HAS_K_ORDER: tl.constexpr,
    HAS_Q_STARTS: tl.constexpr, HAS_K_STARTS: tl.constexpr, HAS_BLOCK_TAIL: tl.constexpr,
    HAS_KEY_LENGTHS: tl.constexpr, HAS_TAIL: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid ``(query tiles, heads, batch)``. ``scale`` includes log2(e); 64-bit wherever a length meets a stride.

    Cost per kept tile of M queries and N keys: ``4 M N D`` operations of tensor cores as in full precision, half of
    them (or all) at twice the rate; ``N (D* + Dv*)`` bytes of keys and values from the L2 cache instead of twice that.
    """
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    head = b * heads + h

    # Which positions: [start, end) of query block `block`.
    if HAS_Q_STARTS:
        own = b * stride_tb + h * stride_th + tl.program_id(0)
        block = tl.load(TileBlock + own)
        if block >= q_blocks:  # the grid is an upper bound
            return
        start = tl.load(TileStart + own)
        end = tl.load(QStarts + b * stride_qsb + h * stride_qsh + block + 1)
    else:
        block = tl.program_id(0) // TILES_Q
        start = block * block_q + (tl.program_id(0) % TILES_Q) * BLOCK_M
        end = tl.minimum((block + 1) * block_q, q_len)
        if start >= end:
            return
    positions = start + tl.arange(0, BLOCK_M)
    in_block = positions < end
    rows = positions.to(tl.int64)
    if HAS_Q_ORDER:
        rows = tl.load(QOrder + b * stride_qob + h * stride_qoh + positions, mask=in_block, other=0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    Q += b * stride_qb + h * stride_qh
    q = _rows(Q, rows, in_block, dims, stride_qs, stride_qd, D, BLOCK_D)
    # Factor on the logits of a row, and what smoothing the keys took from all of them (base 2).
    factor = tl.full([BLOCK_M], 1.0, tl.float32) * scale
    shift = tl.zeros([BLOCK_M], tl.float32)
    if INT8_QK:
        mean = tl.load(Mean + head * D + dims, mask=dims < D, other=0.0)
        exact = q.to(tl.float32)
        shift = tl.sum(exact * mean[None, :], 1) * scale
        step = tl.maximum(tl.max(tl.abs(exact), 1), 1e-10) / 127.0
        factor = step * scale
        q = to_int8(exact / step[:, None])

    peak = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if INT8_QK:
        K8 += head * key_tiles * (BLOCK_N * BLOCK_D)
        KScale += head * key_tiles
    else:
        K += b * stride_kb + h * stride_kh
    if FP8_PV:
        V8 += head * key_tiles * (BLOCK_N * BLOCK_DV)
    else:
        V += b * stride_vb + h * stride_vh
    if HAS_K_ORDER:
        KOrder += b * stride_kob + h * stride_koh
    Indices += b * stride_ib + h * stride_ih + block.to(tl.int64) * stride_ii
    count = tl.load(Counts + b * stride_cb + h * stride_ch + block)
    readable = k_len
    if HAS_KEY_LENGTHS:
        readable = tl.minimum(tl.load(KeyLengths + b), k_len)
    columns = tl.arange(0, BLOCK_N)

    tiles = count * TILES_K
    if HAS_K_STARTS:
        KStarts += b * stride_ksb + h * stride_ksh
        First += b * stride_fb + h * stride_fh
        tiles = _count_tiles(Indices, KStarts, count, readable, BLOCK_N)
    item = 0
    offset = 0
    for t in range(tiles):
        # Which keys: tile `tile` of those that were quantised, positions from k_start on.
        if HAS_K_STARTS:
            j = tl.load(Indices + item).to(tl.int32)
            k_start = tl.load(KStarts + j) + offset
            k_end = tl.minimum(tl.load(KStarts + j + 1), readable)
            tile = tl.load(First + j) + offset // BLOCK_N
            finished = k_start + BLOCK_N >= k_end
            item = tl.where(finished, item + 1, item)
            offset = tl.where(finished, 0, offset + BLOCK_N)
        else:
            j = tl.load(Indices + t // TILES_K).to(tl.int32)
            k_start = j * block_k + (t % TILES_K) * BLOCK_N
            k_end = tl.minimum((j + 1) * block_k, readable)
            # The last block may have fewer tiles than the others.
            tile = tl.minimum(j * TILES_K + t % TILES_K, key_tiles - 1)
        in_range = k_start + columns < k_end
        if not (INT8_QK and FP8_PV):
            tokens = (k_start + columns).to(tl.int64)
            if HAS_K_ORDER:
                tokens = tl.load(KOrder + k_start + columns, mask=in_range, other=0).to(tl.int64)
        if INT8_QK:
            cells = tile.to(tl.int64) * (BLOCK_N * BLOCK_D) + columns[:, None] * BLOCK_D + dims[None, :]
            products = tl.dot(q, tl.trans(tl.load(K8 + cells)), out_dtype=tl.int32)
            logits = products.to(tl.float32) * (factor * tl.load(KScale + tile))[:, None]
        else:
            k = _rows(K, tokens, in_range, dims, stride_ks, stride_kd, D, BLOCK_D)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        logits = tl.where(in_range[None, :], logits, float("-inf"))
        if FP8_PV:
            new_peak = tl.maximum(peak, tl.max(logits, 1))
            weights = tl.exp2(logits - new_peak[:, None])
            decay = tl.exp2(peak - new_peak)
            total = total * decay + tl.sum(weights, 1)
            cells = tile.to(tl.int64) * (BLOCK_N * BLOCK_DV) + dims_v[:, None] * BLOCK_N + columns[None, :]
            # A product of its own per tile: Hopper's FP8 units accumulate with fewer bits than fp32.
            part = tl.dot(to_fp8(weights * 448.0, INTERPRETED), tl.trans(tl.load(V8 + cells)))
            acc = acc * decay[:, None] + part
            peak = new_peak
        else:
            v = _rows(V, tokens, in_range, dims_v, stride_vs, stride_vd, DV, BLOCK_DV)
            peak, total, acc = _absorb(logits, 1.0, v, peak, total, acc, PRECISION)
    if FP8_PV:
        channel = tl.load(VScale + head * DV + dims_v, mask=dims_v < DV, other=0.0)
        acc = acc * (channel / 448.0)[None, :]

    # Tail: every block that is not kept enters as one pooled key with the logarithm of its size.
    if HAS_TAIL:
        q = _rows(Q, rows, in_block, dims, stride_qs, stride_qd, D, BLOCK_D)
        pooled = head * k_blocks
        Kept += b * stride_mb + h * stride_mh + block.to(tl.int64) * stride_mq
        for first_block in range(0, k_blocks, BLOCK_T):
            blocks = first_block + tl.arange(0, BLOCK_T)
            in_range = blocks < k_blocks
            kept = tl.load(Kept + blocks, mask=in_range, other=1)
            bias = tl.load(LogCount + pooled + blocks, mask=in_range, other=float("-inf"))
            bias = tl.where(kept == 0, bias, float("-inf"))
            k = _rows(PooledK + pooled * D, blocks, in_range, dims, D, 1, D, BLOCK_D)
            v = _rows(PooledV + pooled * DV, blocks, in_range, dims_v, DV, 1, DV, BLOCK_DV)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias[None, :] - shift[:, None]
            peak, total, acc = _absorb(logits, 1.0, v, peak, total, acc, PRECISION)

    # Tail per query block: one key, whose weight (base 2) and value are the same for all rows.
    if HAS_BLOCK_TAIL:
        own_block = head * q_blocks + block
        weight = tl.load(TailWeight + own_block) - shift
        value = tl.load(TailValue + own_block * DV + dims_v, mask=dims_v < DV, other=0.0)
        new_peak = tl.maximum(peak, weight)
        decay = tl.exp2(peak - new_peak)
        share = tl.exp2(weight - new_peak)
        total = total * decay + share
        acc = acc * decay[:, None] + share[:, None] * value[None, :]
        peak = new_peak

    # A row without any readable key (no valid plan has one) gives zeros and -inf instead of NaN.
    nothing = total == 0
    out = acc / tl.where(nothing, 1.0, total)[:, None]
    lse = tl.where(nothing, float("-inf"), (peak + tl.log2(total) + shift) * 0.6931471805599453)
    o_mask = in_block[:, None]
    if BLOCK_DV != DV:
        o_mask = o_mask & (dims_v < DV)[None, :]
    pointers = Out + b * stride_ob + h * stride_oh + rows[:, None] * stride_os + dims_v[None, :]
    tl.store(pointers, out.to(Out.dtype.element_ty), mask=o_mask)
    tl.store(Lse + head * q_len + rows, lse, mask=in_block)


# Tile of queries, warps and stages by kind of matrix unit and padded head_dim, without spills
# (scripts/aot_report.py); the tile of keys is that of the quantised keys, at most the second number.
_TILES = {
    "mma": {64: Tiles(128, 64, 8, 2), 128: Tiles(128, 64, 8, 2), 256: Tiles(64, 64, 8, 2)},
    "wgmma": {64: Tiles(128, 64, 4, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(64, 64, 8, 2)},
    "mfma": {64: Tiles(128, 64, 4, 2), 128: Tiles(128, 64, 8, 2), 256: Tiles(64, 64, 8, 1)},
}
# With a pooled tail, what it needs stays in registers too. Pooled keys at a time, in full precision.
_WITH_TAIL = {
    "mma": {128: Tiles(64, 64, 8, 2)},
    "wgmma": {128: Tiles(64, 64, 4, 3)},
    "mfma": {128: Tiles(64, 64, 8, 1)},
}
BLOCK_T = 32
_INTERPRETER = Tiles(64, 64, 1, 1)


def pick_tiles(block_q: int, key_tile: int, head_dim: int, arch: int | str, tail: bool = False) -> Tiles:
    """Tile shape for a plan's query blocks and its tiles of keys, ``tail`` for a pooled one; head_dim up to 256."""
    if head_dim > 256:
        raise ImplUnavailableError(f"impl='triton' takes head_dim up to 256, got {head_dim}; pass impl='torch'")
    largest = _INTERPRETER
    if arch != "interpreter":
        unit, padded = matrix_unit(arch), max(64, triton.next_power_of_2(head_dim))
        largest = _TILES[unit][padded]
        if tail:
            largest = _WITH_TAIL.get(unit, {}).get(padded, largest)
    block_m = min(largest.block_m, max(16, triton.next_power_of_2(block_q)))
    # Smaller tiles need fewer warps to hold them.
    warps = largest.warps if (block_m, key_tile) == largest[:2] else min(largest.warps, 4)
    return Tiles(block_m, key_tile, warps, largest.stages)


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
    """Same contract as ``kernels.quantized_reference.block_sparse_attention``.

    Args:
        q, k, v: ``[B, S, H, D]`` on a GPU, any strides, float16 or bfloat16.
        plan, scale, int8_qk, fp8_pv, quantized: as there.

    Raises:
        ImplUnavailableError: this GPU has no such products, or head_dim is above 256.

    """
    if reason := why_unavailable(q.device, int8_qk, fp8_pv):
        raise ImplUnavailableError(f"quantized attention cannot run: {reason}")
    dtype = q.dtype
    if backend() == "interpreter" and dtype == torch.bfloat16:  # which the interpreter multiplies as integers
        q, k, v = q.float(), k.float(), v.float()
    if quantized is None:
        quantized = quantize(k, v, plan, int8_qk=int8_qk, fp8_pv=fp8_pv)
    (batch, q_len, heads, dim), dim_v, arch = q.shape, v.shape[-1], architecture(q.device)
    key_tiles = quantized.tiles
    tiles = pick_tiles(plan.block_q, key_tiles.size, max(dim, dim_v), arch, plan.tail == "pooled")

    def spread(x: Tensor) -> Tensor:
        x = x if x.stride(-1) == 1 else x.contiguous()
        return x.expand(batch, heads, *x.shape[2:])

    def leading_strides(x: Tensor | None) -> tuple[int, int]:
        return (0, 0) if x is None else (x.stride(0), x.stride(1))

    counts, indices, first = spread(plan.counts), spread(plan.indices), spread(key_tiles.first)
    q_order, k_order, q_starts, k_starts = (
        None if x is None else spread(x) for x in (plan.q_order, plan.k_order, plan.q_starts, plan.k_starts)
    )
    tiles_q = triton.cdiv(plan.block_q, tiles.block_m)
    programs = plan.num_q_blocks * tiles_q
    tile_block = tile_start = None
    if q_starts is not None:
        programs = -(-q_len // tiles.block_m) + plan.num_q_blocks
        tile_block, tile_start = map(spread, tile_table(plan, tiles.block_m, programs))
    pooled_k = pooled_v = log_count = kept = tail_value = tail_weight = None
    if plan.tail == "pooled":
        pooled_k, pooled_v, log_count = pool_blocks(k, v, plan)
        pooled_k, pooled_v = pooled_k.to(q.dtype).contiguous(), pooled_v.to(q.dtype).contiguous()
        log_count = (log_count * LOG2E).contiguous()
        kept = spread(plan.block_mask.view(torch.uint8))
    elif plan.tail == "pooled_block":
        # Its kernel takes a positive factor; q·k·scale stays the same.
        positive = (q, scale) if scale > 0 else (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
        how = pick_full_tiles(64, 32, max(dim, dim_v), q.dtype, arch)._asdict()
        how |= {"precision": precision(q.dtype, backend()), "scale_log2": positive[1] * LOG2E}
        tail_value, tail_weight = block_tail(positive[0], k, v, plan, **how)
    out = torch.empty(batch, q_len, heads, dim_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        _forward[(programs, heads, batch)](
            q, k, v, out, lse, quantized.k, quantized.k_scale, quantized.k_mean, quantized.v, quantized.v_scale,
            counts, indices, first, tail_value, tail_weight,
            q_order, k_order, tile_block, tile_start, q_starts, k_starts, plan.key_lengths,
            pooled_k, pooled_v, log_count, kept,
            *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3],
            *leading_strides(counts), *indices.stride()[:3], *leading_strides(first),
            *leading_strides(q_order), *leading_strides(k_order),
            *leading_strides(tile_block), *leading_strides(q_starts), *leading_strides(k_starts),
            *((0, 0, 0) if kept is None else kept.stride()[:3]),
            q_len, k.shape[1], plan.num_q_blocks, plan.num_k_blocks, key_tiles.start.shape[-1], heads,
            plan.block_q, plan.block_k, scale * LOG2E,
            D=dim, DV=dim_v,
            BLOCK_D=max(32, triton.next_power_of_2(dim)), BLOCK_DV=max(32, triton.next_power_of_2(dim_v)),
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_T=BLOCK_T,
            TILES_Q=tiles_q, TILES_K=triton.cdiv(plan.block_k, tiles.block_n), INT8_QK=int8_qk, FP8_PV=fp8_pv,
            HAS_Q_ORDER=q_order is not None, HAS_K_ORDER=k_order is not None,
            HAS_Q_STARTS=q_starts is not None, HAS_K_STARTS=k_starts is not None,
            HAS_BLOCK_TAIL=tail_weight is not None,
            HAS_KEY_LENGTHS=plan.key_lengths is not None, HAS_TAIL=kept is not None,
            PRECISION=precision(q.dtype, backend()), INTERPRETED=backend() == "interpreter",
            num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out.to(dtype), lse


def why_unavailable(device: torch.device, int8_qk: bool, fp8_pv: bool) -> str | None:
    """Reason why the kernel cannot run on tensors of a device, or None."""
    arch = architecture(device) if device.type == "cuda" or backend() == "interpreter" else None
    if arch is None:
        return f"it needs CUDA tensors, got {device.type}; impl='torch' or 'reference' emulates it, at no speed"
    if isinstance(arch, str):
        known = arch == "interpreter" or not fp8_pv
        return None if known else f"FP8 products are for NVIDIA GPUs from compute capability 8.9 on, this is {arch}"
    least, what = (89, "FP8") if fp8_pv else (80, "INT8")
    if (int8_qk or fp8_pv) and arch < least:
        return f"{what} products need compute capability {least / 10}, this GPU has {arch / 10}"
    return None
