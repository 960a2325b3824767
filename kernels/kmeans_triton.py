"""One iteration of k-means on the GPU: streamed nearest-centroid search, one sort, means over the sorted runs.

The specification is the torch code in ``kernels.kmeans``. Facts on the streamed search and on the update from sorted
labels: flash-kmeans (svg-project). Differs in: no atomic additions, so the same tokens give the same bits; the sort is
handed on as the permutation; half-precision tokens meet centroids of twice their digits (two products), but in all
iterations before the last: centroids that move on anyway are rounded to the tokens' dtype (one product).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsattn.kernels.launch import Tiles, architecture, backend, precision
from dsattn.kernels.segments_triton import segment_means


@triton.jit(do_not_specialize=("length", "clusters"))
def _assign(  # type: ignore[no-untyped-def]
    X, High, Low, Offset, Labels,
    stride_xb, stride_xs, stride_xh, stride_xd,
    length, clusters,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid ``(token tiles, heads, batch)``: argmax over centroids of ``x·c - |c|²/2``, ties to the lowest index.

    Cost: ``2 B H S C D`` FLOPs (twice that with ``HAS_LOW``); reads ``B H S D · element`` bytes once and
    ``4 B H C D`` bytes per tile of ``BLOCK_S`` tokens (from the L2 cache), writes ``4 B H S``.
    """
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    head = b * tl.num_programs(1) + h
    tokens = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    dims = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_C)

    mask = (tokens < length)[:, None]
    if BLOCK_D != D:
        mask = mask & (dims < D)[None, :]
    X += b * stride_xb + h * stride_xh
    x = tl.load(X + tokens.to(tl.int64)[:, None] * stride_xs + dims[None, :] * stride_xd, mask=mask, other=0.0)

    High += head * clusters * D
    if HAS_LOW:
        Low += head * clusters * D
    Offset += head * clusters
    best = tl.full([BLOCK_S], float("-inf"), tl.float32)
    label = tl.zeros([BLOCK_S], tl.int32)
    for first in range(0, clusters, BLOCK_C):
        ids = first + columns
        in_range = ids < clusters
        c_mask = in_range[:, None]
        if BLOCK_D != D:
            c_mask = c_mask & (dims < D)[None, :]
        cells = ids[:, None] * D + dims[None, :]
        scores = tl.dot(x, tl.trans(tl.load(High + cells, mask=c_mask, other=0.0)), input_precision=PRECISION)
        if HAS_LOW:
            scores = tl.dot(
                x, tl.trans(tl.load(Low + cells, mask=c_mask, other=0.0)), scores, input_precision=PRECISION
            )
        scores -= tl.load(Offset + ids, mask=in_range, other=float("inf"))[None, :]
        tile_best = tl.max(scores, 1)
        column = tl.min(tl.where(scores == tile_best[:, None], columns[None, :], BLOCK_C), 1)
        # Strictly better only: an equal score further on loses. A token with NaN keeps label 0.
        label = tl.where(tile_best > best, first + column, label)
        best = tl.maximum(tile_best, best)
    tl.store(Labels + head * length + tokens, label, mask=tokens < length)


# Tokens, centroids, warps and stages of one program by padded head_dim, without spills (scripts/aot_report.py).
_HALF = {64: Tiles(128, 64, 4, 2), 128: Tiles(128, 64, 8, 2), 256: Tiles(64, 32, 8, 2)}
_SINGLE = {64: Tiles(32, 32, 4, 2), 128: Tiles(16, 32, 4, 2), 256: Tiles(16, 32, 4, 2)}
_INTERPRETER = Tiles(128, 128, 1, 1)


def pick_tiles(head_dim: int, dtype: torch.dtype, arch: int | str) -> Tiles:
    """Tile of tokens (``block_m``) and centroids (``block_n``) of the assignment; head_dim at most 256."""
    if arch == "interpreter":
        return _INTERPRETER
    return (_SINGLE if dtype == torch.float32 else _HALF)[max(64, triton.next_power_of_2(head_dim))]


def assign(x: Tensor, centroids: Tensor, coarse: bool = False) -> Tensor:
    """Index of the nearest centroid, ``[B, H, S]`` int32; scores (token, centroid) never leave the chip.

    Args:
        x: ``[B, S, H, D]``, any strides, float16, bfloat16 or float32; D at most 256.
        centroids: ``[B, H, C, D]`` fp32.
        coarse: nearest of the centroids rounded to x's dtype, at half the cost for half precision.

    """
    batch, length, heads, dim = x.shape
    if coarse:  # its own length goes with a rounded centroid, so that the nearest one of them wins
        centroids = centroids.to(x.dtype).float()
    if backend() == "interpreter" and x.dtype == torch.bfloat16:  # which it multiplies as integers
        x = x.float()
    centroids = centroids.contiguous()
    high, low = centroids.to(x.dtype), None
    if x.dtype != torch.float32 and not coarse:
        # A half-precision token is exact in the matrix unit; two such numbers hold a centroid to 16 bits or more.
        low = (centroids - high).to(x.dtype)
    offset = centroids.square().sum(-1) / 2
    labels = torch.empty(batch, heads, length, dtype=torch.int32, device=x.device)
    tiles = pick_tiles(dim, x.dtype, architecture(x.device))
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _assign[(triton.cdiv(length, tiles.block_m), heads, batch)](
            x, high, low, offset, labels,
            *(x.stride(i) for i in range(4)),
            length, centroids.shape[2],
            D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_S=tiles.block_m, BLOCK_C=tiles.block_n,
            HAS_LOW=low is not None, PRECISION=precision(x.dtype, backend()),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return labels


def iterate(x: Tensor, centroids: Tensor, coarse: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One iteration: labels and the order that sorts them ``[B, H, S]``, new centroids, sizes ``[B, H, C]``.

    Cost beyond `assign`: one sort of ``B H`` rows of S labels, and one read of x (`segment_means`).
    """
    labels = assign(x, centroids, coarse)
    ranked, order = labels.sort(dim=-1, stable=True)
    edges = torch.arange(centroids.shape[2] + 1, dtype=torch.int32, device=x.device)
    starts = torch.searchsorted(ranked, edges.expand(*labels.shape[:2], -1).contiguous(), out_int32=True)
    centroids = segment_means(x, centroids.shape[2], order=order, starts=starts, empty=centroids)
    return labels.long(), order, centroids, starts.diff().long()
