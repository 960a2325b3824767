"""The method auto: which head takes what, for which budget, and that all of them still run as one call."""

import dataclasses
import json

import pytest
import torch

import dsattn
from dsattn import Call, Config, Engine, UsageError, VideoGrid
from dsattn.head_profile import DENSITIES, HeadProfile
from dsattn.methods import auto, semantic
from dsattn.methods.auto import CANDIDATES, AutoConfig
from dsattn.methods.base import Memory
from dsattn.methods.estimate import sample_rows
from dsattn.mix import split_heads
from dsattn.state import Arriving

from .method_inputs import dense, tensors

GRID = VideoGrid(4, 5, 9, text=7)
# 24 frames of 8 x 16: a patch over all frames is 24 tokens, a cube of 4 x 4 x 4 is one block.
CLIP = VideoGrid(24, 8, 16)
PLANTED = ["semantic", "topk", "spatial_temporal"]


def planted(seed: int = 0, dim: int = 32) -> list[torch.Tensor]:
    """Three heads: tokens of random groups, of one cube, and of one patch in all frames attend to each other."""
    generator = torch.Generator().manual_seed(seed)
    token = torch.arange(CLIP.tokens)
    frame, patch = token // CLIP.frame_tokens, token % CLIP.frame_tokens
    row, column = patch // CLIP.width, patch % CLIP.width
    groups = torch.randint(0, 24, (CLIP.tokens,), generator=generator)
    cubes = (frame // 4) * 8 + (row // 4) * 4 + column // 4
    q, k = [], []
    # Logits: 9 within a group, and a random part of this standard deviation, which pooling loses.
    for label, spread in ((groups, 1.0), (cubes, 1.0), (patch, 2.0)):
        code = torch.nn.functional.one_hot(label, 128).float() * 3
        noise = torch.randn(2, CLIP.tokens, dim, generator=generator) * (spread / dim**0.5) ** 0.5
        q.append(torch.cat([code, noise[0]], -1) * (128 + dim) ** 0.5)
        k.append(torch.cat([code, noise[1]], -1))
    v = torch.randn(1, CLIP.tokens, 3, 128 + dim, generator=generator)
    return [torch.stack(q, 1)[None], torch.stack(k, 1)[None], v]


def layers_of(engine: Engine, branch: str = "cond") -> dict:
    return engine.state.entries["transformer", 0, branch].memory.shared["auto"]


def names(profile, row: int = 0) -> list[str]:
    return [profile.candidates[i] for i in profile.chosen()[0][row]]


def squared_errors(out, qkv, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error of every sampled row over all heads, and its squared norm: ``[B, R]`` each, float64."""
    exact = dense([x.double() for x in qkv])[:, rows]
    difference = out.double()[:, rows] - exact
    return difference.square().sum((2, 3)), exact.square().sum((2, 3))


# -- choices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.1, 0.2])
def test_heads_of_different_structure_choose_different_methods_in_one_call(target, monkeypatch):
    calls = []
    monkeypatch.setattr("dsattn.engine.attend", lambda *a, **kw: calls.append(a) or dsattn.attend(*a, **kw))
    engine = Engine("auto", target_error=target, impl="torch")
    qkv = planted()
    out = engine(*qkv, Call(0, 0, CLIP))
    profile = layers_of(engine)[0]
    assert names(profile) == PLANTED and len(calls) == 1
    plan = engine.state.entries["transformer", 0, "cond"].plan.validate()
    assert float(plan.density.max()) < 0.15
    # Centroids moved on by one iteration since the densities were measured.
    torch.testing.assert_close(plan.density[:, 1:], profile.at_choice("density")[:, 1:])
    torch.testing.assert_close(plan.density[:, 0], profile.at_choice("density")[:, 0], rtol=0, atol=0.01)
    torch.testing.assert_close(dsattn.attend(*qkv, plan, impl="reference"), out, rtol=1e-4, atol=1e-5)


def test_rows_of_a_batch_choose_by_themselves():
    one, two = planted(0), planted(1)
    both = [torch.cat([a, b.flip(2)]) for a, b in zip(one, two, strict=True)]
    engine = Engine("auto", target_error=0.15, impl="torch")
    engine(*both, Call(0, 0, CLIP))
    profile = layers_of(engine)[0]
    assert [names(profile, row) for row in range(2)] == [PLANTED, PLANTED[::-1]]
    alone = Engine("auto", target_error=0.15, impl="torch")
    alone(*one, Call(0, 0, CLIP))
    assert torch.equal(layers_of(alone)[0].choice[0], profile.choice[0])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["planted", "random"])
def test_a_target_holds_on_rows_that_were_not_sampled(kind, seed):
    """Within the standard error of a mean over as many rows as the choice was made on."""
    grid = CLIP if kind == "planted" else VideoGrid(6, 12, 14)
    qkv = planted(seed) if kind == "planted" else tensors(grid, heads=4, seed=seed)
    target, count = 0.15, 64
    engine = Engine("auto", target_error=target, rows=count, seed=seed, impl="torch")
    out = engine(*qkv, Call(0, 0, grid))
    used = set(sample_rows(grid, count, seed).tolist())
    rows = torch.tensor([r for r in sample_rows(grid, 600, seed=99).tolist() if r not in used])
    error, norm = squared_errors(out, qkv, rows)
    found = float(error.sum() / norm.sum())
    margin = 3 * float(error.std()) / count**0.5 / float(norm.mean())
    assert found <= target**2 + margin
    profile = layers_of(engine)[0]
    estimated = float((profile.weight * profile.at_choice("error").square()).sum())
    assert estimated <= target**2 * (1 + 1e-6)
    assert abs(found - estimated) <= margin + 0.1 * target**2


@pytest.mark.parametrize("cost", [0.1, 0.2, 0.5])
def test_a_cost_is_met(cost):
    engine = Engine("auto", cost=cost, impl="torch")
    qkv = [planted(), tensors(CLIP, heads=3, dim=160)]
    for layer in range(2):
        engine(*qkv[layer], Call(layer, 0, CLIP))
    for layer in range(2):
        engine(*qkv[layer], Call(layer, 1, CLIP))
    layers = layers_of(engine)
    spent = torch.stack([layers[i].at_choice("cost").mean() for i in range(2)])
    assert 0.5 * cost < float(spent.mean()) <= cost
    densities = [engine.state.entries["transformer", i, "cond"].plan.density.mean() for i in range(2)]
    assert float(torch.stack(densities).mean()) < cost


def test_a_layer_that_needs_less_leaves_its_budget_to_the_others():
    """The target is of all layers together: a sharp one alone would keep more than beside a diffuse one."""
    target, qkv = 0.2, [planted(), planted(1)]
    qkv[1][0] = 0.5 * qkv[1][0]
    engine = Engine("auto", target_error=target, dense_steps=1, impl="torch")
    for step in range(2):
        for layer in range(2):
            engine(*qkv[layer], Call(layer, step, CLIP))
    layers = layers_of(engine)
    errors = [float((x.weight * x.at_choice("error").square()).sum()) for x in layers.values()]
    assert errors[1] > target**2 > errors[0]
    assert sum(errors) / 2 <= target**2 * (1 + 1e-6)


# -- over the run ---------------------------------------------------------------------------------------------


def test_choices_stay_while_plans_follow_the_tensors(monkeypatch):
    engine = Engine("auto", cost=0.4, impl="torch")
    first = engine(*tensors(GRID, seed=1), Call(0, 0, GRID))
    choice = layers_of(engine)[0].choice.clone()
    plan = engine.state.entries["transformer", 0, "cond"].plan
    monkeypatch.setattr(auto, "trace", None)
    for step in (1, 2):
        qkv = tensors(GRID, seed=step + 1)
        out = engine(*qkv, Call(0, step, GRID))
        later = engine.state.entries["transformer", 0, "cond"].plan
        assert torch.equal(layers_of(engine)[0].choice, choice)
        assert later is not plan and not torch.equal(later.to_dense(), plan.to_dense())
        torch.testing.assert_close(out, dsattn.attend(*qkv, later.validate(), impl="reference"), rtol=1e-4, atol=1e-5)
    assert out.shape == first.shape


@pytest.mark.parametrize("batch", [1, 2])
def test_looking_in_the_last_dense_step_is_looking_in_the_first_sparse_one(batch):
    qkv = [tensors(GRID, batch, heads=3, seed=layer) for layer in range(2)]
    early, late = (Engine("auto", target_error=0.3, dense_steps=n, impl="torch") for n in (2, 0))
    for step in range(3):
        outs = [early(*qkv[layer], Call(layer, step, GRID)) for layer in range(2)]
    assert {r.kind for r in early.stats.records if r.step < 2} == {"dense"}
    assert {x.step for x in layers_of(early).values()} == {1}
    for _ in range(2):
        again = [late(*qkv[layer], Call(layer, 0, GRID)) for layer in range(2)]
        # The first layer chose before the second was known; at its next plan it knows.
        late.state.entries["transformer", 0, "cond"].plan = None
    for layer in range(2):
        assert torch.equal(layers_of(early)[layer].choice, layers_of(late)[layer].choice)
    torch.testing.assert_close(again[1], outs[1])


def test_a_run_that_is_dense_throughout_measures_nothing(monkeypatch):
    monkeypatch.setattr(auto, "trace", None)
    engine = Engine("auto", dense_steps=2, impl="torch")
    for step in range(2):
        engine(*tensors(GRID), Call(0, step, GRID, num_steps=2))


def test_branches_and_layers_with_dense_attention_are_not_measured_together():
    engine = Engine("auto", dense_steps=1, dense_layers="0", impl="torch")
    for branch in ("cond", "uncond"):
        for layer in range(3):
            engine(*tensors(GRID, seed=layer), Call(layer, 0, GRID, branch=branch))
    shared = [engine.state.entries["transformer", 1, b].memory.shared["auto"] for b in ("cond", "uncond")]
    assert shared[0] is not shared[1] and [sorted(x) for x in shared] == [[1, 2], [1, 2]]


def test_layers_learn_together_again_after_the_layout_changed():
    engine = Engine("auto", impl="torch")
    for step, batch in enumerate((2, 1, 2)):
        for layer in range(3):
            engine(*tensors(GRID, batch, seed=layer), Call(layer, step, GRID))
        memories = [engine.state.entries["transformer", layer, "cond"].memory for layer in range(3)]
        assert all(m.shared is memories[0].shared for m in memories)
        assert sorted(memories[0].shared["auto"]) == [0, 1, 2]
        assert {x.weight.shape for x in memories[0].shared["auto"].values()} == {(batch, 2)}
    assert len(engine.state.shared) == 1


def test_the_budget_follows_what_was_reached():
    config, memory, target = AutoConfig(target_error=0.2), Memory(), 0.2

    def reach(step: int, *layers: list[float]) -> list[float]:
        memory.shared["errors"] = {i: Arriving(torch.tensor(x)) for i, x in enumerate(layers)}
        auto._aim(config, Call(0, step, GRID), memory)
        return memory.shared["auto.aim"].target.tolist()

    auto._aim(config, Call(0, 0, GRID), memory)
    assert float(memory.shared["auto.aim"].target) == pytest.approx(target)
    # Root mean square over layers, every row by itself, one step at most 0.5 down and 1.25 up.
    assert reach(1, [0.3, 0.2], [0.1, 0.2]) == pytest.approx([target * 0.2 / 0.05**0.5, target])
    assert reach(1, [9.0, 9.0]) == pytest.approx([target * 0.2 / 0.05**0.5, target])  # once a step
    assert reach(2, [9.0, 0.0]) == pytest.approx([0.5 * target * 0.2 / 0.05**0.5, 1.25 * target])
    before = reach(3, [0.2, 0.2])
    # What is no number says nothing; an infinite error says too much.
    assert reach(4, [torch.nan, torch.inf]) == pytest.approx([before[0], before[1] / 2])
    for step in range(5, 12):
        bound = reach(step, [9.0, 1e-9])
    assert bound == pytest.approx([0.2 * target, 1.25 * target])


def test_budgets_may_be_tables_over_the_run():
    engine = Engine("auto", cost="0:0.7,2:0.2", impl="torch", candidates="topk")
    qkv = tensors(VideoGrid(6, 12, 14), heads=4)
    choices = []
    for step in range(4):
        engine(*qkv, Call(0, step, VideoGrid(6, 12, 14)))
        choices.append(layers_of(engine)[0].choice)
    costs = [float(layers_of(engine)[0].cost.flatten(0, 1).gather(0, c[None]).mean()) for c in choices]
    assert torch.equal(choices[0], choices[1]) and torch.equal(choices[2], choices[3])
    assert costs[2] <= 0.2 < costs[0] <= 0.7


# -- memory and chunks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_centroids_go_on_per_head(batch):
    """Heads with clusters go on from their own centroids, as if semantic ran on them alone; the others keep theirs."""
    config = AutoConfig(target_error=0.3)
    memory, qkv = Memory(), tensors(GRID, batch, heads=3)
    auto.plan(*qkv, Call(0, 0, GRID), config, memory)
    profile = memory.shared["auto"][0]
    # Chosen by hand: some heads semantic, the first candidate, some topk, the second.
    n = len(DENSITIES)
    assert profile.candidates[:2] == ("semantic", "topk")
    profile.choice = torch.tensor([[5, n + 5, 6], [n + 5, 5, n + 6]])[:batch]
    mine = torch.tensor([0, 2, 4][: 2 * batch - (batch == 2)])
    before = {name: value.clone() for name, value in memory.items() if "/" in name}
    assert all(value.shape[1] == 3 * batch for value in before.values())
    later = tensors(GRID, batch, heads=3, seed=5)
    plan = auto.plan(*later, Call(0, 1, GRID), config, memory).validate()
    own = Memory()
    for name, value in before.items():
        if name.startswith("semantic/"):
            own[name.removeprefix("semantic/")] = value[:, mine]
    ranked = semantic.rank(*(split_heads(x, mine) for x in later), Call(0, 1, GRID), CANDIDATES["semantic"].config, own)
    for name, value in before.items():
        key = name.removeprefix("semantic/")
        assert torch.equal(memory[name][:, mine], own[key])
        rest = [h for h in range(3 * batch) if h not in mine.tolist()]
        assert torch.equal(memory[name][:, rest], value[:, rest])
    density = profile.chosen()[1].flatten()[mine]
    assert torch.equal(plan.to_dense().flatten(0, 1)[mine], ranked.at(density[None]).to_dense()[0])


@pytest.mark.parametrize("batch", [1, 2])
def test_heads_in_groups_give_what_all_give_at_once(batch, monkeypatch):
    qkv, results = tensors(GRID, batch, heads=5), []
    for weights in (auto.WEIGHTS, 2 * 64 * GRID.tokens, 1):
        monkeypatch.setattr(auto, "WEIGHTS", weights)
        memory = Memory()
        plan = auto.plan(*qkv, Call(0, 0, GRID), AutoConfig(target_error=0.25), memory)
        results.append((plan, memory))
    (plan, memory), *others = results
    whole = memory.shared["auto"][0]
    for other, found in others:
        part = found.shared["auto"][0]
        for curve in ("error", "recall", "density", "cost", "weight"):
            torch.testing.assert_close(getattr(part, curve), getattr(whole, curve), rtol=1e-4, atol=2e-6)
        assert torch.equal(part.choice, whole.choice) and torch.equal(other.to_dense(), plan.to_dense())
        assert found.keys() == memory.keys()
        for name, value in memory.items():
            torch.testing.assert_close(found[name], value)


# -- edges ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_choose_alike(dtype):
    wide = [x.to(dtype).float() for x in tensors(GRID, heads=4)]
    choices = []
    for qkv in (wide, [x.to(dtype) for x in wide]):
        engine = Engine("auto", target_error=0.3, impl="torch")
        assert engine(*qkv, Call(0, 0, GRID)).dtype == qkv[0].dtype
        choices.append(layers_of(engine)[0].choice)
    # Sums run in another order over another layout, so that a token between two clusters may change sides.
    first, second = choices
    assert int((first - second).abs().max()) <= 1


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("batch", [1, 2])
def test_one_head_and_one_candidate(candidate, batch):
    qkv = tensors(GRID, batch, heads=1)
    plan = dsattn.plan(*qkv, Call(0, 0, GRID), method="auto", candidates=candidate, target_error=0.4).validate()
    assert (plan.batch, plan.heads) == (batch, 1)
    assert dsattn.attend(*qkv, plan, impl="torch").shape == qkv[0].shape


@pytest.mark.parametrize("grid", [VideoGrid(1, 1, 3), VideoGrid(2, 5, 9, text=21, text_first=True, prefix=4)])
def test_all_candidates_on_odd_grids(grid):
    qkv = tensors(grid, 2, heads=3)
    plan = dsattn.plan(*qkv, Call(0, 0, grid), method="auto", candidates=tuple(CANDIDATES), target_error=0.3)
    error, norm = squared_errors(dsattn.attend(*qkv, plan.validate(), impl="torch"), qkv, torch.arange(grid.tokens))
    assert float(error.sum() / norm.sum()) < 0.4**2


def test_a_layer_without_output_disturbs_no_other():
    alone, both = (Engine("auto", target_error=0.3, dense_steps=1, impl="torch") for _ in range(2))
    q, k, v = tensors(GRID, seed=3)
    for step in range(2):
        alone(*tensors(GRID), Call(0, step, GRID))
        both(*tensors(GRID), Call(0, step, GRID))
        out = both(q, k, torch.zeros_like(v), Call(1, step, GRID))
    assert bool((out == 0).all())
    layers = layers_of(both)
    assert torch.equal(layers[1].at_choice("cost"), layers[1].cost.flatten(0, 1).amin(0))
    assert bool((layers[0].at_choice("cost") <= layers_of(alone)[0].at_choice("cost")).all())


# -- profiles on disk -----------------------------------------------------------------------------------------


def test_a_profile_gives_the_choices_it_was_saved_with(tmp_path, monkeypatch):
    # Without monitoring, or budgets would follow the errors of either run.
    options = {"target_error": 0.3, "dense_steps": 1, "impl": "torch", "monitor": 0}
    engine = Engine("auto", **options)
    qkv = [tensors(GRID, heads=3, seed=layer) for layer in range(2)]
    for step in range(2):
        for layer in range(2):
            engine(*qkv[layer], Call(layer, step, GRID, num_steps=4))
    layers = {("transformer", "cond", layer): x for layer, x in layers_of(engine).items()}
    HeadProfile(layers, GRID, 4).save(tmp_path / "p.json")
    monkeypatch.setattr(auto, "trace", None)
    later = Engine("auto", profile=tmp_path / "p.json", **options)
    for step in range(3):
        for layer in range(2):
            out = later(*qkv[layer], Call(layer, step, GRID, num_steps=4))
    assert out.shape == qkv[0][0].shape
    for layer in range(2):
        assert torch.equal(layers_of(later)[layer].choice, layers_of(engine)[layer].choice)
    twice = [torch.cat([x, x]) for x in qkv[0]]
    later(*twice, Call(0, 3, GRID, num_steps=4))
    assert torch.equal(layers_of(later)[0].choice, layers_of(engine)[0].choice.expand(2, -1))
    # A layer that was not measured is named, also when others of the run were.
    later(*qkv[0], Call(0, 3, GRID, num_steps=4))
    with pytest.raises(UsageError, match="no transformer/cond/7; it has transformer/cond/0, transformer/cond/1"):
        later(*qkv[0], Call(7, 3, GRID, num_steps=4))


# -- config ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": "dense"}, "candidates must be different names out of semantic, topk, .*; got 'dense'"),
        ({"candidates": ("topk", "topk")}, "got .'topk', 'topk'"),
        ({"candidates": ()}, r"got \(\)"),
        ({"candidates": None}, "got None"),
        ({"candidates": 3}, "got 3"),
        ({"candidates": [["topk"]]}, "candidates must be"),
        ({"candidates": {"topk": 1}}, "candidates must be"),
        ({"target_error": 0.1, "cost": 0.1}, "give only one of target_error, cost"),
        ({"target_error": 0}, "target_error must be above 0"),
        ({"cost": 1.5}, r"cost must be a number in \[0, 1\], got 1.5"),
        ({"target_error": "0.1"}, "target_error must be a number or a table .*no start:value pair"),
        ({"cost": "0:0.5,3:0"}, "cost must be above 0"),
        ({"rows": 0}, "rows must be an integer"),
        ({"seed": 0.5}, "seed must be an integer"),
        ({"profile": 3}, "profile must be a text, got 3"),
        ({"densty": 3}, "has no option 'densty'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        Engine("auto", **options)


def test_configs_are_values(tmp_path):
    one, two = AutoConfig(candidates=["topk", "radial"]), AutoConfig(candidates=("topk", "radial"))
    assert one == two and hash(one) == hash(two) and one != AutoConfig()
    assert AutoConfig().target_error == 0.06 and AutoConfig(cost=0.2).target_error is None
    assert AutoConfig(profile=tmp_path / "p.json") == AutoConfig(profile=str(tmp_path / "p.json"))
    assert hash(AutoConfig(profile=tmp_path / "p.json")) is not None
    engine = Engine("auto", candidates=["topk", "radial"], profile=tmp_path / "p.json")
    again = Config.from_dict(json.loads(json.dumps(engine.config.to_dict(), default=str)))
    assert Engine(again).method_config == engine.method_config
    assert json.loads(json.dumps(dataclasses.asdict(one)))["candidates"] == ["topk", "radial"]
    assert json.loads(json.dumps(engine.summary(), default=str))["method"] == "auto"


def test_a_profile_serves_where_later_plans_choose_other_heads(tmp_path):
    """Without having observed all heads, a candidate starts anew for heads it has not had."""
    first = Engine("auto", target_error=0.3, impl="torch")
    qkv = tensors(GRID, heads=3)
    first(*qkv, Call(0, 0, GRID))
    profile = HeadProfile({("transformer", "cond", 0): layers_of(first)[0]}, GRID)
    profile.save(tmp_path / "p.json")
    config, memory, n = AutoConfig(target_error=0.3, profile=tmp_path / "p.json"), Memory(), len(DENSITIES)
    auto.plan(*qkv, Call(0, 0, GRID), config, memory)
    found = memory.shared["auto"][0]
    for step, choice in enumerate(([5, n + 5, n + 5], [n + 5, 5, 5], [n + 5, n + 5, 5], [5, 5, 5]), 1):
        memory.shared["auto.aim"].step = step
        found.choice = torch.tensor([choice])
        plan = auto.plan(*qkv, Call(0, step, GRID), config, memory).validate()
        fresh = Memory({"auto": {0: found}, "auto.aim": memory.shared["auto.aim"]})
        want = auto.plan(*qkv, Call(0, step, GRID), config, fresh)
        assert torch.equal(plan.to_dense(), want.to_dense())
