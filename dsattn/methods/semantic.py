"""``semantic``: k-means clusters of queries and keys as blocks; the rest enters pooled.

Source: SVG2, NeurIPS 2025 (arXiv 2505.18875): clustering, warm start, centroid scores. Pooled tail over clusters and
routing by its error: SVG-EAR (arXiv 2603.08982).
Differs in: key clusters are ranked by estimated mass per key, which keeps the most mass for the keys that are read
(SVG2 ranks by mass per cluster); a budget of keys (``density``) beside ``top_p``; cluster counts follow the number of
tokens; fixed iteration counts and a seeded start; text and prefix tokens are exact for every model; distances between
logits instead of tokens, and values beside keys, are options of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dsattn.block_plan import TAILS, BlockPlan, Tail
from dsattn.config import require, require_choice, require_one_of
from dsattn.errors import UsageError
from dsattn.grid import Call, VideoGrid
from dsattn.kernels.cluster_errors import cluster_errors
from dsattn.kernels.kmeans import Clusters, draw_tokens, first_centroids, kmeans
from dsattn.methods.base import Memory, Method
from dsattn.methods.budget import Table, at_step, require_shares
from dsattn.methods.cluster_space import METRICS, ClusterSpace, Metric
from dsattn.methods.estimate import RowSample, fit_density, sample_rows
from dsattn.methods.ranked import Ranked, mass_before, share_by_rank, share_by_rank_of_head
from dsattn.methods.scores import routing_noise
from dsattn.methods.tail_weights import tail_weights

# Tile of text and prefix tokens, and the tile that kernels should use within clusters.
TILE = 64
# Iterations of k-means over the centroids of key clusters that are to be grouped.
GROUP_ITERATIONS = 3
# The first iterations see one token in so many.
FIRST_SHARE = 4
# Automatic cluster counts: tokens per cluster, and the most clusters (SVG2's for 75,600 tokens).
Q_TOKENS, Q_MOST = 30, 300
K_TOKENS, K_MOST = 36, 1000

Routing = Literal["mass", "weight_error", "output_error"]
BudgetOf = Literal["head", "row"]
ROUTINGS: tuple[Routing, ...] = ("mass", "weight_error", "output_error")


@dataclass(frozen=True)
class SemanticConfig:
    """Options of ``semantic``. With both ``density`` and ``top_p``, a cluster reads what either of them keeps.

    Budgets are numbers, or tables over the run such as ``"0:0.2,0.5:0.05"`` (``dsattn.methods.budget``);
    ``target_error`` excludes the others.

    Args:
        density: share of the keys that queries read exactly, in (0, 1], text and prefix included; 0.045 if no budget is
            given.
        budget: ``"row"``: every query cluster reads so much. ``"head"``: ``density`` is the mean over the queries of a
            head, and the best pairs of query and key clusters are read: query clusters that gain most read most, those
            of few queries less, as kernels work in tiles.
        top_p: keep the best key clusters until their share of the estimated softmax mass reaches ``top_p``, in
            (0, 1]; the cluster that crosses the mark is kept.
        target_error: keep as little, head by head, as brings the relative L2 error of the output down to this, in
            (0, 1], estimated on ``rows`` sampled queries when a plan is made.
        rows: sampled queries for ``target_error``; at least 1.
        q_clusters, k_clusters: clusters per head; 0 is one per 30 queries (at most 300) and one per 36 keys (at
            most 1000).
        k_groups: read key clusters in so many groups of neighbours, each as a whole, while pools stay those of the
            clusters (hierarchical centroids); 0 is each for itself.
        first_iterations: k-means iterations of the first plan of a run; all but the last on a quarter of the tokens.
        iterations: k-means iterations of later plans, which start from the last centroids.
        tail: what skipped clusters contribute, ``"pooled"``, ``"pooled_block"`` or ``"none"``.
        tail_order: 1 gives a skipped cluster the weight that all its keys would have if they were their mean; 2 counts
            every key by the weight that queries give it beside the mean, to second order, from the moments of all
            queries (``dsattn.methods.tail_weights``).
        metric: distance between tokens: ``"euclidean"``; ``"query"``, between keys the mean squared difference of
            their logits over the queries; ``"logit"``, also between queries that over the keys (``ClusterSpace``).
        values: how much values count beside keys when these are clustered, at least 0; at 1 both weigh the same.
        routing: key clusters are read in the order of their estimated softmax ``"mass"`` per key, or of the squared
            error per key that pooling them would cause, in the weights (``"weight_error"``) or in the output
            (``"output_error"``); the last two need ``tail="pooled"``. None is ``"weight_error"`` with that tail,
            ``"mass"`` with another.
        seed: draws the tokens that are the first centroids, the sampled queries and the noise.
        routing_noise: standard deviation of a Gaussian that is added to the logarithm of what clusters are ordered by,
            new at every plan, so that no cluster is passed over at every step (PASA); 0 is none.

    """

    density: Table | None = None
    budget: BudgetOf = "row"
    top_p: Table | None = None
    target_error: Table | None = None
    rows: int = 64
    q_clusters: int = 0
    k_clusters: int = 0
    k_groups: int = 0
    first_iterations: int = 6
    iterations: int = 1
    tail: Tail = "pooled"
    tail_order: int = 2
    metric: Metric = "logit"
    values: float = 0.0
    routing: Routing | None = None
    seed: int = 0
    routing_noise: float = 0.0

    def __post_init__(self) -> None:
        require_one_of(density=self.density, target_error=self.target_error)
        require_one_of(top_p=self.top_p, target_error=self.target_error)
        if not require_shares(density=self.density, top_p=self.top_p, target_error=self.target_error):
            object.__setattr__(self, "density", 0.045)
        require("rows", self.rows, int, low=1)
        require("q_clusters", self.q_clusters, int, low=0)
        require("k_clusters", self.k_clusters, int, low=0)
        require("k_groups", self.k_groups, int, low=0)
        require("first_iterations", self.first_iterations, int, low=1)
        require("iterations", self.iterations, int, low=1)
        require_choice("budget", self.budget, ("head", "row"))
        require_choice("tail", self.tail, TAILS)
        require("tail_order", self.tail_order, int, low=1, high=2)
        require_choice("metric", self.metric, METRICS)
        require("values", self.values, (int, float), low=0)
        if self.routing is not None:
            require_choice("routing", self.routing, ROUTINGS)
        if self.routing not in (None, "mass") and self.tail != "pooled":
            raise UsageError(
                f"routing={self.routing!r} is about the error of pooled clusters and needs tail='pooled', "
                f"got tail={self.tail!r}; use routing='mass'"
            )
        require("seed", self.seed, int)
        require("routing_noise", self.routing_noise, (int, float), low=0, high=10)


def plan(q: Tensor, k: Tensor, v: Tensor, call: Call, config: SemanticConfig, memory: Memory) -> BlockPlan:
    """Plan from the current q and k; ``memory`` keeps the centroids for the next plan.

    Args:
        q, k, v: ``[B, S, H, D]`` after norm and RoPE; S must equal ``call.grid.tokens``.

    """
    ranked = rank(q, k, v, call, config, memory)
    if config.target_error is None:
        return ranked.within(config.density, config.top_p, call)
    rows = sample_rows(call.grid, config.rows, config.seed).to(q.device, non_blocking=True)
    sample = RowSample.of(q, k, v, rows)
    made, memory["rung"] = fit_density(ranked.at, sample, at_step(config.target_error, call), memory.get("rung"))
    return made


def rank(q: Tensor, k: Tensor, v: Tensor, call: Call, config: SemanticConfig, memory: Memory) -> Ranked:
    """Clusters by their worth per key; the arguments are those of ``plan``, the values of budgets play no part."""
    batch, length, heads, _ = q.shape
    grid = call.grid
    video = slice(grid.video_start, grid.video_end)
    q_video, k_video, v_video = (x[:, video] for x in (q, k, v))
    space = ClusterSpace.of_queries(k_video, config.metric, config.seed)
    q_side, _ = _cluster(q_video, space, config.q_clusters, (Q_TOKENS, Q_MOST), config, memory, "q_centroids")
    space = ClusterSpace.of_keys(q_video, k_video, v_video, config.metric, config.values, config.seed)
    tokens = torch.cat([k_video, v_video], -1) if config.values else k_video
    k_side, features = _cluster(tokens, space, config.k_clusters, (K_TOKENS, K_MOST), config, memory, "k_centroids")
    q_order, q_starts, exact = _lay_out(q_side, grid)
    k_order, k_starts, _ = _lay_out(k_side, grid)
    score, mass = _scores(q_side, k_side, k_video, v_video, _routing(config))
    groups = _groups(k_side, space, config.k_groups, config.seed) if config.k_groups else None
    read, before = _by_worth(score, mass, q_side.sizes, k_side.sizes, groups, config, call)
    # Text and prefix use up budget; they are blocks of their own behind the clusters, read by every row and column.
    share = torch.where(read < 0, -1.0, (read * grid.video_tokens + (length - grid.video_tokens)) / length)
    # Rounding may leave the last ones just above everything.
    share = share.clamp(max=1.0)
    weights = None
    if config.tail != "none" and config.tail_order == 2:
        if config.metric == "euclidean" or config.values:
            features = ClusterSpace.of_keys(q_video, k_video, v_video, "query", 0, config.seed)(k_video)
        video_weights = tail_weights(q_video, k_video, features, k_side)
        weights = torch.nn.functional.pad(video_weights, (grid.video_start, length - grid.video_end), value=1.0)

    def make(keep: Tensor) -> BlockPlan:
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
            tail_weights=weights,
        )

    def with_exact(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, exact, 0, exact), value=-1)

    return Ranked(with_exact(share), make, None if before is None else with_exact(before))


def _cluster(
    x: Tensor,
    space: ClusterSpace,
    count: int,
    automatic: tuple[int, int],
    config: SemanticConfig,
    memory: Memory,
    name: str,
) -> tuple[Clusters, Tensor]:
    """Clusters of the video tokens ``x [B, S, H, D]``, from the remembered centroids where there are any.

    Distances are those of the space's features, which come second; centroids are means of ``x``.
    """
    tokens_each, most = automatic
    count = min(count or max(1, min(most, x.shape[1] // tokens_each)), x.shape[1])
    remembered = memory.get(name)
    features = space(x)
    if remembered is None:
        centroids = first_centroids(features, count, config.seed)
        if config.first_iterations > 1:
            drawn = draw_tokens(x.shape[1], max(count, x.shape[1] // FIRST_SHARE), config.seed + 1, x.device)
            centroids = kmeans(features[:, drawn], centroids, config.first_iterations - 1).centroids
        clusters = kmeans(features, centroids, 1)
    else:
        clusters = kmeans(features, space(remembered.transpose(1, 2)).transpose(1, 2), config.iterations)
    if space.changes:
        clusters = replace(clusters, centroids=clusters.means(x, empty=remembered))
    memory[name] = clusters.centroids
    return clusters, features


def _routing(config: SemanticConfig) -> Routing:
    return config.routing or ("weight_error" if config.tail == "pooled" else "mass")


def _groups(k_side: Clusters, space: ClusterSpace, count: int, seed: int) -> Clusters:
    """Neighbouring key clusters, as clusters of their centroids."""
    centroids = space(k_side.centroids.transpose(1, 2))
    count = min(count, centroids.shape[1])
    return kmeans(centroids, first_centroids(centroids, count, seed), GROUP_ITERATIONS)


def _by_worth(
    score: Tensor,
    mass: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    groups: Clusters | None,
    config: SemanticConfig,
    call: Call,
) -> tuple[Tensor, Tensor | None]:
    """Share of keys, and mass, that come before every key cluster ``[B, H, Cq, Ck]``, best clusters or groups first.

    score, mass: of ``_scores``. q_sizes, k_sizes: ``[B, H, C]``. The first counts to the middle of the cluster or
    group; -1 for the best one of a row. The second is None without ``top_p``.
    """
    sizes = k_sizes[:, :, None]
    everything = k_sizes.sum(-1)[..., None, None]
    if groups is not None:
        worth, mass, sizes = (_together(x, groups) for x in (score * sizes, mass, sizes))
        score = worth / sizes.clamp(min=1)
    if config.routing_noise:
        shape = (score.shape[1], score.shape[2], score.shape[3])
        noise = routing_noise(config.routing_noise, shape, call, config.seed, score.device)
        score = score.clamp(min=torch.finfo(score.dtype).tiny).log() + noise
    # Where pooling costs nothing all scores are 0: the best cluster, which is always read, must hold a key.
    score = score.masked_fill(sizes == 0, -torch.inf)
    if config.budget == "head":
        # Reading a key costs as much for few queries as for half a tile of them.
        queries = q_sizes.clamp(min=1)
        filled = queries / (queries + TILE // 2)
        gain = score + filled.log()[..., None] if config.routing_noise else score * filled[..., None]
        read = share_by_rank_of_head(gain, q_sizes, (sizes / everything)[:, :, 0])
    else:
        # Counted in keys, which fp32 adds up without rounding.
        keys = share_by_rank(score, sizes)
        read = torch.where(keys < 0, -1.0, keys / everything)
    before = None if config.top_p is None else mass_before(score, mass)
    if groups is not None:
        index = groups.labels[:, :, None].expand(-1, -1, score.shape[2], -1)
        read, before = read.gather(3, index), None if before is None else before.gather(3, index)
    return read, before


def _together(x: Tensor, groups: Clusters) -> Tensor:
    """Sums ``[B, H, C, G]`` over the groups of ``x [B, H, C, Ck]``."""
    sums = x.new_zeros(*x.shape[:3], groups.sizes.shape[2])
    return sums.scatter_add_(3, groups.labels[:, :, None].expand(x.shape), x)


def _scores(q_side: Clusters, k_side: Clusters, k: Tensor, v: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Worth of reading one key of every key cluster, and the cluster's share of the mass, both ``[B, H, Cq, Ck]``.

    Seen from the centroids of the query clusters; k and v ``[B, S, H, D]`` are what is clustered.
    """
    scale = k.shape[-1] ** -0.5
    sizes = k_side.sizes.float()[:, :, None]
    if routing == "mass":
        logits = q_side.centroids @ k_side.centroids[..., : k.shape[-1]].mT * scale
        # Empty clusters have a mass of zero; left in the maximum, a stale centroid could push all others to zero.
        logits = logits.masked_fill(sizes == 0, -torch.inf)
        share = score = torch.softmax(logits + sizes.log(), -1)
    else:
        kind: Literal["weight", "output"] = "weight" if routing == "weight_error" else "output"
        share, score = cluster_errors(q_side.centroids, k, v, k_side, kind, scale)
    return score / sizes.clamp(min=1), share


def _lay_out(clusters: Clusters, grid: VideoGrid) -> tuple[Tensor, Tensor, int]:
    """Token order ``[B, H, S]``, block starts ``[B, H, N + 1]`` and the number of exact blocks among the N.

    Clusters come first, then prefix and text in tiles, in their own order: padding stays at the very end.
    """
    lead = clusters.labels.shape[:2]
    device = clusters.labels.device
    video = clusters.order + grid.video_start
    segments = [torch.arange(*segment, device=device) for segment in grid.exact_segments]
    order = torch.cat([video, *(s.expand(*lead, -1) for s in segments)], -1)
    starts = torch.nn.functional.pad(clusters.sizes.cumsum(-1), (1, 0))
    ends: list[int] = []
    position = grid.video_tokens
    for start, stop in grid.exact_segments:
        ends += [position + min(done + TILE, stop - start) for done in range(0, stop - start, TILE)]
        position += stop - start
    # Without non_blocking, a copy to a GPU waits for all that was queued before it.
    exact = torch.tensor(ends, dtype=starts.dtype).to(device, non_blocking=True).expand(*lead, -1)
    return order, torch.cat([starts, exact], -1).to(torch.int32), len(ends)


METHOD = Method(
    name="semantic",
    config=SemanticConfig,
    plan=plan,
    rank=rank,
    summary="k-means clusters of queries and keys, best clusters exact, the rest pooled",
    source="SVG2 2505.18875, SVG-EAR 2603.08982",
)
