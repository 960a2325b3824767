"""topk: selection by mean-pooled scores, budgets, always-kept segments."""

import pytest
import torch

import dsattn
from dsattn import orders
from dsattn.grid import Call, VideoGrid
from dsattn.kernels import block_mass
from dsattn.methods import scores

GRID = VideoGrid(5, 9, 11, text=19)


def tensors(grid: VideoGrid, batch: int = 1, heads: int = 2, dim: int = 32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, grid.tokens, heads, dim, generator=generator) for _ in range(3)]


def plan(grid: VideoGrid, qkv, **options) -> dsattn.BlockPlan:
    return dsattn.plan(*qkv, Call(0, 0, grid), method="topk", **options).validate()


@pytest.mark.parametrize("budget", [{"density": 1.0}, {"top_p": 1.0}])
@pytest.mark.parametrize("order", ["raster", "tile", "hilbert"])
def test_everything_kept_is_dense_attention(budget, order):
    qkv = tensors(GRID)
    out = dsattn.attend(*qkv, plan(GRID, qkv, **budget, order=order), impl="torch")
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)
    torch.testing.assert_close(out, dense)


@pytest.mark.parametrize("blocks", [(64, 64), (128, 32), (32, 128), (16, 64)])
@pytest.mark.parametrize("density", [0.01, 0.3])
def test_row_counts(blocks, density):
    grid = VideoGrid(5, 9, 11)
    qkv = tensors(grid)
    made = plan(grid, qkv, density=density, block_q=blocks[0], block_k=blocks[1])
    count = max(1, round(density * made.num_k_blocks))
    diagonal = 1 + (blocks[0] - 1) // blocks[1]
    assert bool((made.counts >= min(count, made.num_k_blocks)).all())
    assert bool((made.counts <= max(count, diagonal + 1)).all())


def test_top_p_keeps_the_crossing_block_and_no_more():
    grid = VideoGrid(1, 16, 16)
    q = torch.zeros(1, 256, 1, 8)
    q[..., 0] = 8**0.5
    k = torch.zeros(1, 256, 1, 8)
    # Block masses 1/2, 1/4, 1/8, 1/8 for every query.
    for block, share in enumerate((0.5, 0.25, 0.125, 0.125)):
        k[:, block * 64 : (block + 1) * 64, :, 0] = torch.tensor(share).log()
    for top_p, expected in ((0.4, {0}), (0.6, {0, 1}), (0.74, {0, 1}), (0.76, {0, 1, 2})):
        rows = plan(grid, (q, k, k), top_p=top_p, order="raster").block_mask[0, 0]
        for i, row in enumerate(rows):
            kept = set(row.nonzero().flatten().tolist())
            # The diagonal is kept whatever its score, and uses up budget first.
            assert i in kept
            assert kept - {i} <= expected | {i}
        assert set(rows[0].nonzero().flatten().tolist()) == expected


def test_partial_last_block_is_weighed_by_its_size():
    """All scores equal: a one-token block holds 1/65 of two blocks' mass and must rank last."""
    grid = VideoGrid(3, 5, 13)  # 195 tokens: three blocks of 64 and one of 3
    zeros = torch.zeros(1, grid.tokens, 1, 8)
    kept = plan(grid, (zeros, zeros, zeros), density=0.75, order="raster").block_mask[0, 0]
    assert kept[:3].tolist() == [[True, True, True, False]] * 3


@pytest.mark.parametrize("grid", [GRID, VideoGrid(4, 9, 11, text=70, text_first=True), VideoGrid(4, 9, 11, prefix=30)])
def test_text_and_prefix_are_exact(grid):
    qkv = tensors(grid)
    pairs = plan(grid, qkv, density=0.05, block_q=32, block_k=16).to_dense()
    for start, stop in grid.exact_segments:
        assert bool(pairs[:, :, start:stop].all())
        assert bool(pairs[:, :, :, start:stop].all())
    assert not bool(pairs.all())


def test_batch_of_two_is_two_batches_of_one():
    qkv = tensors(GRID, batch=2)
    both = plan(GRID, qkv, density=0.2)
    for row in range(2):
        single = plan(GRID, [x[row : row + 1] for x in qkv], density=0.2)
        assert torch.equal(both.block_mask[row], single.block_mask[0])


def test_tail_lowers_the_error_of_smooth_attention():
    qkv = [x * 0.5 for x in tensors(VideoGrid(9, 16, 16))]
    grid = VideoGrid(9, 16, 16)
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)
    errors = [
        (dsattn.attend(*qkv, plan(grid, qkv, density=0.1, tail=tail), impl="torch") - dense).norm()
        for tail in ("none", "pooled")
    ]
    assert errors[1] < errors[0]


def test_grid_must_fit():
    qkv = tensors(GRID)
    with pytest.raises(dsattn.UsageError, match="must have the grid's 495 tokens, got 514 and 514"):
        dsattn.plan(*qkv, Call(0, 0, VideoGrid(5, 9, 11)), method="topk")


def test_subblock_scores_are_the_mass_of_means_of_quarters():
    """Against a loop over the quarters, with a partial last block and a partial last quarter."""
    from dsattn.methods.scores import subblock_scores

    q, k, _ = (x.double() for x in tensors(VideoGrid(1, 9, 9)))  # 81 tokens: 64 + 17 (16 + 1)
    found = subblock_scores(q, k, 64, 32).softmax(-1)

    def quarters(x: torch.Tensor, block: int) -> list[list[torch.Tensor]]:
        blocks = [x[0, i : i + block, 0] for i in range(0, 81, block)]
        return [[b[i : i + block // 4] for i in range(0, len(b), block // 4)] for b in blocks]

    for i, rows in enumerate(quarters(q, 64)):
        masses = []
        for columns in quarters(k, 32):
            pairs = [(a, b) for a in rows for b in columns]
            scores = [(len(a) * len(b), (a.mean(0) @ b.mean(0) * 32**-0.5).exp()) for a, b in pairs]
            masses.append(sum(n * s for n, s in scores))
        want = torch.stack(masses) / sum(masses)
        torch.testing.assert_close(found[0, 0, i].double(), want, rtol=1e-5, atol=1e-7)


def test_subblock_scores_see_a_needle_that_the_mean_hides():
    """One quarter of a block matches the queries, the rest opposes them: the mean says no, the quarters say yes."""
    grid = VideoGrid(1, 16, 32)
    q = torch.zeros(1, 512, 1, 8)
    q[..., 0] = 8**0.5
    k = torch.zeros(1, 512, 1, 8)
    k[:, 256:272, :, 0], k[:, 272:320, :, 0] = 8.0, -8.0
    kept = {
        scorer: plan(grid, (q, k, k), density=0.25, order="raster", scorer=scorer).block_mask[0, 0, 0, 4].item()
        for scorer in ("mean", "subblock")
    }
    assert kept == {"mean": False, "subblock": True}


@pytest.mark.parametrize("grid", [GRID, VideoGrid(4, 9, 11, text=70, text_first=True), VideoGrid(1, 1, 3)])
def test_subblock_scores_sum_all_pairs_of_quarters_whatever_fits_at_a_time(grid, monkeypatch):
    q, k, _ = tensors(grid, batch=2)
    order = torch.randperm(grid.tokens, generator=torch.Generator().manual_seed(1))
    found = []
    for pairs in (scores.CELL_PAIRS, 2000, 1):
        monkeypatch.setattr(scores, "CELL_PAIRS", pairs)
        found.append(scores.subblock_scores(q, k, 32, 16, order))
    assert torch.equal(found[1], found[2])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    q, k = (x[:, order].double().transpose(1, 2) for x in (q, k))
    for i in range(found[0].shape[2]):
        for j in range(found[0].shape[3]):
            total = torch.zeros(2, 2, dtype=torch.float64)
            for a in q[:, :, i * 32 : (i + 1) * 32].split(8, 2):
                for b in k[:, :, j * 16 : (j + 1) * 16].split(4, 2):
                    logit = (a.mean(2) * b.mean(2)).sum(-1) * q.shape[-1] ** -0.5
                    total += a.shape[2] * b.shape[2] * logit.exp()
            torch.testing.assert_close(found[0][:, :, i, j].double(), total.log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("ordered", [False, True])
def test_exact_scores_are_the_mass_of_the_blocks(ordered, impl, monkeypatch):
    """Against a softmax in float64; in chunks of rows, and in Triton's interpreter."""
    monkeypatch.setattr(block_mass, "LOGITS", 20000)
    monkeypatch.setattr(block_mass, "runs_triton", lambda *tensors: impl == "triton")
    q, k, _ = tensors(GRID, batch=2)
    order = torch.randperm(GRID.tokens, generator=torch.Generator().manual_seed(1)) if ordered else None
    found = scores.exact_scores(q, k, 32, 64, order)
    if order is not None:
        q, k = q[:, order], k[:, order]
    weights = (torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * q.shape[-1] ** -0.5).softmax(-1)
    for i, rows in enumerate(weights.split(32, 2)):
        for j, part in enumerate(rows.split(64, 3)):
            torch.testing.assert_close(found[:, :, i, j].double().exp(), part.sum(-1).mean(-1), rtol=1e-4, atol=0)


def test_no_scorer_finds_more_mass_than_the_exact_one():
    qkv = tensors(VideoGrid(3, 16, 16), heads=3, dim=8)
    grid = VideoGrid(3, 16, 16)
    mass = scores.exact_scores(*qkv[:2], 64, 32, orders.token_order(grid, "tile", torch.device("cpu"))).exp()
    options = {"density": 0.3, "block_q": 64, "block_k": 32}
    held = {name: (mass * plan(grid, qkv, scorer=name, **options).block_mask).sum(-1) for name in scores.SCORERS}
    assert bool((held["exact"] >= held["mean"] - 1e-6).all()) and bool((held["exact"] >= held["subblock"] - 1e-6).all())
    assert held["exact"].mean() > 1.02 * held["subblock"].mean()
