"""Pools to second order: weights of keys, against a float64 loop and against what they are for."""

import pytest
import torch

import dsattn
from dsattn.grid import Call, VideoGrid
from dsattn.kernels.kmeans import first_centroids, kmeans
from dsattn.methods.cluster_space import ClusterSpace
from dsattn.methods.tail_weights import LIMIT, SHARE, tail_weights
from tests.method_inputs import tensors


def by_hand(q, k, labels):
    """exp(SHARE (s mean(q)·δ + ½ s² mean((q·δ)²))), clamped, key by key."""
    batch, length, heads, dim = k.shape
    found = torch.zeros(batch, heads, length, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            queries, keys = q[b, :, h].double(), k[b, :, h].double()
            for n in range(length):
                centre = keys[labels[b, h] == labels[b, h, n]].mean(0)
                logits = queries @ (keys[n] - centre) * dim**-0.5
                exponent = SHARE * (logits.mean() + logits.square().mean() / 2)
                found[b, h, n] = exponent.clamp(-LIMIT, LIMIT).exp()
    return found


@pytest.mark.parametrize("elements", [1 << 24, 2000])
@pytest.mark.parametrize(("batch", "length", "heads", "dim"), [(2, 61, 3, 16), (1, 1, 1, 32), (1, 130, 2, 64)])
def test_weights_are_the_definition(batch, length, heads, dim, elements, monkeypatch):
    monkeypatch.setattr("dsattn.methods.tail_weights.ELEMENTS", elements)
    generator = torch.Generator().manual_seed(length)
    q, k = (1 + torch.randn(batch, length, heads, dim, generator=generator) for _ in range(2))
    space = ClusterSpace.of_keys(q, k, k, "query", 0, seed=0)
    clusters = kmeans(k, first_centroids(k, min(5, length), seed=0), 2)
    found = tail_weights(q, k, space(k), clusters)
    # The space's metric has a jitter of 1e-4 of its mean eigenvalue.
    torch.testing.assert_close(found.double(), by_hand(q, k, clusters.labels), rtol=2e-3, atol=0)


def test_equal_keys_count_as_one_each():
    q, k = torch.randn(1, 20, 2, 16), torch.ones(1, 20, 2, 16)
    clusters = kmeans(k, first_centroids(k, 3, seed=0), 1)
    found = tail_weights(q, k, ClusterSpace.of_keys(q, k, k, "query", 0, seed=0)(k), clusters)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-4, atol=0)


@pytest.mark.parametrize("metric", ["euclidean", "logit"])
@pytest.mark.parametrize("values", [0, 0.5])
@pytest.mark.parametrize("grid", [VideoGrid(3, 8, 9, text=7), VideoGrid(2, 9, 8, text=5, text_first=True, prefix=3)])
def test_text_and_prefix_count_fully(grid, metric, values):
    q, k, v = tensors(grid, 2, heads=2, dim=16)
    plan = dsattn.plan(q, k, v, Call(0, 0, grid), method="semantic", metric=metric, values=values).validate()
    outside = torch.ones(grid.tokens, dtype=torch.bool)
    outside[grid.video_start : grid.video_end] = False
    assert bool((plan.tail_weights[..., outside] == 1).all()) and bool((plan.tail_weights[..., ~outside] != 1).any())


def test_first_order_has_no_weights():
    grid = VideoGrid(2, 6, 6)
    qkv = tensors(grid, 1, heads=2, dim=16)
    for options in ({"tail_order": 1}, {"tail": "none"}):
        assert dsattn.plan(*qkv, Call(0, 0, grid), method="semantic", **options).tail_weights is None


def test_second_order_is_closer():
    """Keys spread around a few centres, queries of several directions: what the weights are for."""
    grid = VideoGrid(4, 16, 16)
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(12, 32, generator=generator)

    def around() -> torch.Tensor:
        drawn = centres[torch.randint(12, (1, grid.tokens, 2), generator=generator)]
        return drawn + torch.randn(drawn.shape, generator=generator)

    q, k = around(), around()
    v = 0.5 * k + torch.randn(k.shape, generator=generator)
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def error(order: int) -> float:
        options = {"density": 0.05, "tail_order": order}
        plan = dsattn.plan(q, k, v, Call(0, 0, grid), method="semantic", **options)
        return float((dsattn.attend(q, k, v, plan) - dense).norm() / dense.norm())

    assert error(2) < 0.9 * error(1)
