"""What holds for every method in every variant: plans are valid and mean what is computed, state stays where it is."""

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dsattn
from dsattn import BlockPlan, Call, Engine, VideoGrid

from .method_inputs import GRIDS, dense
from .method_variants import (
    VARIANTS,
    Variant,
    allowed,
    assert_meaning,
    plan_of,
    swapped,
)
from .temporal_runs import local

GRID = VideoGrid(4, 9, 11, text=13)
STEPS = 3


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """File of projections for layers 0 and 1, rows of sum about one."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(2):
        tensors[f"layers.{layer}.weight"] = torch.randn(32, 32, generator=generator) / 32
        tensors[f"layers.{layer}.bias"] = torch.randn(32, generator=generator) / 4
    path = tmp_path_factory.mktemp("weights") / "projections.safetensors"
    save_file(tensors, path)
    return str(path)


@pytest.fixture(params=VARIANTS, ids=str)
def variant(request, weights) -> Variant:
    return request.param.with_weights(weights)


def only(choose) -> pytest.MarkDecorator:
    """Runs a test for some of the variants."""
    return pytest.mark.parametrize("variant", list(filter(choose, VARIANTS)), ids=str, indirect=True)


@pytest.fixture
def plans(monkeypatch) -> list[BlockPlan]:
    """The plans that engines attend with, in the order of the calls."""
    seen: list[BlockPlan] = []
    attend = dsattn.engine.attend

    def record(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, **options):
        seen.append(plan)
        return attend(q, k, v, plan, **options)

    monkeypatch.setattr(dsattn.engine, "attend", record)
    return seen


def call(step: int, grid: VideoGrid = GRID, **more) -> Call:
    return Call(**{"layer": 0, "step": step, "grid": grid, "num_steps": STEPS, **more})


def inputs(step: int = 0, grid: VideoGrid = GRID, batch: int = 1, seed: int = 0, strength: float = 3.0) -> list[Tensor]:
    """q, k, v of one step: rows and heads differ, later steps look at the same places with other noise."""
    rows = [local(grid, seed=seed + 10 * step + b, places=seed + b, strength=strength) for b in range(batch)]
    return [torch.cat(x) for x in zip(*rows, strict=True)]


def run(engine: Engine, steps=range(STEPS), grid: VideoGrid = GRID, batch: int = 1, **more) -> list[Tensor]:
    return [engine(*inputs(step, grid, batch), call(step, grid, **more)) for step in steps]


def row(qkv: list[Tensor], b: int) -> list[Tensor]:
    return [x[b : b + 1] for x in qkv]


# -- meaning ------------------------------------------------------------------------------------------------


@only(lambda variant: variant.method != "dense")  # engines run that without a plan
@pytest.mark.parametrize("grid", [*GRIDS[1:], VideoGrid(1, 13, 5)], ids=str)
def test_outputs_are_what_valid_plans_mean(variant, grid, plans):
    """With text in front and behind, a prefix, padded text; the exact segments stay so as rows and columns."""
    engine = variant.engine(refresh=2)
    for step in range(2):
        qkv, lengths = inputs(step, grid, batch=1 + (grid == GRIDS[1])), None
        if grid == GRIDS[1]:
            lengths = torch.tensor([grid.tokens - 7, grid.tokens])
            for x in qkv[1:]:
                x[0, -7:] *= 30
        out = engine(*qkv, call(step, grid), key_lengths=lengths)
        made = plans[-1].validate()
        assert_meaning(out, qkv, made, lengths)
        pairs = made.to_dense()
        if lengths is not None:
            pairs = pairs | (torch.arange(grid.tokens) >= lengths[:, None])[:, None, None]
        for start, stop in grid.exact_segments:
            assert bool(pairs[:, :, start:stop].all()) and bool(pairs[..., start:stop].all())


@only(lambda variant: variant.everything is not None)
def test_everything_kept_is_dense_attention(variant):
    for grid in (GRID, GRIDS[4]):
        engine = variant.engine(**variant.everything)
        for step in range(2):
            qkv = inputs(step, grid)
            error = float((engine(*qkv, call(step, grid)) - dense(qkv)).abs().max())
            assert error <= allowed(*qkv)


@pytest.mark.parametrize("compat", ["corrected", "original"])
def test_radial_keeps_two_frames_whole(compat):
    grid = VideoGrid(2, 9, 11, text=13)
    made = dsattn.plan(*inputs(0, grid), call(0, grid), method="radial", block=32, compat=compat, decay=0.01)
    assert bool(made.to_dense().all())


# -- independence -------------------------------------------------------------------------------------------


def test_two_batch_rows_are_two_batches_of_one(variant, plans):
    both = run(variant.engine(refresh=2, dense_steps=1), batch=2)
    joint = [made.to_dense() for made in plans]
    for b in range(2):
        plans.clear()
        alone = variant.engine(refresh=2, dense_steps=1)
        for step in range(STEPS):
            qkv = row(inputs(step, batch=2), b)
            error = float((alone(*qkv, call(step)) - both[step][b : b + 1]).abs().max())
            assert error <= allowed(*qkv), f"row {b}, step {step}"
        for made, want in zip(plans, joint, strict=True):
            assert torch.equal(made.to_dense(), want[b : b + 1])


def test_planning_two_batch_rows_is_planning_each(variant):
    qkv = inputs(batch=2)
    both = plan_of(variant, qkv, call(1)).to_dense()
    for b in range(2):
        assert torch.equal(plan_of(variant, row(qkv, b), call(1)).to_dense(), both[b : b + 1])


@only(lambda variant: not variant.noisy)  # noise is drawn by the number of the head
def test_heads_in_another_order_give_the_same_in_that_order(variant):
    one, other = variant.engine(refresh=2), variant.engine(refresh=2)
    for step in range(STEPS):
        qkv = inputs(step)
        out, flipped = one(*qkv, call(step)), other(*(x.flip(2) for x in qkv), call(step))
        error = float((out - flipped.flip(2)).abs().max())
        assert error <= allowed(*qkv), f"step {step}"


@only(lambda variant: not variant.joint)
def test_heads_do_not_see_each_other(variant):
    one, other = variant.engine(refresh=2), variant.engine(refresh=2)
    for step in range(STEPS):
        qkv, changed = inputs(step), inputs(step, seed=5)
        mixed = [torch.cat([x[:, :, :1], y[:, :, 1:]], 2) for x, y in zip(qkv, changed, strict=True)]
        a, b = one(*qkv, call(step)), other(*mixed, call(step))
        assert float((a - b)[:, :, 0].abs().max()) <= allowed(*qkv), f"step {step}"
        assert not torch.allclose(a[:, :, 1], b[:, :, 1])


@only(lambda variant: not variant.joint)
def test_a_process_with_some_of_the_heads_does_what_one_with_all_does(variant):
    whole, shard = variant.engine(refresh=2), variant.engine(refresh=2)
    for step in range(STEPS):
        qkv = inputs(step)
        out = shard(*(x[:, :, 1:] for x in qkv), call(step, first_head=1))
        assert float((out - whole(*qkv, call(step))[:, :, 1:]).abs().max()) <= allowed(*qkv), f"step {step}"


# -- state --------------------------------------------------------------------------------------------------


def test_runs_repeat_and_branches_layers_and_models_do_not_meet(variant):
    engine = variant.engine(refresh=2, dense_steps=1)
    first = run(engine)
    second = []
    for step in range(STEPS):
        engine(*inputs(step, seed=7), call(step, branch="uncond"))
        engine(*inputs(step, seed=8), call(step, model="transformer_2"))
        second += run(engine, [step])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_changed_layout_in_the_middle_of_a_run_is_a_fresh_start(variant):
    """Grid, batch, dtype: from then on all layers do what those of a new engine do."""
    engine = variant.engine(refresh=2)

    def steps(engine: Engine, start: int, change: str) -> list[Tensor]:
        outs = []
        for step in (start, start + 1):
            for layer in range(2):
                grid = swapped(GRID) if change == "grid" else GRID
                # Layers that need unlike densities, where they share a budget.
                qkv = inputs(step, grid, 2 if change == "batch" else 1, seed=3 * layer, strength=2.0 + 4 * layer)
                qkv = [x.double() if change == "dtype" else x for x in qkv]
                outs.append(engine(*qkv, call(step, grid, layer=layer, num_steps=8)))
        return outs

    for start, change in ((0, ""), (2, "grid"), (4, "batch"), (6, "dtype")):
        found, want = steps(engine, start, change), steps(variant.engine(refresh=2), start, change)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True)), change


def test_a_run_that_broke_off_leaves_nothing_to_the_next(variant, monkeypatch):
    engine = variant.engine(refresh=9)
    want = run(variant.engine(refresh=9))
    run(engine, range(2), batch=1)

    def broken(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dsattn.engine, "attend", broken)
        engine(*inputs(2, seed=9), call(2), dense=broken)
    assert all(torch.equal(a, b) for a, b in zip(run(engine), want, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@only(lambda variant: variant.method in ("semantic", "temporal", "auto"))
def test_another_device_is_a_fresh_start(variant):
    engine, fresh = variant.engine(refresh=9), variant.engine(refresh=9)
    run(engine, range(2))
    for step in range(2, 4):
        qkv = [x.cuda() for x in inputs(step)]
        assert torch.equal(engine(*qkv, call(step)), fresh(*qkv, call(step)))


# -- inputs -------------------------------------------------------------------------------------------------


def test_any_strides(variant):
    qkv = inputs()
    made = plan_of(variant, qkv, call(1))
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    packed = torch.cat(qkv, 2).split(2, 2)
    gaps = [torch.stack([x, x + 1], -1).flatten(3)[..., ::2] for x in qkv]
    for strided in (heads_first, packed, gaps):
        assert all(torch.equal(a, b) and not a.is_contiguous() for a, b in zip(strided, qkv, strict=True))
        again = plan_of(variant, strided, call(1))
        assert torch.equal(again.to_dense(), made.to_dense())
        out = dsattn.attend(*strided, again, impl="torch")
        assert float((out - dsattn.attend(*qkv, again, impl="torch")).abs().max()) <= allowed(*qkv)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_plans_as_its_values_in_fp32_do(variant, dtype, plans):
    engines = variant.engine(refresh=2), variant.engine(refresh=2)
    for step in range(2):
        half = [x.to(dtype) for x in inputs(step)]
        single = [x.float() for x in half]
        out, want = engines[0](*half, call(step)), engines[1](*single, call(step))
        assert out.dtype == dtype
        if variant.half is None:
            if plans:
                assert torch.equal(plans[-2].to_dense(), plans[-1].to_dense())
            assert float((out - want).abs().max()) <= allowed(*single, dtype)
        else:
            exact = dense(single)
            errors = [float((x - exact).norm() / exact.norm()) for x in (out, want)]
            assert errors[0] <= 1.2 * errors[1] + torch.finfo(dtype).eps


# -- memory -------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements that any new tensor holds; views hold none of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.where = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in old:
                elements = x.untyped_storage().nbytes() // x.element_size()
                if elements > self.elements:
                    self.elements, self.where = elements, str(func)
        return out


LARGE = VideoGrid(7, 20, 21, text=60)  # 3,000 tokens


def most_elements(variant: Variant, grid: VideoGrid, heads: int, dim: int) -> int:
    """What the largest tensor of planning may hold, batch of one: bounds by what each method says it looks at."""
    options = {**variant.options, **variant.options.get("base_options", {})}
    methods = {variant.method, options.get("base"), *options.get("candidates", ())}
    per_token = 2 * dim  # keys beside their values, once
    if "spatial_temporal" in methods or "auto" in methods or variant.method == "semantic":
        per_token = max(per_token, options.get("rows", 64))  # logits of the sampled rows
    if "auto" in methods:
        # Their weights, with every block padded to whole tiles.
        per_token = 2 * options.get("rows", 64)
    if variant.method == "temporal" and "target_error" in variant.options:
        per_token = max(per_token, 2 * options["block_q"] + 2)
    # Block pairs, or with sub-blocks pairs of quarters, rounded up to whole blocks.
    parts = 4 if options.get("scorer") == "subblock" else 1
    pairs = 1
    for name in ("block_q", "block_k"):
        block = options.get(name, options.get("block", 64))
        pairs *= -(-grid.tokens // block) * parts
    return heads * max(per_token * grid.tokens, pairs)


def test_planning_holds_nothing_of_the_size_of_all_pairs(variant, monkeypatch):
    """Also where k-means and cluster errors run in chunks: those of one query cluster are the smallest."""
    monkeypatch.setitem(dsattn.kernels.kmeans.SCORES, "cpu", 1 << 16)
    monkeypatch.setitem(dsattn.kernels.cluster_errors.CHUNK_ELEMENTS, "cpu", 1 << 16)
    monkeypatch.setattr(dsattn.kernels.block_mass, "LOGITS", 1 << 16)
    qkv = inputs(0, LARGE)
    with Largest() as seen:
        plan_of(variant, qkv, call(1, LARGE))
    limit = most_elements(variant, LARGE, heads=2, dim=32)
    assert limit < 2 * LARGE.tokens**2 / 12
    assert 0 < seen.elements <= limit, f"{seen.where} made {seen.elements} elements, {limit} are allowed"


@only(lambda variant: variant.method != "dense")
def test_what_is_kept_between_steps_is_bounded(variant):
    """Lists, one bit per tile, orders and centroids: not the tokens, which would be 4 D bytes each."""
    engine = variant.engine(refresh=2)
    for step in range(2):
        engine(*inputs(step, LARGE), call(step, LARGE))
    (entry,) = engine.state.entries.values()
    made, heads, dim = entry.plan, 2, 32
    tiles = made.num_q_blocks * made.num_k_blocks
    # 4 bytes per listed block, a byte for the block map and one for that of a linear branch, bits.
    lists = tiles * 6 + 3 * made.num_q_blocks * (made.num_k_blocks // 32 + 1) * 4
    # Two orders and their blocks, and weights in the pools.
    orders = (3 * 8 + 4) * LARGE.tokens
    edges = 8 * 8 * (made.num_q_blocks + made.num_k_blocks)
    clusters = {"semantic", "auto"} & {variant.method, variant.options.get("base")}
    automatic = LARGE.tokens // 30 + LARGE.tokens // 36 if "auto" in clusters else 12 + 20
    centroids = automatic * 2 * dim * 4 if clusters else 0
    projection = 0 if made.linear is None else 4 * (dim * dim + dim)
    assert heads * 4 * dim * LARGE.tokens > heads * orders
    assert 0 < engine.state.plan_bytes <= heads * (lists + orders + edges + centroids) + projection + 64
