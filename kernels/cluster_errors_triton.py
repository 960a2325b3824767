"""Mass and pooling error of key clusters on the GPU; the specification is ``kernels.cluster_errors``."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.kernels.block_sparse import block_sparse_attention
from dsattn.kernels.kmeans import Clusters
from dsattn.kernels.launch import Tiles, architecture, backend, precision

LOG2E = math.log2(math.e)


@triton.jit(do_not_specialize=("stride_oh", "rows", "clusters"))
def _cluster_errors(  # type: ignore[no-untyped-def]
    Queries, K, V, Order, Starts, Means, Out, Lse, Mass, Error,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_oh, rows, clusters, heads, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OUTPUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid ``(clusters, query tiles, batch * heads)``; scale and Lse are base 2.

    Cost per head, for C queries: ``2 C S D`` FLOPs (OUTPUT: ``4 C S D``), as much again for Out and Lse before it;
    reads every key (and value) once per tile of queries, writes ``8 C N`` bytes.
    """
    j = tl.program_id(0)
    head = tl.program_id(2).to(tl.int64)
    b = head // heads
    h = head % heads
    items = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    in_rows = items < rows

    q_mask = in_rows[:, None] & (dims < D)[None, :]
    q = tl.load(Queries + (head * rows + items)[:, None] * D + dims[None, :], mask=q_mask, other=0.0)
    lse = tl.load(Lse + head * rows + items, mask=in_rows, other=0.0)
    mean = tl.load(Means + (head * clusters + j) * D + dims, mask=dims < D, other=0.0)
    pooled = tl.exp2(tl.sum(q.to(tl.float32) * mean[None, :], 1) * scale - lse)

    Starts += head * (clusters + 1) + j
    end = tl.load(Starts + 1)
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    Order += head * stride_oh
    mass = tl.zeros([BLOCK_M], tl.float32)
    # What the stand-in gets wrong: the sum of its weights, and (OUTPUT) of its weighted values.
    wrong = tl.zeros([BLOCK_M], tl.float32)
    moved = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for first in range(tl.load(Starts), end, BLOCK_N):
        in_run = first + columns < end
        tokens = tl.load(Order + first + columns, mask=in_run, other=0).to(tl.int64)
        k_mask = in_run[:, None] & (dims < D)[None, :]
        k = tl.load(K + tokens[:, None] * stride_ks + dims[None, :] * stride_kd, mask=k_mask, other=0.0)
        weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
        missing = tl.where(in_run[None, :], weights - pooled[:, None], 0.0)
        mass += tl.sum(tl.where(in_run[None, :], weights, 0.0), 1)
        if OUTPUT:
            v_mask = in_run[:, None] & (dims_v < DV)[None, :]
            v = tl.load(V + tokens[:, None] * stride_vs + dims_v[None, :] * stride_vd, mask=v_mask, other=0.0)
            moved = tl.dot(missing.to(v.dtype), v, moved, input_precision=PRECISION)
            wrong += tl.sum(missing, 1)
        else:
            wrong += tl.sum(missing * missing, 1)
    if OUTPUT:
        o_mask = in_rows[:, None] & (dims_v < DV)[None, :]
        out = tl.load(Out + (head * rows + items)[:, None] * DV + dims_v[None, :], mask=o_mask, other=0.0)
        moved -= wrong[:, None] * out.to(tl.float32)
        wrong = tl.sum(moved * moved, 1)
    cells = (head * rows + items) * clusters + j
    tl.store(Mass + cells, mass, mask=in_rows)
    tl.store(Error + cells, wrong, mask=in_rows)


# Tile of queries and of keys, warps, stages by padded head_dim, without spills (scripts/aot_report.py; float32
# at 256 spills a few registers).
_HALF = {64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 4, 2), 256: Tiles(32, 32, 4, 2)}
_SINGLE = {64: Tiles(16, 32, 4, 2), 128: Tiles(16, 32, 4, 2), 256: Tiles(16, 16, 8, 2)}
_INTERPRETER = Tiles(128, 128, 1, 1)


def pick_tiles(head_dim: int, dtype: torch.dtype, arch: int | str) -> Tiles:
    """Tile shape; head_dim at most 256."""
    if arch == "interpreter":
        return _INTERPRETER
    return (_SINGLE if dtype == torch.float32 else _HALF)[max(64, triton.next_power_of_2(head_dim))]


def cluster_errors(
    queries: Tensor, k: Tensor, v: Tensor, clusters: Clusters, kind: str, scale: float
) -> tuple[Tensor, Tensor]:
    """Same contract as ``kernels.cluster_errors.cluster_errors``; queries are rounded to the dtype of k first.

    k and v have one dtype out of float16, bfloat16, float32 and at most 256 dimensions; scale is positive.
    """
    if backend() == "interpreter" and k.dtype == torch.bfloat16:  # which it multiplies as integers
        k, v = k.float(), v.float()
    batch, heads, rows, dim = queries.shape
    count, dim_v = clusters.sizes.shape[2], v.shape[-1]
    queries = queries.to(k.dtype).contiguous()
    dense = BlockPlan.dense(batch, heads, rows, k.shape[1], device=k.device)
    out, lse = block_sparse_attention(queries.transpose(1, 2), k, v, dense, scale=scale)
    out, lse = out.transpose(1, 2).contiguous(), lse * LOG2E
    means = clusters.means(k).contiguous()
    starts = torch.nn.functional.pad(clusters.sizes.cumsum(-1), (1, 0)).to(torch.int32).contiguous()
    order = clusters.order.contiguous()
    mass, error = torch.empty(2, batch, heads, rows, count, dtype=torch.float32, device=k.device)
    tiles = pick_tiles(max(dim, dim_v), k.dtype, architecture(k.device))
    with torch.cuda.device(k.device) if k.is_cuda else nullcontext():
        _cluster_errors[(count, triton.cdiv(rows, tiles.block_m), batch * heads)](
            queries, k, v, order, starts, means, out, lse, mass, error,
            *(k.stride(i) for i in (0, 1, 2, 3)), *(v.stride(i) for i in (0, 1, 2, 3)),
            order.stride(1), rows, count, heads, scale * LOG2E,
            D=dim, DV=dim_v,
            BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_DV=max(16, triton.next_power_of_2(dim_v)),
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
            OUTPUT=kind == "output", PRECISION=precision(k.dtype, backend()),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return mass, error
