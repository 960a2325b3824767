"""Random block plans, an oracle that shares no code with the package, and tolerances derived from the dtype."""

import itertools
import math
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dsattn.block_plan import BlockPlan

HEAD_DIMS = (32, 40, 64, 80, 96, 128, 160, 192, 256)
BLOCKS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Shape(NamedTuple):
    """Everything static about a case: two cases of one shape differ in values, never in tensor shapes."""

    batch: int
    heads: int
    q_len: int
    k_len: int
    dim: int
    block_q: int
    block_k: int
    dtype: torch.dtype
    layouts: tuple[str, str, str]
    q_clusters: int  # 0: fixed-size blocks
    k_clusters: int
    leads: tuple[tuple[int, int], ...]  # leading dims of lists, q_order, k_order, q_starts, k_starts
    q_order: bool
    k_order: bool
    key_lengths: bool
    tail: str
    trimmed: bool  # index lists as long as the longest, instead of one entry per key block
    scale: float
    weighted: bool  # keys count differently in the pools


@dataclass(frozen=True)
class Case:
    """One attention call."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    plan: BlockPlan
    scale: float

    def to(self, device: str) -> "Case":
        moved = {f.name: getattr(self.plan, f.name) for f in fields(self.plan)}
        moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in moved.items()}
        q, k, v = (x.to(device) for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, plan=BlockPlan(**moved))


class Draw:
    """Random choices from a seeded generator."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def pick(self, options):
        return options[self.integer(0, len(options) - 1)]

    def chance(self, probability: float) -> bool:
        return float(torch.rand((), generator=self.generator)) < probability

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def permutations(self, lead: tuple[int, int], length: int) -> Tensor:
        return self.uniform(*lead, length).argsort(-1)


def random_shape(seed: int) -> Shape:
    """A shape of any kind the plan allows.

    Every tenth seed draws lengths up to 700, the others up to 150. Large ones get fewer heads and larger blocks, so
    that an interpreter can run hundreds.
    """
    draw = Draw(seed)
    longest, most_steps = (700, 121) if seed % 10 == 0 else (150, 24)
    q_len = draw.integer(1, longest)
    k_len = q_len if draw.chance(0.4) else draw.integer(1, longest)
    batch, heads = draw.integer(1, 3), draw.integer(1, 4)
    block_q, block_k = draw.pick(BLOCKS), draw.pick(BLOCKS)

    def steps() -> int:
        return batch * heads * math.ceil(q_len / min(block_q, 64)) * math.ceil(k_len / min(block_k, 64))

    while steps() > most_steps and min(block_q, block_k) < 64:
        block_q, block_k = (2 * block_q, block_k) if block_q < block_k else (block_q, 2 * block_k)
    while steps() > most_steps and batch * heads > 1:
        batch, heads = (batch, heads - 1) if heads > 1 else (batch - 1, heads)
    return Shape(
        batch, heads, q_len, k_len, draw.pick(HEAD_DIMS), block_q, block_k, draw.pick(DTYPES),
        layouts=tuple(draw.pick(("bshd", "bhsd", "strided", "packed")) for _ in range(3)),
        q_clusters=draw.integer(1, math.ceil(q_len / block_q) + 3) if draw.chance(0.4) else 0,
        k_clusters=draw.integer(1, math.ceil(k_len / block_k) + 3) if draw.chance(0.4) else 0,
        leads=tuple((draw.pick((1, batch)), draw.pick((1, heads))) for _ in range(5)),
        q_order=draw.chance(0.4), k_order=draw.chance(0.4), key_lengths=draw.chance(0.3),
        tail=draw.pick(("none", "pooled", "pooled_block")), trimmed=draw.chance(0.5),
        scale=draw.pick((0.04, 0.1, 0.25)), weighted=draw.chance(0.5),
    )  # fmt: skip


def random_case(shape: Shape, seed: int, starts_seed: int | None = None) -> Case:
    """Values, lists, orders and lengths for a shape, and boundaries (from a seed of their own if one is given)."""
    draw = Draw(seed)
    starts_draw = draw if starts_seed is None else Draw(starts_seed)
    q, k, v = (
        _tensor(draw, (shape.batch, length, shape.heads, shape.dim), layout, shape.dtype)
        for length, layout in zip((shape.q_len, shape.k_len, shape.k_len), shape.layouts, strict=True)
    )
    lists, q_order, k_order, q_starts, k_starts = shape.leads
    q_starts = _starts(starts_draw, q_starts, shape.q_len, shape.q_clusters) if shape.q_clusters else None
    k_starts = _starts(starts_draw, k_starts, shape.k_len, shape.k_clusters) if shape.k_clusters else None
    lengths = None
    if shape.key_lengths:
        lengths = torch.tensor([draw.integer(1, shape.k_len) for _ in range(shape.batch)], dtype=torch.int32)
    kept = _kept_blocks(draw, shape, lists, q_starts, k_starts, lengths)
    key_blocks = shape.k_clusters or math.ceil(shape.k_len / shape.block_k)
    width = max(1, max(len(row) for row in kept.values())) if shape.trimmed else key_blocks
    query_blocks = shape.q_clusters or math.ceil(shape.q_len / shape.block_q)
    counts = torch.zeros(*lists, query_blocks, dtype=torch.int32)
    indices = torch.zeros(*lists, query_blocks, width, dtype=torch.int32)
    for (b, h, i), row in kept.items():
        counts[b, h, i] = len(row)
        indices[b, h, i, : len(row)] = torch.tensor(row, dtype=torch.int32)
    plan = BlockPlan(
        batch=shape.batch, heads=shape.heads, q_len=shape.q_len, k_len=shape.k_len,
        block_q=shape.block_q, block_k=shape.block_k, counts=counts, indices=indices,
        q_order=draw.permutations(q_order, shape.q_len) if shape.q_order else None,
        k_order=draw.permutations(k_order, shape.k_len) if shape.k_order else None,
        q_starts=q_starts, k_starts=k_starts, key_lengths=lengths, tail=shape.tail,
    )  # fmt: skip
    if shape.weighted:
        plan = replace(plan, tail_weights=draw.uniform(*lists, shape.k_len) * 3 + 0.1)
    return Case(f"seed {seed}, {shape}", q, k, v, plan, shape.scale)


def _tensor(draw: Draw, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    batch, length, heads, dim = shape
    x = draw.normal(*shape) * draw.pick((0.5, 1.0, 2.0)) + draw.pick((0.0, 0.5))
    if layout == "bhsd":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "strided":  # head_dim in steps of two, rows with a gap
        x = torch.stack([x, draw.normal(*shape)], -1).flatten(3)[..., ::2]
    elif layout == "packed":  # a slice of one projection's output
        x = torch.cat([draw.normal(*shape), x, draw.normal(*shape)], 2)[:, :, heads : 2 * heads]
    return x.to(dtype)


def _starts(draw: Draw, lead: tuple[int, int], length: int, blocks: int) -> Tensor:
    """Boundaries of variable-size blocks; equal neighbours make empty blocks."""
    cuts = (draw.uniform(*lead, blocks - 1) * (length + 1)).floor().sort(-1).values
    ends = torch.full((*lead, 1), float(length))
    return torch.cat([ends * 0, cuts, ends], -1).to(torch.int32)


def _edges(starts: Tensor | None, b: int, h: int, length: int, block: int) -> list[int]:
    if starts is None:
        return [*range(0, length, block), length]
    return starts[b % starts.shape[0], h % starts.shape[1]].tolist()


def _kept_blocks(draw, shape, lead, q_starts, k_starts, lengths) -> dict[tuple[int, int, int], list[int]]:
    """Key blocks per row of the lists, in random order; rows with queries keep a readable key in every head."""
    key_blocks = shape.k_clusters or math.ceil(shape.k_len / shape.block_k)
    density = draw.pick((0.05, 0.2, 0.5, 0.8, 1.0))
    readable, empty = {}, {}
    for b in range(shape.batch):
        limit = shape.k_len if lengths is None else int(lengths[b])
        for h in range(shape.heads):
            edges = _edges(k_starts, b, h, shape.k_len, shape.block_k)
            readable[b, h] = [j for j in range(key_blocks) if min(edges[j + 1], limit) > edges[j]]
            edges = _edges(q_starts, b, h, shape.q_len, shape.block_q)
            empty[b, h] = {i for i in range(len(edges) - 1) if edges[i] == edges[i + 1]}
    query_blocks = shape.q_clusters or math.ceil(shape.q_len / shape.block_q)
    drawn = (draw.uniform(*lead, query_blocks, key_blocks) < density).tolist()
    rows = {}
    for b, h, i in itertools.product(range(lead[0]), range(lead[1]), range(query_blocks)):
        row = {j for j in range(key_blocks) if drawn[b][h][i][j]}
        for (bb, hh), candidates in readable.items():
            mine = bb % lead[0] == b and hh % lead[1] == h
            if mine and i not in empty[bb, hh] and row.isdisjoint(candidates):
                row.add(draw.pick(candidates))
        row = sorted(row)
        rows[b, h, i] = [row[n] for n in torch.randperm(len(row), generator=draw.generator).tolist()]
    return rows


# -- oracle -------------------------------------------------------------------------------------------------


def oracle(case: Case) -> tuple[Tensor, Tensor]:
    """Out ``[B, Sq, H, D]`` and LSE ``[B, H, Sq]`` in float64, from a dense mask built token by token."""
    return _dense_softmax(case, torch.float64)


def _dense_softmax(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Dense masked softmax with the roundings a kernel for this dtype has.

    float64: none. Otherwise products are accumulated in fp32, and softmax weights, pooled queries, keys and values
    are rounded to the dtype, as the tensor cores require.
    """
    work = torch.float64 if dtype == torch.float64 else torch.float32
    plan = case.plan
    out = torch.zeros(case.q.shape[:3] + case.v.shape[3:], dtype=work)
    lse = torch.zeros(plan.batch, plan.heads, plan.q_len, dtype=work)
    for b in range(plan.batch):
        limit = plan.k_len if plan.key_lengths is None else int(plan.key_lengths[b])
        for h in range(plan.heads):
            q, k, v = (x[b, :, h].to(work) for x in (case.q, case.k, case.v))
            q_tokens, k_tokens = _tokens(plan.q_order, b, h, plan.q_len), _tokens(plan.k_order, b, h, plan.k_len)
            q_edges = _edges(plan.q_starts, b, h, plan.q_len, plan.block_q)
            k_edges = _edges(plan.k_starts, b, h, plan.k_len, plan.block_k)
            columns = [k_tokens[s : max(s, min(e, limit))] for s, e in zip(k_edges[:-1], k_edges[1:], strict=True)]
            exact = torch.zeros(plan.q_len, plan.k_len, dtype=torch.bool)
            pooled = torch.zeros(plan.q_len, len(columns), dtype=torch.bool)
            tail_q = q.clone()  # the query that scores pooled keys
            for i, (start, end) in enumerate(zip(q_edges[:-1], q_edges[1:], strict=True)):
                rows = q_tokens[start:end]
                kept = _lists(plan, b, h, i)
                if plan.tail == "pooled_block" and len(rows):
                    tail_q[rows] = q[rows].mean(0).to(dtype).to(work)
                for j, block in enumerate(columns):
                    if j in kept:
                        exact[rows[:, None], block[None, :]] = True
                    elif plan.tail != "none" and len(block):
                        pooled[rows, j] = True
            mean_k = torch.stack([k[block].mean(0) if len(block) else k[0] * 0 for block in columns])
            count = torch.ones(plan.k_len, dtype=work)
            if plan.tail_weights is not None:
                count = plan.tail_weights[b % plan.tail_weights.shape[0], h % plan.tail_weights.shape[1]].to(work)
            total = torch.stack([count[block].sum() for block in columns])
            mean_v = torch.stack(
                [count[block] @ v[block] / total[j] if len(block) else v[0] * 0 for j, block in enumerate(columns)]
            )
            mean_k, mean_v = mean_k.to(dtype).to(work), mean_v.to(dtype).to(work)
            logits = torch.cat([q @ k.T * case.scale, tail_q @ mean_k.T * case.scale + total.log()], 1)
            logits = logits.masked_fill(~torch.cat([exact, pooled], 1), -torch.inf)
            peak = logits.amax(1, keepdim=True)
            exponentials = (logits - peak).exp()
            denominator = exponentials.sum(1, keepdim=True)
            lse[b, h] = (peak + denominator.log())[:, 0]
            out[b, :, h] = exponentials.to(dtype).to(work) @ torch.cat([v, mean_v]) / denominator
    return (out if dtype == torch.float64 else out.to(dtype)), lse


def _tokens(order: Tensor | None, b: int, h: int, length: int) -> Tensor:
    return torch.arange(length) if order is None else order[b % order.shape[0], h % order.shape[1]]


def _lists(plan: BlockPlan, b: int, h: int, i: int) -> set[int]:
    b, h = b % plan.counts.shape[0], h % plan.counts.shape[1]
    return set(plan.indices[b, h, i, : int(plan.counts[b, h, i])].tolist())


# -- tolerances ---------------------------------------------------------------------------------------------


class Budget(NamedTuple):
    """Largest absolute error allowed."""

    out: float
    lse: float


def error_budget(case: Case, exact: tuple[Tensor, Tensor] | None = None) -> Budget:
    """What a correct implementation of this case may be off by.

    A dense masked softmax with the unavoidable roundings of the dtype (`_dense_softmax`) has some error against
    float64. Implementations round the same things in another order, so they may be off by twice as much, plus

    * out: one rounding of the result and one of the largest weight, ``u`` relative each (u = half an ulp of the
      dtype), on values up to ``max |v|``;
    * both: fp32 arithmetic of the logits. A dot product that is summed in another order, or as three TF32 products,
      moves a logit by a few fp32 ulps of ``scale * |q| |k|``; e to that moves weights and sums by as much.
    """
    exact = oracle(case) if exact is None else exact
    plain = _dense_softmax(case, case.q.dtype)
    out_error, lse_error = (float((a.double() - b).abs().max()) for a, b in zip(plain, exact, strict=True))
    u = torch.finfo(case.q.dtype).eps / 2
    longest = (x.double().norm(dim=-1).max() for x in (case.q, case.k))
    logits = 16 * 2.0**-24 * (1 + abs(case.scale) * float(math.prod(longest)))
    return Budget(2 * out_error + float(case.v.abs().max()) * (2 * u + logits), 2 * lse_error + logits)


def check(case: Case, out: Tensor, lse: Tensor) -> None:
    """Fail with the case's seed and shape unless out and lse are right within the budget."""
    exact = oracle(case)
    assert out.shape == exact[0].shape and out.dtype == case.q.dtype, f"{case.name}: {out.shape} {out.dtype}"
    assert lse.shape == exact[1].shape and lse.dtype == torch.float32, f"{case.name}: {lse.shape} {lse.dtype}"
    budget = error_budget(case, exact)
    for what, got, want, allowed in zip(("out", "lse"), (out, lse), exact, budget, strict=True):
        error = float((got.cpu().double() - want).abs().max())
        assert error <= allowed, f"{case.name}: {what} is off by {error:.3g}, budget {allowed:.3g}"
