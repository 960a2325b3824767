"""BlockPlan: which key blocks each query block reads. The only thing a kernel knows about a method.

A plan describes positions, not tokens: with a token order, position ``p`` of head ``h`` holds token
``order[b, h, p]``; without one, positions are tokens. Blocks are runs of consecutive positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from dsattn.verdict import pick_bits

Tail = Literal["none", "pooled", "pooled_block"]
TAILS: tuple[Tail, ...] = ("none", "pooled", "pooled_block")
FeatureMap = Literal["softmax", "elu", "relu", "hedgehog"]
# Elements of what is worked on at a time where lists are made or read.
_CHUNK_ELEMENTS = 1 << 23
FEATURE_MAPS: tuple[FeatureMap, ...] = ("softmax", "elu", "relu", "hedgehog")


@dataclass(frozen=True, eq=False)
class LinearTail:
    """Linear attention that is added, through a learned projection, to what a plan's softmax gives.

    Sums over keys and values are made anew from the current k and v at every call.

    Args:
        weight, bias: ``[D, D]`` and ``[D]``: ``out += linear @ weight.T + bias``, the same for all heads.
        feature_map: applied to queries and keys, see ``dsattn.kernels.feature_maps``.
        blocks: ``[b, h, Nq, Nk]`` bool, the key blocks that enter for each query block; None means all keys.

    """

    weight: Tensor
    bias: Tensor
    feature_map: FeatureMap = "softmax"
    blocks: Tensor | None = None

    def __post_init__(self) -> None:
        if self.feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, got {self.feature_map!r}")
        dim = self.bias.shape[-1]
        if self.weight.shape != (dim, dim) or self.bias.ndim != 1:
            shapes = f"{tuple(self.weight.shape)} and {tuple(self.bias.shape)}"
            raise ValueError(f"weight and bias must be [D, D] and [D], got {shapes}")


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Frozen value: the block-sparse pattern of one attention call.

    Leading dimensions ``b`` and ``h`` of every tensor are 1 (shared by all) or ``batch`` / ``heads``.

    Args:
        batch, heads: what the leading dimensions broadcast to.
        q_len, k_len: number of query and key tokens.
        block_q, block_k: positions per block; with ``q_starts`` / ``k_starts`` the tile a kernel should use.
        counts: ``[b, h, Nq]`` int32, number of key blocks that each query block reads.
        indices: ``[b, h, Nq, K]`` int16 or int32, their indices; entries at and behind ``counts`` are padding (0).
            Entries of one row are distinct; their order is the order in which kernels visit them.
        q_order, k_order: ``[b, h, len]`` int64, token at each position; None keeps the given order.
        q_starts, k_starts: ``[b, h, N + 1]`` int32, first position of every block for variable-size blocks
            (clusters), non-decreasing, from 0 to the length; blocks may be empty. None: fixed-size blocks,
            the last one partial.
        key_lengths: ``[batch]`` int32, number of key positions that may be read (padded text behind them
            never enters); None means all. At least 1, and every row keeps a block with a readable key.
        tail: what the blocks that are not kept contribute. ``"none"``: nothing. ``"pooled"``: block j with
            n_j readable keys enters the same softmax as one key, its mean, with weight n_j and the mean
            value; recomputed from the current k and v at every call. ``"pooled_block"``: the same, but the score
            of a pooled key is that of the query block's mean query, once for all its rows.
        tail_weights: ``[b, h, k_len]`` fp32, positive: what each key (by token, not by position) counts for in the
            pool of its block. Their sum takes the place of n_j, and the mean value is weighed by them; the mean key
            is not. None is 1 for every key.
        linear: linear attention beside the softmax, added to its result; the log-sum-exp does not know of it. One
            that names its blocks needs blocks of equal size and no token order.

    """

    batch: int
    heads: int
    q_len: int
    k_len: int
    block_q: int
    block_k: int
    counts: Tensor
    indices: Tensor
    q_order: Tensor | None = None
    k_order: Tensor | None = None
    q_starts: Tensor | None = None
    k_starts: Tensor | None = None
    key_lengths: Tensor | None = None
    tail: Tail = "none"
    tail_weights: Tensor | None = None
    linear: LinearTail | None = None

    def __post_init__(self) -> None:
        if self.tail not in TAILS:
            raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {self.tail!r}")
        lead = self.counts.shape[:2]
        if self.counts.ndim != 3 or lead[0] not in (1, self.batch) or lead[1] not in (1, self.heads):
            raise ValueError(
                f"counts must be [1 or {self.batch}, 1 or {self.heads}, Nq], got {tuple(self.counts.shape)}"
            )
        if self.counts.shape[2] != self.num_q_blocks:
            raise ValueError(f"counts must have {self.num_q_blocks} query blocks, got {self.counts.shape[2]}")
        if self.indices.ndim != 4 or self.indices.shape[:3] != self.counts.shape:
            raise ValueError(f"indices must be {tuple(self.counts.shape)} + [K], got {tuple(self.indices.shape)}")
        for name, length in (("q_order", self.q_len), ("k_order", self.k_len), ("tail_weights", self.k_len)):
            per_token = getattr(self, name)
            if per_token is not None and (per_token.ndim != 3 or per_token.shape[-1] != length):
                raise ValueError(f"{name} must be [b, h, {length}], got {tuple(per_token.shape)}")
        if self.key_lengths is not None and self.key_lengths.shape != (self.batch,):
            raise ValueError(f"key_lengths must be [{self.batch}], got {tuple(self.key_lengths.shape)}")
        if self.linear is not None and self.linear.blocks is not None:
            self._check_linear_blocks(self.linear.blocks)

    def _check_linear_blocks(self, blocks: Tensor) -> None:
        shape = (self.num_q_blocks, self.num_k_blocks)
        if blocks.ndim != 4 or blocks.shape[2:] != shape or blocks.dtype != torch.bool:
            came = f"{tuple(blocks.shape)} {blocks.dtype}"
            raise ValueError(f"linear.blocks must be [b, h, {shape[0]}, {shape[1]}] bool, got {came}")
        if any(x is not None for x in (self.q_order, self.k_order, self.q_starts, self.k_starts)):
            raise ValueError("linear.blocks needs blocks of equal size and no token order; use linear.blocks=None")

    # -- construction ---------------------------------------------------------------------------------

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        q_len: int,
        k_len: int,
        *,
        batch: int,
        heads: int,
        block_q: int = 64,
        block_k: int = 64,
        q_order: Tensor | None = None,
        k_order: Tensor | None = None,
        q_starts: Tensor | None = None,
        k_starts: Tensor | None = None,
        key_lengths: Tensor | None = None,
        tail: Tail = "none",
        tail_weights: Tensor | None = None,
        linear: LinearTail | None = None,
    ) -> BlockPlan:
        """Plan from a block map; key blocks are visited in ascending order.

        ``K`` is ``Nk``: no host synchronisation is needed to size the lists. Their entries take two bytes where they
        fit (int16).

        Args:
            mask: ``[b, h, Nq, Nk]`` bool, the blocks that are kept; every row keeps at least one with a readable key
                (``validate`` checks).
            q_len, k_len: number of query and key tokens.
            batch, heads: what ``b`` and ``h`` (each 1 or the full number) broadcast to.
            block_q, block_k: positions per block, at least 1.
            q_order, k_order, q_starts, k_starts, key_lengths, tail, tail_weights, linear: as in the plan itself.

        Raises:
            ValueError: shapes that do not fit each other.

        """
        counts, indices = _lists(mask)
        return cls(
            batch=batch,
            heads=heads,
            q_len=q_len,
            k_len=k_len,
            block_q=block_q,
            block_k=block_k,
            counts=counts,
            indices=indices,
            q_order=q_order,
            k_order=k_order,
            q_starts=q_starts,
            k_starts=k_starts,
            key_lengths=key_lengths,
            tail=tail,
            tail_weights=tail_weights,
            linear=linear,
        )

    @classmethod
    def dense(
        cls, batch: int, heads: int, q_len: int, k_len: int, *, block_q: int = 64, block_k: int = 64,
        device: torch.device | str = "cpu",
    ) -> BlockPlan:  # fmt: skip
        """Plan that keeps everything, for ``batch`` rows of ``heads`` heads, ``q_len`` queries and ``k_len`` keys."""
        shape = (1, 1, -(-q_len // block_q), -(-k_len // block_k))
        mask = torch.ones(shape, dtype=torch.bool, device=device)
        return cls.from_mask(mask, q_len, k_len, batch=batch, heads=heads, block_q=block_q, block_k=block_k)

    def with_key_lengths(self, key_lengths: Tensor | None) -> BlockPlan:
        """The same structure for a call in which other keys are padding.

        Args:
            key_lengths: ``[batch]`` int32, leading key positions that may be read, at least 1; None means all.

        """
        return replace(self, key_lengths=key_lengths)

    @property
    def why_not_plain(self) -> str | None:
        """What sets the plan apart from plain block-sparse attention (equal blocks, no order, no tail), or None."""
        if self.q_order is not None or self.k_order is not None:
            return "a token order"
        if self.q_starts is not None or self.k_starts is not None:
            return "blocks of variable size"
        return None if self.tail == "none" else f"tail={self.tail!r}"

    def restrict(self, bits: Tensor) -> BlockPlan:
        """The plan without the blocks whose bit is clear, visited in the same order; reads nothing back to the host.

        A row that would lose every readable block keeps the first readable one of its list.

        Args:
            bits: ``[1 or batch, 1 or heads, Nq, ceil(Nk / 32)]`` int32, one bit per block, see ``dsattn.verdict``.

        """
        listed = torch.arange(self.indices.shape[-1], device=self.device) < self.counts[..., None]
        readable = listed & pick_columns(self.k_sizes > 0, self.indices)
        kept = pick_bits(bits, self.indices) & listed
        first = readable & (readable.cumsum(-1, dtype=torch.int32) == 1)
        kept = kept | (first & ~(kept & readable).any(-1, keepdim=True))
        # Kept entries move up to their rank; the others go to one extra slot that is cut off again.
        width = self.indices.shape[-1]
        target = kept.cumsum(-1).sub_(1).masked_fill_(~kept, width)
        lists = torch.zeros(*kept.shape[:-1], width + 1, dtype=self.indices.dtype, device=self.device)
        lists = lists.scatter_(-1, target, self.indices.expand_as(kept))[..., :-1]
        return replace(self, counts=kept.sum(-1, dtype=torch.int32), indices=lists)

    # -- shape ----------------------------------------------------------------------------------------

    @property
    def num_q_blocks(self) -> int:
        """Number of query blocks, empty clusters included."""
        return -(-self.q_len // self.block_q) if self.q_starts is None else self.q_starts.shape[-1] - 1

    @property
    def num_k_blocks(self) -> int:
        """Number of key blocks, empty clusters included."""
        return -(-self.k_len // self.block_k) if self.k_starts is None else self.k_starts.shape[-1] - 1

    @property
    def device(self) -> torch.device:
        """Device of the plan's tensors."""
        return self.counts.device

    @cached_property
    def q_edges(self) -> Tensor:
        """``[b, h, Nq + 1]`` int64: first position of every query block, then ``q_len``."""
        return _edges(self.q_len, self.block_q, self.q_starts, self.device)

    @cached_property
    def k_edges(self) -> Tensor:
        """``[b, h, Nk + 1]`` int64: first position of every key block, then ``k_len``."""
        return _edges(self.k_len, self.block_k, self.k_starts, self.device)

    @cached_property
    def q_sizes(self) -> Tensor:
        """``[b, h, Nq]`` int64: queries per block."""
        return self.q_edges.diff(dim=-1)

    @cached_property
    def k_sizes(self) -> Tensor:
        """``[b, h, Nk]`` int64: readable keys per block; ``b`` is ``batch`` when ``key_lengths`` is set."""
        edges = self.k_edges
        if self.key_lengths is not None:
            edges = edges.minimum(self.key_lengths.to(edges)[:, None, None])
        return edges.diff(dim=-1)

    @cached_property
    def q_block_of_token(self) -> Tensor:
        """``[b, h, q_len]`` int64: query block of every token."""
        return _block_of_token(self.q_edges, self.q_order, self.q_len)

    @cached_property
    def k_block_of_token(self) -> Tensor:
        """``[b, h, k_len]`` int64: key block of every token, whether it may be read or not."""
        return _block_of_token(self.k_edges, self.k_order, self.k_len)

    @cached_property
    def derived(self) -> dict[tuple[str, int], Any]:
        """What kernels made of this plan and will need again, by name and tile size; lives as long as the plan."""
        return {}

    # -- meaning --------------------------------------------------------------------------------------

    @cached_property
    def block_mask(self) -> Tensor:
        """``[b, h, Nq, Nk]`` bool: the kept (query block, key block) pairs."""
        # Padding points at one extra column that is cut off again.
        mask = torch.zeros(*self.counts.shape, self.num_k_blocks + 1, dtype=torch.bool, device=self.device)
        for part, indices, counts in _chunks(mask, self.indices, self.counts[..., None]):
            valid = torch.arange(indices.shape[-1], device=self.device) < counts
            part.scatter_(-1, indices.long().masked_fill_(~valid, self.num_k_blocks), True)
        return mask[..., :-1]

    @cached_property
    def key_lists(self) -> tuple[Tensor, Tensor]:
        """The lists the other way round: ``counts [b, h, Nk]`` and ``indices [b, h, Nk, Nq]``.

        Which query blocks read each key block, ascending; a backward pass walks them.
        """
        return _lists(self.block_mask.mT)

    @cached_property
    def density(self) -> Tensor:
        """``[B, H]`` float32: exactly computed (query, key) pairs / all pairs, readable tokens only."""
        lead = torch.broadcast_shapes(self.counts.shape[:2], self.k_sizes.shape[:2])  # type: ignore[no-untyped-call]
        sizes = self.k_sizes.int()[:, :, None].expand(*lead, self.counts.shape[2], -1)
        keys = torch.empty(*lead, self.counts.shape[2], 1, dtype=torch.int64, device=self.device)
        lists = self.indices.expand(*lead, -1, -1), self.counts.expand(*lead, -1)[..., None]
        for out, indices, counts, size in _chunks(keys, *lists, sizes):
            listed = torch.arange(indices.shape[-1], device=self.device) < counts
            torch.sum(size.gather(-1, indices.long()).mul_(listed), -1, keepdim=True, out=out)
        kept = (keys.squeeze(-1) * self.q_sizes).sum(-1)
        pairs = self.q_len * self.k_sizes.sum(-1)
        return (kept / pairs).float().expand(self.batch, self.heads)

    def to_dense(self) -> Tensor:
        """``[B, H, Sq, Sk]`` bool in original token order: the pairs computed exactly. For tests and pictures."""
        return self.rows_to_dense(torch.arange(self.q_len, device=self.device))

    def rows_to_dense(self, rows: Tensor) -> Tensor:
        """``[B, H, R, Sk]`` bool in original token order: the keys that the query tokens ``rows [R]`` read exactly."""
        lead = (self.batch, self.heads)
        pairs = self.kept_blocks(rows).gather(
            3, self.k_block_of_token.expand(*lead, -1)[:, :, None].expand(-1, -1, len(rows), -1)
        )
        if self.key_lengths is None:
            return pairs
        readable = torch.arange(self.k_len, device=self.device) < self.key_lengths[:, None]
        readable = readable[:, None].expand(*lead, -1)
        if self.k_order is not None:
            order = self.k_order.expand(*lead, -1)
            readable = torch.zeros_like(readable).scatter_(-1, order, readable)
        return pairs & readable[:, :, None]

    def kept_blocks(self, rows: Tensor) -> Tensor:
        """``[B, H, R, Nk]`` bool: the key blocks that the query tokens ``rows [R]`` read."""
        lead = (self.batch, self.heads)
        mask = self.block_mask.expand(*lead, -1, -1)
        block = self.q_block_of_token.expand(*lead, -1)[..., rows]
        return mask.gather(2, block[..., None].expand(-1, -1, -1, mask.shape[-1]))

    def validate(self) -> BlockPlan:
        """Check what the constructor cannot without reading values (synchronises a GPU).

        Raises:
            ValueError: a row that keeps no readable key, an index out of range or twice in a row, an order
                that is no permutation, or block starts that do not run from 0 to the length.

        """
        valid = torch.arange(self.indices.shape[-1], device=self.device) < self.counts[..., None]
        kept = self.indices[valid]
        if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= self.num_k_blocks):
            raise ValueError(f"indices must lie in [0, {self.num_k_blocks}), got {int(kept.min())}..{int(kept.max())}")
        if not torch.equal(self.block_mask.sum(-1), self.counts.long()):
            raise ValueError("a row of indices names the same key block twice, or counts exceeds its length")
        for name, edges, length in (("q", self.q_edges, self.q_len), ("k", self.k_edges, self.k_len)):
            if bool((edges.diff(dim=-1) < 0).any()) or bool(
                (edges[..., 0] != 0).any() | (edges[..., -1] != length).any()
            ):
                raise ValueError(f"{name}_starts must run from 0 to {length} without decreasing")
        for name, order, length in (("q", self.q_order, self.q_len), ("k", self.k_order, self.k_len)):
            if order is not None and not torch.equal(
                order.sort(-1).values, torch.arange(length, device=self.device).expand_as(order)
            ):
                raise ValueError(f"{name}_order must be a permutation of 0..{length - 1} in every head")
        if self.tail_weights is not None and not bool((self.tail_weights > 0).all()):
            raise ValueError("tail_weights must be positive")
        readable = (self.block_mask & (self.k_sizes > 0)[:, :, None, :]).any(-1)
        if bool((~readable & (self.q_sizes > 0)).any()):
            raise ValueError(
                "a query block keeps no key: every non-empty row must keep at least one readable key block"
            )
        return self


def _lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """``counts [b, h, N]`` int32 and ``indices [b, h, N, M]`` of a block map ``[b, h, N, M]``, columns ascending."""
    counts = mask.sum(dim=-1, dtype=torch.int32)
    columns = torch.arange(mask.shape[-1], device=mask.device)
    kind = torch.int16 if mask.shape[-1] <= torch.iinfo(torch.int16).max else torch.int32
    indices = torch.empty(mask.shape, dtype=kind, device=mask.device)
    for part, kept, count in _chunks(indices, mask, counts[..., None]):
        # Kept columns first, in ascending order: a stable sort on "not kept".
        order = torch.sort((~kept).to(torch.uint8), dim=-1, stable=True).indices
        part.copy_(order.masked_fill_(columns >= count, 0))
    return counts, indices


def _chunks(first: Tensor, *rest: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same runs of rows of tensors ``[b, h, N, *]``, as views: int64 temporaries of one take 64 MiB at most."""
    rows = max(1, _CHUNK_ELEMENTS // max(1, *(x.shape[-1] for x in (first, *rest))))
    b, h, n = first.shape[:3]
    if b * h * n <= rows:
        yield (first, *rest)
        return
    step = max(1, rows // n)
    for i, j, start in itertools.product(range(b), range(0, h, step), range(0, n, rows)):
        cut = (slice(i, i + 1), slice(j, j + step), slice(start, start + rows))
        yield tuple(x[cut] for x in (first, *rest))


def _edges(length: int, block: int, starts: Tensor | None, device: torch.device) -> Tensor:
    if starts is not None:
        return starts.long()
    return torch.arange(0, length + block, block, device=device).clamp_(max=length)[None, None]


def pick_columns(columns: Tensor, indices: Tensor) -> Tensor:
    """``[B, H, Nq, K]``: the entries of ``columns [b, h, Nk]`` that index lists ``[b, h, Nq, K]`` name."""
    lead = torch.broadcast_shapes(columns.shape[:2], indices.shape[:2])  # type: ignore[no-untyped-call]
    rows = columns.expand(*lead, -1)[:, :, None].expand(-1, -1, indices.shape[2], -1)
    return rows.gather(-1, indices.long().expand(*lead, -1, -1))


def _block_of_token(edges: Tensor, order: Tensor | None, length: int) -> Tensor:
    """``[b, h, length]``: block that each token belongs to (empty blocks own nothing)."""
    positions = torch.arange(length, device=edges.device).expand(*edges.shape[:2], -1).contiguous()
    block = torch.searchsorted(edges[..., 1:].contiguous(), positions, right=True)
    if order is None:
        return block
    b, h = (max(x, y) for x, y in zip(block.shape[:2], order.shape[:2], strict=True))
    order, block = order.expand(b, h, -1), block.expand(b, h, -1)
    return torch.empty_like(order).scatter_(-1, order, block)
