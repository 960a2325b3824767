"""semantic: clusters as blocks, budgets, warm start, exact segments, and that it finds what positions hide."""

import itertools

import pytest
import torch

import dsattn
from dsattn.functional import find_method
from dsattn.grid import Call, VideoGrid
from dsattn.kernels.kmeans import first_centroids, kmeans
from dsattn.methods import semantic
from dsattn.methods.base import Memory
from dsattn.methods.cluster_space import ClusterSpace

from .method_inputs import GRIDS, dense, tensors

ROUTES = ("weight_error", "output_error")
EVERYTHING = {"metric": "logit", "values": 0.1, "routing": "output_error"}


def plan(grid: VideoGrid, qkv, **options) -> dsattn.BlockPlan:
    return dsattn.plan(*qkv, Call(0, 0, grid), method="semantic", **options).validate()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("budget", [{"density": 1.0}, {"top_p": 1.0}, {"density": 1.0, **EVERYTHING}])
def test_everything_kept_is_dense_attention(grid, budget):
    qkv = tensors(grid)
    torch.testing.assert_close(dsattn.attend(*qkv, plan(grid, qkv, **budget)), dense(qkv))


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5])
def test_every_query_cluster_reads_its_budget_of_keys(density):
    grid = VideoGrid(5, 9, 11)
    qkv = tensors(grid)
    made = plan(grid, qkv, density=density, k_clusters=40)
    keys = (made.block_mask * made.k_sizes[:, :, None]).sum(-1)
    # The best cluster is kept whatever it costs; none is cut.
    slack = made.k_sizes.max()
    assert bool((keys <= density * grid.tokens + slack).all())
    assert bool((keys >= density * grid.tokens - slack).all())
    assert bool((keys > 0).all())


def test_top_p_keeps_the_crossing_cluster_and_no_more():
    """Four planted clusters of 64 keys that hold 1/2, 1/4, 1/8, 1/8 of the mass for every query."""
    grid = VideoGrid(1, 16, 16)
    q = torch.zeros(1, 256, 1, 8)
    q[..., 0] = 8**0.5
    k = torch.zeros(1, 256, 1, 8)
    owner = torch.arange(256) % 4
    shares = torch.tensor([0.5, 0.25, 0.125, 0.125])
    k[0, :, 0, 0] = shares.log()[owner]
    k[0, :, 0, 1] = 100.0 * owner
    for top_p, expected in ((0.4, 128 / 256), (0.6, 192 / 256), (0.8, 224 / 256)):
        made = plan(
            grid, (q, k, k), top_p=top_p, k_clusters=4, first_iterations=8, seed=3, metric="euclidean", routing="mass"
        )
        kept = made.to_dense()[0, 0, 0]
        mass = shares[owner][kept].sum() / 64
        assert mass == pytest.approx(expected)


def test_clusters_find_what_positions_hide():
    """Tokens of 12 groups stand in random positions and only see their own group: exact at a density of 1/8."""
    grid = VideoGrid(4, 12, 16)
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(12, (grid.tokens,), generator=generator)
    codes = 6 * torch.nn.functional.one_hot(group, 32).float()[None, :, None].expand(1, -1, 2, -1)
    noise = torch.randn(2, 1, grid.tokens, 2, 32, generator=generator)
    q, k = codes + 0.1 * noise[0], codes + 0.1 * noise[1]
    v = torch.randn(1, grid.tokens, 2, 32, generator=generator)
    errors = {}
    for method, options in (("semantic", {"q_clusters": 64, "k_clusters": 64}), ("topk", {})):
        made = dsattn.plan(q, k, v, Call(0, 0, grid), method=method, density=0.125, tail="none", **options)
        out = dsattn.attend(q, k, v, made, impl="torch")
        errors[method] = ((out - dense((q, k, v))).norm() / dense((q, k, v)).norm()).item()
    assert errors["semantic"] < 0.05 < 0.5 < errors["topk"], errors


@pytest.mark.parametrize("options", [{}, EVERYTHING])
@pytest.mark.parametrize("grid", GRIDS[1:4])
def test_text_and_prefix_are_exact(grid, options):
    qkv = tensors(grid)
    pairs = plan(grid, qkv, density=0.05, **options).to_dense()
    for start, stop in grid.exact_segments:
        assert bool(pairs[:, :, start:stop].all())
        assert bool(pairs[:, :, :, start:stop].all())
    assert not bool(pairs.all())


def test_padded_text_stays_at_the_end():
    """key_lengths counts positions, so the order must leave padded text where it is."""
    grid = VideoGrid(5, 9, 11, prefix=3, text=80)
    q, k, v = tensors(grid, batch=2)
    made = plan(grid, (q, k, v))
    assert made.k_order is not None
    assert torch.equal(made.k_order[..., -80:], torch.arange(grid.tokens - 80, grid.tokens).expand(2, 2, -1))
    lengths = torch.tensor([grid.tokens - 50, grid.tokens], dtype=torch.int32)
    k[0, -50:], v[0, -50:] = torch.nan, torch.nan
    out = dsattn.attend(q, k, v, made.with_key_lengths(lengths), impl="torch")
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("options", [{}, EVERYTHING])
def test_batch_of_two_is_two_batches_of_one(options):
    grid = GRIDS[1]
    qkv = tensors(grid, batch=2)
    both = plan(grid, qkv, **options).to_dense()
    for b in range(2):
        assert torch.equal(both[b : b + 1], plan(grid, [x[b : b + 1] for x in qkv], **options).to_dense())


def test_a_later_plan_starts_from_the_last_centroids():
    grid = GRIDS[0]
    qkv = tensors(grid)
    engine = dsattn.Engine("semantic", first_iterations=2, iterations=3, metric="euclidean")
    engine(*qkv, Call(0, 0, grid))
    first = dict(engine.state.entries["transformer", 0, "cond"].memory)
    engine(*qkv, Call(0, 1, grid))
    entry = engine.state.entries["transformer", 0, "cond"]
    for name, x in zip(("q_centroids", "k_centroids"), qkv[:2], strict=True):
        assert torch.equal(entry.memory[name], kmeans(x, first[name], 3).centroids)
        assert not torch.equal(entry.memory[name], first[name])
    held = sum(x.numel() * x.element_size() for x in entry.memory.values())
    assert 0 < held < engine.state.plan_bytes


def test_second_run_repeats_the_first_and_branches_do_not_meet():
    grid = GRIDS[0]
    first, other = tensors(grid), tensors(grid, seed=1)
    engine = dsattn.Engine("semantic")

    def run(with_other: bool) -> list[torch.Tensor]:
        outs = []
        for step in range(3):
            outs.append(engine(*first, Call(0, step, grid)))
            if with_other:
                engine(*other, Call(0, step, grid, branch="uncond"))
        return outs

    for a, b in zip(run(False), run(True), strict=True):
        assert torch.equal(a, b)


def test_a_new_grid_forgets_the_centroids():
    engine = dsattn.Engine("semantic")
    for grid in (GRIDS[0], GRIDS[1]):
        out = engine(*tensors(grid), Call(0, 0, grid))
    assert torch.equal(out, dsattn.Engine("semantic")(*tensors(grid), Call(0, 0, grid)))


def test_equal_tokens_fall_into_one_cluster():
    grid = VideoGrid(3, 8, 9)
    q, k, v = tensors(grid)
    q, k = torch.ones_like(q), torch.ones_like(k)
    made = plan(grid, (q, k, v), density=0.05)
    torch.testing.assert_close(dsattn.attend(q, k, v, made), dense((q, k, v)))


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_rows_read_a_key_where_pooling_costs_nothing(noise):
    """All keys fall into one remembered cluster, others are empty: it is read, whatever its index."""
    grid = VideoGrid(3, 8, 9)
    q, k, v = tensors(grid)
    engine = dsattn.Engine("semantic", density=0.05, routing_noise=noise, impl="torch")
    for step in range(2):
        engine(q, k * (step == 0), v, Call(0, step, grid))
    made = engine.state.entries["transformer", 0, "cond"].plan.validate()
    assert bool((made.k_sizes.argmax(-1) > 0).all())


def error(qkv, made: dsattn.BlockPlan) -> float:
    exact = dense(qkv)
    return ((dsattn.attend(*qkv, made) - exact).norm() / exact.norm()).item()


def root(x: torch.Tensor) -> torch.Tensor:
    """Symmetric square root of E[x xᵀ], x [S, D], with the method's jitter; float64."""
    moment = x.double().T @ x.double() / len(x)
    moment += 1e-4 * moment.diagonal().mean() * torch.eye(x.shape[1])
    values, vectors = torch.linalg.eigh(moment)
    return vectors @ values.sqrt().diag() @ vectors.T


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("side", ["k", "q"])
def test_metric_is_k_means_on_transformed_tokens(side):
    """Against scikit-learn on tokens times a symmetric root; the method takes a triangular one."""
    from sklearn.cluster import KMeans

    grid = VideoGrid(4, 8, 9)
    q, k, v = tensors(grid)
    q, k = q * torch.linspace(0.1, 3, 32), k * torch.linspace(3, 0.1, 32) + 2
    method = find_method("semantic")
    count = {"q_clusters": 9, "k_clusters": 11}
    config = method.config(metric="logit", first_iterations=1, iterations=4, **count)
    memory: dict[str, torch.Tensor] = {}
    for _ in range(2):
        made = method.plan(q, k, v, Call(0, 0, grid), config, memory)
    clusters = count[f"{side}_clusters"]
    for h in range(2):
        tokens, other = (k, q[0, :, h]) if side == "k" else (q, k[0, :, h] - k[0, :, h].mean(0))
        maps = root(other)
        tokens = tokens[0, :, h].double()
        start = first_centroids((tokens @ maps)[None, :, None], clusters, 0)[0, 0].double()
        oracle = KMeans(clusters, init=start.numpy(), n_init=1, max_iter=5, tol=0, algorithm="lloyd")
        oracle.fit((tokens @ maps).numpy())
        labels = made.k_block_of_token[0, h] if side == "k" else made.q_block_of_token[0, h]
        means = torch.stack([tokens[labels == j].mean(0) for j in range(clusters)])
        # What is remembered and ranked are the means of the tokens themselves.
        torch.testing.assert_close(memory[f"{side}_centroids"][0, h].double(), means, rtol=1e-4, atol=1e-4)
        wanted = torch.from_numpy(oracle.cluster_centers_)
        torch.testing.assert_close(means @ maps, wanted, rtol=1e-3, atol=1e-3)


def test_metric_looks_where_the_other_side_looks():
    """Keys differ most where no query looks, queries most where all keys are the same."""
    grid = VideoGrid(4, 12, 12)
    q, k, v = tensors(grid, seed=3)
    k = k * torch.tensor([2.0] * 8 + [12.0] * 24)
    q = q * torch.tensor([3.0] * 8 + [0.01] * 24)
    k[..., 0] = 5.0
    q[..., 0] *= 10
    errors = {
        metric: error((q, k, v), plan(grid, (q, k, v), density=0.1, k_clusters=40, q_clusters=40, metric=metric))
        for metric in ("euclidean", "query", "logit")
    }
    assert errors["logit"] < 0.85 * errors["query"] < 0.7 * errors["euclidean"], errors


@pytest.mark.parametrize("options", [{}, EVERYTHING])
def test_triton_makes_the_same_plan(options, monkeypatch):
    """What runs on a GPU, from clusters to ranking; up to single tokens that stand between two centroids."""
    from dsattn.kernels import cluster_errors, kmeans, pooling

    grid = VideoGrid(3, 8, 9, text=7)
    qkv = tensors(grid, batch=2)
    options = {"density": 0.25, "k_clusters": 12, "q_clusters": 9, **options}
    pairs = plan(grid, qkv, **options).to_dense()
    for module in (cluster_errors, kmeans, pooling):
        monkeypatch.setattr(module, "runs_triton", lambda *tensors: True)
    other = plan(grid, qkv, **options).to_dense()
    assert float((pairs != other).float().mean()) < 0.02


def test_values_split_clusters_whose_keys_are_alike():
    grid = VideoGrid(4, 8, 8)
    q, k, _ = tensors(grid)
    group = torch.arange(grid.tokens) % 2
    v = torch.where(group[:, None] == 1, 1.0, -1.0)[None, :, None].expand(1, -1, 2, 32).contiguous()

    def purity(values: float, scale: float = 1.0) -> float:
        made = plan(grid, (q, k, scale * v), k_clusters=8, values=values)
        share = [(made.k_block_of_token[0, 0][group == g]).bincount(minlength=8) for g in range(2)]
        return float(torch.stack(share).amax(0).sum() / grid.tokens)

    assert purity(0.0) < 0.7 and purity(4.0) == 1.0
    # Values are weighed against keys by their variance: their unit does not matter.
    assert torch.equal(*(plan(grid, (q, k, s * v), values=0.5).to_dense() for s in (1, 1024)))


@pytest.mark.parametrize("metric", ["euclidean", "logit"])
@pytest.mark.parametrize("routing", ["mass", "weight_error", "output_error"])
@pytest.mark.parametrize("budget", ["row", "head"])
def test_routing_keeps_what_the_definition_ranks_first(budget, routing, metric):
    """A float64 loop over the plan's own clusters; text and prefix use up budget but take no part."""
    grid = VideoGrid(3, 8, 9, prefix=4, text=5)
    q, k, v = tensors(grid)
    q = 3 * q
    counts = {"k_clusters": 20, "q_clusters": 7}
    made = plan(grid, (q, k, v), density=0.3, routing=routing, metric=metric, budget=budget, **counts)
    video = torch.zeros(grid.tokens, dtype=torch.bool)
    video[grid.video_start : grid.video_end] = True
    scale = 32**-0.5
    for h in range(2):
        queries, keys, values = (x[0, :, h].double() for x in (q, k, v))
        q_block, k_block = made.q_block_of_token[0, h], made.k_block_of_token[0, h]
        scores, allowed = torch.zeros(7, 20, dtype=torch.float64), 0.3 * grid.tokens - (~video).sum()
        for i in range(7):
            query = queries[q_block == i].mean(0)
            logits = keys[video] @ query * scale
            out = logits.softmax(0) @ values[video]
            sizes = []
            for j in range(20):
                inside = k_block == j
                n, mean = inside.sum(), keys[inside].mean(0)
                p = (keys[inside] @ query * scale - logits.logsumexp(0)).exp()
                stand_in = (mean @ query * scale - logits.logsumexp(0)).exp()
                moved = p @ (values[inside] - out) - n * stand_in * (values[inside].mean(0) - out)
                score = {
                    "mass": n * stand_in,
                    "weight_error": (p - stand_in).square().sum(),
                    "output_error": moved.square().sum(),
                }
                scores[i, j] = score[routing] / n
                sizes.append(n)
            if routing == "mass":  # its softmax is over the clusters
                scores[i] /= scores[i] @ torch.stack(sizes).double()
        sizes, kept = torch.stack(sizes), made.block_mask[0, h, :7, :20]
        if budget == "row":
            for row, of_row in zip(scores, kept, strict=True):
                order = row.argsort(descending=True)
                read = sizes[order]
                fits = read.cumsum(0) - read / 2 <= allowed
                assert set(order[fits].tolist()) == set(of_row.nonzero()[:, 0].tolist())
        else:
            queries = torch.bincount(q_block[video], minlength=7)
            scores *= (queries / (queries + 32))[:, None]
            scores[range(7), scores.argmax(1)] = torch.inf
            order = scores.flatten().argsort(descending=True)
            read = (queries[:, None] * sizes).flatten()[order] / queries.sum()
            fits = (read.cumsum(0) - read / 2 <= allowed) | (scores.flatten()[order] == torch.inf)
            assert set(order[fits].tolist()) == set(kept.flatten().nonzero()[:, 0].tolist())


def test_routing_by_error_reads_what_pooling_would_spoil():
    """Half of the clusters hold one key many times, with much mass; the others are broad, with less mass but error."""
    grid = VideoGrid(2, 16, 16)
    q, k, v = tensors(grid)
    owner = torch.arange(grid.tokens) % 16
    k = 0.02 * k
    k[..., 0] = (40.0 * owner)[None, :, None]
    q[..., 0] = 0
    k[:, owner < 8, :, 1] = 2.0
    k[:, owner >= 8, :, 1] = 0.0
    k[:, owner >= 8, :, 2:] *= 100
    q[..., 1] = 3.0
    start = {"k_clusters": 16, "q_clusters": 1, "density": 0.5, "first_iterations": 12, "seed": 0}
    errors = {r: error((q, k, v), plan(grid, (q, k, v), routing=r, **start)) for r in ("mass", *ROUTES)}
    assert max(errors[r] for r in ROUTES) < 0.5 * errors["mass"], errors


@pytest.mark.parametrize("target", [0.02, 0.1, 0.3])
def test_a_target_error_is_met_by_every_head(target):
    """Judged on all rows, not on the sampled ones. Heads 0 and 1 see their own of 12 groups, head 2 is noise."""
    grid = VideoGrid(4, 12, 12, text=9)
    q, k, v = tensors(grid, heads=3)
    group = torch.randint(12, (grid.tokens,), generator=torch.Generator().manual_seed(0))
    codes = 5 * torch.nn.functional.one_hot(group, 32).float()[:, None]
    q[0, :, :2], k[0, :, :2] = codes + 0.1 * q[0, :, :2], codes + 0.1 * k[0, :, :2]
    made = plan(grid, (q, k, v), target_error=target, rows=256, q_clusters=36, k_clusters=48)
    out, exact = dsattn.attend(q, k, v, made), dense((q, k, v))
    errors = ((out - exact).square().sum((1, 3)) / exact.square().sum((1, 3))).sqrt()
    assert bool((errors <= 1.25 * target).all()), errors
    assert float(made.density[0, :2].max()) < 0.5 < float(made.density[0, 2])


def test_a_target_error_follows_drift_rung_by_rung():
    grid = GRIDS[0]
    q, k, v = tensors(grid)
    engine = dsattn.Engine("semantic", target_error=0.1, rows=200)
    entry = None
    densities = []
    for step, factor in enumerate((0.1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.1, 0.1)):
        engine(q * factor, k, v, Call(0, step, grid))
        entry = engine.state.entries["transformer", 0, "cond"]
        densities.append(float(entry.plan.density.mean()))
    fresh = float(plan(grid, (q, k, v), target_error=0.1, rows=200).density.mean())
    assert densities[0] < densities[1] < densities[2] <= densities[8]
    assert densities[8] == pytest.approx(fresh, rel=0.5)
    assert densities[-1] < densities[8]


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0.0},
        {"density": 0.1, "target_error": 0.1},
        {"target_error": 2.0},
        {"target_error": 0.1, "top_p": 0.9},
        {"q_clusters": -1},
        {"iterations": 0},
        {"tail": "linear"},
        {"metric": "cosine"},
        {"values": -0.1},
        {"routing": "random"},
        {"routing": "weight_error", "tail": "none"},
    ],
)
def test_bad_options_are_named(options):
    with pytest.raises(dsattn.UsageError, match=next(iter(options))):
        plan(GRIDS[0], tensors(GRIDS[0]), **options)


@pytest.mark.parametrize(
    "options", [{"density": 0.2}, {"top_p": 0.4, "density": 0.02}, {"density": 0.3, "tail": "none"}]
)
def test_groups_are_read_or_skipped_whole(options):
    grid = VideoGrid(3, 8, 9, text=7)
    q, k, v = tensors(grid, batch=2, heads=2, dim=16)
    config = semantic.SemanticConfig(q_clusters=6, k_clusters=24, k_groups=5, **options)
    memory = Memory()
    made = semantic.plan(q, k, v, Call(0, 0, grid), config, memory).validate()
    centroids = memory["k_centroids"]
    space = ClusterSpace.of_keys(q[:, : grid.video_end], k[:, : grid.video_end], v, config.metric, 0, config.seed)
    features = space(centroids.transpose(1, 2))
    labels = kmeans(features, first_centroids(features, 5, config.seed), semantic.GROUP_ITERATIONS).labels
    kept, held = made.block_mask[..., :6, :24], made.k_sizes[..., :24] > 0
    seen = set()
    for b, h, group in itertools.product(range(2), range(2), range(5)):
        columns = (labels[b, h] == group) & held[b, h]
        rows = kept[b, h][:, columns]
        assert bool((rows.all(1) | ~rows.any(1)).all())
        seen.add(int(columns.sum()))
    assert max(seen) > 1
