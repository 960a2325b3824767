"""Budgets over the run, the ranking they cut off, and the noise that varies it."""

import itertools
import math
import statistics

import pytest
import torch

import dsattn
from dsattn.grid import Call, VideoGrid
from dsattn.methods.budget import at_step
from dsattn.methods.ranked import Ranked, mass_before, share_by_rank
from dsattn.methods.scores import routing_noise

from .method_inputs import tensors

GRID = VideoGrid(5, 9, 11)
CPU = torch.device("cpu")


def call(step: int, steps: int | None = None, **options) -> Call:
    return Call(options.pop("layer", 0), step, GRID, num_steps=steps, **options)


# -- tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "steps", "values"),
    [
        (0.3, None, [0.3] * 4),
        ("0:0.5", None, [0.5] * 4),
        ("0:0.5, 2:0.1", None, [0.5, 0.5, 0.1, 0.1]),
        ("0:1,1:.5,3:1e-2", None, [1.0, 0.5, 0.5, 0.01]),
        ("0:0.5,0.5:0.1", 4, [0.5, 0.5, 0.1, 0.1]),
        ("0.0:0.5,0.3:0.2,0.7:0.1", 10, [0.5, 0.5, 0.5, 0.2, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1]),
        ("0:0.5,0.01:0.1", 4, [0.1] * 4),  # 1 % of four steps is none
    ],
)
def test_values_hold_until_the_next_start(table, steps, values):
    assert [at_step(table, call(step, steps)) for step in range(len(values))] == values


def test_shares_need_the_number_of_steps():
    with pytest.raises(dsattn.UsageError, match="counts in shares of the run.*number of steps is unknown"):
        at_step("0:0.3,0.5:0.1", call(0))


@pytest.mark.parametrize("method", ["topk", "semantic", "sol"])
def test_density_follows_its_table(method):
    engine = dsattn.Engine(method, density="0:0.5,2:0.1", impl="torch")
    densities = []
    for step in range(4):
        engine(*tensors(GRID), call(step))
        densities.append(float(engine.state.entries["transformer", 0, "cond"].plan.density.mean()))
    assert densities[0] == pytest.approx(densities[1], rel=0.1) and densities[0] > 0.4
    assert densities[2] == pytest.approx(densities[3], rel=0.1) and densities[2] < 0.2


def test_target_error_and_top_p_follow_their_tables():
    q, k, v = tensors(GRID)
    qkv = [0.3 * q, k, v]
    for method, name, values in (("semantic", "target_error", "0:0.01,1:0.4"), ("topk", "top_p", "0:0.95,1:0.3")):
        made = [dsattn.plan(*qkv, call(step), method=method, **{name: values}).density.mean() for step in range(2)]
        alone = [
            dsattn.plan(*qkv, call(0), method=method, **{name: float(part.split(":")[1])}).density.mean()
            for part in values.split(",")
        ]
        assert made == alone and made[0] > made[1]


def test_a_reused_plan_keeps_its_value():
    engine = dsattn.Engine("topk", density="0:0.5,1:0.1", refresh=2, impl="torch")
    densities = []
    for step in range(3):
        engine(*tensors(GRID), call(step))
        densities.append(float(engine.state.entries["transformer", 0, "cond"].plan.density.mean()))
    assert densities[0] == densities[1] > 2 * densities[2]


# -- ranking ------------------------------------------------------------------------------------------------


def test_union_keeps_what_either_budget_keeps():
    for method in ("topk", "semantic"):
        qkv = [x * 0.5 for x in tensors(GRID)]
        for density, top_p in ((0.4, 0.1), (0.05, 0.9), (0.2, 0.5)):
            masks = [
                dsattn.plan(*qkv, call(0), method=method, **options).block_mask
                for options in ({"density": density}, {"top_p": top_p}, {"density": density, "top_p": top_p})
            ]
            assert torch.equal(masks[0] | masks[1], masks[2])


def test_ranking_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    scores, sizes = torch.rand(2, 3, 5, 12, generator=generator), torch.randint(0, 9, (2, 3, 12), generator=generator)
    mass = torch.rand(scores.shape, generator=generator).softmax(-1)
    always = torch.rand(5, 12, generator=generator) < 0.1
    total = int(sizes.sum(-1).max())
    for fixed in (None, always):
        keys = share_by_rank(scores, sizes[:, :, None], fixed)
        ranked = Ranked(torch.where(keys < 0, -1, keys / total), lambda keep: keep, mass_before(scores, mass, fixed))
        for density, top_p in ((0.5, None), (None, 0.6), (0.3, 0.4), (1.0, None), (None, 1.0)):
            keep = ranked.within(density, top_p, call(0))
            for b, h, i in itertools.product(range(2), range(3), range(5)):
                first = set() if fixed is None else set(fixed[i].nonzero().flatten().tolist())
                order = sorted(range(12), key=lambda j: (j not in first, -float(scores[b, h, i, j])))
                used, held, kept = 0, 0.0, {*first, order[0]}
                for j in order:
                    size, share = int(sizes[b, h, j]), float(mass[b, h, i, j])
                    fits = density is not None and used + size / 2 <= density * total
                    needed = top_p is not None and (held < top_p or top_p == 1)
                    kept |= {j} if fits or needed else set()
                    used, held = used + size, held + share
                assert set(keep[b, h, i].nonzero().flatten().tolist()) == kept


# -- noise --------------------------------------------------------------------------------------------------


def test_noise_is_gaussian_without_pattern():
    noise = routing_noise(0.5, (4, 200, 300), call(3, layer=2), 0, CPU) / 0.5
    count = noise.numel()
    assert abs(float(noise.mean())) < 5 / math.sqrt(count)
    assert float(noise.std()) == pytest.approx(1, abs=5 / math.sqrt(2 * count))
    assert float(noise.abs().max()) < 6
    normal = torch.distributions.Normal(0, 1)
    for mark in (-2.0, -1.0, 0.0, 1.0, 2.0):
        share = float(normal.cdf(torch.tensor(mark)))
        assert float((noise < mark).double().mean()) == pytest.approx(share, abs=5 * math.sqrt(0.25 / count))
    neighbours = ((noise[:-1], noise[1:]), (noise[:, :-1], noise[:, 1:]), (noise[..., :-1], noise[..., 1:]))
    for a, b in (*neighbours, (noise[0, :, :200], noise[0, :, :200].T)):
        assert abs(float((a * b).mean())) < 0.02
    for other in (call(4, layer=2), call(3, layer=3)):
        assert abs(float((noise * routing_noise(2, (4, 200, 300), other, 0, CPU) / 2).mean())) < 0.02
    assert not torch.equal(noise, routing_noise(0.5, (4, 200, 300), call(3, layer=2), 1, CPU) / 0.5)


def test_noise_agrees_between_branches_and_ranks():
    shape = (4, 9, 7)
    noise = routing_noise(1.0, shape, call(3, branch="cond"), 0, CPU)
    assert torch.equal(noise, routing_noise(1.0, shape, call(3, branch="uncond"), 0, CPU))
    shard = routing_noise(1.0, (2, 9, 7), call(3, first_head=2), 0, CPU)
    assert torch.equal(noise[2:], shard)


def test_noise_against_plain_integers():
    """The same numbers on every machine and in every release."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x21F0AAAD % 2**32
        x = (x ^ (x >> 15)) * 0x735A2D97 % 2**32
        return x ^ (x >> 15)

    seed, layer, step, first_head = 2**33 + 5, 7, 3, 6
    got = routing_noise(0.5, (2, 3, 4), call(step, layer=layer, first_head=first_head), seed, CPU)
    for h in range(2):
        for i in range(3):
            for j in range(4):
                state = 0
                for part in (5, layer, step, first_head + h, i, j):
                    state = mix(state ^ part)
                want = 0.5 * statistics.NormalDist().inv_cdf((state // 512 + 0.5) / 2**23)
                assert float(got[h, i, j]) == pytest.approx(want, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", ["topk", "semantic", "sol"])
def test_noise_varies_what_is_kept_from_step_to_step(method):
    qkv = tensors(GRID)
    options = {} if method == "semantic" else {"block_q": 16, "block_k": 16} if method == "topk" else {"block": 16}

    def mask(step: int, **more) -> torch.Tensor:
        return dsattn.plan(*qkv, call(step), method=method, density=0.2, **options, **more).validate().block_mask

    assert torch.equal(mask(0), mask(1)) and torch.equal(mask(0), mask(0, routing_noise=0))
    noisy = [mask(step, routing_noise=0.02) for step in range(8)]
    assert torch.equal(noisy[0], mask(0, routing_noise=0.02))
    changed = (noisy[0] != noisy[1]).double().mean()
    assert 0 < float(changed) < 0.1
    # What no step of the plain method keeps, some step now does.
    assert int(torch.stack(noisy).any(0).sum()) > int(mask(0).sum())
