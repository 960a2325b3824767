"""Tokens into the order of a plan, and back: one pass over memory."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# Positions of one program, and its warps: 16 bytes per thread and row of 128 half-precision numbers.
ROWS, WARPS = 32, 4


@triton.jit(do_not_specialize=("stride_pb", "stride_ph", "length"))
def _permute(  # type: ignore[no-untyped-def]
    X, Order, Y,
    stride_xb, stride_xs, stride_xh, stride_yb, stride_ys, stride_yh, stride_pb, stride_ph, length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Grid ``(tiles of positions, heads, batch)``."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    positions = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = positions < length
    tokens = tl.load(Order + b * stride_pb + h * stride_ph + positions, mask=inside, other=0).to(tl.int64)
    places = positions.to(tl.int64)
    source, target = (places, tokens) if BACK else (tokens, places)
    dims = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (dims < D)[None, :]
    x = tl.load(X + b * stride_xb + h * stride_xh + source[:, None] * stride_xs + dims[None, :], mask=mask)
    tl.store(Y + b * stride_yb + h * stride_yh + target[:, None] * stride_ys + dims[None, :], x, mask=mask)


def permute(x: Tensor, order: Tensor | None, *, back: bool = False) -> Tensor:
    """Token ``order[b, h, p]`` at position p of head h; with ``back``, what stands there back at that token.

    Args:
        x: ``[B, S, H, D]``, any strides.
        order: ``[b, h, S]`` int64, a permutation per head; None leaves x as it is.
        back: undo it.

    Returns:
        ``[B, S, H, D]``; in the plan's order each head is contiguous in memory, else each token.

    """
    if order is None:
        return x
    batch, length, heads, dim = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    order = (order if order.stride(-1) == 1 else order.contiguous()).expand(batch, heads, -1)
    if back:
        y = torch.empty(batch, length, heads, dim, dtype=x.dtype, device=x.device)
    else:
        y = torch.empty(batch, heads, length, dim, dtype=x.dtype, device=x.device).transpose(1, 2)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _permute[(triton.cdiv(length, ROWS), heads, batch)](
            x, order, y, *x.stride()[:3], *y.stride()[:3], *order.stride()[:2], length,
            D=dim, BLOCK_D=triton.next_power_of_2(dim), ROWS=ROWS, BACK=back, num_warps=WARPS,
        )  # fmt: skip
    return y
