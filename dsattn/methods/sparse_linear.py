"""``sparse_linear``: exact attention over the best key blocks, and projected linear attention added to it.

Source: SLA (arXiv 2509.24006) and its published code; ``linear_scope`` names the three variants found there.
Differs in: selection in fp32; at least one block per row, so that short sequences run; text and prefix blocks are
always exact; without weights the projection is zero, as in a fresh SLA layer, and the linear branch is not computed.

To train, put parameters into the plan, ``dataclasses.replace(plan, linear=LinearTail(weight, bias))``, and call
``dsattn.attend``: gradients reach them and q, k, v.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dsattn.block_plan import FEATURE_MAPS, BlockPlan, FeatureMap, LinearTail
from dsattn.config import require, require_choice
from dsattn.errors import UsageError
from dsattn.grid import Call
from dsattn.methods.base import Memory, Method, keep_exact_segments
from dsattn.methods.projections import Projections
from dsattn.methods.scores import block_sizes, mean_pool

BLOCKS = (16, 32, 64, 128)
LinearScope = Literal["global", "complement", "marginal"]
LINEAR_SCOPES: tuple[LinearScope, ...] = ("global", "complement", "marginal")


@dataclass(frozen=True)
class SparseLinearConfig:
    """Options of ``sparse_linear``. The published figures need a model that was fine-tuned with it.

    Args:
        critical: share of key blocks each query block computes exactly, in (0, 1], rounded down, at least one block;
            text and prefix blocks come on top.
        negligible: share of key blocks, the worst ones, that the linear branch leaves out, in [0, 1], rounded down;
            matters with ``linear_scope="marginal"`` only.
        block_q, block_k: tokens per block, one of 16, 32, 64, 128. Those the model was trained with.
        feature_map: of the linear branch, ``"softmax"``, ``"elu"``, ``"relu"``, or ``"hedgehog"`` without learned
            weights.
        linear_scope: keys of the linear branch: ``"global"`` all (the code that TurboDiffusion runs), ``"complement"``
            those of blocks that are not critical (branch SLA-1), ``"marginal"`` those of blocks that are neither
            critical nor negligible (the paper).
        weights: safetensors file of the projections, see ``dsattn.methods.projections``; None: the projection is zero
            and only the exact part runs.

    """

    critical: float = 0.05
    negligible: float = 0.10
    block_q: int = 64
    block_k: int = 64
    feature_map: FeatureMap = "softmax"
    linear_scope: LinearScope = "global"
    weights: str | Path | None = None

    def __post_init__(self) -> None:
        require("critical", self.critical, (int, float), low=0, high=1)
        if self.critical == 0:
            raise UsageError(f"critical must be above 0, got {self.critical!r}")
        require("negligible", self.negligible, (int, float), low=0, high=1)
        require_choice("block_q", self.block_q, BLOCKS)
        require_choice("block_k", self.block_k, BLOCKS)
        require_choice("feature_map", self.feature_map, FEATURE_MAPS)
        require_choice("linear_scope", self.linear_scope, LINEAR_SCOPES)
        if self.weights is not None:
            require("weights", self.weights, (str, Path))
            object.__setattr__(self, "weights", str(self.weights))
            _ = self.projections  # a file that cannot be used is an error now, not in the first sparse call

    @cached_property
    def projections(self) -> Projections | None:
        """The projections of ``weights``, read once per config."""
        return None if self.weights is None else Projections.load(str(self.weights))


def plan(q: Tensor, k: Tensor, v: Tensor, call: Call, config: SparseLinearConfig, memory: Memory) -> BlockPlan:
    """Plan from the current q and k.

    Args:
        q, k, v: ``[B, S, H, D]`` after norm and RoPE; S must equal ``call.grid.tokens``.

    Raises:
        UsageError: the weights file has no projection of this layer and head_dim.

    """
    batch, length, heads, dim = q.shape
    critical, marginal = classify(q, k, call, config)
    projection = None if config.projections is None else config.projections.find(call, dim, q.device)
    linear = None
    if projection is not None:
        blocks = {"global": None, "complement": ~critical, "marginal": marginal}[config.linear_scope]
        linear = LinearTail(*projection, feature_map=config.feature_map, blocks=blocks)
    made = BlockPlan.from_mask(
        critical,
        length,
        length,
        batch=batch,
        heads=heads,
        block_q=config.block_q,
        block_k=config.block_k,
        linear=linear,
    )
    if call.grid.exact_segments:
        return made
    # All rows keep as many blocks: a cached plan holds no longer lists.
    return replace(made, indices=made.indices[..., : _best(config, made.num_k_blocks)].contiguous())


def _best(config: SparseLinearConfig, blocks: int) -> int:
    """Critical blocks per row, text and prefix aside."""
    return max(1, int(config.critical * blocks))


def classify(q: Tensor, k: Tensor, call: Call, config: SparseLinearConfig) -> tuple[Tensor, Tensor]:
    """Which blocks are critical and which marginal, ``[B, H, Nq, Nk]`` bool each; the rest is negligible.

    Blocks are ranked, row by row, by the product of mean query and mean key. Keys are taken relative to their mean over
    the sequence, which shifts all scores of a row alike and keeps them small.
    """
    keys = mean_pool(k, config.block_k)
    shares = block_sizes(k.shape[1], config.block_k, k.device)[:, None] / k.shape[1]
    scores = mean_pool(q, config.block_q) @ (keys - (keys * shares).sum(2, keepdim=True)).mT
    blocks = scores.shape[-1]
    best, worst = _best(config, blocks), int(config.negligible * blocks)
    ranked = scores.sort(dim=-1, descending=True, stable=True).indices
    place = torch.arange(blocks, device=q.device).expand_as(ranked)
    rank = torch.empty_like(ranked).scatter_(-1, ranked, place)
    critical = keep_exact_segments(rank < best, call.grid, config.block_q, config.block_k)
    return critical, ~critical & (rank < blocks - worst)


METHOD = Method(
    name="sparse_linear",
    config=SparseLinearConfig,
    plan=plan,
    summary="best blocks exactly, plus linear attention through trained projections (none without weights)",
    source="SLA 2509.24006",
)
