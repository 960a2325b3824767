"""Softmax mass of pairs of blocks on the GPU; the specification is ``kernels.block_mass``."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.kernels.launch import LOG2E, Tiles, architecture, backend, pick_tiles, precision

_UNSPECIALIZED = (
    "stride_qob", "stride_qoh", "stride_kob", "stride_koh", "stride_qsb", "stride_qsh", "stride_ksb", "stride_ksh",
    "q_len", "k_len", "q_blocks", "k_blocks", "heads", "block_q", "block_k",
)  # fmt: skip


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    X, Order, positions, in_range, dims, stride_s, stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """Rows of one head's ``[S, D]`` matrix at some positions, and their tokens; zeros outside of it."""
    tokens = positions.to(tl.int64)
    if HAS_ORDER:
        tokens = tl.load(Order + positions, mask=in_range, other=0).to(tl.int64)
    mask = in_range[:, None]
    if BLOCK_D != D:
        mask = mask & (dims < D)[None, :]
    return tl.load(X + tokens[:, None] * stride_s + dims[None, :] * stride_d, mask=mask, other=0.0), tokens


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _block_mass(  # type: ignore[no-untyped-def]
    Q, K, Lse, Mass, QOrder, KOrder, QStarts, KStarts, KeyLengths,
    stride_qb, stride_qs, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_qob, stride_qoh, stride_kob, stride_koh, stride_qsb, stride_qsh, stride_ksb, stride_ksh,
    q_len, k_len, q_blocks, k_blocks, heads, block_q, block_k, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES_K: tl.constexpr,
    FLAT: tl.constexpr, HAS_Q_ORDER: tl.constexpr, HAS_K_ORDER: tl.constexpr,
    HAS_Q_STARTS: tl.constexpr, HAS_K_STARTS: tl.constexpr, HAS_KEY_LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid ``(query blocks, heads, batch)``; scale and Lse in base 2. FLAT: one tile of queries, equal key blocks.

    Cost: ``2 B H Sq Sk D`` FLOPs; reads q once and k once per query block (from the L2 cache), writes ``4 B H Nq Nk``.
    """
    block = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    if HAS_Q_STARTS:
        QStarts += b * stride_qsb + h * stride_qsh + block
        q_start = tl.load(QStarts)
        q_end = tl.load(QStarts + 1)
    else:
        q_start = block * block_q
        q_end = tl.minimum(q_start + block_q, q_len)
    if HAS_Q_ORDER:
        QOrder += b * stride_qob + h * stride_qoh
    if HAS_K_ORDER:
        KOrder += b * stride_kob + h * stride_koh
    if HAS_K_STARTS:
        KStarts += b * stride_ksb + h * stride_ksh
    readable = k_len
    if HAS_KEY_LENGTHS:
        readable = tl.minimum(tl.load(KeyLengths + b), k_len)
    Q += b * stride_qb + h * stride_qh
    K += b * stride_kb + h * stride_kh
    Lse += (b * heads + h) * q_len
    Mass += ((b * heads + h) * q_blocks + block) * k_blocks
    items = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)

    if FLAT:
        in_rows = q_start + items < q_end
        q, tokens = _rows(Q, QOrder, q_start + items, in_rows, dims, stride_qs, stride_qd, D, BLOCK_D, HAS_Q_ORDER)
        lse = tl.load(Lse + tokens, mask=in_rows, other=float("inf"))
        # Summed number by number, and over the tile once per block.
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for t in range(k_blocks * TILES_K):
            j = t // TILES_K
            keys = j * block_k + (t % TILES_K) * BLOCK_N + columns
            in_range = keys < tl.minimum((j + 1) * block_k, readable)
            k, _ = _rows(K, KOrder, keys, in_range, dims, stride_ks, stride_kd, D, BLOCK_D, HAS_K_ORDER)
            weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
            sums += tl.where(in_range[None, :], weights, 0.0)
            last = t % TILES_K == TILES_K - 1
            tl.store(Mass + j, tl.sum(tl.sum(sums, 1), 0), mask=last)
            sums = tl.where(last, 0.0, sums)
    else:
        for j in range(k_blocks):
            if HAS_K_STARTS:
                k_start = tl.load(KStarts + j)
                k_end = tl.minimum(tl.load(KStarts + j + 1), readable)
            else:
                k_start = j * block_k
                k_end = tl.minimum(k_start + block_k, readable)
            sums = tl.zeros([BLOCK_M], tl.float32)
            for first_row in range(q_start, q_end, BLOCK_M):
                rows = first_row + items
                in_rows = rows < q_end
                q, tokens = _rows(Q, QOrder, rows, in_rows, dims, stride_qs, stride_qd, D, BLOCK_D, HAS_Q_ORDER)
                lse = tl.load(Lse + tokens, mask=in_rows, other=float("inf"))
                for first in range(k_start, k_end, BLOCK_N):
                    keys = first + columns
                    in_range = keys < k_end
                    k, _ = _rows(K, KOrder, keys, in_range, dims, stride_ks, stride_kd, D, BLOCK_D, HAS_K_ORDER)
                    weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
                    sums += tl.sum(tl.where(in_range[None, :], weights, 0.0), 1)
            tl.store(Mass + j, tl.sum(sums, 0))


def fit_tiles(tiles: Tiles, dtype: torch.dtype, flat: bool) -> Tiles:
    """From tiles of the forward pass, which holds more; in fp32, clusters leave no registers for prefetches."""
    return tiles._replace(stages=1) if dtype == torch.float32 and not flat else tiles


def compiles_flat(arch: int | str) -> bool:
    """Whether FLAT compiles: Triton 3.6 fails for Blackwell ("parent layout must have at least rank >= 2")."""
    recent = tuple(int(x) for x in triton.__version__.split(".")[:2]) >= (3, 9)
    return recent or isinstance(arch, str) or not 100 <= arch < 120


def block_mass(q: Tensor, k: Tensor, lse: Tensor, plan: BlockPlan, *, scale: float) -> Tensor:
    """Same contract as ``kernels.block_mass.block_mass``, for float16, bfloat16 and float32; no ``lse`` is -inf."""
    if backend() == "interpreter" and q.dtype == torch.bfloat16:  # which it multiplies as integers
        q, k = q.float(), k.float()
    batch, q_len, heads, dim = q.shape
    tiles = pick_tiles(plan.block_q, plan.block_k, dim, q.dtype, architecture(q.device))

    def spread(x: Tensor | None) -> tuple[Tensor | None, tuple[int, int]]:
        if x is None:
            return None, (0, 0)
        x = x.contiguous().expand(batch, heads, -1)
        return x, (x.stride(0), x.stride(1))

    layout = [spread(x) for x in (plan.q_order, plan.k_order, plan.q_starts, plan.k_starts)]
    (q_order, _), (k_order, _), (q_starts, _), (k_starts, _) = layout
    flat = q_starts is None and k_starts is None and plan.block_q <= tiles.block_m
    flat = flat and compiles_flat(architecture(q.device))
    tiles = fit_tiles(tiles, q.dtype, flat)
    mass = torch.empty(batch, heads, plan.num_q_blocks, plan.num_k_blocks, dtype=torch.float32, device=q.device)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        _block_mass[(plan.num_q_blocks, heads, batch)](
            q, k, (lse * LOG2E).contiguous(), mass, q_order, k_order, q_starts, k_starts, plan.key_lengths,
            *q.stride(), *k.stride(), *(stride for _, strides in layout for stride in strides),
            q_len, k.shape[1], plan.num_q_blocks, plan.num_k_blocks, heads, plan.block_q, plan.block_k, scale * LOG2E,
            D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)),
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, TILES_K=triton.cdiv(plan.block_k, tiles.block_n),
            FLAT=flat, HAS_Q_ORDER=q_order is not None, HAS_K_ORDER=k_order is not None,
            HAS_Q_STARTS=q_starts is not None, HAS_K_STARTS=k_starts is not None,
            HAS_KEY_LENGTHS=plan.key_lengths is not None, PRECISION=precision(q.dtype, backend()),
            num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return mass
