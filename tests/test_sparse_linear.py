"""sparse_linear: classes of blocks, the linear branch in three scopes, plans and reuse."""

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor

import dsattn
from dsattn.block_plan import BlockPlan, LinearTail
from dsattn.grid import Call, VideoGrid
from dsattn.kernels import sparse_linear as kernels
from dsattn.methods.estimate import RowSample, relative_error, sample_rows
from dsattn.methods.sparse_linear import SparseLinearConfig, classify

from .method_inputs import GRIDS, dense, tensors
from .sparse_linear_parts import (
    CALL,
    DEVICE,
    GRID,
    MAPS,
    SCOPES,
    check,
    classes,
    linear_pairs,
    oracle,
    plan,
    projection,
    write_weights,
)


@pytest.fixture
def weights(tmp_path):
    """Writes a weights file and returns its path."""
    return partial(write_weights, tmp_path)


# -- classes of blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [(64, 64), (16, 32), (128, 16)])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_classes_against_a_loop(grid, blocks):
    q, k, _ = tensors(grid, batch=2)
    config = SparseLinearConfig(critical=0.3, negligible=0.4, block_q=blocks[0], block_k=blocks[1])
    made = plan((q, k, k), Call(0, 0, grid), **dataclasses.asdict(config))
    critical, marginal = classes(q, k, grid, 0.3, 0.4, *blocks)
    assert torch.equal(made.to_dense(), critical)
    found = classify(q, k, Call(0, 0, grid), config)
    for got, want in zip(found, (critical, marginal), strict=True):
        assert torch.equal(dataclasses.replace(made, counts=got.sum(-1).int(), indices=lists(got)).to_dense(), want)


def lists(mask: Tensor) -> Tensor:
    return (~mask).int().sort(dim=-1, stable=True).indices.int()


def test_a_shift_of_all_keys_changes_nothing():
    q, k, v = tensors(GRID)
    made, moved = plan((q, k, v), critical=0.4), plan((q, k + 50, v), critical=0.4)
    assert torch.equal(made.block_mask, moved.block_mask)


@pytest.mark.parametrize("grid", [VideoGrid(1, 1, 3), VideoGrid(2, 8, 8)])
def test_short_sequences_keep_one_block(grid):
    qkv = tensors(grid)
    made = plan(qkv, Call(0, 0, grid), critical=0.01)
    assert (made.counts == 1).all() and made.indices.shape[-1] == 1
    assert dsattn.attend(*qkv, made).isfinite().all()


@pytest.mark.parametrize("grid", [GRID, VideoGrid(4, 9, 11, text=70, text_first=True), VideoGrid(4, 9, 11, prefix=30)])
def test_text_and_prefix_are_exact(grid):
    pairs = plan(tensors(grid), Call(0, 0, grid), critical=0.05, block_q=32, block_k=16).to_dense()
    for start, stop in grid.exact_segments:
        assert bool(pairs[:, :, start:stop].all()) and bool(pairs[:, :, :, start:stop].all())
    assert not bool(pairs.all())


def test_batch_of_two_is_two_batches_of_one(weights):
    qkv = tensors(GRID, batch=2)
    options = {"critical": 0.2, "linear_scope": "marginal", "weights": weights()}
    out = dsattn.attend(*qkv, plan(qkv, **options))
    for row in range(2):
        single = [x[row : row + 1] for x in qkv]
        torch.testing.assert_close(out[row : row + 1], dsattn.attend(*single, plan(single, **options)))


# -- result -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", MAPS)
def test_scopes_and_feature_maps_against_the_oracle(name, scope, impl, weights):
    grid = VideoGrid(3, 7, 9, text=11)  # 200 tokens
    q, k, v = tensors(grid, batch=2)
    options = {"critical": 0.2, "negligible": 0.3, "block_q": 16, "block_k": 32}
    made = plan((q, k, v), Call(1, 0, grid), **options, feature_map=name, linear_scope=scope, weights=weights())
    out = attend_on_device((q, k, v), made, impl)
    critical, marginal = classes(q, k, grid, *options.values())
    want = oracle(q, k, v, critical, linear_pairs(scope, critical, marginal), *projection(32, seed=2), name)
    check(out, want, v)


def attend_on_device(qkv, made: BlockPlan, impl: str) -> Tensor:
    """Plans are made on the CPU here, so that selection is the oracle's; they run where Triton does."""
    device = DEVICE if impl == "triton" else "cpu"
    tail = made.linear
    if tail is not None:
        values = {f.name: getattr(tail, f.name) for f in dataclasses.fields(tail)}
        tail = LinearTail(**{name: x.to(device) if isinstance(x, Tensor) else x for name, x in values.items()})
    moved = dataclasses.replace(
        made, counts=made.counts.to(device), indices=made.indices.to(device), linear=tail,
        key_lengths=None if made.key_lengths is None else made.key_lengths.to(device),
    )  # fmt: skip
    return dsattn.attend(*(x.to(device) for x in qkv), moved, impl=impl)


@pytest.mark.parametrize("impl", ["reference", "torch", "triton", "flex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype, impl, weights):
    qkv = [x.to(dtype) for x in tensors(GRID)]
    made = plan(qkv, critical=0.3, weights=weights())
    critical, _ = classes(*qkv[:2], GRID, 0.3, 0.1, 64, 64)
    want = oracle(*qkv, critical, torch.ones_like(critical), *projection(32), "softmax")
    check(attend_on_device(qkv, made, impl), want, qkv[2])


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_head_dims_strides_and_padding(dim, impl, weights):
    """Views of a packed tensor; keys behind the length hold NaN and enter nowhere."""
    grid = VideoGrid(3, 5, 7)
    q, k, v = torch.randn(2, 105, 2, 3 * dim, generator=torch.Generator().manual_seed(0)).split(dim, -1)
    lengths = torch.tensor([100, 41], dtype=torch.int32)
    for scope in SCOPES:
        made = plan((q, k, v), Call(0, 0, grid), critical=0.4, block_k=32, linear_scope=scope, weights=weights(dim))
        made = made.with_key_lengths(lengths)
        # Every row reads a key: the first block is kept by all.
        mask = made.block_mask.clone()
        mask[..., 0] = True
        made = BlockPlan.from_mask(
            mask, 105, 105, batch=2, heads=2, block_k=32, key_lengths=lengths, linear=made.linear
        ).validate()
        critical, marginal = classes(q, k, grid, 0.4, 0.1, 64, 32)
        visible = (torch.arange(105) < lengths[:, None])[:, None, None]
        exact = made.to_dense()
        linear = linear_pairs(scope, critical, marginal) & visible
        want = oracle(q, k, v, exact, linear, *projection(dim), "softmax")
        dirty_k, dirty_v = k.clone(), v.clone()
        for x in (dirty_k, dirty_v):
            x[0, 100:], x[1, 41:] = torch.nan, torch.nan
        check(attend_on_device((q, dirty_k, dirty_v), made, impl), want, v)


def test_everything_critical_is_dense_attention_plus_the_linear_branch(weights):
    q, k, v = tensors(GRID)
    everything = torch.ones(1, 2, GRID.tokens, GRID.tokens, dtype=torch.bool)
    weight, bias = projection(32)
    for scope in SCOPES:
        made = plan((q, k, v), critical=1.0, linear_scope=scope, weights=weights())
        assert bool(made.block_mask.all())
        linear = everything if scope == "global" else ~everything
        want = oracle(q, k, v, everything, linear, weight, bias, "softmax")
        check(dsattn.attend(q, k, v, made), want, v)
        if scope != "global":
            torch.testing.assert_close(dsattn.attend(q, k, v, made), dense([q, k, v]) + bias)


def test_without_weights_or_with_zeros_it_is_the_sparse_path(weights):
    qkv = tensors(GRID)
    zeros = {f"layers.0.{part}": torch.zeros(shape) for part, shape in (("weight", (32, 32)), ("bias", (32,)))}
    for options in ({}, {"weights": weights(layers=zeros)}):
        made = plan(qkv, critical=0.2, **options)
        assert made.linear is None
        plain = BlockPlan.from_mask(made.block_mask, GRID.tokens, GRID.tokens, batch=1, heads=2)
        assert torch.equal(dsattn.attend(*qkv, made), dsattn.attend(*qkv, plain))
    # A projection of zeros that is computed all the same adds nothing.
    tail = LinearTail(torch.zeros(32, 32), torch.zeros(32))
    added = dsattn.attend(*qkv, dataclasses.replace(plain, linear=tail))
    assert torch.equal(added, dsattn.attend(*qkv, plain))


def test_lse_does_not_know_of_the_linear_branch(weights):
    qkv = tensors(GRID)
    made = plan(qkv, critical=0.2, weights=weights())
    _, lse = dsattn.attend(*qkv, made, return_lse=True)
    _, plain = dsattn.attend(*qkv, dataclasses.replace(made, linear=None), return_lse=True)
    assert torch.equal(lse, plain)


def test_heads_in_groups_give_the_same(monkeypatch, weights):
    qkv = tensors(GRID, heads=5)
    for scope in SCOPES:
        made = plan(qkv, critical=0.2, linear_scope=scope, weights=weights())
        whole = kernels.linear_attention(*qkv, made, made.linear)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "LIMIT", 1)
            torch.testing.assert_close(kernels.linear_attention(*qkv, made, made.linear), whole)


def test_long_sums_are_cut_into_slices(weights):
    """More tokens than one slice of the Triton kernel takes."""
    grid = VideoGrid(3, 25, 31)
    qkv = tensors(grid, heads=1)
    made = plan(qkv, Call(0, 0, grid), critical=0.05, block_q=128, weights=weights())
    out = attend_on_device(qkv, made, "triton")
    check(out, dsattn.attend(*(x.double() for x in qkv), made, impl="torch"), qkv[2])


# -- plans --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
def test_a_reused_plan_sums_the_current_keys(scope, weights):
    engine = dsattn.Engine("sparse_linear", critical=0.3, refresh=2, linear_scope=scope, weights=weights())
    engine(*tensors(GRID), CALL)
    later = tensors(GRID, seed=9)
    out = engine(*later, Call(0, 1, GRID))
    made = engine.state.entries["transformer", 0, "cond"].plan
    assert [record.kind for record in engine.stats.records] == ["refresh", "reuse"]
    torch.testing.assert_close(out, dsattn.attend(*later, made, impl="reference"))
    held = 4 * (32 * 32 + 32) + (0 if made.linear.blocks is None else made.linear.blocks.numel())
    assert engine.state.plan_bytes >= made.counts.nbytes + made.indices.nbytes + held


def test_key_lengths_reach_the_linear_branch(weights):
    engine = dsattn.Engine("sparse_linear", critical=0.3, weights=weights())
    q, k, v = tensors(GRID, batch=2)
    lengths = torch.tensor([GRID.tokens, GRID.tokens - 10])
    clean = engine(q, k, v, CALL, key_lengths=lengths)
    k[1, -10:], v[1, -10:] = 77.0, -77.0
    plan_before = engine.state.entries["transformer", 0, "cond"].plan
    torch.testing.assert_close(
        dsattn.attend(q, k, v, plan_before.with_key_lengths(lengths.int()), impl="reference"), clean
    )


def test_a_projection_for_another_head_dim_is_refused():
    q, k, v = tensors(GRID, dim=64)
    made = dataclasses.replace(plan((q, k, v)), linear=LinearTail(*projection(32)))
    with pytest.raises(dsattn.UsageError, match=r"linear\.weight must be \[64, 64\] on cpu .* got \[32, 32\] on cpu"):
        dsattn.attend(q, k, v, made)


def test_plans_check_their_linear_tail():
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    build = {"batch": 1, "heads": 1, "block_q": 16, "block_k": 16}
    weight, bias = torch.zeros(8, 8), torch.zeros(8)
    with pytest.raises(ValueError, match=r"must be \[D, D\] and \[D\], got \(8, 4\) and \(8,\)"):
        LinearTail(torch.zeros(8, 4), bias)
    with pytest.raises(ValueError, match="feature_map must be one of softmax, elu, relu, hedgehog, got 'exp'"):
        LinearTail(weight, bias, "exp")
    with pytest.raises(ValueError, match=r"linear\.blocks must be \[b, h, 2, 2\] bool, got \(1, 1, 3, 2\)"):
        tail = LinearTail(weight, bias, blocks=torch.ones(1, 1, 3, 2, dtype=torch.bool))
        BlockPlan.from_mask(mask, 32, 32, **build, linear=tail)
    with pytest.raises(ValueError, match="needs blocks of equal size and no token order"):
        order = torch.arange(32)[None, None]
        BlockPlan.from_mask(mask, 32, 32, **build, k_order=order, linear=LinearTail(weight, bias, blocks=mask))


@pytest.mark.parametrize("scope", SCOPES)
def test_estimated_error_counts_the_linear_branch(scope, weights):
    q, k, v = tensors(GRID, batch=2)
    made = plan((q, k, v), critical=0.2, block_q=32, linear_scope=scope, weights=weights())
    rows = sample_rows(GRID, 40, seed=3)
    out = dsattn.attend(q, k, v, made, impl="reference")
    want = relative_error(*(x.transpose(1, 2)[:, :, rows] for x in (out, dense([q, k, v]))))
    torch.testing.assert_close(RowSample.of(q, k, v, rows).error(made), want, rtol=1e-4, atol=2e-6)
