"""Entries of the kernel benchmark around attention: clustering, planning, pooling, permutation."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import bench_cases as cases
import torch
from bench_timing import Entry
from torch import Tensor

import dsattn
from dsattn.block_plan import BlockPlan
from dsattn.errors import ImplUnavailableError
from dsattn.grid import Call
from dsattn.kernels.kmeans import Clusters, first_centroids, kmeans
from dsattn.kernels.pooling import pool_blocks
from dsattn.methods import METHODS
from dsattn.methods.base import Memory
from dsattn.methods.semantic import K_MOST, K_TOKENS, Q_MOST, Q_TOKENS, SemanticConfig

QKV = tuple[Tensor, Tensor, Tensor]

# Names that the targets refer to.
MAP = "k-means, map and order"
REUSE = "reuse step, planning"


def entries(shape: cases.Shape, qkv: QKV, tiles: BlockPlan, clusters: BlockPlan) -> list[Entry]:
    """All parts.

    Args:
        shape: of the call.
        qkv: its tensors.
        tiles: a plan of equal blocks, whose blocks are pooled.
        clusters: a plan of variable blocks in a token order, whose blocks are pooled.

    """
    return [
        *_kmeans(shape, qkv),
        *_plans(shape, qkv),
        _reuse(shape, qkv),
        *_pooling(qkv, tiles, clusters),
        *_permutation(qkv, clusters),
    ]


def _entry(name: str, run: Callable[[], Any], *, moved: float = 0, flops: float = 0, **rest: Any) -> Entry:
    """``moved``: bytes that must be read and written; ``flops`` 0 with bytes means that memory alone bounds it."""
    info = {"group": "parts", "impl": "dsattn", "part": name, "bytes": moved or None, "flops": flops or None}
    return Entry(name, run, info | rest.pop("info", {}), **rest)


def _kmeans(shape: cases.Shape, qkv: QKV) -> list[Entry]:
    """Two iterations on q and on k, from the centroids of earlier ones: what a plan made anew costs."""
    q, k, _ = qkv
    counts = [max(1, min(most, q.shape[1] // each)) for each, most in ((Q_TOKENS, Q_MOST), (K_TOKENS, K_MOST))]
    warm = [kmeans(x, first_centroids(x, count, 0), 2).centroids for x, count in zip((q, k), counts, strict=True)]

    def both() -> tuple[Clusters, Clusters]:
        return kmeans(q, warm[0], 2), kmeans(k, warm[1], 2)

    flops = sum(2 * 2.0 * shape.heads * q.shape[1] * count * shape.dim for count in counts)
    # Per iteration and tensor: read once to assign, once for the means; labels and order written and sorted.
    moved = 2 * 2 * (2.0 * q.nbytes + 24 * q.shape[0] * q.shape[1] * shape.heads)
    memory = 6.0 * q.nbytes
    return [_entry("k-means, 2 warm iterations of q and k", both, moved=moved, flops=flops, memory=memory)]


def _plans(shape: cases.Shape, qkv: QKV) -> list[Entry]:
    """Whole plans: the plainest one of clusters, then the default method warm and fresh, and one without clusters."""
    q = qkv[0]
    mapped = SemanticConfig(density=0.1, tail="none", metric="euclidean", routing="mass", iterations=2)

    def plan(method: str, config: Any, memory: Memory | None = None) -> BlockPlan:
        return METHODS[method].plan(*qkv, shape.call, config, Memory() if memory is None else memory)

    def warm(config: SemanticConfig) -> Callable[[], BlockPlan]:
        memory = Memory()
        return partial(plan, "semantic", config, memory)

    default = SemanticConfig()
    memory = 16.0 * q.nbytes
    return [
        _entry(MAP, warm(mapped), memory=memory),
        _entry("semantic plan, warm", warm(default), memory=memory),
        _entry("semantic plan, fresh", partial(plan, "semantic", default), memory=memory),
        _entry("topk plan", partial(plan, "topk", METHODS["topk"].config()), memory=memory),
    ]


def _reuse(shape: cases.Shape, qkv: QKV) -> Entry:
    """What an engine does beside attention at a step that reuses a plan, by its own measurement."""
    steps = 1 << 20
    engine = dsattn.Engine("semantic", refresh=steps, monitor=0, timing=True)
    at = iter(range(steps))

    def step() -> Tensor:
        engine.stats.clear()
        out: Tensor = engine(*qkv, Call(0, next(at), shape.grid, num_layers=1, num_steps=steps))
        return out

    def read() -> float:
        record = engine.stats.records[-1]
        record.read_events()
        return record.plan_s + record.monitor_s

    return _entry(REUSE, step, memory=20.0 * qkv[0].nbytes, read=read)


def _pooling(qkv: QKV, tiles: BlockPlan, clusters: BlockPlan) -> list[Entry]:
    """Means of the blocks of k and v: both are read once."""
    _, k, v = qkv
    read = float(k.nbytes + v.nbytes)
    lead = 4 * k.shape[0] * k.shape[2] * (k.shape[-1] + v.shape[-1])
    found = []
    for name, plan, ordered in (("pool equal blocks", tiles, False), ("pool clusters", clusters, True)):
        # Orders are int64, read for k and for v.
        moved = read + lead * plan.num_k_blocks + (2 * 8 * k.shape[0] * k.shape[2] * k.shape[1] if ordered else 0)
        run = partial(pool_blocks, k, v, plan)
        found.append(_entry(name, run, moved=moved, check=_pool_check(k, plan), memory=4.0 * k.nbytes))
    return found


def _pool_check(k: Tensor, plan: BlockPlan) -> Callable[[tuple[Tensor, Tensor, Tensor]], tuple[float, float]]:
    """Means of head 0 against float64 sums."""

    def check(got: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
        owner = plan.k_block_of_token.expand(1, plan.heads, -1)[0, 0]
        rows = k[0, :, 0].double()
        count = owner.bincount(minlength=plan.num_k_blocks).clamp(min=1)[:, None]
        want = rows.new_zeros(plan.num_k_blocks, rows.shape[1]).index_add_(0, owner, rows) / count
        return float((got[0][0, 0].double() - want).norm() / want.norm()), 1e-5

    return check


def _permutation(qkv: QKV, clusters: BlockPlan) -> list[Entry]:
    """q, k and v into the order of their clusters, and a result back: the kernel where it runs, and torch's gather."""
    orders = (clusters.q_order, clusters.k_order, clusters.k_order)
    given = [
        (x, order.expand(x.shape[0], x.shape[2], -1)) for x, order in zip(qkv, orders, strict=True) if order is not None
    ]
    index = [order.transpose(1, 2)[..., None] for _, order in given]

    def gather() -> list[Tensor]:
        return [x.gather(1, i.expand_as(x)) for (x, _), i in zip(given, index, strict=True)]

    def kernel() -> list[Tensor]:
        from dsattn.kernels import launch
        from dsattn.kernels.permute import permute

        if reason := launch.why_unavailable(qkv[0].device):
            raise ImplUnavailableError(reason)
        return [permute(x, order) for x, order in given]

    def check(got: list[Tensor]) -> tuple[float, float]:
        same = all(torch.equal(a, b) for a, b in zip(got, gather(), strict=True))
        return (0.0 if same else math.inf), 0.0

    moved = 2.0 * sum(x.nbytes for x in qkv) + sum(order.nbytes for _, order in given)
    memory = 7.0 * qkv[0].nbytes
    return [
        _entry("permute q, k, v", kernel, moved=moved, memory=memory, check=check),
        _entry("permute q, k, v by torch", gather, moved=moved, memory=memory, info={"impl": "torch"}),
    ]
