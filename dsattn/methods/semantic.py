"""``semantic``: k-means clusters of queries and keys as blocks; the rest enters pooled.

Source: SVG2, NeurIPS 2025 (arXiv 2505.18875): clustering, warm start, centroid scores. Pooled tail over clusters:
SVG-EAR (arXiv 2603.08982).
Differs in: key clusters are ranked by estimated mass per key, which keeps the most mass for the keys that are read
(SVG2 ranks by mass per cluster); a budget of keys (``density``) beside ``top_p``; cluster counts follow the number of
tokens; fixed iteration counts and a seeded start; text and prefix tokens are exact for every model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsattn.block_plan import TAILS, BlockPlan, Tail
from dsattn.config import require, require_budget, require_choice
from dsattn.grid import Call, VideoGrid
from dsattn.kernels.kmeans import Clusters, first_centroids, kmeans
from dsattn.methods.base import Memory, Method

# Tile of text and prefix tokens, and the tile that kernels should use within clusters.
TILE = 64
# Automatic cluster counts: tokens per cluster, and the most clusters (SVG2's for 75,600 tokens).
Q_TOKENS, Q_MOST = 72, 300
K_TOKENS, K_MOST = 24, 1000


@dataclass(frozen=True)
class SemanticConfig:
    """Options of ``semantic``; ``density`` and ``top_p`` exclude each other.

    Args:
        density: share of the keys that every query cluster reads exactly, in (0, 1], text and prefix included;
            0.1 if neither is given.
        top_p: keep the best key clusters until their share of the estimated softmax mass reaches ``top_p``, in
            (0, 1]; the cluster that crosses the mark is kept.
        q_clusters, k_clusters: clusters per head; 0 is one per 72 queries (at most 300) and one per 24 keys (at
            most 1000).
        first_iterations: k-means iterations of the first plan of a run.
        iterations: k-means iterations of later plans, which start from the last centroids.
        tail: what skipped clusters contribute, ``"pooled"`` or ``"none"``.
        seed: draws the tokens that are the first centroids.

    """

    density: float | None = None
    top_p: float | None = None
    q_clusters: int = 0
    k_clusters: int = 0
    first_iterations: int = 4
    iterations: int = 1
    tail: Tail = "pooled"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", require_budget(self.density, self.top_p, default=0.1))
        require("q_clusters", self.q_clusters, int, low=0)
        require("k_clusters", self.k_clusters, int, low=0)
        require("first_iterations", self.first_iterations, int, low=1)
        require("iterations", self.iterations, int, low=1)
        require_choice("tail", self.tail, TAILS)
        require("seed", self.seed, int)


def plan(q: Tensor, k: Tensor, v: Tensor, call: Call, config: SemanticConfig, memory: Memory) -> BlockPlan:
    """Plan from the current q and k; ``memory`` keeps the centroids for the next plan.

    Args:
        q, k, v: ``[B, S, H, D]`` after norm and RoPE; S must equal ``call.grid.tokens``.

    """
    batch, length, heads, dim = q.shape
    grid = call.grid
    video = slice(grid.video_start, grid.video_end)
    q_side = _cluster(q[:, video], config.q_clusters, (Q_TOKENS, Q_MOST), config, memory, "q_centroids")
    k_side = _cluster(k[:, video], config.k_clusters, (K_TOKENS, K_MOST), config, memory, "k_centroids")
    q_order, q_starts, exact = _lay_out(q_side, grid)
    k_order, k_starts, _ = _lay_out(k_side, grid)

    sizes = k_side.sizes.float()
    logits = q_side.centroids @ k_side.centroids.mT * dim**-0.5
    # Empty clusters have a mass of zero; left in the maximum, a stale centroid could push all others to zero.
    logits = logits.masked_fill(k_side.sizes[:, :, None] == 0, -torch.inf)
    mass_per_key = torch.softmax(logits + sizes.log()[:, :, None], -1) / sizes.clamp(min=1)[:, :, None]
    keep = _select(mass_per_key, k_side.sizes, length - grid.video_tokens, length, config)
    # Exact segments are rows and columns behind the clusters.
    keep = torch.nn.functional.pad(keep, (0, exact, 0, exact), value=True)
    return BlockPlan.from_mask(
        keep,
        length,
        length,
        batch=batch,
        heads=heads,
        block_q=TILE,
        block_k=TILE,
        q_order=q_order,
        k_order=k_order,
        q_starts=q_starts,
        k_starts=k_starts,
        tail=config.tail,
    )


def _cluster(
    x: Tensor, count: int, automatic: tuple[int, int], config: SemanticConfig, memory: Memory, name: str
) -> Clusters:
    """Clusters of the video tokens ``x [B, S, H, D]``, from the remembered centroids where there are any."""
    tokens_each, most = automatic
    count = min(count or max(1, min(most, x.shape[1] // tokens_each)), x.shape[1])
    centroids = memory.get(name)
    if centroids is None:
        clusters = kmeans(x, first_centroids(x, count, config.seed), config.first_iterations)
    else:
        clusters = kmeans(x, centroids, config.iterations)
    memory[name] = clusters.centroids
    return clusters


def _lay_out(clusters: Clusters, grid: VideoGrid) -> tuple[Tensor, Tensor, int]:
    """Token order ``[B, H, S]``, block starts ``[B, H, N + 1]`` and the number of exact blocks among the N.

    Clusters come first, then prefix and text in tiles, in their own order: padding stays at the very end.
    """
    lead = clusters.labels.shape[:2]
    device = clusters.labels.device
    video = clusters.labels.argsort(dim=-1, stable=True) + grid.video_start
    segments = [torch.arange(*segment, device=device) for segment in grid.exact_segments]
    order = torch.cat([video, *(s.expand(*lead, -1) for s in segments)], -1)
    starts = torch.nn.functional.pad(clusters.sizes.cumsum(-1), (1, 0))
    ends: list[int] = []
    position = grid.video_tokens
    for start, stop in grid.exact_segments:
        ends += [position + min(done + TILE, stop - start) for done in range(0, stop - start, TILE)]
        position += stop - start
    exact = torch.tensor(ends, dtype=starts.dtype, device=device).expand(*lead, -1)
    return order, torch.cat([starts, exact], -1).to(torch.int32), len(ends)


def _select(mass_per_key: Tensor, sizes: Tensor, exact: int, length: int, config: SemanticConfig) -> Tensor:
    """``[B, H, Cq, Ck]`` bool: the key clusters that every query cluster reads; at least the best one.

    Args:
        mass_per_key: ``[B, H, Cq, Ck]`` estimated softmax mass of one key.
        sizes: ``[B, H, Ck]`` keys per cluster.
        exact: keys that are read anyway and use up budget.
        length: all keys.

    """
    ranked = mass_per_key.sort(dim=-1, descending=True, stable=True).indices
    keys = sizes[:, :, None].expand_as(ranked).gather(-1, ranked)
    if config.density is not None:
        # The cluster on the mark is kept if more than half of it fits.
        chosen = keys.cumsum(-1) - keys / 2 <= config.density * length - exact
    else:
        share = mass_per_key.gather(-1, ranked) * keys
        # Rounding may leave a cumulated share just above top_p = 1: keep all then.
        chosen = (share.cumsum(-1) - share < (config.top_p or 0)) | (config.top_p == 1)
    chosen[..., 0] = True
    return torch.zeros_like(chosen).scatter_(-1, ranked, chosen)


METHOD = Method(
    name="semantic",
    config=SemanticConfig,
    plan=plan,
    summary="k-means clusters of queries and keys, best clusters exact, the rest pooled",
    source="SVG2 2505.18875, SVG-EAR 2603.08982",
)
