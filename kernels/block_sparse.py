"""Block-sparse attention on the GPU: one flash-attention forward whose key loop follows a `BlockPlan`.

One program computes one tile of ``BLOCK_M`` positions of one query block. It walks the key blocks its query
block keeps, tile by tile, and then, with a pooled tail, the pooled keys of all blocks with the kept ones masked,
or the one key that `block_tail` made of them for the whole query block.
Softmax runs online in the base-2 domain (Milakov & Gimelshein 2018; Dao 2023), accumulation in fp32.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.errors import ImplUnavailableError
from dsattn.kernels.block_tail import block_tail
from dsattn.kernels.pooling import pool_blocks
from dsattn.verdict import VerdictRule

LOG2E = math.log2(math.e)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _absorb(logits, scale, values, peak, total, acc, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Take one tile of logits into the running softmax: peak and total ``[M]``, acc ``[M, DV]``, base 2.

    ``scale`` is positive and multiplied here, so that it fuses with the subtraction. The first peak is finite:
    a tile that is masked everywhere then leaves zeros, never NaN.
    """
    new_peak = tl.maximum(peak, tl.max(logits, 1) * scale)
    weights = tl.exp2(logits * scale - new_peak[:, None])
    decay = tl.exp2(peak - new_peak)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION)
    return new_peak, total, acc


# Lengths and strides of the plan change from call to call: compiling for their divisibility would gain nothing.
_UNSPECIALIZED = (
    "stride_cb", "stride_ch", "stride_ib", "stride_ih", "stride_ii",
    "stride_qob", "stride_qoh", "stride_kob", "stride_koh",
    "stride_tb", "stride_th", "stride_qsb", "stride_qsh", "stride_ksb", "stride_ksh",
    "stride_mb", "stride_mh", "stride_mq",
    "q_len", "k_len", "q_blocks", "k_blocks", "heads", "block_q", "block_k",
)  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _forward(  # type: ignore[no-untyped-def]
    Q, K, V, Out, Lse,
    Counts, Indices, TailValue, TailWeight,
    QOrder, KOrder, TileBlock, TileStart, QStarts, KStarts, KeyLengths,
    PooledK, PooledV, LogCount, Kept,
    Threshold, Needed,
    stride_qb, stride_qs, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_ob, stride_os, stride_oh,
    stride_cb, stride_ch, stride_ib, stride_ih, stride_ii,
    stride_qob, stride_qoh, stride_kob, stride_koh,
    stride_tb, stride_th, stride_qsb, stride_qsh, stride_ksb, stride_ksh,
    stride_mb, stride_mh, stride_mq,
    q_len, k_len, q_blocks, k_blocks, heads, block_q, block_k, scale, pv_skip,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES_Q: tl.constexpr, TILES_K: tl.constexpr,
    HAS_Q_ORDER: tl.constexpr, HAS_K_ORDER: tl.constexpr,
    HAS_Q_STARTS: tl.constexpr, HAS_K_STARTS: tl.constexpr, HAS_BLOCK_TAIL: tl.constexpr,
    HAS_KEY_LENGTHS: tl.constexpr, HAS_TAIL: tl.constexpr, PRECISION: tl.constexpr,
    HAS_VERDICT: tl.constexpr, PV_SKIP: tl.constexpr,
):  # fmt: skip
    """Grid ``(query tiles, heads, batch)``. ``scale`` includes log2(e); 64-bit wherever a length meets a stride."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)

    # Which positions: [start, end) of query block `block`.
    if HAS_Q_STARTS:
        tile = b * stride_tb + h * stride_th + tl.program_id(0)
        block = tl.load(TileBlock + tile)
        if block >= q_blocks:  # the grid is an upper bound
            return
        start = tl.load(TileStart + tile)
        end = tl.load(QStarts + b * stride_qsb + h * stride_qsh + block + 1)
    else:
        block = tl.program_id(0) // TILES_Q
        start = block * block_q + (tl.program_id(0) % TILES_Q) * BLOCK_M
        end = tl.minimum((block + 1) * block_q, q_len)
        if start >= end:
            return
    positions = start + tl.arange(0, BLOCK_M)
    in_block = positions < end
    if HAS_Q_ORDER:
        rows = tl.load(QOrder + b * stride_qob + h * stride_qoh + positions, mask=in_block, other=0).to(tl.int64)
    else:
        rows = positions.to(tl.int64)

    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    q_mask = in_block[:, None]
    if BLOCK_D != D:
        q_mask = q_mask & (dims < D)[None, :]
    q_pointers = Q + b * stride_qb + h * stride_qh + rows[:, None] * stride_qs + dims[None, :] * stride_qd
    q = tl.load(q_pointers, mask=q_mask, other=0.0)

    peak = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    # Exact part: the kept key blocks, in the order of the list.
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    if HAS_K_ORDER:
        KOrder += b * stride_kob + h * stride_koh
    if HAS_K_STARTS:
        KStarts += b * stride_ksb + h * stride_ksh
    Indices += b * stride_ib + h * stride_ih + block.to(tl.int64) * stride_ii
    count = tl.load(Counts + b * stride_cb + h * stride_ch + block)
    readable = k_len
    if HAS_KEY_LENGTHS:
        readable = tl.minimum(tl.load(KeyLengths + b), k_len)
    columns = tl.arange(0, BLOCK_N)

    tiles = count * TILES_K
    if HAS_K_STARTS:
        tiles = _count_tiles(Indices, KStarts, count, readable, BLOCK_N)
    if HAS_VERDICT:
        threshold = tl.load(Threshold + b * heads + h)
        Needed += ((b * heads + h) * q_blocks + block) * ((k_blocks + 31) // 32)
        # Peak of the blocks before this one, and the largest gain of this one's tiles so far.
        before = peak
        best = float("-inf")
    item = 0
    offset = 0
    for t in range(tiles):
        if HAS_K_STARTS:
            j = tl.load(Indices + item)
            k_start = tl.load(KStarts + j) + offset
            k_end = tl.minimum(tl.load(KStarts + j + 1), readable)
            finished = k_start + BLOCK_N >= k_end
            item = tl.where(finished, item + 1, item)
            offset = tl.where(finished, 0, offset + BLOCK_N)
        else:
            j = tl.load(Indices + t // TILES_K)
            k_start = j * block_k + (t % TILES_K) * BLOCK_N
            k_end = tl.minimum((j + 1) * block_k, readable)
        in_range = columns < k_end - k_start
        if HAS_K_ORDER:
            tokens = tl.load(KOrder + k_start + columns, mask=in_range, other=0).to(tl.int64)
            k_pointers = K + tokens[:, None] * stride_ks + dims[None, :] * stride_kd
            v_pointers = V + tokens[:, None] * stride_vs + dims_v[None, :] * stride_vd
        else:
            first = k_start.to(tl.int64)
            k_pointers = K + first * stride_ks + (columns[:, None] * stride_ks + dims[None, :] * stride_kd)
            v_pointers = V + first * stride_vs + (columns[:, None] * stride_vs + dims_v[None, :] * stride_vd)
        k_mask = in_range[:, None]
        v_mask = in_range[:, None]
        if BLOCK_D != D:
            k_mask = k_mask & (dims < D)[None, :]
        if BLOCK_DV != DV:
            v_mask = v_mask & (dims_v < DV)[None, :]
        k = tl.load(k_pointers, mask=k_mask, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        logits = tl.where(in_range[None, :], logits, float("-inf"))
        if HAS_VERDICT:
            gain = tl.max(tl.where(in_block, tl.max(logits, 1) * scale - before, float("-inf")), 0)
            best = tl.maximum(best, gain)
        if PV_SKIP:
            if gain > -pv_skip:
                v = tl.load(v_pointers, mask=v_mask, other=0.0)
                peak, total, acc = _absorb(logits, scale, v, peak, total, acc, PRECISION)
        else:
            v = tl.load(v_pointers, mask=v_mask, other=0.0)
            peak, total, acc = _absorb(logits, scale, v, peak, total, acc, PRECISION)
        if HAS_VERDICT:
            last = finished if HAS_K_STARTS else t % TILES_K == TILES_K - 1
            # Against the initial peak, only the first readable block gains this much: it is needed whatever it holds.
            needed = last & ((best > threshold) | (best > 1e29))
            tl.atomic_or(Needed + j // 32, 1 << (j % 32), mask=needed, sem="relaxed")
            before = tl.where(last, peak, before)
            best = tl.where(last, float("-inf"), best)

    # Tail: every block that is not kept enters as one pooled key with the logarithm of its size.
    if HAS_TAIL:
        pooled = (b * heads + h) * k_blocks
        Kept += b * stride_mb + h * stride_mh + block.to(tl.int64) * stride_mq
        for first_block in range(0, k_blocks, BLOCK_N):
            blocks = first_block + columns
            in_range = blocks < k_blocks
            kept = tl.load(Kept + blocks, mask=in_range, other=1)
            bias = tl.load(LogCount + pooled + blocks, mask=in_range, other=float("-inf"))
            bias = tl.where(kept == 0, bias, float("-inf"))
            pooled_rows = (pooled + blocks)[:, None]
            k_mask = in_range[:, None]
            v_mask = in_range[:, None]
            if BLOCK_D != D:
                k_mask = k_mask & (dims < D)[None, :]
            if BLOCK_DV != DV:
                v_mask = v_mask & (dims_v < DV)[None, :]
            k = tl.load(PooledK + pooled_rows * D + dims[None, :], mask=k_mask, other=0.0)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias[None, :]
            v = tl.load(PooledV + pooled_rows * DV + dims_v[None, :], mask=v_mask, other=0.0)
            peak, total, acc = _absorb(logits, 1.0, v, peak, total, acc, PRECISION)

    # Tail per query block: one key, whose weight (base 2) and value are the same for all rows.
    if HAS_BLOCK_TAIL:
        own = (b * heads + h) * q_blocks + block
        weight = tl.load(TailWeight + own)
        value = tl.load(TailValue + own * DV + dims_v, mask=dims_v < DV, other=0.0)
        new_peak = tl.maximum(peak, weight)
        decay = tl.exp2(peak - new_peak)
        share = tl.exp2(weight - new_peak)
        total = total * decay + share
        acc = acc * decay[:, None] + share[:, None] * value[None, :]
        peak = new_peak

    # A row without any readable key (no valid plan has one) gives zeros and -inf instead of NaN.
    nothing = total == 0
    out = acc / tl.where(nothing, 1.0, total)[:, None]
    lse = tl.where(nothing, float("-inf"), (peak + tl.log2(total)) * 0.6931471805599453)
    o_mask = in_block[:, None]
    if BLOCK_DV != DV:
        o_mask = o_mask & (dims_v < DV)[None, :]
    o_pointers = Out + b * stride_ob + h * stride_oh + rows[:, None] * stride_os + dims_v[None, :]
    tl.store(o_pointers, out.to(Out.dtype.element_ty), mask=o_mask)
    tl.store(Lse + (b * heads + h) * q_len + rows, lse, mask=in_block)


@triton.jit
def _count_tiles(Indices, KStarts, count, readable, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Key tiles that a list of ``count`` variable-size blocks needs; an empty block costs one masked tile."""
    tiles = 0
    for first in range(0, count, 128):
        items = first + tl.arange(0, 128)
        mask = items < count
        j = tl.load(Indices + items, mask=mask, other=0)
        k_start = tl.load(KStarts + j)
        size = tl.minimum(tl.load(KStarts + j + 1), readable) - k_start
        per_block = tl.maximum((size + BLOCK_N - 1) // BLOCK_N, 1)
        tiles += tl.sum(tl.where(mask, per_block, 0))
    return tiles


class Tiles(NamedTuple):
    """Compile-time shape of one program: tile of queries, tile of keys, warps, software pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# Largest tiles that compile without spills, by kind of matrix unit and padded head_dim; scripts/aot_report.py
# shows registers, spills and shared memory of every entry. "mma": Ampere, Ada, consumer Blackwell; "wgmma": Hopper
# and datacenter Blackwell; "mfma": AMD CDNA; "interpreter": no such limits, and few large steps are fastest.
_HALF = {
    "mma": {64: Tiles(128, 32, 4, 2), 128: Tiles(128, 32, 8, 2), 256: Tiles(64, 32, 8, 2)},
    "wgmma": {64: Tiles(128, 64, 4, 2), 128: Tiles(128, 64, 8, 3), 256: Tiles(64, 32, 8, 3)},
    "mfma": {64: Tiles(128, 64, 4, 2), 128: Tiles(128, 64, 4, 2), 256: Tiles(64, 32, 4, 2)},
}
# Float32 is for exactness, not speed: each product is three (CUDA) or runs at a quarter of the rate (AMD).
_SINGLE = {64: Tiles(32, 32, 4, 2), 128: Tiles(16, 32, 4, 2), 256: Tiles(16, 16, 8, 2)}
_INTERPRETER = Tiles(64, 64, 1, 1)


def pick_tiles(block_q: int, block_k: int, head_dim: int, dtype: torch.dtype, arch: int | str) -> Tiles:
    """Tile shape for a plan's block sizes.

    Args:
        block_q, block_k: the plan's block sizes, in positions; a tile never spans two blocks.
        head_dim: the larger of D and Dv, at most 256.
        dtype: of q, k, v.
        arch: compute capability (80, 90, …), an AMD architecture (``"gfx942"``), or ``"interpreter"``.

    Raises:
        ImplUnavailableError: head_dim above 256.

    """
    if head_dim > 256:
        raise ImplUnavailableError(
            f"impl='triton' takes head_dim up to 256, got {head_dim}; pass impl='torch' or 'reference'"
        )
    padded = max(64, triton.next_power_of_2(head_dim))
    if arch == "interpreter":
        largest = _INTERPRETER
    elif dtype == torch.float32:
        largest = _SINGLE[padded]
    else:
        largest = _HALF[_matrix_unit(arch)][padded]
    block_m = min(largest.block_m, max(16, triton.next_power_of_2(block_q)))
    block_n = min(largest.block_n, max(16, triton.next_power_of_2(block_k)))
    # Smaller tiles need fewer warps to hold them.
    warps = largest.warps if block_m == largest.block_m else min(largest.warps, 4)
    return Tiles(block_m, block_n, warps, largest.stages)


def _matrix_unit(arch: int | str) -> str:
    if isinstance(arch, str):
        return "mfma"
    return "wgmma" if 90 <= arch < 120 else "mma"


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float,
    rule: VerdictRule | None = None,
    needed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the kept blocks of a plan, plus its tail; same contract as `reference`.

    Args:
        q, k, v: ``[B, S, H, D]`` on a CUDA or ROCm device, any strides, float16, bfloat16 or float32.
        plan: pattern; its tensors on the same device.
        scale: factor on q·k before the softmax.
        rule, needed: as in `reference`; ``pv_skip`` decides per tile of the kernel.

    Returns:
        ``out [B, Sq, H, Dv]`` in q's dtype and ``lse [B, H, Sq]`` fp32, natural log, tail included.

    Raises:
        ImplUnavailableError: tensors on the CPU (without Triton's interpreter), a dtype or head_dim that the
            kernel does not take.

    """
    _check(q, k, v, plan)
    if scale <= 0:  # the kernel takes a positive factor; q·k·scale stays the same
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    dtype = q.dtype
    if _backend() == "interpreter" and dtype == torch.bfloat16:  # which the interpreter multiplies as integers
        q, k, v = q.float(), k.float(), v.float()
    batch, q_len, heads, dim = q.shape
    dim_v = v.shape[-1]
    tiles = pick_tiles(plan.block_q, plan.block_k, max(dim, dim_v), q.dtype, _architecture(q.device))
    lead = (batch, heads)

    def spread(x: Tensor) -> Tensor:
        x = x if x.stride(-1) == 1 else x.contiguous()
        return x.expand(*lead, *x.shape[2:])

    def leading_strides(x: Tensor | None) -> tuple[int, int]:
        return (0, 0) if x is None else (x.stride(0), x.stride(1))

    counts, indices = spread(plan.counts), spread(plan.indices)
    q_order, k_order, q_starts, k_starts = (
        None if x is None else spread(x) for x in (plan.q_order, plan.k_order, plan.q_starts, plan.k_starts)
    )
    tiles_q = triton.cdiv(plan.block_q, tiles.block_m)
    programs = plan.num_q_blocks * tiles_q
    tile_block = tile_start = None
    if q_starts is not None:
        programs = -(-q_len // tiles.block_m) + plan.num_q_blocks
        tile_block, tile_start = map(spread, tile_table(plan, tiles.block_m, programs))
    pooled_k = pooled_v = log_count = kept = None
    if plan.tail == "pooled":
        pooled_k, pooled_v, log_count = pool_blocks(k, v, plan)
        pooled_k, pooled_v = pooled_k.to(q.dtype).contiguous(), pooled_v.to(q.dtype).contiguous()
        log_count = (log_count * LOG2E).contiguous()
        kept = spread(plan.block_mask.view(torch.uint8))
    tail_value = tail_weight = None
    if plan.tail == "pooled_block":
        shape = pick_tiles(64, 32, max(dim, dim_v), q.dtype, _architecture(q.device))
        how = shape._asdict() | {"precision": precision(q.dtype, _backend()), "scale_log2": scale * LOG2E}
        tail_value, tail_weight = block_tail(q, k, v, plan, **how)

    out = torch.empty(batch, q_len, heads, dim_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        _forward[(programs, heads, batch)](
            q, k, v, out, lse,
            counts, indices, tail_value, tail_weight,
            q_order, k_order, tile_block, tile_start, q_starts, k_starts, plan.key_lengths,
            pooled_k, pooled_v, log_count, kept,
            None if rule is None else rule.threshold.float().expand(*lead).contiguous(), needed,
            *(q.stride(i) for i in range(4)), *(k.stride(i) for i in range(4)), *(v.stride(i) for i in range(4)),
            *out.stride()[:3],
            *leading_strides(counts), *indices.stride()[:3],
            *leading_strides(q_order), *leading_strides(k_order),
            *leading_strides(tile_block), *leading_strides(q_starts), *leading_strides(k_starts),
            *((0, 0, 0) if kept is None else kept.stride()[:3]),
            q_len, k.shape[1], plan.num_q_blocks, plan.num_k_blocks, heads, plan.block_q, plan.block_k,
            scale * LOG2E, 0.0 if rule is None or rule.pv_skip is None else float(rule.pv_skip),
            D=dim, DV=dim_v,
            BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_DV=max(16, triton.next_power_of_2(dim_v)),
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
            TILES_Q=tiles_q, TILES_K=triton.cdiv(plan.block_k, tiles.block_n),
            HAS_Q_ORDER=q_order is not None, HAS_K_ORDER=k_order is not None,
            HAS_Q_STARTS=q_starts is not None, HAS_K_STARTS=k_starts is not None,
            HAS_BLOCK_TAIL=tail_weight is not None,
            HAS_KEY_LENGTHS=plan.key_lengths is not None, HAS_TAIL=kept is not None,
            PRECISION=precision(q.dtype, _backend()),
            HAS_VERDICT=rule is not None, PV_SKIP=rule is not None and rule.pv_skip is not None,
            num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out.to(dtype), lse


def precision(dtype: torch.dtype, backend: str) -> str:
    """How the kernel multiplies: on CUDA, fp32 becomes three TF32 products, close to IEEE at tensor-core speed."""
    return "tf32x3" if backend == "cuda" and dtype == torch.float32 else "ieee"


def tile_table(plan: BlockPlan, block_m: int, programs: int) -> tuple[Tensor, Tensor]:
    """Which tile of queries each program computes when query blocks vary in size.

    Returns:
        ``block [b, h, programs]`` and ``start [b, h, programs]`` int32: query block and first position of each tile.
        Programs bounds the number of tiles without reading any value; surplus programs get block ``Nq``.

    """
    tiles = (plan.q_sizes + block_m - 1) // block_m
    ends = tiles.cumsum(-1)
    ids = torch.arange(programs, device=plan.device).expand(*ends.shape[:2], -1).contiguous()
    block = torch.searchsorted(ends, ids, right=True)
    owner = block.clamp(max=plan.num_q_blocks - 1)
    within = ids - (ends - tiles).gather(-1, owner)
    start = plan.q_edges.gather(-1, owner) + within * block_m
    return block.int(), start.int()


def _backend() -> str:
    if not isinstance(_forward, triton.runtime.JITFunction):
        return "interpreter"
    return "hip" if torch.version.hip else "cuda"


def why_unavailable(device: torch.device) -> str | None:
    """Reason why the kernel cannot run on tensors of a device, or None."""
    if device.type == "cuda" or _backend() == "interpreter":
        return None
    return f"it needs CUDA tensors, got {device.type}; pass impl='flex', 'torch' or 'reference'"


def _check(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> None:
    for name, device in (("q", q.device), ("k", k.device), ("v", v.device), ("the plan", plan.device)):
        if device != q.device or why_unavailable(device):
            raise ImplUnavailableError(
                f"impl='triton' needs CUDA tensors, all on one device, got {name} on {device}; "
                "pass impl='flex', 'torch' or 'reference'"
            )
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ImplUnavailableError(
            f"impl='triton' takes q, k, v of one dtype out of float16, bfloat16, float32; got {q.dtype}, "
            f"{k.dtype}, {v.dtype}; pass impl='torch' or 'reference'"
        )


def _architecture(device: torch.device) -> int | str:
    backend = _backend()
    if backend == "interpreter":
        return backend
    if backend == "hip":
        return torch.cuda.get_device_properties(device).gcnArchName
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
