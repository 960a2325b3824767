"""Block-sparse attention on compiled FlexAttention: the fast path on the CPU.

Plans are handed over as explicit blocks. FlexAttention knows equal blocks and one mask function, so orders
become gathers, variable-size blocks are padded to whole tiles, and pooled keys are appended behind the keys.
Uncompiled FlexAttention ignores explicit blocks and computes dense attention: this module never calls it
uncompiled, and a failed compile raises.
"""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dsattn.block_plan import BlockPlan
from dsattn.kernels import gather
from dsattn.kernels.pooling import pool_blocks

# Dynamo gives up on a function after 8 shapes by default, and then runs it uncompiled.
COMPILED_SHAPES = 4096


@lru_cache(maxsize=1)
def why_unavailable() -> str | None:
    """Reason why nothing can be compiled for the CPU here, or None."""
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler is None:
        return "no C++ compiler was found (install g++ or clang++)"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return f"Python.h was not found in {sysconfig.get_paths()['include']} (install the Python headers)"
    return None


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, scale: float, need_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Same contract as ``kernels.reference.block_sparse_attention``; ``lse`` is None unless ``need_lse``.

    FlexAttention returns no LSE on the CPU: there it is computed by ``kernels.gather`` when needed.
    """
    q_tiles, k_tiles = _tile(plan, "q"), _tile(plan, "k")
    q_flex = q_tiles.load(q)
    k_flex, v_flex = k_tiles.load(k), k_tiles.load(v)
    kept = k_tiles.spread(q_tiles.spread(plan.block_mask, 2), 3)
    readable = k_tiles.valid
    if plan.key_lengths is not None:
        readable = readable & (k_tiles.position < plan.key_lengths[:, None, None])
    if plan.tail == "pooled":
        k_pool, v_pool, log_count = pool_blocks(k, v, plan)
        skipped = log_count[:, :, None].masked_fill(q_tiles.spread(plan.block_mask, 2), -torch.inf)
        k_flex = _append(k_flex, k_pool, plan.block_k)
        v_flex = _append(v_flex, v_pool, plan.block_k)
        mask, score_mod = _tail_mask(kept, readable, skipped, plan, q_flex.shape[2])
    else:
        mask, score_mod = _plain_mask(kept, readable, plan, q_flex.shape[2], k_flex.shape[2]), None
    on_cpu = q.device.type == "cpu"
    result = _run(q_flex, k_flex, v_flex, mask, score_mod, scale, need_lse and not on_cpu)
    out = q_tiles.store(result[0], plan.q_len)
    if not need_lse:
        return out, None
    if on_cpu:
        return out, gather.block_sparse_attention(q, k, v, plan, scale=scale, need_lse=True)[1]
    return out, q_tiles.store(result[1][..., None], plan.q_len)[..., 0].transpose(1, 2)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Dense attention by compiled FlexAttention, ``[B, S, H, D]``."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _run(q, k, v, None, None, scale, False)[0].transpose(1, 2)


def _run(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, score_mod: Callable[..., Tensor] | None,
    scale: float, return_lse: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    with torch._dynamo.config.patch(recompile_limit=COMPILED_SHAPES, accumulated_recompile_limit=COMPILED_SHAPES):
        result = _compiled()(q, k, v, score_mod=score_mod, block_mask=mask, scale=scale, return_lse=return_lse)
    # One tensor without the LSE, a pair with it.
    return tuple(result) if return_lse else (result,)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    # fullgraph: a graph break would run part of it uncompiled.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@dataclass(frozen=True)
class _Tiles:
    """Positions of one side cut into whole tiles of ``block`` slots; ``b`` and ``h`` broadcast.

    position: ``[b, h, P]`` plan position in each slot (0 in empty slots).
    valid: ``[b, h, P]`` bool, slots that hold a position; all True unless blocks have variable size.
    owner: ``[b, h, P / block]`` plan block of each tile, None when tiles are blocks.
    order: the plan's token order.
    """

    block: int
    position: Tensor
    valid: Tensor
    owner: Tensor | None
    order: Tensor | None

    def load(self, x: Tensor) -> Tensor:
        """``[B, S, H, D]`` to ``[B, H, P, D]``."""
        x = x.transpose(1, 2)
        if self.owner is None and self.order is None:
            return x
        token = self._token(*x.shape[:2])
        return x.gather(2, token[..., None].expand(-1, -1, -1, x.shape[-1]))

    def store(self, x: Tensor, length: int) -> Tensor:
        """``[B, H, P, D]`` back to ``[B, S, H, D]``."""
        if self.owner is not None or self.order is not None:
            # Empty slots write to one extra row that is cut off again.
            token = self._token(*x.shape[:2]).where(self.valid, length)
            full = x.new_empty(*x.shape[:2], length + 1, x.shape[-1])
            x = full.scatter_(2, token[..., None].expand_as(x), x)[:, :, :length]
        return x.transpose(1, 2)

    def spread(self, blocks: Tensor, dim: int) -> Tensor:
        """Per-block values along ``dim`` of ``[b, h, Nq, Nk]`` to per-tile values."""
        if self.owner is None:
            return blocks
        lead = torch.broadcast_shapes(blocks.shape[:2], self.owner.shape[:2])
        blocks = blocks.expand(*lead, -1, -1)
        other = blocks.shape[5 - dim]
        owner = self.owner.expand(*lead, -1)
        index = owner[..., None].expand(-1, -1, -1, other) if dim == 2 else owner[:, :, None].expand(-1, -1, other, -1)
        return blocks.gather(dim, index)

    def _token(self, batch: int, heads: int) -> Tensor:
        position = self.position.expand(batch, heads, -1)
        return position if self.order is None else self.order.expand(batch, heads, -1).gather(2, position)


def _tile(plan: BlockPlan, side: str) -> _Tiles:
    length, block, edges, starts, order = (
        (plan.q_len, plan.block_q, plan.q_edges, plan.q_starts, plan.q_order)
        if side == "q"
        else (plan.k_len, plan.block_k, plan.k_edges, plan.k_starts, plan.k_order)
    )
    if starts is None:
        position = torch.arange(length, device=plan.device)[None, None]
        return _Tiles(block, position, torch.ones_like(position, dtype=torch.bool), None, order)
    sizes = edges.diff(dim=-1)
    tile_ends = ((sizes + block - 1) // block).cumsum(-1)
    tiles = torch.arange(int(tile_ends[..., -1].max()), device=plan.device).expand(*sizes.shape[:2], -1).contiguous()
    owner = torch.searchsorted(tile_ends, tiles, right=True)
    # Tiles behind the last block own nothing: they point at it with an offset past its end.
    owner = owner.clamp_(max=sizes.shape[-1] - 1)
    first_tile = (tile_ends - (sizes + block - 1) // block).gather(-1, owner)
    offset = ((tiles - first_tile) * block)[..., None] + torch.arange(block, device=plan.device)
    valid = (offset < sizes.gather(-1, owner)[..., None]).flatten(2)
    position = (edges.gather(-1, owner)[..., None] + offset).flatten(2).where(valid, 0)
    return _Tiles(block, position, valid, owner, order)


def _plain_mask(kept: Tensor, readable: Tensor, plan: BlockPlan, q_len: int, k_len: int) -> BlockMask:
    if bool(readable.all()):
        counts, indices = _lists(kept)
        none = torch.zeros_like(counts), torch.zeros_like(indices)
        return BlockMask.from_kv_blocks(
            *none, counts, indices, BLOCK_SIZE=(plan.block_q, plan.block_k), seq_lengths=(q_len, k_len)
        )
    some, every = _tile_readable(readable, plan.block_k)
    lists = (*_lists(kept & (some & ~every)[:, :, None]), *_lists(kept & every[:, :, None]))
    shape = readable.shape

    def mask_mod(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return readable[b % shape[0], h % shape[1], k_index]

    return BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=(plan.block_q, plan.block_k), mask_mod=mask_mod, seq_lengths=(q_len, k_len)
    )


def _tail_mask(
    kept: Tensor, readable: Tensor, skipped: Tensor, plan: BlockPlan, q_len: int
) -> tuple[BlockMask, Callable[..., Tensor]]:
    """Mask over keys and, behind them from a whole block on, pooled keys; bias of the pooled keys.

    ``skipped [b, h, q tiles, Nk]``: log-count of the blocks a query tile does not keep, -inf for the others.
    """
    block_q, block_k = plan.block_q, plan.block_k
    readable = torch.nn.functional.pad(readable, (0, -readable.shape[-1] % block_k))
    first = readable.shape[-1]
    bias = torch.nn.functional.pad(skipped, (0, -skipped.shape[-1] % block_k), value=-torch.inf)
    some, every = _tile_readable(readable, block_k)
    tail_tiles = (bias > -torch.inf).unflatten(-1, (-1, block_k)).any(-1)
    lead = torch.broadcast_shapes(kept.shape[:2], readable.shape[:2], tail_tiles.shape[:2])
    kept, tail_tiles = kept.expand(*lead, -1, -1), tail_tiles.expand(*lead, -1, -1)
    partial = torch.cat([kept & (some & ~every)[:, :, None], tail_tiles], -1)
    full = torch.cat([kept & every[:, :, None], torch.zeros_like(tail_tiles)], -1)
    shape, bias_shape = readable.shape, bias.shape

    def mask_mod(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        key = readable[b % shape[0], h % shape[1], k_index.clamp(max=first - 1)]
        # A bias of -inf alone would do, but only a mask is skipped for whole rows.
        weight = bias[b % bias_shape[0], h % bias_shape[1], q_index // block_q, (k_index - first).clamp(min=0)]
        return torch.where(k_index < first, key, weight > -torch.inf)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        weight = bias[b % bias_shape[0], h % bias_shape[1], q_index // block_q, (k_index - first).clamp(min=0)]
        return torch.where(k_index < first, score, score + weight)

    mask = BlockMask.from_kv_blocks(
        *_lists(partial), *_lists(full), BLOCK_SIZE=(block_q, block_k), mask_mod=mask_mod,
        seq_lengths=(q_len, first + bias.shape[-1]),
    )  # fmt: skip
    return mask, score_mod


def _tile_readable(readable: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Per tile: some slot readable, every slot readable (slots behind the end count as readable)."""
    pad = -readable.shape[-1] % block
    some = torch.nn.functional.pad(readable, (0, pad), value=False).unflatten(-1, (-1, block)).any(-1)
    every = torch.nn.functional.pad(readable, (0, pad), value=True).unflatten(-1, (-1, block)).all(-1)
    return some, every


def _lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and block lists of a block map, in FlexAttention's form."""
    indices = torch.sort((~mask).to(torch.uint8), dim=-1, stable=True).indices
    return mask.sum(-1, dtype=torch.int32), indices.to(torch.int32)


def _append(x: Tensor, pooled: Tensor, block: int) -> Tensor:
    """Pooled rows behind x, both padded to whole blocks."""
    pad = torch.nn.functional.pad
    x, pooled = pad(x, (0, 0, 0, -x.shape[2] % block)), pad(pooled, (0, 0, 0, -pooled.shape[2] % block))
    return torch.cat([x, pooled.to(x.dtype)], dim=2)
