"""Verdicts: which of the tiles a call computed mattered, as the kernel saw them. One bit per tile.

A tile is a pair (query block, key block) of a `BlockPlan`. Bit ``j % 32`` of word ``j // 32`` is key block j.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WORD = 32


@dataclass(frozen=True, eq=False)
class VerdictRule:
    """How a kernel judges the tiles it computes.

    For every query r of a tile, the tile's gain is its largest logit less the largest one of the tiles visited
    before it in this call, times log2(e). The tile is needed if the gain of any query is above the threshold: below
    -10, say, no weight in it reaches 2^-10 of the row's largest so far. The first visited tile with a readable key is
    always needed. A tail takes no part.
    Source: LiteAttention (arXiv 2511.11062), its kernel's test; the same quantity skips PV in SpargeAttn (2502.18137).

    Args:
        threshold: ``[1 or B, 1 or H]`` fp32, log2 units; -inf needs every tile, +inf only the first.
        pv_skip: a tile after the first whose largest gain is at most ``-pv_skip`` (log2 units, at least 0) is left
            out of this very call, its softmax weights and its product with v; implementations may decide on parts of
            a tile. None leaves out nothing.

    """

    threshold: Tensor
    pv_skip: float | None = None


def count_words(blocks: int) -> int:
    """32-bit words that hold one bit per block."""
    return -(-blocks // WORD)


def pack_bits(mask: Tensor) -> Tensor:
    """``[..., N]`` bool to ``[..., ceil(N / 32)]`` int32; bits behind N are 0."""
    shifts = torch.arange(WORD, dtype=torch.int32, device=mask.device)
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % WORD))
    words = padded.view(*mask.shape[:-1], -1, WORD).to(torch.int32)
    # Different bits: their sum is their union, and no sum leaves the range.
    return (words << shifts).sum(-1, dtype=torch.int32)


def unpack_bits(bits: Tensor, count: int) -> Tensor:
    """``[..., W]`` int32 to ``[..., count]`` bool."""
    shifts = torch.arange(WORD, dtype=torch.int32, device=bits.device)
    return (bits[..., None] >> shifts & 1).flatten(-2)[..., :count].bool()


def pick_bits(bits: Tensor, indices: Tensor) -> Tensor:
    """``[B, H, Nq, K]`` bool: the bits ``[b, h, Nq, W]`` that index lists ``[b, h, Nq, K]`` name."""
    lead = torch.broadcast_shapes(bits.shape[:3], indices.shape[:3])  # type: ignore[no-untyped-call]
    # One word per entry, changed in place: the largest tensor of all there are.
    words = bits.expand(*lead, -1).gather(-1, (indices // WORD).long().expand(*lead, -1))
    return words.bitwise_right_shift_(indices % WORD).bitwise_and_(1).bool()
