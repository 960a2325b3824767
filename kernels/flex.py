"""Block-sparse attention on compiled FlexAttention: the fast path on the CPU.

Plans are handed over as explicit blocks. FlexAttention knows equal blocks and one mask function, so orders
become gathers, variable-size blocks are padded to whole tiles, and pooled keys are appended behind the keys.
Uncompiled FlexAttention ignores explicit blocks and computes dense attention: this module never calls it
uncompiled, and a failed compile raises.
"""

from __future__ import annotations

import inspect
import math
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dsattn.block_plan import BlockPlan
from dsattn.kernels import gather
from dsattn.kernels.pooling import pool_blocks, pool_tail

# Only the lists that the forward pass reads; releases before the option always build the others too.
_SIGNATURE = inspect.signature(BlockMask.from_kv_blocks)
LISTS_ONLY: dict[str, Any] = {"compute_q_blocks": False} if "compute_q_blocks" in _SIGNATURE.parameters else {}

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
    q_flex, k_flex, v_flex = q_tiles.load(q), k_tiles.load(k), k_tiles.load(v)
    readable = _readable(k_tiles, plan)
    if plan.tail != "none":
        if plan.tail == "pooled":
            k_pool, v_pool, log_count = _pool(k_flex, v_flex, k, v, plan)
            weights = log_count[:, :, None].masked_fill(plan.block_mask, -torch.inf)
        else:
            # One key per query block, which only this block may read: of zeros, its weight is all there is.
            v_pool, log_weight = pool_tail(q, k, v, plan, scale)
            k_pool = v_pool.new_zeros(*v_pool.shape[:3], q.shape[-1])
            others = ~torch.eye(plan.num_q_blocks, dtype=torch.bool, device=q.device)
            weights = log_weight[:, :, None].masked_fill(others, -torch.inf)
        k_flex, v_flex = _append(k_flex, k_pool, plan.block_k), _append(v_flex, v_pool, plan.block_k)
        first = k_flex.shape[2] - _rounded(weights.shape[-1], plan.block_k)
        mask, score_mod = _tail_mask(q_tiles, k_tiles, readable, q_tiles.spread(weights, 2), plan, first)
    else:
        mask, score_mod = _plain_mask(q_tiles, k_tiles, readable, plan), None
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
    options = {} if mask is None or q.device.type == "cpu" else {"kernel_options": _gpu_tile(mask, q.shape[-1])}
    with torch._dynamo.config.patch(recompile_limit=COMPILED_SHAPES, accumulated_recompile_limit=COMPILED_SHAPES):
        result = _compiled()(
            q, k, v, score_mod=score_mod, block_mask=mask, scale=scale, return_lse=return_lse, **options
        )
    # One tensor without the LSE, a pair with it.
    return tuple(result) if return_lse else (result,)


def _gpu_tile(mask: BlockMask, dim: int) -> dict[str, int]:
    """Tile of FlexAttention's GPU kernel, which must divide the mask's blocks: its own choice may not."""
    largest = (128, 64) if dim <= 128 else (64, 32)
    return {name: math.gcd(*pair) for name, *pair in zip(("BLOCK_M", "BLOCK_N"), mask.BLOCK_SIZE, largest, strict=True)}


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

    @property
    def length(self) -> int:
        """Slots of the longest head."""
        return self.position.shape[-1]

    def load(self, x: Tensor) -> Tensor:
        """``[B, S, H, D]`` to ``[B, H, P, D]``."""
        if self.owner is None and self.order is None:
            return x.transpose(1, 2)
        if self.owner is None and self.order is not None and self.order.shape[:2] == (1, 1):
            return x[:, self.order[0, 0]].transpose(1, 2)
        token = self._token(x.shape[0], x.shape[2])
        return x.transpose(1, 2).gather(2, token[..., None].expand(-1, -1, -1, x.shape[-1]))

    def store(self, x: Tensor, length: int) -> Tensor:
        """``[B, H, P, D]`` back to ``[B, S, H, D]``."""
        if self.owner is None and self.order is None:
            return x.transpose(1, 2)
        if self.owner is None and self.order is not None and self.order.shape[:2] == (1, 1):
            full = x.new_empty(x.shape[0], length, x.shape[1], x.shape[-1])
            full[:, self.order[0, 0]] = x.transpose(1, 2)
            return full
        # Empty slots write to one extra row that is cut off again.
        token = self._token(*x.shape[:2]).where(self.valid, length)
        full = x.new_empty(*x.shape[:2], length + 1, x.shape[-1])
        return full.scatter_(2, token[..., None].expand_as(x), x)[:, :, :length].transpose(1, 2)

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


def _readable(k_tiles: _Tiles, plan: BlockPlan) -> Tensor | None:
    """``[b, h, P]`` bool, key slots that may be read; None when all may."""
    readable = None if k_tiles.owner is None else k_tiles.valid
    if plan.key_lengths is not None:
        within = k_tiles.position < plan.key_lengths[:, None, None]
        readable = within if readable is None else readable & within
    return readable


def _pool(k_flex: Tensor, v_flex: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled keys and values; keys that are in plan order already are not gathered a second time."""
    if plan.k_starts is None:
        weights = plan.tail_weights
        if weights is not None and plan.k_order is not None:
            lead = torch.broadcast_shapes(weights.shape[:2], plan.k_order.shape[:2])
            weights = weights.expand(*lead, -1).gather(2, plan.k_order.expand(*lead, -1))
        plan = replace(plan, k_order=None, tail_weights=weights)
        k, v = k_flex.transpose(1, 2), v_flex.transpose(1, 2)
    return pool_blocks(k, v, plan)


def _plain_mask(q_tiles: _Tiles, k_tiles: _Tiles, readable: Tensor | None, plan: BlockPlan) -> BlockMask:
    lengths = q_tiles.length, k_tiles.length
    if readable is None:
        counts, indices = _full_lists(q_tiles, k_tiles, plan)
        none = torch.zeros_like(counts), torch.zeros_like(indices)
        return _block_mask(none, (counts, indices), plan, lengths)
    kept = k_tiles.spread(q_tiles.spread(plan.block_mask, 2), 3)
    some, every = _tile_readable(readable, plan.block_k)
    partial, full = (_lists(kept & tiles[:, :, None]) for tiles in (some & ~every, every))
    shape = readable.shape

    def mask_mod(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return readable[b % shape[0], h % shape[1], k_index]

    return _block_mask(partial, full, plan, lengths, mask_mod)


def _tail_mask(
    q_tiles: _Tiles, k_tiles: _Tiles, readable: Tensor | None, weights: Tensor, plan: BlockPlan, first: int
) -> tuple[BlockMask, Callable[..., Tensor]]:
    """Mask over keys and the pooled keys that stand from slot ``first`` on; score function with their bias.

    ``weights [b, h, q tiles, T]``: log-weight of the pooled keys for a query tile, -inf for those it does not read.
    """
    block_q, block_k = plan.block_q, plan.block_k
    bias = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % block_k), value=-torch.inf)
    # A last block that is partial has empty slots between it and the pooled keys; a query block with a pooled key of
    # its own reads one tile of them, not all.
    if readable is None and (first != k_tiles.length or plan.tail == "pooled_block"):
        readable = torch.ones(1, 1, k_tiles.length, dtype=torch.bool, device=weights.device)
    tail_tiles = bias.shape[-1] // block_k
    if readable is None:
        full = _full_lists(q_tiles, k_tiles, plan)
        tail = torch.arange(first // block_k, first // block_k + tail_tiles, dtype=torch.int32, device=bias.device)
        partial = torch.full_like(full[0], tail_tiles), tail.expand(*full[0].shape, -1).contiguous()
        allowed = torch.ones(1, 1, 1, dtype=torch.bool, device=bias.device)
    else:
        allowed = torch.nn.functional.pad(readable, (0, first - readable.shape[-1]))
        some, every = _tile_readable(allowed, block_k)
        kept = k_tiles.spread(q_tiles.spread(plan.block_mask, 2), 3)
        tail = (bias != -torch.inf).unflatten(-1, (tail_tiles, block_k)).any(-1)
        lead = torch.broadcast_shapes(kept.shape[:3], (*some.shape[:2], 1), tail.shape[:3])
        kept, some, every = (x.expand(*lead, -1) for x in (kept, some[:, :, None], every[:, :, None]))
        tail = tail.expand(*lead, -1)
        partial = _lists(torch.cat([kept & some & ~every, tail], -1))
        full = _lists(torch.cat([kept & every, torch.zeros_like(tail)], -1))
    shape, bias_shape = allowed.shape, bias.shape

    def pooled_bias(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return bias[b % bias_shape[0], h % bias_shape[1], q_index // block_q, (k_index - first).clamp(min=0)]

    def mask_mod(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        key = allowed[b % shape[0], h % shape[1], k_index.clamp(max=shape[2] - 1)]
        return torch.where(k_index < first, key, pooled_bias(b, h, q_index, k_index) != -torch.inf)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return torch.where(k_index < first, score, score + pooled_bias(b, h, q_index, k_index))

    lengths = q_tiles.length, first + bias.shape[-1]
    return _block_mask(partial, full, plan, lengths, mask_mod), score_mod


def _block_mask(
    partial: tuple[Tensor, Tensor],
    full: tuple[Tensor, Tensor],
    plan: BlockPlan,
    lengths: tuple[int, int],
    mask_mod: Callable[..., Tensor] | None = None,
) -> BlockMask:
    """BlockMask from (counts, lists) of the blocks that need the mask function and of those that do not."""
    # The CPU kernel reads the number of key blocks off the lists' width.
    width = -(-lengths[1] // plan.block_k)
    wide = [torch.nn.functional.pad(indices, (0, width - indices.shape[-1])) for _, indices in (partial, full)]
    return BlockMask.from_kv_blocks(
        partial[0],
        wide[0],
        full[0],
        wide[1],
        BLOCK_SIZE=(plan.block_q, plan.block_k),
        mask_mod=mask_mod,
        seq_lengths=lengths,
        **LISTS_ONLY,
    )


def _tile_readable(readable: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Per tile: some slot readable, every slot readable (slots behind the end count as readable)."""
    pad = -readable.shape[-1] % block
    some = torch.nn.functional.pad(readable, (0, pad), value=False).unflatten(-1, (-1, block)).any(-1)
    every = torch.nn.functional.pad(readable, (0, pad), value=True).unflatten(-1, (-1, block)).all(-1)
    return some, every


def _full_lists(q_tiles: _Tiles, k_tiles: _Tiles, plan: BlockPlan) -> tuple[Tensor, Tensor]:
    """The kept blocks as FlexAttention's lists; the plan's own where tiles are blocks."""
    if q_tiles.owner is None and k_tiles.owner is None:
        return plan.counts, plan.indices.int()
    return _lists(k_tiles.spread(q_tiles.spread(plan.block_mask, 2), 3))


def _lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and block lists of a block map, in FlexAttention's form."""
    indices = torch.sort((~mask).to(torch.uint8), dim=-1, stable=True).indices
    return mask.sum(-1, dtype=torch.int32), indices.to(torch.int32)


def _append(x: Tensor, pooled: Tensor, block: int) -> Tensor:
    """``[B, H, P, D]``: pooled rows behind x, both padded with zeros to whole blocks."""
    batch, heads, length, dim = x.shape
    first, extra = _rounded(length, block), _rounded(pooled.shape[2], block)
    joined = x.new_zeros(batch, heads, first + extra, dim)
    joined[:, :, :length] = x
    joined[:, :, first : first + pooled.shape[2]] = pooled
    return joined


def _rounded(length: int, block: int) -> int:
    return -(-length // block) * block
