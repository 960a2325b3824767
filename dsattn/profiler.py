"""Which method fits which head: error against cost of candidates, measured on sampled query rows.

One exact attention of the sampled rows judges every density of every candidate: densities are nested, so that the
output of each is a running sum over what the blocks that come in there add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.head_profile import DENSITIES, LayerProfile
from dsattn.kernels.pooling import pool_blocks
from dsattn.kernels.runs import Runs
from dsattn.methods.estimate import RowSample, relative_error
from dsattn.methods.ranked import Ranked

# Keys of a block that stand side by side; blocks are padded to a multiple of it.
TILE = 32


@dataclass(frozen=True)
class Curve:
    """One candidate on the heads of one call, over ``DENSITIES``.

    error: ``[n, b, h]`` relative L2 error of the output on the sampled rows.
    recall: the same, softmax mass of the keys that are read, mean over rows.
    density: the same, executed density of the plan.
    tail: pooled keys per key.
    """

    error: Tensor
    recall: Tensor
    density: Tensor
    tail: float


def trace(sample: RowSample, ranked: Ranked) -> Curve:
    """Curve of one candidate; nothing is read back to the host.

    Args:
        sample: exact attention of R rows.
        ranked: the candidate's blocks for the same call.

    """
    plan = ranked.at(1.0)
    ladder = torch.tensor(DENSITIES, device=sample.exact.device)
    lead = sample.logits.shape[:2]
    blocks = plan.num_k_blocks
    owner = plan.q_block_of_token.expand(*lead, -1)[..., sample.rows]
    shares = ranked.share.expand(*lead, -1, -1).gather(2, owner[..., None].expand(-1, -1, -1, blocks))
    # Place on the ladder from which on a block is read. The last density reads everything and needs no sum.
    level = torch.bucketize(shares, ladder)
    places = torch.arange(len(DENSITIES) - 1, device=ladder.device)

    peak = sample.logits.amax(-1, keepdim=True)
    weights = (sample.logits - peak).exp()
    order = torch.arange(plan.k_len, device=ladder.device)[None, None] if plan.k_order is None else plan.k_order
    runs = Runs.of(order.expand(*lead, -1), plan.k_sizes.expand(*lead, -1), TILE)
    tiles = runs.columns(weights)
    # [B, H, R, places, tiles]: which tiles come in at which place; surplus tiles are of no weight.
    of_tile = level.gather(3, runs.owner.clamp(max=blocks - 1)[:, :, None].expand(-1, -1, level.shape[2], -1))
    comes_in = (of_tile[:, :, :, None] == places[:, None]).to(weights.dtype)
    values = tiles @ runs.gather(sample.v)
    top = (comes_in @ values.transpose(2, 3)).cumsum(3)
    bottom = (comes_in @ tiles.sum(-1).transpose(2, 3)[..., None]).cumsum(3)
    recall = bottom / weights.sum(-1)[..., None, None]
    tail, v_pool = _tail(sample, plan, peak)
    if tail is not None:
        # [B, H, R, places, Nk]: pooled at this place, as not read yet.
        rest = tail[:, :, :, None] * (level[:, :, :, None] > places[:, None])
        top, bottom = top + (rest.flatten(2, 3) @ v_pool).view_as(top), bottom + rest.sum(-1, keepdim=True)
    # What is read may hold no mass that fp32 can tell from none: the output is then zero.
    found = top / bottom.clamp(min=torch.finfo(bottom.dtype).tiny)
    error = torch.stack([relative_error(x, sample.exact) for x in found.unbind(3)])
    recalls = recall.mean((2, 4)).movedim(2, 0)
    return Curve(
        torch.cat([error, torch.zeros_like(error[:1])]),
        torch.cat([recalls, torch.ones_like(recalls[:1])]),
        _densities(ranked, plan, ladder),
        blocks / plan.k_len if tail is not None else 0.0,
    )


def _tail(sample: RowSample, plan: BlockPlan, peak: Tensor) -> tuple[Tensor | None, Tensor]:
    """Weights ``[B, H, R, Nk]`` of the pooled keys, where the plan has a tail, and their values ``[B, H, Nk, D]``."""
    if plan.tail == "none":
        return None, sample.values
    k_pool, v_pool, log_count = (x.float() for x in pool_blocks(sample.k, sample.v, plan))
    logits = sample.q @ k_pool.mT * sample.q.shape[-1] ** -0.5 + log_count[:, :, None]
    return (logits - peak).exp(), v_pool


def _densities(ranked: Ranked, plan: BlockPlan, ladder: Tensor) -> Tensor:
    """``[n, b, h]`` fp32: share of all (query, key) pairs that is read at every place of the ladder."""
    queries, keys = plan.q_sizes.float() / plan.q_len, plan.k_sizes.float() / plan.k_len
    read = [((ranked.share <= density).float() @ keys[..., None]).squeeze(-1) for density in ladder]
    return torch.stack([(share * queries).sum(-1) for share in read]).expand(-1, plan.batch, plan.heads)


def allocate(
    layers: Sequence[LayerProfile], *, target: float | Tensor | None = None, cost: float | None = None
) -> None:
    """Set the choice of all heads together: the cheapest that meets a target, or the best that a mean cost can buy.

    One price of error, the same for all heads of all layers, decides: every head takes the option with the least
    cost + price × share of the layer's squared output × squared relative error. The price is found by bisection,
    for every batch row of its own.

    Args:
        layers: their ``choice`` is set.
        target: relative L2 error of a layer's output, root mean square over layers; a number or ``[B]``.
        cost: mean over heads and layers; used where ``target`` is None.

    """
    # What is no number (of a head without any output) counts as nothing: argmin would choose it, and no sum with it
    # would ever meet a target.
    errors = [
        (x.weight.double() * x.error.flatten(0, 1).double().square()).nan_to_num(nan=0.0, posinf=torch.inf)
        for x in layers
    ]
    costs = [x.cost.flatten(0, 1).double() for x in layers]
    rows = errors[0].shape[1]
    low, high = (torch.full((rows,), edge, dtype=torch.float64) for edge in (-30.0, 30.0))

    def choose(price: Tensor) -> list[Tensor]:
        factor = price.exp()[:, None]
        return [(c + factor * e).argmin(0) for c, e in zip(costs, errors, strict=True)]

    def total(values: list[Tensor], chosen: list[Tensor]) -> Tensor:
        return torch.stack([v.gather(0, i[None])[0].sum(-1) for v, i in zip(values, chosen, strict=True)]).mean(0)

    heads = errors[0].shape[2]
    for _ in range(50):
        middle = (low + high) / 2
        chosen = choose(middle)
        if target is not None:
            enough = total(errors, chosen) <= target**2
        else:
            # The dearest price that the budget still pays.
            enough = total(costs, chosen) / heads > (cost or 0.0)
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    for layer, choice in zip(layers, choose(high if target is not None else low), strict=True):
        layer.choice = choice
