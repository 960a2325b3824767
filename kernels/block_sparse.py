"""Block-sparse attention on the GPU: from a `BlockPlan` to the launch of its kernel."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.errors import ImplUnavailableError
from dsattn.kernels import block_sparse_tma, tuned_tiles
from dsattn.kernels.block_sparse_kernel import _forward
from dsattn.kernels.block_tail import block_tail
from dsattn.kernels.launch import (
    DTYPES,
    LOG2E,
    Specialized,
    Tiles,
    architecture,
    backend,
    pick_specialized,
    pick_tiles,
    precision,
    why_unavailable,
)
from dsattn.kernels.pooling import pool_blocks
from dsattn.kernels.program_order import ends_of_keys, order_of_blocks, order_of_tiles
from dsattn.verdict import VerdictRule


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float,
    rule: VerdictRule | None = None,
    needed: Tensor | None = None,
    tiles: Tiles | Specialized | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the kept blocks of a plan, plus its tail; same contract as `reference`.

    Args:
        q, k, v: ``[B, S, H, D]`` on a CUDA or ROCm device, any strides, float16, bfloat16 or float32.
        plan: pattern; its tensors on the same device.
        scale: factor on q·k before the softmax.
        rule, needed: as in `reference`; ``pv_skip`` decides per tile of the kernel.
        tiles: runs the general kernel, or the one with tensor descriptors, compiled so; None picks.

    Returns:
        ``out [B, Sq, H, Dv]`` in q's dtype and ``lse [B, H, Sq]`` fp32, natural log, tail included.

    Raises:
        ImplUnavailableError: tensors on the CPU (without Triton's interpreter), a dtype or head_dim that the
            kernel does not take.

    """
    _check(q, k, v, plan)
    if scale <= 0:  # the kernels take a positive factor; q·k·scale stays the same
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    dtype = q.dtype
    if backend() == "interpreter" and dtype == torch.bfloat16:  # which the interpreter multiplies as integers
        q, k, v = q.float(), k.float(), v.float()
    arch = architecture(q.device)
    size = (plan.block_q, plan.block_k, max(q.shape[-1], v.shape[-1]), q.dtype, arch)
    tail = None
    if plan.tail == "pooled_block":
        shape = pick_tiles(64, 32, *size[2:])
        how = shape._asdict() | {"precision": precision(q.dtype, backend()), "scale_log2": scale * LOG2E}
        tail = block_tail(q, k, v, plan, **how)
    special = tiles if isinstance(tiles, Specialized) else None
    if tiles is None and rule is None:
        special = pick_specialized(*size, tail=plan.tail == "pooled")
        special = special and tuned_tiles.tma(q, v.shape[-1], plan, special)
    if special is not None and block_sparse_tma.why_not(q, k, v, plan, special.tiles) is None:
        out, lse = block_sparse_tma.block_sparse_attention(q, k, v, plan, scale=scale, how=special, tail=tail)
    else:
        # Lists of keys without gaps between blocks; a verdict is about whole blocks.
        packed = plan.k_starts is not None and rule is None
        if not isinstance(tiles, Tiles):
            tiles = pick_tiles(*size, packed_tail=packed and plan.tail == "pooled")
            tiles = tuned_tiles.block_sparse(q, v.shape[-1], plan, rule, tiles)
        out, lse = _launch(q, k, v, plan, scale, tiles, packed, tail, rule, needed)
    return out.to(dtype), lse


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    tiles: Tiles,
    packed: bool,
    tail: tuple[Tensor, Tensor] | None,
    rule: VerdictRule | None,
    needed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`block_sparse_kernel` for any plan; ``packed`` lists keys without gaps, ``tail`` is what ``block_tail`` made."""
    batch, q_len, heads, dim = q.shape
    dim_v = v.shape[-1]
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
    if q_starts is None:
        tiles_q, slots, tile_block, tile_start = triton.cdiv(plan.block_q, tiles.block_m), plan.num_q_blocks, None, None
        order = order_of_blocks(plan)
    else:
        tiles_q, slots = 1, -(-q_len // tiles.block_m) + plan.num_q_blocks
        order, tile_block, tile_start = order_of_tiles(plan, tiles.block_m, slots)
    key_ends = spread(ends_of_keys(plan)) if packed else None
    key_lengths = None if packed else plan.key_lengths  # which those lists know
    pooled_k = pooled_v = log_count = kept = None
    if plan.tail == "pooled":
        pooled_k, pooled_v, log_count = pool_blocks(k, v, plan)
        pooled_k, pooled_v = pooled_k.to(q.dtype).contiguous(), pooled_v.to(q.dtype).contiguous()
        log_count = (log_count * LOG2E).contiguous()
        kept = spread(plan.block_mask.view(torch.uint8))
    tail_value, tail_weight = (None, None) if tail is None else tail
    out = torch.empty(batch, q_len, heads, dim_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        _forward[(slots * tiles_q * heads * batch,)](
            q, k, v, out, lse,
            counts, indices, tail_value, tail_weight,
            q_order, k_order, order, tile_block, tile_start, q_starts, k_starts, key_ends, key_lengths,
            pooled_k, pooled_v, log_count, kept,
            None if rule is None else rule.threshold.float().expand(*lead).contiguous(), needed,
            *(q.stride(i) for i in range(4)), *(k.stride(i) for i in range(4)), *(v.stride(i) for i in range(4)),
            *out.stride()[:3],
            *leading_strides(counts), *indices.stride()[:3],
            *leading_strides(q_order), *leading_strides(k_order),
            *leading_strides(tile_block), *leading_strides(q_starts), *leading_strides(k_starts),
            *((0, 0, 0) if key_ends is None else key_ends.stride()[:3]),
            *((0, 0, 0) if kept is None else kept.stride()[:3]),
            q_len, k.shape[1], plan.num_q_blocks, plan.num_k_blocks, heads, plan.block_q, plan.block_k, slots,
            scale * LOG2E, 0.0 if rule is None or rule.pv_skip is None else float(rule.pv_skip),
            D=dim, DV=dim_v,
            BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_DV=max(16, triton.next_power_of_2(dim_v)),
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
            TILES_Q=tiles_q, TILES_K=triton.cdiv(plan.block_k, tiles.block_n),
            HAS_Q_ORDER=q_order is not None, HAS_K_ORDER=k_order is not None,
            HAS_Q_STARTS=q_starts is not None, HAS_K_STARTS=k_starts is not None,
            SEARCH=indices.shape[-1].bit_length() if packed else 0, HAS_BLOCK_TAIL=tail is not None,
            HAS_KEY_LENGTHS=key_lengths is not None, HAS_TAIL=kept is not None,
            PRECISION=precision(q.dtype, backend()),
            HAS_VERDICT=rule is not None, PV_SKIP=rule is not None and rule.pv_skip is not None,
            num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


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
