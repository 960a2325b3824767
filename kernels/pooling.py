"""Means of blocks: what skipped key blocks contribute to a pooled tail, and to whom."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from dsattn.block_plan import BlockPlan


def pool_blocks(k: Tensor, v: Tensor, plan: BlockPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Mean key, mean value and log weight of every key block, over the keys that may be read.

    With ``plan.tail_weights`` the mean value is weighed by them, and the log weight is that of their sum; without, it
    is that of the number of keys.

    Sums run in fp32 (fp64 for fp64 inputs) per block, never as differences of a running sum, which would lose
    digits over a long sequence. Nothing is read back to the host. On a GPU the means come from Triton
    (``kernels.segments_triton``); the torch code is its specification.

    Args:
        k, v: ``[B, Sk, H, D]`` and ``[B, Sk, H, Dv]``, any strides.
        plan: its ``k_order``, ``k_starts`` and ``key_lengths`` say which tokens form a block.

    Returns:
        ``kbar [B, H, Nk, D]``, ``vbar [B, H, Nk, Dv]`` and ``log_count [B, H, Nk]``, all fp32 (fp64). A block
        without readable keys has means 0 and log weight -inf.

    """
    if runs_triton(k, v):
        from dsattn.kernels.segments_triton import segment_means, weighted_segment_means

        where = (plan.block_k, plan.k_order, plan.k_starts, plan.key_lengths)
        k_pool = segment_means(k, plan.num_k_blocks, *where)
        if plan.tail_weights is not None:
            v_pool, total = weighted_segment_means(v, plan.tail_weights, plan.num_k_blocks, *where)
            return k_pool, v_pool, total.log()
        sizes = plan.k_sizes.clamp(min=0).expand(plan.batch, plan.heads, -1)
        return k_pool, segment_means(v, plan.num_k_blocks, *where), sizes.float().log()
    work = torch.float64 if k.dtype == torch.float64 else torch.float32
    sizes = plan.k_sizes.clamp(min=0).expand(plan.batch, plan.heads, -1).to(work)
    # A mean over one key at least: empty blocks divide their zero sum by one.
    weight = sizes.clamp(min=1).reciprocal()[..., None]
    k_pool = _sums(k, plan, work) * weight
    if plan.tail_weights is None:
        return k_pool, _sums(v, plan, work) * weight, sizes.log()
    weights = plan.tail_weights.to(work).expand(plan.batch, plan.heads, -1).transpose(1, 2)[..., None]
    total = _sums(weights, plan, work)
    return k_pool, _sums(v.to(work) * weights, plan, work) / total.where(total > 0, 1), total[..., 0].log()


def pool_queries(q: Tensor, plan: BlockPlan) -> Tensor:
    """Mean query of every query block, 0 for an empty one: ``[B, Sq, H, D]`` to ``[B, H, Nq, D]`` fp32 (fp64)."""
    if runs_triton(q):
        from dsattn.kernels.segments_triton import segment_means

        return segment_means(q, plan.num_q_blocks, block=plan.block_q, order=plan.q_order, starts=plan.q_starts)
    # The blocks of the queries in place of those of the keys: nothing else of this plan is read.
    as_keys = replace(
        plan,
        k_len=plan.q_len,
        block_k=plan.block_q,
        k_order=plan.q_order,
        k_starts=plan.q_starts,
        key_lengths=None,
        tail_weights=None,
        linear=None,
    )
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    sizes = plan.q_sizes.clamp(min=1).expand(plan.batch, plan.heads, -1).to(work)
    return _sums(q, as_keys, work) / sizes[..., None]


def pool_tail(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Tail ``"pooled_block"``: what every query block skips, as one key that each of its rows takes in.

    Args:
        q, k, v: ``[B, S, H, D]``, any strides.
        plan: its kept blocks are left out.
        scale: factor on q·k.

    Returns:
        ``value [B, H, Nq, Dv]``, the mean of the pooled values by weight, and ``log_weight [B, H, Nq]``, the log of the
        sum of the weights, both fp32 (fp64). A block that skips nothing has value 0 and log weight -inf.

    """
    k_pool, v_pool, log_count = pool_blocks(k, v, plan)
    logits = pool_queries(q, plan) @ k_pool.mT * scale + log_count[:, :, None]
    logits = logits.masked_fill(plan.block_mask | (log_count == -torch.inf)[:, :, None], -torch.inf)
    log_weight = logits.logsumexp(-1)
    # The clamp keeps a row of -inf from becoming NaN.
    shares = (logits - log_weight.clamp(min=torch.finfo(logits.dtype).min)[..., None]).exp()
    return shares @ v_pool, log_weight


def _sums(x: Tensor, plan: BlockPlan, work: torch.dtype) -> Tensor:
    """``[B, H, Nk, D]``: sum over the readable keys of every block."""
    blocks = plan.num_k_blocks
    if plan.k_starts is not None:
        return segment_sums(x, _block_of_token(plan), blocks, work)
    batch, length, heads, dim = x.shape
    x = x.transpose(1, 2)
    if plan.k_order is not None:
        x = x.gather(2, plan.k_order.expand(batch, heads, -1)[..., None].expand(-1, -1, -1, dim))
    if plan.key_lengths is not None:
        positions = torch.arange(length, device=x.device)
        # Padding may hold anything, NaN included: it is replaced, not multiplied by zero.
        x = x.masked_fill((positions >= plan.key_lengths[:, None])[:, None, :, None], 0)
    full = length // plan.block_k
    head = x[:, :, : full * plan.block_k].unflatten(2, (full, plan.block_k)).sum(3, dtype=work)
    rest = x[:, :, full * plan.block_k :].sum(2, keepdim=True, dtype=work)
    return head if full == blocks else torch.cat([head, rest], 2)


def _block_of_token(plan: BlockPlan) -> Tensor:
    """``[b, h, Sk]`` int64: block of every key token; Nk for keys that may not be read."""
    owner = plan.k_block_of_token
    if plan.key_lengths is None:
        return owner
    hidden = (torch.arange(plan.k_len, device=plan.device) >= plan.key_lengths[:, None])[:, None]
    if plan.k_order is not None:
        lead = (plan.batch, plan.k_order.shape[1])
        hidden = torch.empty(*lead, plan.k_len, dtype=torch.bool, device=plan.device).scatter_(
            -1, plan.k_order.expand(*lead, -1), hidden.expand(*lead, -1)
        )
    return owner.where(~hidden, plan.num_k_blocks)


def segment_sums(x: Tensor, labels: Tensor, count: int, work: torch.dtype = torch.float32) -> Tensor:
    """Sum of the tokens of every label; the same inputs give the same bits on every device.

    Args:
        x: ``[B, S, H, D]``.
        labels: ``[b, h, S]`` int64 in ``[0, count]``, b and h broadcast; tokens labelled ``count`` are left out.
        count: number of labels.
        work: dtype of sums and result.

    Returns:
        ``[B, H, count, D]``.

    """
    batch, length, heads, dim = x.shape
    labels = labels.expand(batch, heads, -1)
    if x.device.type == "cpu":
        # Rows stay where they are: (b, s, h) adds to sum (b, h, label).
        head = torch.arange(batch * heads, device=x.device).view(batch, heads, 1)
        target = (head * (count + 1) + labels).transpose(1, 2).reshape(-1)
        sums = torch.zeros(batch * heads * (count + 1), dim, dtype=work, device=x.device)
        return sums.index_add_(0, target, x.to(work).reshape(-1, dim)).view(batch, heads, -1, dim)[:, :, :count]
    # Elsewhere index_add_ adds in the order threads happen to run: sums over sorted runs do not.
    order = labels.argsort(dim=-1, stable=True)
    runs = x.transpose(1, 2).gather(2, order[..., None].expand(-1, -1, -1, dim)).to(work).flatten(0, 2)
    sizes = torch.zeros(batch, heads, count + 1, dtype=torch.int64, device=x.device)
    sizes.scatter_add_(2, labels, torch.ones_like(labels))
    sums = torch.segment_reduce(runs, "sum", lengths=sizes.flatten(), axis=0, unsafe=True)
    return sums.view(batch, heads, -1, dim)[:, :, :count]


def runs_triton(*tensors: Tensor) -> bool:
    """Whether Triton kernels take these tensors ``[..., D]``: on a GPU, known dtypes, D up to 256, no gradient."""
    kernels_take = all(
        x.is_cuda and x.dtype in (torch.float16, torch.bfloat16, torch.float32) and x.shape[-1] <= 256 for x in tensors
    )
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return kernels_take and not gradient and _has_triton()


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
