"""Curves of candidates against plans that are really made; budgets against all ways to spend them."""

import itertools
from functools import cache

import pytest
import torch

from dsattn.block_plan import BlockPlan
from dsattn.grid import Call, VideoGrid
from dsattn.head_profile import DENSITIES, LayerProfile
from dsattn.methods import radial, semantic, sol, spatial_temporal, topk
from dsattn.methods.base import Memory
from dsattn.methods.estimate import RowSample, sample_rows
from dsattn.profiler import allocate, trace

from .method_inputs import tensors

GRID = VideoGrid(3, 5, 7)
TEXT = VideoGrid(3, 5, 9, text=21)
FIRST = VideoGrid(2, 7, 9, text=19, text_first=True, prefix=6)
SMALL = VideoGrid(1, 2, 3)

METHODS = {
    "topk": lambda tail: (topk.rank, topk.TopkConfig(block_q=32, block_k=16, order="hilbert", tail=tail)),
    "semantic": lambda tail: (semantic.rank, semantic.SemanticConfig(q_clusters=4, k_clusters=30, tail=tail)),
    "sol": lambda tail: (sol.rank, sol.SolConfig(block=16, tail=tail)),
    "spatial_temporal": lambda tail: (
        spatial_temporal.rank,
        spatial_temporal.SpatialTemporalConfig(block=16, tail=tail),
    ),
    "radial": lambda tail: (radial.rank, radial.RadialConfig(block=32, tail=tail)),
}


def by_hand(qkv, plan: BlockPlan, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Error and recall ``[B, H]`` on some rows, in float64 from the map of all pairs of tokens."""
    q, k, v = (x.double().transpose(1, 2) for x in qkv)
    weights = (q[:, :, rows] @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    exact = weights @ v
    read = plan.to_dense()[:, :, rows]
    recall = (weights * read).sum(-1).mean(-1)
    kept = weights * read
    numerator, denominator = kept @ v, kept.sum(-1, keepdim=True)
    if plan.tail == "pooled":
        # Mean keys and values of every block by counting tokens.
        logits = q[:, :, rows] @ k.mT * q.shape[-1] ** -0.5
        peak = logits.amax(-1, keepdim=True)
        total = (logits - peak).exp().sum(-1, keepdim=True)
        owner = plan.k_block_of_token.expand(*k.shape[:2], -1)
        member = torch.nn.functional.one_hot(owner, plan.num_k_blocks).double()
        sizes = member.sum(2)[..., None]
        k_mean = member.mT @ k / sizes.clamp(min=1)
        if plan.tail_weights is not None:
            member = member * plan.tail_weights.double().expand(*k.shape[:2], -1)[..., None]
            sizes = member.sum(2)[..., None]
        v_mean = member.mT @ v / sizes.where(sizes > 0, 1)
        pooled = sizes.mT * (q[:, :, rows] @ k_mean.mT * q.shape[-1] ** -0.5 - peak).exp() / total
        pooled = pooled * ~plan.kept_blocks(rows)
        numerator, denominator = numerator + pooled @ v_mean, denominator + pooled.sum(-1, keepdim=True)
    difference = numerator / denominator - exact
    return (difference.square().sum((2, 3)) / exact.square().sum((2, 3))).sqrt(), recall


@pytest.mark.parametrize("tail", ["pooled", "none"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("grid", "batch"), [(GRID, 2), (TEXT, 1), (FIRST, 2), (SMALL, 1)])
def test_a_curve_is_what_its_plans_do(grid, batch, method, tail):
    qkv = tensors(grid, batch, heads=3, dim=16)
    qkv[1] *= 2
    rank, config = METHODS[method](tail)
    ranked = rank(*qkv, Call(0, 0, grid), config, Memory())
    rows = sample_rows(grid, 20, seed=1)
    sample = RowSample.of(*qkv, rows)
    curve = trace(sample, ranked)
    assert curve.error.shape == curve.recall.shape == curve.density.shape == (len(DENSITIES), batch, 3)
    for place, density in enumerate(DENSITIES):
        plan = ranked.at(torch.full((batch, 3), density)).validate()
        error, recall = by_hand(qkv, plan, rows)
        # fp32 sums of a few hundred weights; where all is read, the error is rounding alone.
        torch.testing.assert_close(curve.error[place].double(), error, rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(curve.error[place], sample.error(plan), rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(curve.recall[place].double(), recall, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(curve.density[place], plan.density)
        assert torch.equal(plan.block_mask, ranked.at(density).block_mask.expand_as(plan.block_mask))
    assert curve.tail == (plan.num_k_blocks / grid.tokens if tail == "pooled" else 0.0)
    assert float(curve.density[-1].min()) == pytest.approx(1) and float(curve.error[-1].max()) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_curves_are_computed_in_fp32(dtype):
    qkv = [x.to(dtype) for x in tensors(TEXT, dim=16)]
    rank, config = METHODS["semantic"]("pooled")
    ranked = rank(*qkv, Call(0, 0, TEXT), config, Memory())
    rows = sample_rows(TEXT, 20, seed=1)
    curve = trace(RowSample.of(*qkv, rows), ranked)
    assert curve.error.dtype == curve.recall.dtype == curve.density.dtype == torch.float32
    error, recall = by_hand(qkv, ranked.at(DENSITIES[5]), rows)
    torch.testing.assert_close(curve.error[5].double(), error, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(curve.recall[5].double(), recall, rtol=1e-5, atol=1e-6)


def test_mass_far_below_the_peak_gives_finite_errors():
    """A key that holds all mass and is not read: what is read has weights that fp32 rounds to zero."""
    q, k, v = tensors(GRID, heads=1, dim=16)
    q[..., 0], k[..., 0] = 30.0, 0.0
    k[:, -1, :, 0] = 100.0
    rank, config = METHODS["radial"]("none")
    curve = trace(RowSample.of(q, k, v, torch.arange(20)), rank(q, k, v, Call(0, 0, GRID), config, Memory()))
    assert bool(torch.isfinite(curve.error).all()) and float(curve.error[0].max()) == pytest.approx(1)
    assert float(curve.error[-1].max()) < 1e-5


# -- allocate -------------------------------------------------------------------------------------------------


def layers_of(count: int, batch: int = 1, heads: int = 2, candidates: int = 2, seed: int = 0) -> list[LayerProfile]:
    """Layers with falling errors and rising costs over densities, unlike in every head."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    layers = []
    for layer in range(count):
        shape = (candidates, len(DENSITIES), batch, heads)
        falls = torch.linspace(1, 0, len(DENSITIES)).view(1, -1, 1, 1) ** (0.5 + 4 * draw(candidates, 1, batch, heads))
        error = falls * draw(candidates, 1, batch, heads)
        density = torch.tensor(DENSITIES).view(1, -1, 1, 1).expand(shape)
        weight = draw(batch, heads) + 0.05
        weight = weight / weight.sum(1, keepdim=True)
        names = tuple("abc"[:candidates])
        layers.append(LayerProfile(layer, names, error, 1 - error, density, density + 0.03 * draw(*shape), weight))
    return layers


def spent(layers: list[LayerProfile]) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error (mean over layers) and cost (mean over layers and heads) of the choices, ``[B]``."""
    errors = [(x.weight.double() * x.at_choice("error").double().square()).sum(1) for x in layers]
    costs = [x.at_choice("cost").double().mean(1) for x in layers]
    return torch.stack(errors).mean(0), torch.stack(costs).mean(0)


@cache
def all_ways(seed: int) -> tuple[tuple[float, float], ...]:
    """Squared error and cost of every choice of 2 layers with one head each and 2 candidates."""
    layers = layers_of(2, heads=1, seed=seed)
    options = [
        list(zip(x.error.flatten().double().square().tolist(), x.cost.flatten().double().tolist(), strict=True))
        for x in layers
    ]
    return tuple(((a + b) / 2, (x + y) / 2) for (a, x), (b, y) in itertools.product(*options))


def hull(ways) -> list[tuple[float, float]]:
    """Ways that are the best at some price of error: the corners of the lower convex hull, by rising error."""
    corners: list[tuple[float, float]] = []
    for error, cost in sorted(ways):
        if corners and cost >= corners[-1][1]:
            continue
        while len(corners) > 1:
            (e0, c0), (e1, c1) = corners[-2:]
            if (c1 - c0) * (error - e0) < (cost - c0) * (e1 - e0):
                break
            corners.pop()
        corners.append((error, cost))
    return corners


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("target", [0.02, 0.1, 0.25, 0.5])
def test_a_target_is_met_by_the_cheapest_corner_of_all_ways(seed, target):
    layers = layers_of(2, heads=1, seed=seed)
    allocate(layers, target=target)
    error, cost = (float(x) for x in spent(layers))
    corners = hull(all_ways(seed))
    best = min((c for c in corners if c[0] <= target**2), key=lambda c: c[1])
    assert (error, cost) == pytest.approx(best, rel=1e-6, abs=1e-12)
    assert error <= target**2
    # No price does better; a mixture of two corners can, by less than one step from corner to corner.
    cheapest = min(c for e, c in all_ways(seed) if e <= target**2)
    before = max((c[1] for c in corners if c[1] < cost), default=0.0)
    assert before < cheapest <= cost + 1e-12


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [0.03, 0.1, 0.3, 0.9])
def test_a_cost_buys_the_best_corner_of_all_ways(seed, budget):
    layers = layers_of(2, heads=1, seed=seed)
    allocate(layers, cost=budget)
    error, cost = (float(x) for x in spent(layers))
    corners = hull(all_ways(seed))
    best = min((c for c in corners if c[1] <= budget), default=corners[-1])
    assert (error, cost) == pytest.approx(best, rel=1e-6, abs=1e-12)
    assert cost <= budget or cost == pytest.approx(min(c for _, c in all_ways(seed)))


def test_the_price_is_one_for_all_layers_and_heads():
    """No head could give back cost for less error than another would gain by it."""
    layers = layers_of(5, heads=4, candidates=3)
    allocate(layers, target=0.15)
    error, _ = spent(layers)
    assert float(error) <= 0.15**2
    worst_given, best_taken = 0.0, float("inf")
    for layer in layers:
        errors = (layer.weight * layer.error.flatten(0, 1).square()).double()[:, 0]
        costs = layer.cost.flatten(0, 1).double()[:, 0]
        for head in range(4):
            chosen = int(layer.choice[0, head])
            gain, more = errors[chosen, head] - errors[:, head], costs[:, head] - costs[chosen, head]
            assert not bool(((gain >= 0) & (more < -1e-12)).any()), "something cheaper and no worse was passed over"
            dearer, cheaper = (more > 0) & (gain > 0), (more < 0) & (gain < 0)
            if bool(dearer.any()):
                worst_given = max(worst_given, float((gain[dearer] / more[dearer]).max()))
            if bool(cheaper.any()):
                best_taken = min(best_taken, float((gain[cheaper] / more[cheaper]).min()))
    assert worst_given <= best_taken * (1 + 1e-9)


@pytest.mark.parametrize("budget", ["target", "cost"])
def test_batch_rows_choose_as_if_alone(budget):
    both = layers_of(3, batch=2, heads=3)
    allocate(both, **{budget: 0.12})
    curves = ("error", "recall", "density", "cost")
    for row in range(2):
        alone = [
            LayerProfile(
                x.step, x.candidates, *(getattr(x, c)[:, :, row : row + 1] for c in curves), x.weight[row : row + 1]
            )
            for x in both
        ]
        allocate(alone, **{budget: 0.12})
        for one, two in zip(alone, both, strict=True):
            assert torch.equal(one.choice[0], two.choice[row])


def test_looser_budgets_spend_in_one_direction():
    for name, values in (("target", (0.01, 0.05, 0.1, 0.2, 0.4, 1.0)), ("cost", (1.0, 0.5, 0.2, 0.1, 0.05, 0.01))):
        results = []
        for value in values:
            layers = layers_of(4, batch=2, heads=3)
            allocate(layers, **{name: value})
            results.append(spent(layers))
        for (error, cost), (later_error, later_cost) in itertools.pairwise(results):
            assert bool((error <= later_error).all()) and bool((cost >= later_cost).all())


def test_budgets_out_of_reach_give_the_most_that_can_be_had():
    layers = layers_of(2)
    for layer in layers:
        layer.error = layer.error + 0.2
    allocate(layers, target=0.1)
    assert all(torch.equal(x.at_choice("error"), x.error.flatten(0, 1).amin(0)) for x in layers)
    allocate(layers, cost=1e-4)
    assert all(torch.equal(x.at_choice("cost"), x.cost.flatten(0, 1).amin(0)) for x in layers)


def test_heads_without_output_take_the_cheapest_and_disturb_nobody():
    """A dead head (weight 0), a dead layer (all weights 0), infinite errors and errors that are no numbers."""
    alone = layers_of(3, heads=2)[:2]
    allocate(alone, target=0.1)
    layers = layers_of(3, heads=2)
    dead = layers[2]
    for bad in (1.0, torch.inf, torch.nan):
        dead.weight, dead.error = torch.zeros(1, 2), torch.full_like(dead.error, bad)
        allocate(layers, target=0.1 * (2 / 3) ** 0.5)
        assert torch.equal(dead.at_choice("cost"), dead.cost.flatten(0, 1).amin(0))
        assert all(torch.equal(x.choice, y.choice) for x, y in zip(layers[:2], alone, strict=True))
    # An infinite error of a head that counts is never chosen while there is another.
    dead.weight = torch.ones(1, 2) / 2
    dead.error[:, -1] = 0.0
    dead.error[:, :-1] = torch.inf
    allocate(layers, target=1.0)
    assert bool((dead.at_choice("error") == 0).all())


def test_one_layer_one_head_one_candidate():
    layers = layers_of(1, heads=1, candidates=1)
    allocate(layers, target=0.1)
    chosen = int(layers[0].choice)
    good = (layers[0].error.flatten() <= 0.1).nonzero().flatten().tolist()
    assert chosen in good and layers[0].chosen()[0].tolist() == [[0]]
    assert layers[0].chosen()[1].item() == pytest.approx(DENSITIES[chosen])
