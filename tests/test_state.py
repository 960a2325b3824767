"""What engines remember between calls: last dense steps, changed inputs and drift, estimated errors, breaking off."""

import pytest
import torch
from torch import Tensor

import dsattn
from dsattn import Call, Engine, VideoGrid
from dsattn.methods import auto
from dsattn.methods.base import Memory
from dsattn.methods.estimate import sample_rows

from .temporal_runs import local

GRID = VideoGrid(4, 9, 11, text=13)
SMALL = {"method": "topk", "density": 0.2, "block_q": 16, "block_k": 16, "order": "raster", "impl": "torch"}


def call(step: int, **more) -> Call:
    return Call(**{"layer": 0, "step": step, "grid": GRID, **more})


def kinds(engine: Engine, **of) -> list[str]:
    records = [r for r in engine.stats.records if all(getattr(r, name) == value for name, value in of.items())]
    return [record.kind if record.kind != "refresh" else record.reason for record in records]


# -- last dense step ----------------------------------------------------------------------------------------


def test_what_the_last_dense_step_showed_makes_the_first_plan():
    """auto measures there, once, on the inputs of that step; layers that stay dense are not measured."""
    options = {"candidates": ("radial", "spatial_temporal"), "target_error": 0.2}
    engine = Engine("auto", dense_steps=2, dense_layers=(1,), refresh=2, impl="torch", **options)
    for step in range(5):
        for layer in range(3):
            engine(*local(GRID, seed=10 * layer + step), call(step, layer=layer))
    assert kinds(engine, layer=0) == ["dense", "dense", "no plan yet", "reuse", "refresh"]
    assert kinds(engine, layer=1) == ["dense"] * 5
    measured = engine.state.entries["transformer", 0, "cond"].memory.shared["auto"]
    assert sorted(measured) == [0, 2] and {profile.step for profile in measured.values()} == {1}
    for layer, profile in measured.items():
        memory = Memory()
        auto.observe(*local(GRID, seed=10 * layer + 1), call(1, layer=layer), engine.method_config, memory)
        assert torch.equal(profile.error, memory.shared["auto"][layer].error)


def test_a_layout_that_changes_after_the_last_dense_step_is_measured_again():
    engine = Engine("auto", dense_steps=1, impl="torch", candidates="radial")
    engine(*local(GRID), call(0))
    engine(*(torch.cat([x, x]) for x in local(GRID)), call(1))
    (profile,) = engine.state.entries["transformer", 0, "cond"].memory.shared["auto"].values()
    assert profile.step == 1 and profile.weight.shape[0] == 2


# -- drift --------------------------------------------------------------------------------------------------


def scene(step: int, number: int) -> list[Tensor]:
    """Queries of every 16 tokens look at 16 others, in every scene at different ones; steps differ in noise."""
    generator = torch.Generator().manual_seed(step)
    codes = torch.randn(26, 2, 32, generator=torch.Generator().manual_seed(99))
    block = torch.arange(GRID.tokens) // 16
    noise = 0.1 * torch.randn(2, GRID.tokens, 2, 32, generator=generator)
    q, k = 2 * codes[(block + 7 * number + 3) % 26] + noise[0], 2 * codes[block] + noise[1]
    return [x[None] for x in (q, k, torch.randn(GRID.tokens, 2, 32, generator=generator))]


def test_drift_makes_a_plan_anew_one_step_after_inputs_change_suddenly():
    engine = Engine(**SMALL, tail="none", refresh=100, drift=1.5, monitor=64)
    plans = []
    for step in range(7):
        for branch, cut in (("cond", 3), ("uncond", 100)):
            engine(*scene(step, int(step >= cut)), call(step, branch=branch))
        plans.append(engine.state.entries["transformer", 0, "cond"].plan)
    assert kinds(engine, branch="cond") == ["no plan yet", "reuse", "reuse", "reuse", "drift", "reuse", "reuse"]
    assert kinds(engine, branch="uncond") == ["no plan yet"] + ["reuse"] * 6
    assert engine.summary()["refresh_reasons"] == {"no plan yet": 2, "drift": 1}
    assert plans[0] is plans[3] is not plans[4] is plans[6]
    error = [float(r.error.mean()) for r in engine.stats.records if r.branch == "cond"]
    assert error[3] > 0.5 > 0.1 > max(error[:3] + error[4:])


def test_without_drift_a_plan_is_kept_until_its_refresh():
    engine = Engine(**SMALL, tail="none", refresh=6)
    for step in range(7):
        engine(*scene(step, int(step >= 3)), call(step))
    assert kinds(engine) == ["no plan yet"] + ["reuse"] * 5 + ["refresh"]
    # Estimated once, where the plan is oldest.
    assert [record.step for record in engine.stats.records if record.error is not None] == [5]


def test_drift_is_measured_against_the_first_use_of_the_plan_in_force():
    """After the refresh, errors of the new scene count as usual; a second change is seen again."""
    engine = Engine(**SMALL, tail="none", refresh=100, drift=1.5, monitor=64)
    for step in range(9):
        engine(*scene(step, (step >= 2) + (step >= 6)), call(step))
    assert kinds(engine) == ["no plan yet", "reuse", "reuse", "drift", "reuse", "reuse", "reuse", "drift", "reuse"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_drift(dtype):
    """A plan that leaves nothing out has an error of rounding alone, which goes up and down."""
    engine = Engine(**{**SMALL, "density": 1.0}, refresh=100, drift=1.01)
    for step in range(6):
        engine(*(x.to(dtype) for x in local(GRID, seed=step)), call(step))
    assert kinds(engine) == ["no plan yet"] + ["reuse"] * 5


@pytest.mark.parametrize("lengths", [None, (GRID.tokens - 9, GRID.tokens)], ids=["", "padded"])
@pytest.mark.parametrize("scale", [None, 0.1])
@pytest.mark.parametrize(
    "options", [{}, {"tail": "none"}, {"method": "temporal", "density": None, "threshold": -2.0}], ids=str
)
def test_the_estimated_error_is_the_true_one_on_its_rows(options, scale, lengths):
    given = {**SMALL, **options}
    engine = Engine(**{k: v for k, v in given.items() if v is not None}, refresh=3, drift=100.0, monitor=40)
    key_lengths = None if lengths is None else torch.tensor(lengths)
    for step in range(3):
        qkv = [torch.cat(x) for x in zip(local(GRID, seed=step), local(GRID, seed=step, places=1), strict=True)]
        out = engine(*qkv, call(step), scale=scale, key_lengths=key_lengths)
        rows = sample_rows(GRID, 40, seed=step)
        q, k, v = (x.double().transpose(1, 2) for x in qkv)
        logits = q[:, :, rows] @ k.mT * (32**-0.5 if scale is None else scale)
        if key_lengths is not None:
            logits = logits.masked_fill((torch.arange(GRID.tokens) >= key_lengths[:, None])[:, None, None], -torch.inf)
        exact = logits.softmax(-1) @ v
        error = (out.transpose(1, 2)[:, :, rows] - exact).square().sum((2, 3)) / exact.square().sum((2, 3))
        found = engine.stats.records[-1].error
        # Below the fp32 noise of both outputs no digit is left.
        torch.testing.assert_close(found.double(), error.mean(0).sqrt(), rtol=1e-4, atol=1e-6)


# -- other engines, other inputs ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["semantic", "temporal", "auto"])
def test_engines_side_by_side_are_as_alone(method):
    options = {"refresh": 2, "dense_steps": 1, "impl": "torch", "monitor": 0}

    def step_of(engine: Engine, step: int, seed: int) -> list[Tensor]:
        return [engine(*local(GRID, seed=seed + step, places=layer), call(step, layer=layer)) for layer in range(2)]

    alone = []
    for seed in (0, 50):
        engine = Engine(method, **options)
        alone.append([step_of(engine, step, seed) for step in range(4)])
    one, two = Engine(method, **options), Engine(method, **options)
    for step in range(4):
        for engine, seed, want in ((one, 0, alone[0]), (two, 50, alone[1])):
            found = step_of(engine, step, seed)
            assert all(torch.equal(a, b) for a, b in zip(found, want[step], strict=True))


def test_a_plan_made_before_other_keys_became_padding_stays_right():
    """Structure is reused while the number of readable keys changes from call to call."""
    engine = Engine(**SMALL, refresh=9)
    for step, padded in enumerate((0, 9, 3)):
        q, k, v = local(GRID, seed=step)
        lengths = torch.tensor([GRID.tokens - padded])
        want = engine(q, k, v, call(step), key_lengths=lengths)
        made = engine.state.entries["transformer", 0, "cond"].plan
        assert made.key_lengths is None
        if padded:
            k, v = k.clone(), v.clone()
            k[:, -padded:], v[:, -padded:] = torch.nan, torch.nan
        again = dsattn.attend(q, k, v, made.with_key_lengths(lengths.int()), impl="torch")
        assert torch.equal(again, want)
    assert kinds(engine) == ["no plan yet", "reuse", "reuse"]
