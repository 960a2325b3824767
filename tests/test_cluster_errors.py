"""Mass and pooling error of key clusters, against a float64 loop over the definition."""

import pytest
import torch

from dsattn.kernels import cluster_errors as ce
from dsattn.kernels.kmeans import Clusters

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_clusters(batch: int, heads: int, length: int, count: int, seed: int) -> Clusters:
    """Unequal sizes, some empty."""
    generator = torch.Generator().manual_seed(seed)
    labels = (count * torch.rand(batch, heads, length, generator=generator) ** 2).long().to(DEVICE)
    sizes = torch.zeros(batch, heads, count, dtype=torch.int64, device=DEVICE)
    sizes.scatter_add_(-1, labels, torch.ones_like(labels))
    # Centroids are not to be used.
    centroids = torch.full((batch, heads, count, 1), torch.nan, device=DEVICE)
    return Clusters(labels, labels.argsort(dim=-1, stable=True), centroids, sizes)


def brute_force(queries, k, v, labels, count, kind, scale):
    batch, heads, rows, _ = queries.shape
    mass, error = torch.zeros(2, batch, heads, rows, count, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            keys, values, q = (x.double().cpu() for x in (k[b, :, h], v[b, :, h], queries[b, h]))
            logits = q @ keys.T * scale
            p = logits.softmax(-1)
            out = p @ values
            for j in range(count):
                members = labels[b, h].cpu() == j
                if not members.any():
                    continue
                mean, v_mean, inside = keys[members].mean(0), values[members].mean(0), p[:, members]
                stand_in = (q @ mean * scale - logits.logsumexp(-1)).exp()[:, None]
                mass[b, h, :, j] = inside.sum(-1)
                if kind == "weight":
                    error[b, h, :, j] = (inside - stand_in).square().sum(-1)
                else:
                    exact = inside @ values[members] - inside.sum(-1, keepdim=True) * out
                    pooled = members.sum() * stand_in * (v_mean - out)
                    error[b, h, :, j] = (exact - pooled).square().sum(-1)
    return mass, error


@pytest.fixture(params=["torch", "triton"])
def impl(request, monkeypatch):
    if request.param == "triton":
        monkeypatch.setattr(ce, "runs_triton", lambda *tensors: True)
    else:
        monkeypatch.setattr(ce, "runs_triton", lambda *tensors: False)
    return request.param


CASES = [
    # batch, tokens, heads, head_dim, dim of values, queries, clusters
    (1, 1, 1, 32, 32, 1, 1),
    (2, 131, 3, 64, 64, 9, 7),
    (1, 300, 2, 96, 40, 70, 60),
    (1, 150, 1, 128, 128, 5, 200),
]


@pytest.mark.parametrize("kind", ["weight", "output"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_definition(case, kind, impl):
    batch, length, heads, dim, dim_v, rows, count = case
    generator = torch.Generator().manual_seed(length)
    k = 2 + torch.randn(batch, heads, length, dim, generator=generator).transpose(1, 2).to(DEVICE)
    v = 5 + torch.randn(batch, length, heads, 2 * dim_v, generator=generator)[..., ::2].to(DEVICE)
    queries = 2 * torch.randn(batch, heads, rows, dim, generator=generator).to(DEVICE)
    clusters = random_clusters(batch, heads, length, count, seed=length)
    found = ce.cluster_errors(queries, k, v, clusters, kind, dim**-0.5)
    wanted = brute_force(queries, k, v, clusters.labels, count, kind, dim**-0.5)
    torch.testing.assert_close(found[0].double().cpu(), wanted[0], rtol=1e-4, atol=1e-6)
    # Errors are differences of terms of the size of mass (times |v| for the output): compared as such.
    torch.testing.assert_close(found[1].double().cpu().sqrt(), wanted[1].sqrt(), rtol=1e-3, atol=1e-4)


def test_chunks_change_nothing(monkeypatch):
    monkeypatch.setattr(ce, "runs_triton", lambda *tensors: False)
    clusters = random_clusters(2, 2, 90, 11, seed=0)
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, 90, 2, 32, generator=generator).to(DEVICE)
    queries = torch.randn(2, 2, 13, 32, generator=generator).to(DEVICE)
    kinds = ("weight", "output")
    whole = [ce.cluster_errors(queries, k, v, clusters, kind, 0.2) for kind in kinds]
    monkeypatch.setattr(ce, "CHUNK_ELEMENTS", {"cpu": 1, "other": 1})
    for kind, wanted in zip(kinds, whole, strict=True):
        for part, all_at_once in zip(ce.cluster_errors(queries, k, v, clusters, kind, 0.2), wanted, strict=True):
            torch.testing.assert_close(part, all_at_once, rtol=1e-4, atol=1e-7)


def test_large_logits_and_shifted_values(impl):
    """Weights cannot overflow; values that all move by one vector move no output, so no error either."""
    clusters = random_clusters(1, 1, 90, 11, seed=0)
    generator = torch.Generator().manual_seed(0)
    k, v = (30 * torch.randn(2, 1, 90, 1, 32, generator=generator)).to(DEVICE)
    queries = 30 * torch.randn(1, 1, 13, 32, generator=generator).to(DEVICE)
    mass, error = ce.cluster_errors(queries, k, v, clusters, "output", 1.0)
    assert bool(error.isfinite().all())
    # A logit of this size is rounded by that much, and with it the logarithm of a weight.
    rounding = 4 * 2**-24 * float((queries @ k[:, :, 0].mT[:, None]).abs().max())
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]), rtol=rounding, atol=0)
    shifted = ce.cluster_errors(queries, k, v + 100, clusters, "output", 1.0)[1]
    torch.testing.assert_close(shifted.sqrt(), error.sqrt(), rtol=1e-3, atol=1e-2)


def test_clusters_of_one_kind_of_key_have_no_error(impl):
    clusters = random_clusters(1, 2, 80, 6, seed=1)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(1, 2, 6, 32, generator=generator).to(DEVICE)
    k = codes.gather(2, clusters.labels[..., None].expand(-1, -1, -1, 32)).transpose(1, 2)
    v = torch.randn(1, 80, 2, 32, generator=generator).to(DEVICE)
    queries = torch.randn(1, 2, 9, 32, generator=generator).to(DEVICE)
    for kind in ("weight", "output"):
        assert float(ce.cluster_errors(queries, k, v, clusters, kind, 0.2)[1].max()) < 1e-10


@pytest.mark.parametrize("kind", ["weight", "output"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, kind, impl):
    clusters = random_clusters(1, 2, 200, 17, seed=3)
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 200, 2, 64, generator=generator).to(dtype).to(DEVICE)
    queries = torch.randn(1, 2, 9, 64, generator=generator).to(dtype).float().to(DEVICE)
    found = ce.cluster_errors(queries, k, v, clusters, kind, 0.125)
    wanted = brute_force(queries, k, v, clusters.labels, 17, kind, 0.125)
    # Weights meet values in half precision; the output is rounded to it.
    torch.testing.assert_close(found[0].double().cpu(), wanted[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[1].double().cpu().sqrt(), wanted[1].sqrt(), rtol=2**-6, atol=1e-3)


@pytest.mark.parametrize("factor", [1.0, 40.0])
def test_weight_errors_of_far_keys(factor, monkeypatch):
    """Centred logits beyond what fp32 can raise e to go the longer way; both ways give the definition."""
    monkeypatch.setattr(ce, "runs_triton", lambda *tensors: False)
    monkeypatch.setattr(ce, "_CENTRED_ELEMENTS", 300)
    generator = torch.Generator().manual_seed(3)
    k = factor * torch.randn(2, 90, 2, 16, generator=generator)
    queries = torch.randn(2, 2, 6, 16, generator=generator)
    clusters = random_clusters(2, 2, 90, 8, seed=3)
    clusters = Clusters(*(x.cpu() for x in (clusters.labels, clusters.order, clusters.centroids, clusters.sizes)))
    assert (ce._centred(queries, k, clusters, 1.0) is None) == (factor > 1)
    found = ce.cluster_errors(queries, k, k, clusters, "weight", 1.0)
    wanted = brute_force(queries, k, k, clusters.labels, 8, "weight", 1.0)
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1].double().sqrt(), wanted[1].sqrt(), rtol=1e-3, atol=1e-4)
