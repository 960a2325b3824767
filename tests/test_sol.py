"""sol: routing by threshold, budgets, exact segments, its tails, and the properties every method has."""

import math

import pytest
import torch

import dsattn
from dsattn.grid import Call, VideoGrid
from dsattn.methods import sol
from dsattn.methods.base import Memory
from dsattn.orders import token_order

from .method_inputs import GRIDS, dense, tensors

VIDEO = VideoGrid(5, 9, 11)


def plan(grid: VideoGrid, qkv, call: Call | None = None, **options) -> dsattn.BlockPlan:
    return dsattn.plan(*qkv, call or Call(0, 0, grid), method="sol", **options).validate()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("tail", ["none", "pooled", "pooled_block"])
def test_everything_kept_is_dense_attention(grid, tail):
    qkv = tensors(grid)
    out = dsattn.attend(*qkv, plan(grid, qkv, density=1.0, tail=tail), impl="torch")
    torch.testing.assert_close(out, dense(qkv))
    low = plan(grid, qkv, tau=-10, tail=tail)
    assert bool(low.block_mask.all())


def oracle(q: torch.Tensor, k: torch.Tensor, grid: VideoGrid, block: int, tau: float, variance: str) -> torch.Tensor:
    """``[H, N, N]`` bool in float64, block by block; None of its numbers come from the package but the order."""
    order = token_order(grid, "morton", q.device)
    q, k = (x[0, order].double() for x in (q, k))
    edges = [*range(0, grid.tokens, block), grid.tokens]
    spans = list(zip(edges[:-1], edges[1:], strict=True))
    exact = [any(a < stop and start < b for start, stop in grid.exact_segments) for a, b in spans]
    others = [j for j, on in enumerate(exact) if not on]
    mask = torch.zeros(q.shape[1], len(spans), len(spans), dtype=torch.bool)
    for h in range(q.shape[1]):
        means = [k[a:b, h].mean(0) for a, b in spans]
        table = torch.stack([means[j] for j in others])
        for i, (a, b) in enumerate(spans):
            query = q[a:b, h].mean(0) / math.sqrt(q.shape[-1])
            scores = [float(query @ mean) for mean in means]
            seen = torch.tensor([scores[j] for j in others])
            diagonal = (query**2 * table.var(0, correction=0)).sum()
            square = seen.var(correction=0) if variance == "exact" else diagonal
            limit = seen.mean() + tau * math.sqrt(square + 1e-6 * math.log(2) ** 2)
            for j in range(len(spans)):
                mask[h, i, j] = i == j or exact[i] or exact[j] or scores[j] >= limit
    return mask


@pytest.mark.parametrize("variance", ["diag", "exact"])
@pytest.mark.parametrize("grid", [VIDEO, GRIDS[1], GRIDS[2], GRIDS[3]])
def test_routing_is_mean_plus_tau_deviations(grid, variance):
    # Channels that vary together: the two variances differ.
    q, k, v = tensors(grid)
    k = k + 2 * k[..., :1]
    q = q + 0.5
    for tau in (-0.5, 0.4, 1.1):
        made = plan(grid, (q, k, v), tau=tau, variance=variance, block=16)
        assert torch.equal(made.block_mask[0], oracle(q, k, grid, 16, tau, variance))


def test_higher_tau_is_sparser():
    qkv = tensors(VIDEO)
    densities = [float(plan(VIDEO, qkv, tau=t, block=16).density.mean()) for t in (-1.0, 0.0, 0.5, 1.0, 1.5, 3.0)]
    assert densities == sorted(densities, reverse=True) and len(set(densities)) == 6
    # Scores of random tokens are Gaussian: one in 6.3 lies a deviation above the mean, plus the diagonal.
    assert densities[3] == pytest.approx(0.1587 + 1 / 31, abs=0.04)


def test_scores_that_are_all_equal_route_nothing():
    q, k, v = tensors(VIDEO)
    q, k = q[:, :1].expand_as(q), k[:, :1].expand_as(k)
    made = plan(VIDEO, (q, k, v), tau=1.0, block=16)
    assert torch.equal(made.block_mask[0, 0], torch.eye(made.num_q_blocks, dtype=torch.bool))
    torch.testing.assert_close(dsattn.attend(q, k, v, made, impl="torch"), dense([q, k, v]))


@pytest.mark.parametrize("density", [0.1, 0.4])
def test_density_counts_blocks_per_row(density):
    qkv = tensors(VIDEO)
    made = plan(VIDEO, qkv, density=density, block=16)
    assert made.counts.unique().tolist() == [round(density * made.num_k_blocks)]
    ranked = sol.rank(*qkv, Call(0, 0, VIDEO), sol.SolConfig(block=16), Memory())
    assert torch.equal(ranked.at(density).block_mask, made.block_mask)


@pytest.mark.parametrize("grid", GRIDS[1:4])
def test_text_and_prefix_are_exact(grid):
    qkv = tensors(grid)
    pairs = plan(grid, qkv, tau=1.3, block=16).to_dense()
    for start, stop in grid.exact_segments:
        assert bool(pairs[:, :, start:stop].all())
        assert bool(pairs[:, :, :, start:stop].all())
    assert not bool(pairs.all())


@pytest.mark.parametrize("options", [{"tau": 0.8}, {"density": 0.2}])
def test_padded_text_decides_nothing(options):
    """What stands in padded tokens, NaN included, changes no other row."""
    grid = VideoGrid(5, 9, 11, prefix=3, text=80)
    qkv = tensors(grid, batch=2)
    lengths = torch.tensor([grid.tokens - 50, grid.tokens], dtype=torch.int32)
    clean = dsattn.attend(*qkv, plan(grid, qkv, **options, tail="pooled_block").with_key_lengths(lengths), impl="torch")
    dirty = [x.clone() for x in qkv]
    for x in dirty:
        x[0, -50:] = torch.nan
    made = plan(grid, dirty, **options, tail="pooled_block")
    out = dsattn.attend(*dirty, made.with_key_lengths(lengths), impl="torch")
    assert torch.equal(out[1], clean[1]) and torch.equal(out[0, :-50], clean[0, :-50])


def test_batch_of_two_is_two_batches_of_one():
    grid = GRIDS[1]
    qkv = tensors(grid, batch=2)
    both = plan(grid, qkv, tau=0.7)
    for row in range(2):
        single = plan(grid, [x[row : row + 1] for x in qkv], tau=0.7)
        assert torch.equal(both.block_mask[row], single.block_mask[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout_of_the_input(dtype):
    qkv = [x.to(dtype) for x in tensors(GRIDS[1], heads=3)]
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    assert not strided[0].is_contiguous()
    assert torch.equal(plan(GRIDS[1], qkv).block_mask, plan(GRIDS[1], strided).block_mask)


def test_two_runs_of_an_engine_are_equal():
    engine = dsattn.Engine("sol", tau="0:1.3,2:0.8", routing_noise=0.3, tail="pooled_block", refresh=2, block=16)
    runs = []
    for _ in range(2):
        steps = [tensors(VIDEO, seed=step) for step in range(4)]
        runs.append([engine(*qkv, Call(0, step, VIDEO)) for step, qkv in enumerate(steps)])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_tau_follows_its_table():
    qkv = tensors(VIDEO)
    table = "0:1.3,0.25:1.0,0.5:0.2"
    for step, tau in enumerate((1.3, 1.3, 1.0, 1.0, 0.2, 0.2, 0.2, 0.2)):
        made = plan(VIDEO, qkv, Call(0, step, VIDEO, num_steps=8), tau=table, block=16)
        assert torch.equal(made.block_mask, plan(VIDEO, qkv, tau=tau, block=16).block_mask)


def test_tails_lower_the_error_and_the_cheap_one_costs_little():
    """Smooth attention: skipped blocks hold much of the mass, and the queries of a block are alike."""
    grid = VideoGrid(8, 16, 16)
    axes = torch.meshgrid(*(torch.arange(n) / 8 for n in (8, 16, 16)), indexing="ij")
    waves = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    smooth = torch.sin(torch.stack([a.flatten() for a in axes], -1) @ waves)[None, :, None].expand(-1, -1, 2, -1)
    q, k, v = (x + smooth for x in tensors(grid, dim=24))
    errors = {}
    for tail in ("none", "pooled", "pooled_block"):
        out = dsattn.attend(q, k, v, plan(grid, (q, k, v), tau=1.0, tail=tail), impl="torch")
        errors[tail] = float((out - dense([q, k, v])).norm() / dense([q, k, v]).norm())
    assert errors["pooled"] < 0.5 * errors["none"] and errors["pooled_block"] < 0.6 * errors["none"], errors


@pytest.mark.parametrize(
    "options",
    [{"tau": 1.0, "density": 0.2}, {"variance": "full"}, {"block": 48}, {"order": "spiral"}, {"tail": "some"}],
)
def test_bad_options_are_named(options):
    with pytest.raises(dsattn.UsageError, match=next(iter(options))):
        plan(VIDEO, tensors(VIDEO), **options)
