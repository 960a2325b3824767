"""temporal: what verdicts may drop, when they hold, what they cost."""

import pytest
import torch

import dsattn
from dsattn import Call, Engine, VideoGrid
from dsattn.errors import ImplUnavailableError, UsageError
from dsattn.methods.temporal import BITS, TemporalConfig, own_frame_first

from .method_inputs import GRIDS, dense
from .temporal_runs import GRID, SMALL, bits, density, engine, error, local

# -- limits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_threshold_minus_infinity_is_dense(grid, impl):
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    qkv = [x.to(device) for x in local(grid, batch=2)]
    run = engine(threshold=float("-inf"), impl=impl, block_q=64, block_k=32)
    for step in range(3):
        torch.testing.assert_close(run(*qkv, Call(0, step, grid)), dense(qkv), rtol=1e-4, atol=1e-5)
    assert density(run) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_threshold_infinity_leaves_the_first_tile_and_must_keeps(grid):
    qkv = local(grid)
    run = engine(threshold=float("inf"), **SMALL)
    for step in range(2):
        run(*qkv, Call(0, step, grid))
    blocks = -(-grid.tokens // 16)
    want = torch.zeros(blocks, blocks, dtype=torch.bool)
    want.scatter_(1, own_frame_first(grid, 16, 16, torch.device("cpu"))[:, :1].long(), True)
    for start, stop in grid.exact_segments:
        want[start // 16 : -(-stop // 16)] = True
        want[:, start // 16 : -(-stop // 16)] = True
    assert bool(want.diagonal().all())
    got = bits(run)
    assert torch.equal(got, want.expand_as(got))
    pairs = want.double() @ torch.tensor([min(16, grid.tokens - 16 * j) for j in range(blocks)]).double()
    share = float(pairs @ torch.tensor([min(16, grid.tokens - 16 * i) for i in range(blocks)]).double())
    assert density(run) == pytest.approx([1.0, share / grid.tokens**2])


# -- steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("traversal", ["own_frame", "ascending", "alternate"])
@pytest.mark.parametrize("refresh", [1, 9])
def test_bits_only_go_from_step_to_step(traversal, refresh):
    """Whatever the values do, refreshed or reused, and whatever the direction."""
    run = engine(threshold=-4, traversal=traversal, refresh=refresh)
    before = None
    for step in range(5):
        run(*local(seed=step, places=step), Call(0, step, GRID))
        now = bits(run)
        assert before is None or not bool((now & ~before).any())
        before = now
    shares = density(run)
    assert shares[0] == 1.0 and shares[1] < 0.9 and shares == sorted(shares, reverse=True)


def test_verdicts_hold_from_the_next_step_on():
    """The judging call itself computes everything it was going to."""
    run, qkv = engine(threshold=-3), local()
    assert error(run(*qkv, Call(0, 0, GRID)), qkv) < 1e-5
    assert 1e-3 < error(run(*qkv, Call(0, 1, GRID)), qkv) < 0.2


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
def test_identical_inputs_drop_nothing_more(impl):
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    grid = VideoGrid(5, 6, 8, text=7)
    run, qkv = engine(threshold=-2.5, impl=impl), [x.to(device) for x in local(grid)]
    outs = [run(*qkv, Call(0, step, grid)) for step in range(4)]
    assert density(run)[1] == density(run)[2] == density(run)[3] < 0.9
    assert torch.equal(outs[1], outs[2]) and torch.equal(outs[1], outs[3])


def test_implementations_drop_the_same_tiles():
    grid = VideoGrid(4, 6, 9, text=11, text_first=True)
    kept = {}
    for impl in ("reference", "torch"):
        run = engine(threshold=-4, impl=impl, **SMALL)
        for step in range(3):
            run(*local(grid, batch=2, seed=step), Call(0, step, grid))
        kept[impl] = bits(run)
    assert torch.equal(kept["reference"], kept["torch"]) and not bool(kept["torch"].all())


def test_revisit_computes_all_tiles_again():
    """Every three steps, also where the step it was due at is left out; what was dropped wrongly comes back."""
    run = engine(threshold=-4, revisit=3)
    for step in (0, 1, 2, 4, 5, 6, 7):
        run(*local(places=step >= 4), Call(0, step, GRID))
    shares = density(run)
    full = [share == 1.0 for share in shares]
    assert full == [True, False, False, True, False, False, True]
    alone = engine(threshold=-4)
    for step in (4, 5):
        alone(*local(places=1), Call(0, step, GRID))
    assert shares[4] == density(alone)[1]


def test_thresholds_per_step_layer_and_head():
    run = engine(threshold={0: [-20, -3], 1: [[-3, float("-inf")]], 2: -3}, refresh=9)
    qkv = local()
    for step in range(4):
        for layer in range(4):
            run(*qkv, Call(layer, step, GRID))
    shares = {(r.layer, r.step): r.density for r in run.stats.records}
    # Layer 0 is strict at step 0: it drops from step 2 on. Layers that are not named use -10.
    assert float(shares[0, 1].min()) == 1.0 and float(shares[0, 2].max()) < 0.9
    assert float(shares[1, 1][0]) < 0.9 and float(shares[1, 1][1]) == 1.0
    assert torch.equal(shares[2, 1], shares[0, 2])
    plain = engine()
    for step in range(2):
        plain(*qkv, Call(3, step, GRID))
    assert torch.equal(shares[3, 1], plain.stats.records[-1].density)
    # Sharded heads take their part of the list.
    shard = engine(threshold=[[-3, float("-inf")]])
    for step in range(2):
        shard(*(x[:, :, 1:] for x in qkv), Call(1, step, GRID, first_head=1))
    assert float(shard.stats.records[-1].density) == 1.0


# -- state --------------------------------------------------------------------------------------------------


def test_batch_rows_are_independent():
    one, two = local(seed=1, places=1), local(seed=2, places=2)
    both, alone = engine(threshold=-4), engine(threshold=-4)
    for step in range(3):
        out = both(*(torch.cat(pair) for pair in zip(one, two, strict=True)), Call(0, step, GRID))
        torch.testing.assert_close(out[1:], alone(*two, Call(0, step, GRID)))
    assert torch.equal(bits(both)[1:], bits(alone)) and not torch.equal(bits(both)[:1], bits(alone))


def test_branches_layers_and_models_are_isolated():
    alone, mixed = engine(threshold=-4), engine(threshold=-4)
    for step in range(3):
        want = alone(*local(seed=step), Call(0, step, GRID))
        mixed(*local(seed=50 + step, places=1), Call(0, step, GRID, branch="uncond"))
        mixed(*local(seed=60 + step, places=2), Call(1, step, GRID))
        mixed(*local(seed=70 + step, places=3), Call(0, step, GRID, model="transformer_2"))
        assert torch.equal(mixed(*local(seed=step), Call(0, step, GRID)), want)
    assert torch.equal(bits(alone), bits(mixed)) and not torch.equal(bits(mixed), bits(mixed, branch="uncond"))


def test_a_new_run_starts_with_everything():
    run = engine(threshold=-4)
    runs = [[run(*local(seed=step), Call(0, step, GRID)) for step in range(3)] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert density(run)[0] == 1.0


@pytest.mark.parametrize("other", ["grid", "batch", "dtype"])
def test_a_changed_layout_starts_with_everything(other):
    run = engine(threshold=-4, refresh=9)
    for step in range(2):
        run(*local(), Call(0, step, GRID))
    grid = VideoGrid(9, 16, 8, text=13) if other == "grid" else GRID
    qkv = local(grid, batch=2 if other == "batch" else 1)
    run(*(x.double() if other == "dtype" else x for x in qkv), Call(0, 2, grid))
    assert density(run)[1] < 1.0 and density(run)[2] == 1.0


def test_memory_is_one_bit_per_tile():
    grid = VideoGrid(16, 16, 16)  # 4,096 tokens: 256 × 256 tiles of 16
    run = engine(threshold=-4, refresh=9, order="raster", **SMALL)
    qkv = local(grid)
    run(*qkv, Call(0, 0, grid))
    memory = run.state.entries["transformer", 0, "cond"].memory
    tiles = 2 * 256 * 256
    assert memory[BITS].untyped_storage().nbytes() == tiles // 8
    # Beside them: a mark per block row and column, and a step.
    assert sum(x.untyped_storage().nbytes() for x in memory.values()) == tiles // 8 + 4 * 256 + 256 // 8 + 8
    run(*qkv, Call(0, 1, grid))
    assert memory[BITS].untyped_storage().nbytes() == tiles // 8


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.exact_segments], ids=str)
@pytest.mark.parametrize("base", [name for name in dsattn.METHODS if name != "temporal"])
def test_text_and_prefix_are_never_lost(grid, base):
    """As rows and as columns, whatever the threshold and the base's blocks."""
    run = engine(threshold=float("inf"), base=base)
    for step in range(3):
        run(*local(grid, seed=step), Call(0, step, grid))
    shrunk = before(run, Call(0, 3, grid))
    pairs = shrunk.validate().to_dense()
    for start, stop in grid.exact_segments:
        assert bool(pairs[:, :, start:stop].all()) and bool(pairs[..., start:stop].all())


def before(run: Engine, call: Call) -> dsattn.BlockPlan:
    """The plan that a call would compute."""
    entry = run.state.entries[call.model, call.layer, call.branch]
    return run.method.before(entry.plan, call, run.method_config, entry.memory)[0]


# -- composition --------------------------------------------------------------------------------------------

BASES = [
    ("topk", {"density": 0.5, "tail": "none"}),
    ("topk", {"density": 0.5, "block_q": 32, "block_k": 16, "order": "hilbert"}),
    ("radial", {"block": 32}),
    ("spatial_temporal", {"density": 0.5, "block": 32}),
    ("semantic", {"density": 0.5}),
    ("sparse_linear", {"critical": 0.5}),
    ("auto", {"target_error": 0.1}),
]


@pytest.mark.parametrize(("base", "options"), BASES)
def test_verdicts_shrink_the_plan_of_any_method(base, options):
    """The first call computes the base's plan; later ones a part of it, the tail taking what is dropped."""
    qkv = local()
    run = engine(base=base, base_options=options, threshold=-2, refresh=9)
    plan = dsattn.plan(*qkv, Call(0, 0, GRID), method=base, **options)
    want = dsattn.attend(*qkv, plan, impl="torch")
    torch.testing.assert_close(run(*qkv, Call(0, 0, GRID)), want, rtol=1e-4, atol=1e-5)
    run(*qkv, Call(0, 1, GRID))
    shrunk = before(run, Call(0, 2, GRID)).validate()
    assert shrunk.tail == plan.tail
    assert not bool((shrunk.to_dense() & ~plan.to_dense()).any())
    assert 0 < float(shrunk.density.mean()) < float(plan.density.mean())


def test_the_base_sees_the_last_dense_step():
    """auto measures its candidates there, through temporal as alone."""
    run, alone = engine(base="auto", threshold=-2, dense_steps=1), Engine("auto", dense_steps=1, impl="torch")
    for step in range(2):
        qkv = local(places=step)
        out, want = (e(*qkv, Call(0, step, GRID)) for e in (run, alone))
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(run.stats.records[1].density, alone.stats.records[1].density)


def test_tiles_that_the_base_left_out_are_not_judged():
    """topk chooses other tiles at every step: those it did not choose have no verdict."""
    run = engine(base="topk", base_options={"density": 0.3, "tail": "none"}, threshold=-4)
    run(*local(), Call(0, 0, GRID))
    first = dsattn.plan(*local(), Call(0, 0, GRID), method="topk", density=0.3, tail="none").block_mask
    assert bool((bits(run) | first).all()) and not bool(bits(run).all())


def test_a_row_whose_tiles_were_all_dropped_keeps_its_own_block():
    grid = VideoGrid(4, 8, 8)
    run = engine(base="topk", base_options={"density": 0.3, "tail": "none", "block_q": 16, "block_k": 16})
    run(*local(grid), Call(0, 0, grid))
    entry = run.state.entries["transformer", 0, "cond"]
    entry.memory[BITS] = torch.zeros_like(entry.memory[BITS])
    shrunk = before(run, Call(0, 1, grid)).validate()
    assert torch.equal(shrunk.block_mask, torch.eye(16, dtype=torch.bool).expand(1, 2, -1, -1))


def test_verdicts_die_with_the_blocks_they_were_about():
    """New clusters hold other tokens; the fixed blocks of topk hold the same ones."""
    for base, refresh, kept in (("semantic", 1, False), ("semantic", 9, True), ("topk", 1, True)):
        run = engine(base=base, base_options={"density": 0.5}, threshold=-2, refresh=refresh)
        run(*local(seed=0), Call(0, 0, GRID))
        judged = bits(run)
        call = Call(0, 1, GRID)
        if refresh == 1:
            entry = run.state.entries["transformer", 0, "cond"]
            run.method.plan(*local(seed=1), call, run.method_config, entry.memory)
        assert not bool(judged.all())
        assert torch.equal(bits(run), judged) if kept else bool(bits(run).all()), base


def test_heads_whose_order_stays_keep_their_verdicts():
    """spatial_temporal may move one head to the other class: the other head's verdicts stay."""
    run = engine(base="spatial_temporal", base_options={"density": 0.5, "block": 32}, threshold=-2)
    run(*local(), Call(0, 0, GRID))
    memory = run.state.entries["transformer", 0, "cond"].memory
    memory[BITS] = torch.zeros_like(memory[BITS])
    memory["temporal.k_order"] = memory["temporal.k_order"].clone()
    memory["temporal.k_order"][0, 1] = torch.arange(GRID.tokens).flip(0)
    run.method.plan(*local(), Call(0, 1, GRID), run.method_config, memory)
    assert bool((memory[BITS][0, 0] == 0).all()) and bool((memory[BITS][0, 1] == -1).all())


@pytest.mark.parametrize(("first", "then"), [("topk", "semantic"), ("semantic", "topk"), ("radial", "topk")])
def test_blocks_of_another_kind_start_with_everything(first, then):
    """A base may go from fixed blocks to clusters and back, as auto may, or get an order."""
    options = {"density": 0.3} if first == "semantic" else {}
    run = engine(base=first, threshold=-1, base_options=options)
    run(*local(), Call(0, 0, GRID))
    memory = run.state.entries["transformer", 0, "cond"].memory
    assert not bool((memory[BITS] == -1).all())
    call, config = Call(0, 1, GRID), TemporalConfig(base=then, threshold=-1)
    plan = run.method.plan(*local(), call, config, memory)
    base = dsattn.plan(*local(), call, method=then)
    shrunk, _ = run.method.before(plan, call, config, memory)
    assert bool((memory[BITS] == -1).all()) and torch.equal(shrunk.validate().counts, base.counts.expand(1, 2, -1))


def test_dropped_tiles_can_enter_pooled():
    qkv = local()
    errors = {}
    for tail in ("none", "pooled"):
        run = engine(threshold=-1, tail=tail)
        for step in range(2):
            out = run(*qkv, Call(0, step, GRID))
        errors[tail] = error(out, qkv)
    assert errors["pooled"] < errors["none"]


def test_pv_skip_through_the_engine():
    run, qkv = engine(threshold=-30, pv_skip=5.0), local()
    out = run(*qkv, Call(0, 0, GRID))
    assert 1e-6 < error(out, qkv) < 0.1


def test_padded_keys_never_enter():
    grid = VideoGrid(5, 8, 16, text=40)
    q, k, v = local(grid, batch=2)
    lengths = torch.tensor([grid.tokens - 25, grid.tokens])
    noisy_k, noisy_v = k.clone(), v.clone()
    noisy_k[0, -25:], noisy_v[0, -25:] = 50.0, 1e4
    runs = [engine(threshold=-3, **SMALL) for _ in range(2)]
    for step in range(3):
        a = runs[0](q, k, v, Call(0, step, grid), key_lengths=lengths)
        b = runs[1](q, noisy_k, noisy_v, Call(0, step, grid), key_lengths=lengths)
        assert torch.equal(a, b)
    assert torch.equal(bits(runs[0]), bits(runs[1])) and density(runs[0])[-1] < 0.9


# -- order of the visit -------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [*GRIDS, VideoGrid(7, 4, 8, prefix=21, text=9)], ids=str)
@pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (64, 32)])
def test_own_frame_comes_first(grid, block_q, block_k):
    order = own_frame_first(grid, block_q, block_k, torch.device("cpu"))
    assert torch.equal(order.sort(-1).values, torch.arange(order.shape[1]).expand_as(order).int())

    def frames(block: int, size: int) -> set[int]:
        tokens = range(block * size, min((block + 1) * size, grid.tokens))
        return {(t - grid.video_start) // grid.frame_tokens for t in tokens if grid.video_start <= t < grid.video_end}

    for i, row in enumerate(order.tolist()):
        own = frames(i, block_q)
        if own:
            apart = [min(abs(a - b) for a in own for b in f) if (f := frames(j, block_k)) else 0 for j in row]
            assert apart == sorted(apart)
            first = [min(i * block_q, row[0] * block_k), max(i * block_q + block_q, row[0] * block_k + block_k)]
            assert first[1] - first[0] <= block_q + block_k


@pytest.mark.parametrize("strength", [3.0, 4.0])
def test_own_frame_first_drops_more_than_ascending(strength):
    """At an equal threshold, and at an equal error."""
    qkv = local(strength=strength)
    for options in ({"threshold": -6}, {"target_error": 0.05, "sample_blocks": 8}):
        shares, errors = {}, {}
        for traversal in ("own_frame", "ascending"):
            run = engine(traversal=traversal, refresh=9, **options)
            for step in range(2):
                out = run(*qkv, Call(0, step, GRID))
            shares[traversal], errors[traversal] = density(run)[1], error(out, qkv)
        assert shares["own_frame"] < 0.85 * shares["ascending"], (options, shares)
        assert max(errors.values()) < 0.06


def test_alternating_directions_end_between():
    """Both directions drop: after two calls at least as much as one direction alone."""
    qkv, shares = local(), {}
    for traversal in ("ascending", "alternate"):
        run = engine(traversal=traversal, threshold=-6, refresh=9)
        for step in range(3):
            run(*qkv, Call(0, step, GRID))
        shares[traversal] = density(run)
    assert shares["alternate"][1] == shares["ascending"][1]
    assert shares["alternate"][2] < 0.9 * shares["ascending"][2]


# -- options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -3, "target_error": 0.1}, "give only one of threshold, target_error"),
        ({"threshold": "low"}, "threshold must be a number, got 'low'"),
        ({"threshold": [-3, [-1, None]]}, "threshold must be a number, got None"),
        ({"threshold": []}, r"threshold must be a number, got \[\]"),
        ({"threshold": {"first": -3}}, r"threshold as a mapping must name layers by number, got \['first'\]"),
        ({"threshold": {1: "low"}}, "threshold must be a number, got 'low'"),
        ({"threshold": {1: {2: -3}}}, "threshold must be a number, got {2: -3}"),
        ({"target_error": 0}, "target_error must be above 0, got 0"),
        ({"base": "temporal"}, "base must be one of dense, radial, .*; got 'temporal'"),
        ({"base": "topk", "base_options": {"densty": 1}}, "base method 'topk' has no option 'densty'"),
        ({"base": "topk", "block_q": 32}, "block_q is for base 'dense', got block_q=32; give it in base_options"),
        ({"order": "hilbert"}, "order must be one of raster, tile; got 'hilbert'"),
        ({"revisit": -1}, "revisit must be an integer"),
        ({"pv_skip": -1}, "pv_skip must be a number"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        Engine("temporal", **options)


def test_a_list_over_too_few_heads_is_refused():
    with pytest.raises(UsageError, match="threshold lists 1 heads at layer 0, step 0; expected 2"):
        engine(threshold=[[-3]])(*local(), Call(0, 0, GRID))


def test_options_survive_yaml_and_dicts():
    config = TemporalConfig(threshold={"2": [-3, [-1, -2]]})
    assert config.threshold == {2: (-3, (-1, -2))} == TemporalConfig(threshold=config.threshold).threshold
    assert TemporalConfig().threshold == -10.0 and TemporalConfig(target_error=0.1).threshold is None


def test_flex_is_refused_before_any_work():
    run = engine(impl="flex")
    with pytest.raises(ImplUnavailableError, match="flex gives no verdicts on tiles"):
        run(*local(), Call(0, 0, GRID))
    assert run.stats.records == []
    auto = engine(impl="auto")
    auto(*local(), Call(0, 0, GRID))
    assert auto.stats.records[0].impl in ("torch", "triton")
