"""k-means: Lloyd's iterations against scikit-learn, ties, empty clusters, determinism, chunks."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from dsattn.kernels import kmeans as km
from dsattn.kernels.pooling import segment_sums


def blobs(batch: int, length: int, heads: int, dim: int, centres: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    means = 4 * torch.randn(batch, centres, heads, dim, generator=generator)
    owner = torch.randint(centres, (length,), generator=generator)
    return means[:, owner] + torch.randn(batch, length, heads, dim, generator=generator)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(("length", "count", "iterations"), [(101, 1, 1), (211, 7, 1), (211, 7, 6), (640, 33, 3)])
def test_agrees_with_scikit_learn(length, count, iterations):
    x = torch.randn(2, length, 3, 16, generator=torch.Generator().manual_seed(length))
    start = km.first_centroids(x, count, seed=1)
    found = km.kmeans(x, start, iterations)
    # scikit-learn moves empty clusters, SVG2 keeps them: the rules are the same only without any.
    assert bool((found.sizes > 0).all())
    for b in range(2):
        for h in range(3):
            tokens = x[b, :, h].double().numpy()
            init = start[b, h].double().numpy()
            oracle = KMeans(count, init=init, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")
            oracle.fit(tokens)
            np.testing.assert_allclose(found.centroids[b, h].numpy(), oracle.cluster_centers_, rtol=1e-4, atol=1e-4)


def test_centroids_are_the_means_of_their_labels():
    x = blobs(1, 300, 2, 8, 5)
    found = km.kmeans(x, km.first_centroids(x, 12, seed=0), 3)
    for h in range(2):
        for c in range(12):
            members = x[0, found.labels[0, h] == c, h].double()
            assert len(members) == found.sizes[0, h, c]
            torch.testing.assert_close(found.centroids[0, h, c].double(), members.mean(0), rtol=1e-5, atol=1e-5)


def test_ties_go_to_the_lowest_index_and_empty_clusters_keep_their_centroid():
    x = torch.ones(1, 10, 1, 4)
    start = torch.stack([torch.full((4,), 5.0), torch.zeros(4), torch.zeros(4)])[None, None]
    found = km.kmeans(x, start, 1)
    assert found.labels.unique().tolist() == [1]
    assert found.sizes[0, 0].tolist() == [0, 10, 0]
    torch.testing.assert_close(found.centroids[0, 0, 0], start[0, 0, 0])
    torch.testing.assert_close(found.centroids[0, 0, 2], start[0, 0, 2])


def test_chunks_do_not_change_the_labels(monkeypatch):
    x = blobs(2, 157, 2, 16, 6)
    start = km.first_centroids(x, 11, seed=3)
    whole = km.assign(x, start)
    monkeypatch.setitem(km.SCORES, "cpu", 2 * 2 * 11 * 10)
    assert torch.equal(km.assign(x, start), whole)


def test_first_centroids_are_different_tokens_drawn_by_the_seed():
    x = torch.arange(50.0).view(1, 50, 1, 1).expand(1, 50, 2, 1)
    drawn = km.first_centroids(x, 50, seed=0)
    assert sorted(drawn[0, 0, :, 0].tolist()) == list(range(50))
    assert torch.equal(drawn, km.first_centroids(x, 50, seed=0))
    assert not torch.equal(drawn, km.first_centroids(x, 50, seed=1))


def test_half_precision_is_clustered_in_fp32():
    x = blobs(1, 200, 2, 16, 5).bfloat16()
    found = km.kmeans(x, km.first_centroids(x, 6, seed=0), 2)
    same = km.kmeans(x.float(), km.first_centroids(x, 6, seed=0), 2)
    assert found.centroids.dtype == torch.float32
    assert torch.equal(found.labels, same.labels)


@pytest.mark.parametrize("heads", [1, 3])
def test_segment_sums_leave_the_last_label_out(heads):
    x = torch.randn(2, 40, heads, 5, dtype=torch.float64)
    labels = torch.randint(0, 5, (2, 1, 40))
    x[labels[:, 0] == 4] = torch.nan
    sums = segment_sums(x, labels, 4, torch.float64)
    for b in range(2):
        for c in range(4):
            want = x[b, labels[b, 0] == c].sum(0)
            torch.testing.assert_close(sums[b, :, c], want)
