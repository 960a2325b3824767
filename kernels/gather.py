"""Block-sparse attention from gathers and SDPA: needs nothing but torch, runs on every device.

On a CPU it is the fast path for variable-size blocks (clusters): the kept keys of a query block are gathered into
one dense run, so nothing is padded to tiles, and pooled keys are just more keys. It reads list lengths on the host,
so on a GPU it synchronises: it is the fallback and the debugging aid there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.kernels.pooling import pool_blocks, pool_tail
from dsattn.verdict import VerdictRule, pack_bits

# Elements of one chunk's gathered keys (or its logits): on a CPU keys and values should stay in the cache between
# the gather and the product, elsewhere the number only bounds memory.
CHUNK_ELEMENTS = {"cpu": 1 << 19, "other": 1 << 24}
# Key positions that are listed at a time; bounds the memory of the lists.
LISTED_KEYS = 1 << 22
# Query blocks of one chunk are padded to its largest; a chunk ends where they are smaller than this share of it.
MIN_FILL = 0.8


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float,
    need_lse: bool = True,
    rule: VerdictRule | None = None,
    needed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Same contract as ``kernels.reference.block_sparse_attention``; ``lse`` is None unless ``need_lse``.

    Half-precision inputs are computed in fp32.
    """
    batch, q_len, heads, dim = q.shape
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = _Rows(plan)
    # Row (b * S + token) * H + h of these matrices is one token of one head.
    # Key and value stand in one row: one gather of twice the length instead of two.
    q_rows, kv_rows = q.reshape(-1, dim), torch.cat([k, v], -1).view(-1, dim + v.shape[-1])
    first_pooled, tail_bias = len(kv_rows), None
    if plan.tail != "none":
        tail_kv, tail_bias = _tail_keys(q, k, v, plan, rows.kept, scale)
        kv_rows = torch.cat([kv_rows.to(work), tail_kv])
        tail_slots = torch.arange(tail_bias.shape[1], device=q.device) + first_pooled
    # Empty slots of a chunk write to one extra row that is cut off again.
    out = torch.empty(len(q_rows) + 1, v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(len(q_rows) + 1, dtype=work, device=q.device) if need_lse else None
    limit = CHUNK_ELEMENTS.get(q.device.type, CHUNK_ELEMENTS["other"])
    judge = None if rule is None or needed is None else _Judge(rows, rule, needed)

    for chunk in rows.chunks(dim, limit):
        keys = chunk.keys
        bias = torch.zeros(keys.shape, dtype=work, device=q.device).masked_fill_(~chunk.key_exists, -torch.inf)
        if tail_bias is not None:
            owner = chunk.head if plan.tail == "pooled" else chunk.rows
            keys = torch.cat([keys, owner[:, None] * len(tail_slots) + tail_slots], 1)
            bias = torch.cat([bias, tail_bias[chunk.rows]], 1)
        kv_chunk, q_chunk = (
            x.index_select(0, index.flatten()).to(work).view(len(index), -1, x.shape[-1])
            for x, index in ((kv_rows, keys), (q_rows, chunk.queries))
        )
        k_chunk, v_chunk = kv_chunk.split([dim, v.shape[-1]], -1)
        check = None if judge is None else partial(judge, chunk)
        result, result_lse = _softmax_attention(q_chunk, k_chunk, v_chunk, bias[:, None], scale, need_lse, check)
        target = chunk.queries.masked_fill(~chunk.query_exists, len(q_rows)).flatten()
        out = out.index_copy_(0, target, result.flatten(0, 1).to(q.dtype))
        if lse is not None and result_lse is not None:
            lse = lse.index_copy_(0, target, result_lse.flatten())
    out = out[:-1].view(batch, q_len, heads, -1)
    return out, None if lse is None else lse[:-1].view(batch, q_len, heads).transpose(1, 2).contiguous()


def _tail_keys(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, kept: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The tail as more keys: their rows ``[*, D + Dv]``, T per head or per plan row, and biases ``[plan rows, T]``."""
    if plan.tail == "pooled":
        k_pool, v_pool, log_count = pool_blocks(k, v, plan)
        bias = log_count.flatten(0, 1)[:, None].masked_fill(kept, -torch.inf).flatten(0, 1)
        return torch.cat([k_pool, v_pool], -1).flatten(0, 2), bias
    # A key of zeros has score 0 in every row: its weight is all there is.
    value, log_weight = pool_tail(q, k, v, plan, scale)
    zeros = value.new_zeros(*value.shape[:3], q.shape[-1])
    return torch.cat([zeros, value], -1).flatten(0, 2), log_weight.flatten()[:, None]


def _softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    scale: float,
    need_lse: bool,
    judge: Callable[[Tensor], Tensor | None] | None,
) -> tuple[Tensor, Tensor | None]:
    """Q ``[R, M, D]``, k and v ``[R, T, D]``, bias ``[R, 1, T]``; ``judge`` sees logits and masks some of them."""
    if judge is None and not need_lse and q.device.type != "cpu":
        # A fourth dimension and a full-size mask keep SDPA on its fused kernel.
        mask = bias[:, None].expand(-1, 1, q.shape[1], -1)
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=mask, scale=scale)
        return out[:, 0], None
    # On a CPU the logits of a chunk stay in the cache, and two plain products beat SDPA, which cuts queries into
    # slices of 32.
    logits = torch.baddbmm(bias.expand(-1, q.shape[1], -1), q, k.mT, alpha=scale)
    if judge is not None and (left_out := judge(logits.detach())) is not None:
        logits = logits.masked_fill(left_out, -torch.inf)
    return torch.softmax(logits, -1) @ v, logits.logsumexp(-1) if need_lse else None


@dataclass(frozen=True)
class _Chunk:
    """R plan rows (a row is a query block of one head), padded to M queries and T keys.

    rows, head: ``[R]``, (b * H + h) * Nq + block, and b * H + h.
    queries, query_exists: ``[R, M]``, index into the matrix of all queries, and whether the slot is used.
    keys, key_exists: ``[R, T]``, the same for the kept keys.
    """

    rows: Tensor
    head: Tensor
    queries: Tensor
    query_exists: Tensor
    keys: Tensor
    key_exists: Tensor


class _Rows:
    """All plan rows, flattened over batch and heads."""

    def __init__(self, plan: BlockPlan) -> None:
        self.plan = plan

        def flat(x: Tensor) -> Tensor:
            return x.expand(plan.batch, plan.heads, *x.shape[2:]).flatten(0, 1)

        self.kept = flat(plan.block_mask)
        self.q_edges, self.q_sizes, self.k_edges, self.k_sizes = map(
            flat, (plan.q_edges, plan.q_sizes, plan.k_edges, plan.k_sizes)
        )
        self.queries = self._matrix_rows(plan.q_order, plan.q_len)
        self.keys = self._matrix_rows(plan.k_order, plan.k_len)
        self.keys_per_row = (self.kept * self.k_sizes[:, None]).sum(-1)

    def _matrix_rows(self, order: Tensor | None, length: int) -> Tensor:
        """``[B * H * S]`` int64: row of the token matrix, ``(b * S + token) * H + h``, at every position of a head."""
        batch, heads, device = self.plan.batch, self.plan.heads, self.plan.device
        token = torch.arange(length, device=device) if order is None else order
        token = token + torch.arange(batch, device=device)[:, None, None] * length
        return (token * heads + torch.arange(heads, device=device)[:, None]).flatten()

    def chunks(self, dim: int, limit: int) -> Iterator[_Chunk]:
        """Chunks of rows alike in both counts, so that little is padding; empty query blocks are left out."""
        keys, queries = self.keys_per_row.flatten(), self.q_sizes.flatten()
        # Classes of key counts a factor of 1.25 apart, within a class by the number of queries.
        scale = int(queries.max()) + 1
        level = (keys.clamp(min=1).log2() * 3).long()
        rows = (level * scale + queries).argsort(descending=True)
        rows = rows[queries[rows] > 0]
        tail = {"none": 0, "pooled": self.plan.num_k_blocks, "pooled_block": 1}[self.plan.tail]
        table = torch.stack([keys[rows], queries[rows], level[rows]]).tolist()
        start = 0
        for group in _groups(table[0], LISTED_KEYS):
            lists = _KeyLists(self, rows[start : start + group])
            stop = start + group
            while start < stop:
                end = _chunk_end([column[start:stop] for column in table], tail, dim, limit) + start
                yield self._chunk(rows[start:end], lists, start - (stop - group), max(table[1][start:end]))
                start = end

    def _chunk(self, rows: Tensor, lists: _KeyLists, first: int, most_queries: int) -> _Chunk:
        head, block = rows // self.plan.num_q_blocks, rows % self.plan.num_q_blocks
        slot = torch.arange(most_queries, device=rows.device)
        exists = slot < self.q_sizes[head, block][:, None]
        position = (self.q_edges[head, block] + head * self.plan.q_len)[:, None] + slot
        queries = self.queries[position.masked_fill(~exists, 0)]
        keys, key_exists = lists.padded(first, len(rows))
        return _Chunk(rows, head, queries, exists, keys, key_exists)


class _Judge:
    """Verdicts on the tiles of a chunk, in the order in which the plan lists them."""

    def __init__(self, rows: _Rows, rule: VerdictRule, needed: Tensor) -> None:
        plan, self.rule, self.needed, self.k_sizes = rows.plan, rule, needed.view(-1, needed.shape[-1]), rows.k_sizes
        lead = (plan.batch, plan.heads)
        self.counts = plan.counts.expand(*lead, -1).flatten()
        self.indices = plan.indices.expand(*lead, -1, -1).flatten(0, 2)
        self.threshold = rule.threshold.expand(lead).flatten()[:, None]

    def __call__(self, chunk: _Chunk, logits: Tensor) -> Tensor | None:
        """Store the verdicts of a chunk's ``logits [R, M, T]``; returns the keys to leave out, ``[R, 1, T]`` bool."""
        slots = torch.arange(self.indices.shape[-1], device=logits.device)
        listed = slots < self.counts[chunk.rows, None]
        # Keys stand by ascending block (with unlisted slots as empty blocks at the end): their runs, then the rest.
        blocks = self.indices[chunk.rows].long().masked_fill(~listed, len(self.k_sizes[0]))
        blocks, listed_at = blocks.sort(-1)
        sizes = F.pad(self.k_sizes.clamp(min=0), (0, 1))[chunk.head].gather(-1, blocks)
        runs = torch.cat([sizes, logits.shape[-1] - sizes.sum(-1, keepdim=True)], -1)
        peaks = torch.segment_reduce(logits.mT.contiguous(), "max", lengths=runs, axis=1, unsafe=True)[:, :-1]
        # From ascending blocks to the order of the visit; the running peak before each tile.
        peaks = torch.empty_like(peaks).scatter_(1, listed_at[..., None].expand_as(peaks), peaks)
        first = torch.full_like(peaks[:, :1], -torch.inf)
        before = torch.cat([first, peaks.cummax(1).values[:, :-1]], 1)
        gain = (peaks - before).masked_fill(peaks == -torch.inf, -torch.inf)
        gain = gain.masked_fill(~chunk.query_exists[:, None], -torch.inf).amax(-1) * math.log2(math.e)
        # A gain of infinity is a first tile.
        verdict = (gain > self.threshold[chunk.head]) | (gain == torch.inf)
        by_block = verdict.gather(-1, listed_at)
        bits = torch.zeros(len(blocks), len(self.k_sizes[0]) + 1, dtype=torch.bool, device=logits.device)
        self.needed[chunk.rows] = pack_bits(bits.scatter_(1, blocks, by_block)[:, :-1])
        if self.rule.pv_skip is None:
            return None
        skipped = F.pad((gain <= -self.rule.pv_skip).gather(-1, listed_at), (0, 1))
        keys = torch.arange(logits.shape[-1], device=logits.device).expand(len(runs), -1).contiguous()
        run = torch.searchsorted(runs.cumsum(-1), keys, right=True)
        return skipped.gather(-1, run)[:, None]


class _KeyLists:
    """The kept keys of some rows, one list behind the other."""

    def __init__(self, rows: _Rows, which: Tensor) -> None:
        head, block = which // rows.plan.num_q_blocks, which % rows.plan.num_q_blocks
        row, key_block = rows.kept[head, block].nonzero(as_tuple=True)
        owner = head[row]
        sizes = rows.k_sizes[owner, key_block].clamp(min=0)
        self.counts = rows.keys_per_row[head, block]
        self.starts = self.counts.cumsum(0) - self.counts
        # Position p of a block's run stands at (start of the run in the list) + p - (first position of the block).
        shift = rows.k_edges[owner, key_block] + owner * rows.plan.k_len - (sizes.cumsum(0) - sizes)
        listed = torch.arange(int(self.counts.sum()), device=which.device)
        self.rows = rows.keys[torch.repeat_interleave(shift, sizes, output_size=len(listed)) + listed]

    def padded(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Lists ``first .. first + count`` side by side, ``[count, T]``, and which slots are used."""
        counts, starts = self.counts[first : first + count, None], self.starts[first : first + count, None]
        slot = torch.arange(int(counts.max()), device=counts.device)
        return self.rows[starts + slot.clamp(max=counts - 1)], slot < counts


def _groups(keys: list[int], limit: int) -> Iterator[int]:
    """Cut a sequence of key counts into runs of at most ``limit`` keys in all; yields how many rows each has."""
    rows = total = 0
    for count in keys:
        if rows and total + count > limit:
            yield rows
            rows = total = 0
        rows, total = rows + 1, total + count
    if rows:
        yield rows


def _chunk_end(table: list[list[int]], tail: int, dim: int, limit: int) -> int:
    """How many of the next rows go together; columns of ``table`` are keys, queries and class of key count."""
    end = most = 0
    for keys, queries, level in zip(*table, strict=True):
        most = max(most, keys)
        full = (end + 1) * (most + tail) * max(table[1][0], dim) > limit
        if end and (full or level != table[2][0] or queries < MIN_FILL * table[1][0]):
            break
        end += 1
    return end
