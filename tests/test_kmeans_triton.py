"""Triton kernels of k-means and of pooling, against float64 brute force and the torch code that specifies them."""

import numpy as np
import pytest
import torch

from dsattn.block_plan import BlockPlan
from dsattn.kernels import kmeans as km
from dsattn.kernels import kmeans_triton, pooling
from dsattn.kernels.segments_triton import segment_means

from . import plans
from .test_kmeans import blobs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPSILON = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture
def triton(monkeypatch):
    """The dispatchers choose Triton for CPU tensors too, as they do on a GPU."""
    for module in (km, pooling):
        monkeypatch.setattr(module, "runs_triton", lambda *tensors: True)


def draw(shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int, layout: str = "bshd") -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if layout == "bhsd":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "strided":
        x = torch.stack([x, x], -1)[..., 1]
    return x.to(DEVICE)


CASES = [
    # batch, tokens, heads, head_dim, clusters, layout
    (1, 1, 1, 32, 1, "bshd"),
    (2, 131, 3, 64, 7, "bhsd"),
    (1, 300, 2, 96, 130, "strided"),
    (2, 77, 1, 128, 77, "bshd"),
    (1, 150, 2, 40, 33, "bhsd"),
    (1, 140, 1, 256, 12, "strided"),
]


@pytest.mark.parametrize("dtype", plans.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_assignment_is_the_nearest_centroid(case, dtype):
    batch, length, heads, dim, count, layout = case
    x = draw((batch, length, heads, dim), dtype, seed=length, layout=layout)
    # Far from zero, as keys are: what is left of the distance after cancellation decides.
    x = x + 3
    centroids = draw((batch, heads, count, dim), torch.float32, seed=count) + 3
    labels = kmeans_triton.assign(x, centroids)
    assert labels.dtype == torch.int32 and labels.shape == (batch, heads, length)
    distances = torch.cdist(x.transpose(1, 2).double(), centroids.double()).square()
    chosen = distances.gather(-1, labels.long()[..., None])[..., 0]
    # Products of |x| |c| summed in fp32; a half-precision token meets a centroid of twice its digits.
    scale = x.double().square().sum(-1).amax() + centroids.double().square().sum(-1).amax()
    assert float((chosen - distances.amin(-1)).max()) <= float(scale) * max(4 * 2**-23, EPSILON[dtype] ** 2 / 4)


@pytest.mark.parametrize("dtype", plans.DTYPES, ids=str)
def test_coarse_assignment_is_the_nearest_rounded_centroid(dtype):
    x = draw((2, 131, 2, 64), dtype, seed=1) + 3
    centroids = draw((2, 2, 70, 64), torch.float32, seed=2) + 3
    labels = kmeans_triton.assign(x, centroids, coarse=True).long()
    distances = torch.cdist(x.transpose(1, 2).double(), centroids.to(dtype).double()).square()
    chosen = distances.gather(-1, labels[..., None])[..., 0]
    scale = x.double().square().sum(-1).amax() + centroids.double().square().sum(-1).amax()
    assert float((chosen - distances.amin(-1)).max()) <= float(scale) * 4 * 2**-23


def test_only_the_last_iteration_is_exact(triton, monkeypatch):
    kinds = []
    iterate = kmeans_triton.iterate
    monkeypatch.setattr(
        kmeans_triton, "iterate", lambda *a, coarse=False: (kinds.append(coarse), iterate(*a, coarse))[1]
    )
    x = draw((1, 50, 1, 32), torch.float16, 0)
    start = km.first_centroids(x, 5, seed=0)
    found = km.kmeans(x, start, 3)
    assert kinds == [True, True, False]
    centroids = start.float()
    for _ in range(2):
        labels = km.assign(x.float(), centroids.half().float())
        centroids = km._means(km.segment_sums(x.float(), labels, 5), labels_count(labels, 5), centroids)
    assert torch.equal(found.labels, km.assign(x.float(), centroids))


def labels_count(labels, count):
    return torch.nn.functional.one_hot(labels, count).sum(2)


def test_ties_go_to_the_lowest_index_in_and_between_tiles():
    x = torch.ones(1, 10, 1, 16, device=DEVICE)
    centroids = torch.full((1, 1, 300, 16), 5.0, device=DEVICE)
    for equal in ([7, 8], [5, 200], [130, 131, 299]):
        start = centroids.clone()
        start[0, 0, equal] = 0.5
        assert kmeans_triton.assign(x, start).unique().tolist() == equal[:1]


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_a_token_that_is_not_a_number_gets_a_label():
    x = torch.ones(1, 10, 1, 16, device=DEVICE)
    x[0, 3] = torch.nan
    labels = kmeans_triton.assign(x, torch.tensor([3.0, 1.0], device=DEVICE)[None, None, :, None].expand(1, 1, 2, 16))
    assert labels.flatten().tolist() == [1, 1, 1, 0, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("dtype", plans.DTYPES, ids=str)
@pytest.mark.parametrize(("length", "dim", "count", "iterations"), [(211, 32, 7, 4), (300, 128, 20, 2), (90, 64, 1, 1)])
def test_agrees_with_the_torch_code(triton, monkeypatch, length, dim, count, iterations, dtype):
    # Separated groups: rounding cannot change a label.
    x = blobs(2, length, 3, dim, count).to(dtype).to(DEVICE)[:, 3:]
    start = km.first_centroids(x, count, seed=1)
    found = km.kmeans(x, start, iterations)
    monkeypatch.setattr(km, "runs_triton", lambda *tensors: False)
    wanted = km.kmeans(x, start, iterations)
    for name in ("labels", "order", "sizes"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    torch.testing.assert_close(found.centroids, wanted.centroids, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.labels.gather(-1, found.order), found.labels.sort(dim=-1, stable=True).values)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_agrees_with_scikit_learn(triton):
    from sklearn.cluster import KMeans

    x = torch.randn(2, 211, 2, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    start = km.first_centroids(x, 9, seed=1)
    found = km.kmeans(x, start, 5)
    assert bool((found.sizes > 0).all())
    for b in range(2):
        for h in range(2):
            init = start[b, h].double().cpu().numpy()
            oracle = KMeans(9, init=init, n_init=1, max_iter=5, tol=0, algorithm="lloyd")
            oracle.fit(x[b, :, h].double().cpu().numpy())
            np.testing.assert_allclose(found.centroids[b, h].cpu(), oracle.cluster_centers_, rtol=1e-4, atol=1e-4)


def test_empty_clusters_keep_their_centroid(triton):
    x = torch.ones(1, 10, 1, 16, device=DEVICE)
    start = torch.stack([torch.full((16,), 5.0), torch.zeros(16), torch.zeros(16)])[None, None].to(DEVICE)
    found = km.kmeans(x, start, 1)
    assert found.sizes[0, 0].tolist() == [0, 10, 0]
    assert torch.equal(found.centroids[0, 0, [0, 2]], start[0, 0, [0, 2]])
    assert torch.equal(found.centroids[0, 0, 1], torch.ones(16, device=DEVICE))


def test_means_of_something_else(triton, monkeypatch):
    x, v = draw((2, 100, 2, 32), torch.float32, 0), draw((2, 100, 2, 24), torch.bfloat16, 1)
    found = km.kmeans(x, km.first_centroids(x, 9, seed=0) + torch.tensor([100.0] + [0.0] * 31, device=DEVICE), 1)
    means = found.means(v, torch.full((2, 2, 9, 24), 7.0, device=DEVICE))
    monkeypatch.setattr(km, "runs_triton", lambda *tensors: False)
    torch.testing.assert_close(means, found.means(v, torch.full((2, 2, 9, 24), 7.0, device=DEVICE)))


def test_runs_longer_than_a_tile_do_not_lose_digits():
    x = 1000 + draw((1, 5000, 1, 32), torch.float32, 0)
    starts = torch.tensor([[[0, 1, 1, 4990, 5000]]], dtype=torch.int32, device=DEVICE)
    means = segment_means(x, 4, starts=starts)
    for j, (start, stop) in enumerate([(0, 1), (1, 1), (1, 4990), (4990, 5000)]):
        wanted = x[0, start:stop, 0].double().mean(0) if stop > start else torch.zeros(32, device=DEVICE).double()
        # 156 additions per lane, then a tree: half of that many roundings of 1000 at worst.
        torch.testing.assert_close(means[0, 0, j].double(), wanted, rtol=80 * 2**-24, atol=0)


@pytest.mark.parametrize("seed", range(40))
def test_pooling_agrees_with_the_torch_code(monkeypatch, seed):
    """Random plans: clusters or fixed blocks, orders, shared leads, key lengths, any strides and dtypes."""
    case = plans.random_case(plans.random_shape(seed), seed).to(DEVICE)
    wanted = pooling.pool_blocks(case.k, case.v, case.plan)
    monkeypatch.setattr(pooling, "runs_triton", lambda *tensors: True)
    found = pooling.pool_blocks(case.k, case.v, case.plan)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_pooling_never_reads_padding(triton):
    k = draw((2, 50, 1, 32), torch.float32, 0)
    k[0, 20:], k[1, 49:] = torch.nan, torch.nan
    plan = BlockPlan.dense(2, 1, 50, 50, block_k=16, device=DEVICE).with_key_lengths(
        torch.tensor([20, 49], dtype=torch.int32, device=DEVICE)
    )
    kbar, vbar, log_count = pooling.pool_blocks(k, k, plan)
    assert torch.equal(kbar, vbar) and bool(kbar.isfinite().all())
    assert log_count.exp().round().int()[:, 0].tolist() == [[16, 4, 0, 0], [16, 16, 16, 1]]


def test_who_runs_triton():
    cpu = torch.zeros(1, 4, 1, 32)
    assert not pooling.runs_triton(cpu)
    if torch.cuda.is_available():
        gpu = cpu.cuda()
        assert pooling.runs_triton(gpu, gpu.half())
        assert not pooling.runs_triton(gpu, gpu.double())
        assert not pooling.runs_triton(gpu.clone().requires_grad_())
        assert not pooling.runs_triton(torch.zeros(1, 4, 1, 264, device="cuda"))
