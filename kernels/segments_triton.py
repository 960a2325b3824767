"""Means over runs of positions on the GPU: the update of k-means and the pooling of key blocks."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# Positions of a run that are summed side by side, and warps: the running sum stays in registers at any head_dim.
BLOCK_S = 32
WARPS = 4

_UNSPECIALIZED = (
    "stride_ob", "stride_oh", "stride_sb", "stride_sh", "stride_tb", "stride_th", "length", "segments", "block",
)  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _segment_means(  # type: ignore[no-untyped-def]
    X, Order, Starts, KeyLengths, Empty, Weights, Means, Totals,
    stride_xb, stride_xs, stride_xh, stride_xd,
    stride_ob, stride_oh, stride_sb, stride_sh, stride_tb, stride_th,
    length, segments, block,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_ORDER: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_KEY_LENGTHS: tl.constexpr, HAS_EMPTY: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Grid ``(segments, heads, batch)``: one program sums one run, always in the same order, in fp32.

    Cost: reads ``B H S (D · element + 8)`` bytes, writes ``4 B H N D``; one addition per element read.
    """
    j = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    if HAS_STARTS:
        Starts += b * stride_sb + h * stride_sh + j
        start = tl.load(Starts)
        end = tl.load(Starts + 1)
    else:
        start = j * block
        end = tl.minimum(start + block, length)
    if HAS_KEY_LENGTHS:
        end = tl.minimum(end, tl.load(KeyLengths + b))

    items = tl.arange(0, BLOCK_S)
    dims = tl.arange(0, BLOCK_D)
    X += b * stride_xb + h * stride_xh
    if HAS_ORDER:
        Order += b * stride_ob + h * stride_oh
    if HAS_WEIGHTS:
        Weights += b * stride_tb + h * stride_th
        weight = tl.zeros([BLOCK_S], tl.float32)
    total = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for first in range(start, end, BLOCK_S):
        positions = first + items
        in_run = positions < end
        tokens = positions
        if HAS_ORDER:
            tokens = tl.load(Order + positions, mask=in_run, other=0)
        mask = in_run[:, None]
        if BLOCK_D != D:
            mask = mask & (dims < D)[None, :]
        rows = tl.load(X + tokens.to(tl.int64)[:, None] * stride_xs + dims[None, :] * stride_xd, mask=mask, other=0.0)
        if HAS_WEIGHTS:
            own = tl.load(Weights + tokens, mask=in_run, other=0.0)
            weight += own
            total += rows.to(tl.float32) * own[:, None]
        else:
            total += rows.to(tl.float32)

    segment = (b * tl.num_programs(1) + h) * segments + j
    if HAS_WEIGHTS:
        count = tl.sum(weight, 0)
        tl.store(Totals + segment, count)
        count = tl.where(count > 0, count, 1.0)
    else:
        count = tl.maximum(end - start, 1).to(tl.float32)
    mean = tl.sum(total, 0) / count
    row = segment * D
    if HAS_EMPTY:
        last = tl.load(Empty + row + dims, mask=dims < D, other=0.0)
        mean = tl.where(end > start, mean, last)
    tl.store(Means + row + dims, mean, mask=dims < D)


def segment_means(
    x: Tensor,
    segments: int,
    block: int = 0,
    order: Tensor | None = None,
    starts: Tensor | None = None,
    key_lengths: Tensor | None = None,
    empty: Tensor | None = None,
) -> Tensor:
    """Mean of every run of positions, ``[B, H, N, D]`` fp32; the same inputs give the same bits.

    Args:
        x: ``[B, S, H, D]``, any strides, float16, bfloat16 or float32; D at most 256.
        segments: N.
        block: positions per run where ``starts`` is None.
        order: ``[b, h, S]`` int64, token at each position; b and h are 1 or B and H.
        starts: ``[b, h, N + 1]`` int, first position of every run, then S.
        key_lengths: ``[B]`` int, leading positions that count.
        empty: ``[B, H, N, D]`` fp32, result of runs without a position; None is zero.

    """
    return _segment_means_of(x, None, segments, block, order, starts, key_lengths, empty)[0]


def weighted_segment_means(
    x: Tensor,
    weights: Tensor,
    segments: int,
    block: int = 0,
    order: Tensor | None = None,
    starts: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean by weight of every run, ``[B, H, N, D]`` fp32, and the sums of weights, ``[B, H, N]`` fp32.

    ``weights [b, h, S]`` fp32, by token; the rest as for ``segment_means``. A run without weight has mean 0.
    """
    return _segment_means_of(x, weights.float(), segments, block, order, starts, key_lengths, None)


def _segment_means_of(
    x: Tensor,
    weights: Tensor | None,
    segments: int,
    block: int,
    order: Tensor | None,
    starts: Tensor | None,
    key_lengths: Tensor | None,
    empty: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Means and sums of weights; the latter are not written where there are no weights."""
    batch, length, heads, dim = x.shape
    order, starts, weights = (None if t is None else _spread(t, batch, heads) for t in (order, starts, weights))
    empty = None if empty is None else empty.contiguous()
    means = torch.empty(batch, heads, segments, dim, dtype=torch.float32, device=x.device)
    totals = means.new_empty(batch, heads, segments)
    if means.numel() == 0:
        return means, totals
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _segment_means[(segments, heads, batch)](
            x, order, starts, key_lengths, empty, weights, means, totals,
            *(x.stride(i) for i in range(4)),
            *(stride for t in (order, starts, weights) for stride in ((0, 0) if t is None else t.stride()[:2])),
            length, segments, block,
            D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_S=BLOCK_S,
            HAS_ORDER=order is not None, HAS_STARTS=starts is not None,
            HAS_KEY_LENGTHS=key_lengths is not None, HAS_EMPTY=empty is not None,
            HAS_WEIGHTS=weights is not None,
            num_warps=WARPS,
        )  # fmt: skip
    return means, totals


def _spread(x: Tensor, batch: int, heads: int) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.expand(batch, heads, -1)
