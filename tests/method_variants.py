"""Every method in its variants, and attention computed from a plan's meaning alone, for the tests of properties."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import dsattn
from dsattn import BlockPlan, Engine, VideoGrid

CLUSTERS = {"q_clusters": 12, "k_clusters": 20}
WEIGHTS = "weights"  # stands for a file of projections, see `with_weights`


@dataclass(frozen=True)
class Variant:
    """A method with options.

    everything: options to replace with, so that all pairs are kept (None: the method has no such setting).
    noisy: heads are told apart by more than their values. joint: heads share one budget. watched: plans are made at
    every step, and follow the errors that the last ones reached. half: what the selection of half-precision inputs
    differs in from that of their values in fp32 (None: nothing).
    """

    method: str
    options: dict[str, Any]
    everything: dict[str, Any] | None = None
    noisy: bool = False
    joint: bool = False
    watched: bool = False
    half: str | None = None

    def __str__(self) -> str:
        return "-".join([self.method, *(f"{k}={v}" for k, v in self.options.items() if k not in CLUSTERS)])

    def with_weights(self, path: str) -> "Variant":
        def fill(options: dict[str, Any]) -> dict[str, Any]:
            filled = {k: fill(v) if isinstance(v, dict) else v for k, v in options.items()}
            return {**filled, WEIGHTS: path} if WEIGHTS in filled else filled

        return replace(self, options=fill(self.options))

    def engine(self, **options: Any) -> Engine:
        if self.watched:
            options = {**options, "refresh": 1, "monitor": 16, "drift": 1.2}
        return Engine(self.method, **{"impl": "torch", "monitor": 0, **self.options, **options})


def _topk(everything: dict[str, Any], **options: Any) -> Variant:
    return Variant("topk", options, everything, noisy="routing_noise" in options)


def _semantic(everything: dict[str, Any], half: str | None = "features", **options: Any) -> Variant:
    return Variant("semantic", {**CLUSTERS, **options}, everything, half=half)


def _linear(**options: Any) -> Variant:
    everything = None if WEIGHTS in options else {"critical": 1.0}  # test_sparse_linear.py knows the branch's share
    return Variant("sparse_linear", {"critical": 0.2, "block_q": 32, "block_k": 16, **options}, everything)


def _temporal(
    base: str = "dense", threshold: Any = -3.0, options: dict[str, Any] | None = None, **more: Any
) -> Variant:
    own = {"block_q": 32, "block_k": 16} if base == "dense" else {"base": base, "base_options": options or {}}
    if "target_error" not in more:
        more["threshold"] = -3.0
    all_of_base = {"dense": {}, "topk": {"density": 1.0}, "semantic": {"density": 1.0}, "sol": {"density": 1.0}}
    everything = None
    if base in all_of_base and "target_error" not in more:
        everything = {"threshold": -torch.inf, **({"base_options": all_of_base[base]} if base != "dense" else {})}
    half = "features" if base in ("semantic", "auto") else None
    return Variant("temporal", {**own, **more}, everything, joint=base == "auto", half=half)


def _auto(watched: bool = False, **options: Any) -> Variant:
    half = "features" if "semantic" in options.get("candidates", ("semantic",)) else None
    half = "errors reached" if watched else half
    return Variant("auto", options, {"target_error": 1e-6, "cost": None}, joint=True, watched=watched, half=half)


VARIANTS = [
    Variant("dense", {}, {}),
    Variant("radial", {"decay": 0.05, "block": 32}),
    Variant("radial", {"decay": 0.1, "block": 32, "compat": "original", "sink": False, "tail": "pooled"}),
    Variant("spatial_temporal", {"density": 0.3, "block": 16}, {"density": 1.0}),
    Variant("spatial_temporal", {"density": 0.2, "block": 32, "sink": False, "tail": "pooled"}, {"density": 1.0}),
    _topk({"density": 1.0}, order="raster", density=0.2, block_q=32, block_k=16, tail="none"),
    _topk({"top_p": 1.0}, order="tile", scorer="subblock", top_p=0.5, block_q=16, block_k=32),
    _topk({"density": 1.0}, order="morton", density=0.1, top_p=0.3, tail="pooled_block", routing_noise=0.5),
    _topk({"density": 1.0}, order="hilbert", scorer="subblock", density="0:0.4,1:0.2", block_q=32, block_k=32),
    _topk({"density": 1.0}, order="tile", scorer="exact", density=0.3, block_q=32, block_k=16),
    Variant("sol", {"tau": 0.7, "block": 16}, {"tau": -10.0}),
    Variant(
        "sol",
        {"tau": 0.5, "variance": "exact", "tail": "pooled_block", "order": "hilbert", "block": 32},
        {"tau": -10.0},
    ),
    Variant("sol", {"density": 0.2, "tail": "none", "order": "raster", "block": 32}, {"density": 1.0}),
    Variant("sol", {"density": 0.2, "order": "tile", "block": 16}, {"density": 1.0}),
    _semantic({"density": 1.0}, density=0.2),
    _semantic({"top_p": 1.0}, top_p=0.5, metric="query", routing="output_error", values=0.2),
    _semantic({"density": 1.0}, density=0.2, top_p=0.3, k_groups=5),
    _semantic({"density": 1.0}, None, density=0.2, metric="euclidean", routing="mass", tail="none"),
    _semantic({"density": 1.0}, None, density=0.1, top_p=0.2, metric="euclidean"),
    _semantic({"target_error": 1e-9}, target_error=0.3, tail="pooled_block", rows=32),
    _linear(),
    _linear(weights=WEIGHTS, linear_scope="global"),
    _linear(weights=WEIGHTS, linear_scope="complement", feature_map="elu"),
    _linear(weights=WEIGHTS, linear_scope="marginal", feature_map="hedgehog", negligible=0.3),
    _temporal(),
    _temporal(tail="pooled", traversal="alternate", order="raster", revisit=2),
    _temporal(target_error=0.2, traversal="ascending"),
    _temporal("radial", options={"block": 32, "tail": "pooled"}),
    _temporal("spatial_temporal", options={"block": 16}, tail="pooled_block"),
    _temporal("topk", options={"density": 0.4, "block_q": 32, "block_k": 16}),
    _temporal("sol", options={"tau": 0.5, "block": 16}),
    _temporal("semantic", options={"density": 0.4, **CLUSTERS}),
    _temporal("sparse_linear", options={"critical": 0.4, "block_q": 32, "block_k": 32, "weights": WEIGHTS}),
    _temporal("auto", options={"target_error": 0.2}),
    _auto(target_error=0.3),
    _auto(cost=0.3, candidates=("radial", "spatial_temporal", "topk", "semantic")),
    _auto(target_error=0.2, candidates=("radial", "spatial_temporal")),
    _auto(cost=0.2, candidates="semantic"),
    _auto(watched=True, target_error=0.1, candidates=("topk", "spatial_temporal")),
]


# -- oracle -------------------------------------------------------------------------------------------------


def meaning(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, key_lengths: Tensor | None = None) -> Tensor:
    """Float64 output of a plan: softmax over the pairs of ``to_dense``, blocks not kept as means, linear branch added.

    ``key_lengths`` count tokens here: what the positions of a plan must come to.
    """
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    lead, pairs = q.shape[:2], plan.to_dense()
    readable = torch.ones(lead[0], 1, k.shape[2], dtype=torch.bool)
    if key_lengths is not None:
        readable = (torch.arange(k.shape[2]) < key_lengths[:, None])[:, None]
        k, v = (x.masked_fill(~readable[..., None], 0) for x in (k, v))
    assert not bool((pairs & ~readable[:, :, None]).any()), "padding is read"
    logits, values = (q @ k.mT * scale).masked_fill(~pairs, -torch.inf), v
    if plan.tail != "none":
        owner = plan.k_block_of_token.expand(*lead, -1)
        members = torch.nn.functional.one_hot(owner, plan.num_k_blocks).double() * readable[..., None]
        sizes = members.sum(2)[..., None]
        k_mean, weights = members.mT @ k / sizes.clamp(min=1), members
        if plan.tail_weights is not None:
            weights = members * plan.tail_weights.double().expand(*lead, -1)[..., None]
        total = weights.sum(2)[..., None]
        v_mean = weights.mT @ v / total.where(total > 0, 1)
        read = pairs.double() @ members
        assert bool(((read == 0) | (read == sizes.mT)).all()), "a block is read in part"
        queries = _block_means(q, plan) if plan.tail == "pooled_block" else q
        tail = (queries @ k_mean.mT * scale + total.mT.log()).masked_fill(read > 0, -torch.inf)
        logits, values = torch.cat([logits, tail], -1), torch.cat([v, v_mean], 2)
    out = logits.softmax(-1) @ values
    if plan.linear is not None:
        seen = readable[:, :, None].expand(*lead, *pairs.shape[2:])
        if plan.linear.blocks is not None:
            rows, columns = (torch.arange(n) // b for n, b in ((plan.q_len, plan.block_q), (plan.k_len, plan.block_k)))
            seen = seen & plan.linear.blocks.expand(*lead, -1, -1)[:, :, rows][..., columns]
        out = out + _linear_branch(q, k, v, plan, seen)
    return out.transpose(1, 2)


def _block_means(q: Tensor, plan: BlockPlan) -> Tensor:
    members = torch.nn.functional.one_hot(plan.q_block_of_token.expand(*q.shape[:2], -1), plan.num_q_blocks).double()
    return members @ (members.mT @ q / members.sum(2)[..., None].clamp(min=1))


def _linear_branch(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, seen: Tensor) -> Tensor:
    maps = {
        "softmax": lambda x: x.softmax(-1),
        "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
        "hedgehog": lambda x: torch.cat([x, -x], -1).softmax(-1),
    }
    phi = maps[plan.linear.feature_map]
    products = phi(q) @ phi(k).mT * seen
    branch = products @ v / (products.sum(-1, keepdim=True) + 1e-5)
    return branch @ plan.linear.weight.double().T + plan.linear.bias.double()


def allowed(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype = torch.float32) -> float:
    """How far an output in ``dtype`` may be off: fp32 arithmetic of the logits moves weights, results are rounded.

    A dot product summed in another order moves a logit by a few fp32 ulps of ``scale |q| |k|`` (16 cover it and the
    sums over keys); weights and values of half precision are products of rounded factors.
    """
    largest = float(q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max()) * q.shape[-1] ** -0.5
    # The linear branch is a mean of values, projected with rows of sum about one.
    return 4 * float(v.abs().max()) * (16 * 2.0**-24 * (1 + largest) + torch.finfo(dtype).eps)


def assert_meaning(out: Tensor, qkv: list[Tensor], plan: BlockPlan, key_lengths: Tensor | None = None) -> None:
    """Fail unless ``out`` is what the plan means, for q and k of the given values."""
    q, k, v = qkv
    if key_lengths is not None:  # what is never read sets no scale
        hidden = (torch.arange(k.shape[1]) >= key_lengths[:, None])[..., None, None]
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    error = float((out.double() - meaning(q, k, v, plan, key_lengths)).abs().max())
    limit = allowed(q, k, v, out.dtype)
    assert error <= limit, f"off by {error:.3g}, allowed {limit:.3g}"


# -- plans --------------------------------------------------------------------------------------------------


def plan_of(variant: Variant, qkv: list[Tensor], call: dsattn.Call, **options: Any) -> BlockPlan:
    return dsattn.plan(*qkv, call, method=variant.method, **{**variant.options, **options}).validate()


def swapped(grid: VideoGrid) -> VideoGrid:
    """Another grid of as many tokens."""
    return replace(grid, height=grid.width, width=grid.height)
