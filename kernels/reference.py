"""The specification of block-sparse attention: a loop over the plan, in fp32 (fp64 for fp64 inputs).

Every other implementation has the same signature and must agree with this one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsattn.block_plan import BlockPlan, LinearTail
from dsattn.kernels.feature_maps import EPSILON, feature_map
from dsattn.verdict import VerdictRule, pack_bits


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float,
    rule: VerdictRule | None = None,
    needed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the kept blocks of a plan, plus its tail.

    The tail of query block i reads the blocks j that i does not keep, with n_j readable keys of mean k̄_j and mean
    value v̄_j. Row r of block i takes it into its softmax as

    * ``"pooled"``: one key per block, of weight ``n_j exp(scale q_r·k̄_j)`` and value ``v̄_j``;
    * ``"pooled_block"``: the same with the mean query q̄_i of the block in place of q_r: every row of i adds the same
      ``sum_j n_j exp(scale q̄_i·k̄_j)`` to its denominator and ``sum_j n_j exp(scale q̄_i·k̄_j) v̄_j`` to its numerator.

    With ``plan.tail_weights``, n_j is the sum of the weights of these keys, and v̄_j their mean value by weight.

    Args:
        q, k, v: ``[B, S, H, D]``; q and k share D, k and v share S.
        plan: pattern; ``plan.block_mask`` says which blocks are kept.
        scale: factor on q·k before the softmax.
        rule: judge every kept tile by it.
        needed: with a rule, ``[B, H, Nq, ceil(Nk / 32)]`` int32 zeros; the bits of needed tiles are set.

    Returns:
        ``out [B, Sq, H, Dv]`` in q's dtype and ``lse [B, H, Sq]`` fp32 (fp64 for fp64 inputs), the natural
        log of the softmax denominator, tail included.

    """
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, q_len, heads, _ = q.shape
    out = torch.empty(batch, q_len, heads, v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=work, device=q.device)
    for b in range(batch):
        for h in range(heads):
            q_tokens = _tokens(plan.q_order, b, h, plan.q_len, q.device)
            k_tokens = _tokens(plan.k_order, b, h, plan.k_len, q.device)
            q_edges, k_edges = (_pick(e, b, h).tolist() for e in (plan.q_edges, plan.k_edges))
            k_sizes = _pick(plan.k_sizes, b, h).tolist()
            kept = _pick(plan.block_mask, b, h).tolist()
            qh, kh, vh = (x[b, :, h].to(work) for x in (q, k, v))
            for i, (start, stop) in enumerate(zip(q_edges[:-1], q_edges[1:], strict=True)):
                if start == stop:
                    continue
                rows = q_tokens[start:stop]
                mean_query = qh[rows].mean(0)
                skipped: set[int] = set()
                if rule is not None and needed is not None:
                    tiles = [(j, k_tokens[k_edges[j] : k_edges[j] + k_sizes[j]]) for j in _list(plan, b, h, i)]
                    peaks = [(j, (qh[rows] @ kh[columns].T * scale).amax(-1)) for j, columns in tiles if len(columns)]
                    bits, skipped = _judge(peaks, float(_pick(rule.threshold, b, h)), rule.pv_skip, plan.num_k_blocks)
                    needed[b, h, i] = pack_bits(bits).to(needed.device)
                keys, values, log_weights = [], [], []
                for j in range(plan.num_k_blocks):
                    n = k_sizes[j]
                    columns = k_tokens[k_edges[j] : k_edges[j] + n]
                    if n == 0 or j in skipped:
                        continue
                    counts = torch.ones(n, dtype=work, device=q.device)
                    if plan.tail_weights is not None:
                        counts = _pick(plan.tail_weights, b, h)[columns].to(work)
                    mean_value = (counts @ vh[columns] / counts.sum())[None]
                    if kept[i][j]:
                        keys.append(kh[columns])
                        values.append(vh[columns])
                        log_weights.append(torch.zeros(n, dtype=work, device=q.device))
                    elif plan.tail == "pooled":
                        keys.append(kh[columns].mean(0, keepdim=True))
                        values.append(mean_value)
                        log_weights.append(counts.sum(0, keepdim=True).log())
                    elif plan.tail == "pooled_block":
                        # A key of zeros has score 0 in every row: the weight is all there is.
                        mean_key = kh[columns].mean(0, keepdim=True)
                        keys.append(torch.zeros_like(mean_key))
                        values.append(mean_value)
                        log_weights.append(mean_key @ mean_query * scale + counts.sum().log())
                logits = qh[rows] @ torch.cat(keys).T * scale + torch.cat(log_weights)
                lse[b, h, rows] = logits.logsumexp(-1)
                out[b, rows, h] = (logits.softmax(-1) @ torch.cat(values)).to(q.dtype)
    return out, lse


def linear_attention(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, tail: LinearTail) -> Tensor:
    """Projected linear attention of a plan: ``phi(q) H / (EPSILON + phi(q) Z)``, times ``weight.T``, plus ``bias``.

    H and Z are the sums of ``phi(k) v.T`` and ``phi(k)`` over the readable keys of the tail's blocks.

    Returns:
        ``[B, Sq, H, Dv]`` fp32 (fp64 for fp64 inputs), to be added to the softmax's result.

    """
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=work, device=q.device)
    block_q, block_k = (plan.q_len, plan.k_len) if tail.blocks is None else (plan.block_q, plan.block_k)
    for b in range(plan.batch):
        readable = plan.k_len if plan.key_lengths is None else int(plan.key_lengths[b])
        for h in range(plan.heads):
            qh, kh, vh = (x[b, :, h].to(work) for x in (q, k, v))
            for i, start in enumerate(range(0, plan.q_len, block_q)):
                phi_q = feature_map(qh[start : start + block_q], tail.feature_map)
                state = torch.zeros(phi_q.shape[-1], v.shape[-1], dtype=work, device=q.device)
                norm = torch.zeros(phi_q.shape[-1], dtype=work, device=q.device)
                for j, first in enumerate(range(0, readable, block_k)):
                    if tail.blocks is None or bool(_pick(tail.blocks, b, h)[i, j]):
                        keys = slice(first, min(first + block_k, readable))
                        phi_k = feature_map(kh[keys], tail.feature_map)
                        state += phi_k.T @ vh[keys]
                        norm += phi_k.sum(0)
                linear = phi_q @ state / (EPSILON + phi_q @ norm)[:, None]
                out[b, start : start + block_q, h] = linear @ tail.weight.to(work).T + tail.bias.to(work)
    return out


def _judge(
    peaks: list[tuple[int, Tensor]], threshold: float, pv_skip: float | None, blocks: int
) -> tuple[Tensor, set[int]]:
    """Which tiles of one query block are needed, ``[Nk]`` bool, and which are left out of this call.

    ``peaks`` holds a tile's key block and the largest logit of every query ``[rows]``, in the order of the visit.
    """
    bits, skipped = torch.zeros(blocks, dtype=torch.bool), set()
    before: Tensor | None = None
    for j, peak in peaks:
        if before is None:
            bits[j], before = True, peak
            continue
        gain = float((peak - before).amax()) * math.log2(math.e)
        bits[j] = gain > threshold
        if pv_skip is not None and gain <= -pv_skip:
            skipped.add(j)
        before = torch.maximum(before, peak)
    return bits, skipped


def _list(plan: BlockPlan, b: int, h: int, i: int) -> list[int]:
    """Key blocks of a row in the order of the visit."""
    blocks: list[int] = _pick(plan.indices, b, h)[i, : int(_pick(plan.counts, b, h)[i])].tolist()
    return blocks


def _pick(x: Tensor, b: int, h: int) -> Tensor:
    """Row of a tensor whose two leading dimensions broadcast."""
    return x[b if x.shape[0] > 1 else 0, h if x.shape[1] > 1 else 0]


def _tokens(order: Tensor | None, b: int, h: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(length, device=device) if order is None else _pick(order, b, h)
