"""Quantised operands of attention: keys in INT8, values in FP8 (e4m3), and the specification of both.

Source: SageAttention (arXiv 2410.02367) for INT8 products of queries and smoothed keys, SageAttention2 (2411.10958) for
FP8 weights and values with a scale per channel, SpargeAttn (2502.18137) for both on kept blocks only.
Differs in: keys and values are stored tile by tile in the plan's order, so that no tile has two scales and a kernel
gathers neither; a query has a scale of its own, which is finer than one per block and as cheap, since a kernel
quantises the queries it holds anyway; weights reach 448, the largest number of e4m3, and are summed in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.kernels.pooling import runs_triton

# Largest magnitudes of the two formats.
INT8_MAX, FP8_MAX = 127.0, 448.0
# Where everything is zero, or so small that nothing of it matters, a scale must still divide.
TINY = 1e-10


@dataclass(frozen=True)
class KeyTiles:
    """Key blocks cut into tiles of ``size`` positions; a tile never spans two blocks.

    start, stop: ``[b, h, T]`` int32, first position of every tile and the end of what may be read in it; surplus tiles
    (T is bounded by shapes) and those behind the key length have stop <= start.
    first: ``[b, h, Nk]`` int32, first tile of every key block.
    """

    size: int
    start: Tensor
    stop: Tensor
    first: Tensor

    @classmethod
    def of(cls, plan: BlockPlan) -> KeyTiles:
        """Tiles of a plan: 64 positions, or the block's next power of two if that is less, but never under 32."""
        size = min(64, max(32, 1 << (plan.block_k - 1).bit_length()))
        edges, blocks, device = plan.k_edges, plan.num_k_blocks, plan.device
        per_block = (edges.diff(dim=-1) + size - 1) // size
        ends = per_block.cumsum(-1)
        if plan.k_starts is None:
            count = (blocks - 1) * -(-plan.block_k // size) + -(-(plan.k_len - (blocks - 1) * plan.block_k) // size)
        else:
            count = plan.k_len // size + blocks
        ids = torch.arange(count, device=device).expand(*ends.shape[:2], -1).contiguous()
        owner = torch.searchsorted(ends.contiguous(), ids, right=True)
        block = owner.clamp(max=blocks - 1)
        start = edges.gather(-1, block) + (ids - (ends - per_block).gather(-1, block)) * size
        readable = edges[..., 1:]
        if plan.key_lengths is not None:
            readable = readable.minimum(plan.key_lengths.to(edges)[:, None, None])
            start, block, owner = (x.expand(plan.batch, -1, -1) for x in (start, block, owner))
        stop = (start + size).minimum(readable.gather(-1, block)).where(owner < blocks, start)
        return cls(size, start.int(), stop.int(), (ends - per_block).int())

    def tokens(self, plan: BlockPlan) -> tuple[Tensor, Tensor]:
        """``[B, H, T, size]``: the token of every slot (int64), and whether there is one that may be read."""
        lead = (plan.batch, plan.heads)
        positions = self.start[..., None] + torch.arange(self.size, device=self.start.device)
        exists = (positions < self.stop[..., None]).expand(*lead, -1, -1)
        tokens = positions.clamp(max=plan.k_len - 1).long().expand(*lead, -1, -1)
        if plan.k_order is not None:
            tokens = plan.k_order.expand(*lead, -1).gather(-1, tokens.flatten(2)).view_as(tokens)
        return tokens, exists


@dataclass(frozen=True)
class Quantized:
    """Keys and values as a kernel reads them; ``D*`` and ``Dv*`` are powers of two, zeros behind D and Dv.

    k: ``[B, H, T, size, D*]`` int8, key less mean, over the tile's scale; None leaves keys as they are.
    k_scale: ``[B, H, T]`` fp32. k_mean: ``[B, H, D]`` fp32, mean of the keys that may be read.
    v: ``[B, H, T, Dv*, size]`` e4m3, value over its channel's scale; None leaves values as they are.
    v_scale: ``[B, H, Dv]`` fp32.
    """

    tiles: KeyTiles
    k: Tensor | None
    k_scale: Tensor | None
    k_mean: Tensor | None
    v: Tensor | None
    v_scale: Tensor | None


def quantize(k: Tensor, v: Tensor, plan: BlockPlan, *, int8_qk: bool, fp8_pv: bool) -> Quantized:
    """Quantise keys and values for a plan; on a GPU in Triton (``kernels.quantize_triton``).

    Args:
        k, v: ``[B, S, H, D]``, any strides; computed in fp32 (fp64 for fp64).
        plan: its key blocks, order and key lengths say what stands in a tile.
        int8_qk, fp8_pv: quantise keys, values.

    """
    if runs_triton(k, v):
        from dsattn.kernels import quantize_triton

        return quantize_triton.quantize(k, v, plan, int8_qk=int8_qk, fp8_pv=fp8_pv)
    tiles = KeyTiles.of(plan)
    tokens, exists = tiles.tokens(plan)
    k8 = k_scale = mean = v8 = v_scale = None
    if int8_qk:
        keys = _take(k, tokens, exists)
        mean = keys.sum((2, 3)) / exists.sum((2, 3))[..., None]
        keys = (keys - mean[:, :, None, None]).masked_fill(~exists[..., None], 0)
        k8, scale = round_int8(keys, (3, 4))
        k8, k_scale = _pad(k8, 4), scale[..., 0, 0]
    if fp8_pv:
        values = _take(v, tokens, exists)
        v_scale = values.abs().amax((2, 3)).clamp(min=TINY) / FP8_MAX
        v8 = _pad(round_fp8(values / v_scale[:, :, None, None]), 4).mT.contiguous()
    return Quantized(tiles, k8, k_scale, mean, v8, v_scale)


def round_int8(x: Tensor, over: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """``x / scale`` in int8, ties away from zero, and the scale: the largest magnitude over some dimensions / 127."""
    scale = x.abs().amax(over, keepdim=True).clamp(min=TINY) / INT8_MAX
    ratio = x / scale
    return (ratio + torch.full_like(ratio, 0.5).copysign(ratio)).to(torch.int8), scale


def round_fp8(x: Tensor) -> Tensor:
    """To e4m3, ties to even; magnitudes up to 448."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def restore(quantized: Quantized, k: Tensor, v: Tensor, plan: BlockPlan) -> tuple[Tensor, Tensor]:
    """What the quantised tensors stand for, token by token: keys less mean and values, ``[B, H, S, D]`` in fp32 (fp64).

    What is not quantised is k or v itself; what may not be read is 0.
    """
    tokens, exists = quantized.tiles.tokens(plan)
    keys, values = _take(k, tokens, exists), _take(v, tokens, exists)
    if quantized.k is not None and quantized.k_scale is not None:
        keys = quantized.k[..., : k.shape[-1]].to(keys.dtype) * quantized.k_scale[..., None, None]
    if quantized.v is not None and quantized.v_scale is not None:
        values = quantized.v.mT[..., : v.shape[-1]].to(values.dtype) * quantized.v_scale[:, :, None, None]
    return _put(keys, tokens, exists, plan.k_len), _put(values, tokens, exists, plan.k_len)


def _work(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _take(x: Tensor, tokens: Tensor, exists: Tensor) -> Tensor:
    """``[B, H, T, size, D]`` fp32 (fp64) from ``x [B, S, H, D]``; zero where there is nothing to read."""
    index = tokens.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    found = x.transpose(1, 2).gather(2, index).unflatten(2, tokens.shape[2:]).to(_work(x))
    return found.masked_fill(~exists[..., None], 0)


def _put(x: Tensor, tokens: Tensor, exists: Tensor, length: int) -> Tensor:
    """The other way round: ``[B, H, S, D]``, zero where nothing stands."""
    target = tokens.masked_fill(~exists, length).flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    out = x.new_zeros(*x.shape[:2], length + 1, x.shape[-1])
    return out.scatter_(2, target, x.flatten(2, 3))[:, :, :length]


def _pad(x: Tensor, dim: int) -> Tensor:
    """The last dimension up to a power of two, at least 32, with zeros."""
    width = max(32, 1 << (x.shape[dim] - 1).bit_length())
    padded = torch.zeros(*x.shape[:dim], width, dtype=x.dtype, device=x.device)
    padded[..., : x.shape[dim]] = x
    return padded
