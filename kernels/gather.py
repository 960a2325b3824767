"""Block-sparse attention from gathers and SDPA: needs nothing but torch, runs on every device.

Reads list lengths on the host, so on a GPU it synchronises: it is the fallback and the debugging aid there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.kernels.pooling import pool_blocks

# Elements of one chunk's logits and gathered keys; bounds the memory beyond inputs and output.
CHUNK_ELEMENTS = 1 << 24


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, scale: float, need_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Same contract as ``kernels.reference.block_sparse_attention``; ``lse`` is None unless ``need_lse``.

    Half-precision inputs are computed in fp32.
    """
    batch, q_len, heads, dim = q.shape
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    # One row per (b, h, query block); flat tables so that a chunk mixes heads.
    tables = _RowTables(plan)
    q_rows, k_rows, v_rows = (x.transpose(1, 2).reshape(batch * heads * x.shape[1], x.shape[-1]) for x in (q, k, v))
    out = torch.empty(batch * heads * q_len, v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(batch * heads * q_len, dtype=work, device=q.device) if need_lse else None
    pooled = pool_blocks(k, v, plan) if plan.tail == "pooled" else None

    for rows in tables.chunks(dim):
        q_pos, q_valid = tables.query_positions(rows)
        k_pos, k_valid = tables.key_positions(rows)
        q_chunk, k_chunk, v_chunk = q_rows[q_pos].to(work), k_rows[k_pos].to(work), v_rows[k_pos].to(work)
        bias = torch.zeros(k_valid.shape, dtype=work, device=q.device).masked_fill_(~k_valid, -torch.inf)
        if pooled is not None:
            head = rows // plan.num_q_blocks
            k_pool, v_pool, log_count = (x.flatten(0, 1)[head].to(work) for x in pooled)
            k_chunk, v_chunk = torch.cat([k_chunk, k_pool], 1), torch.cat([v_chunk, v_pool], 1)
            bias = torch.cat([bias, log_count.masked_fill(tables.mask[rows], -torch.inf)], 1)
        chunk, chunk_lse = _softmax_attention(q_chunk, k_chunk, v_chunk, bias[:, None], scale, need_lse)
        out[q_pos[q_valid]] = chunk[q_valid].to(q.dtype)
        if lse is not None and chunk_lse is not None:
            lse[q_pos[q_valid]] = chunk_lse[q_valid]
    shaped = out.view(batch, heads, q_len, -1).transpose(1, 2)
    return shaped.contiguous(), None if lse is None else lse.view(batch, heads, q_len)


def _softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Q ``[R, M, D]``, k and v ``[R, T, D]``, bias ``[R, 1, T]``."""
    if not need_lse:
        # A fourth dimension and a full-size mask keep SDPA on its fused kernel.
        mask = bias[:, None].expand(-1, 1, q.shape[1], -1)
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=mask, scale=scale)[
            :, 0
        ], None
    logits = q @ k.transpose(-1, -2) * scale + bias
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp_() @ v, lse


class _RowTables:
    """Positions of queries and kept keys per plan row, as indices into ``[B * H * S]``."""

    def __init__(self, plan: BlockPlan) -> None:
        self.plan = plan
        self.lead = (plan.batch, plan.heads)
        self.mask = plan.block_mask.expand(*self.lead, -1, -1).flatten(0, 2)
        self.q_edges, self.k_edges = (e.expand(*self.lead, -1).flatten(0, 1) for e in (plan.q_edges, plan.k_edges))
        self.q_sizes, self.k_sizes = (e.expand(*self.lead, -1).flatten(0, 1) for e in (plan.q_sizes, plan.k_sizes))
        self.row_keys = (self.mask.view(-1, plan.num_q_blocks, plan.num_k_blocks) * self.k_sizes[:, None]).sum(-1)

    def chunks(self, dim: int) -> list[Tensor]:
        """Rows grouped by similar key count, so that padding stays small; empty query blocks left out."""
        keys, queries = self.row_keys.flatten(), self.q_sizes.flatten()
        rows = keys.argsort(descending=True)
        rows = rows[queries[rows] > 0]
        tail = self.plan.num_k_blocks if self.plan.tail == "pooled" else 0
        largest = int(queries.max()) if len(rows) else 0
        result, start, counts = [], 0, keys[rows].tolist()
        while start < len(counts):
            per_row = (counts[start] + tail) * max(largest, dim)
            size = max(1, CHUNK_ELEMENTS // max(per_row, 1))
            # Stop where rows hold less than half the keys of the chunk's first row.
            stop = start + 1
            while stop < min(start + size, len(counts)) and 2 * counts[stop] >= counts[start]:
                stop += 1
            result.append(rows[start:stop])
            start = stop
        return result

    def query_positions(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``[R, M]`` flat query rows and which of them exist."""
        head, block = rows // self.plan.num_q_blocks, rows % self.plan.num_q_blocks
        start, size = self.q_edges[head, block], self.q_sizes[head, block]
        offset = torch.arange(int(size.max()), device=rows.device)
        valid = offset < size[:, None]
        return self._tokens(head, (start[:, None] + offset).where(valid, 0), self.plan.q_order, self.plan.q_len), valid

    def key_positions(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``[R, T]`` flat key rows of the kept blocks, one after the other, and which of them exist."""
        head = rows // self.plan.num_q_blocks
        sizes = self.k_sizes[head] * self.mask[rows]
        ends = sizes.cumsum(-1)
        offset = torch.arange(int(ends[:, -1].max()), device=rows.device).expand(len(rows), -1).contiguous()
        valid = offset < ends[:, -1:]
        block = torch.searchsorted(ends, offset, right=True).clamp_(max=self.plan.num_k_blocks - 1)
        within = offset - (ends - sizes).gather(1, block)
        position = (self.k_edges[head].gather(1, block) + within).where(valid, 0)
        return self._tokens(head, position, self.plan.k_order, self.plan.k_len), valid

    def _tokens(self, head: Tensor, position: Tensor, order: Tensor | None, length: int) -> Tensor:
        if order is not None:
            position = order.expand(*self.lead, -1).flatten(0, 1)[head[:, None], position]
        return position + head[:, None] * length
