"""The kernel for Hopper and Blackwell: right on the plans it takes, and it takes no others."""

from dataclasses import replace

import pytest
import torch

from dsattn.block_plan import BlockPlan
from dsattn.kernels import block_sparse, block_sparse_tma, launch
from dsattn.kernels.launch import Specialized, Tiles
from dsattn.kernels.permute import permute

from . import plans

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Small tiles in the interpreter; a GPU takes those of its table.
SMALL = Specialized(Tiles(32, 16, 4, 2), True)


@pytest.fixture
def chosen(monkeypatch):
    """Makes the launcher choose this kernel, and counts how often it does."""
    calls = []
    run = block_sparse_tma.block_sparse_attention

    def count(*args, **kwargs):
        calls.append(kwargs["how"])
        return run(*args, **kwargs)

    monkeypatch.setattr(block_sparse, "pick_specialized", lambda *_, **__: SMALL)
    monkeypatch.setattr(block_sparse_tma, "block_sparse_attention", count)
    return calls


def case_of(
    *, q_len, k_len, dim=32, dim_v=None, dtype=torch.float16, batch=2, heads=2, block=(32, 32), seed=0, **options
):
    draw, (block_q, block_k) = plans.Draw(seed), block
    q = draw.normal(batch, q_len, heads, dim).to(dtype)
    k, v = (draw.normal(batch, k_len, heads, d).to(dtype) for d in (dim, dim_v or dim))
    mask = draw.uniform(batch, heads, -(-q_len // block_q), -(-k_len // block_k)) < 0.4
    mask[..., 0] = True
    for name, length in (("q_order", q_len), ("k_order", k_len)):
        wanted = options.pop(name, False)
        options[name] = draw.permutations((1, heads), length) if wanted else None
    plan = BlockPlan.from_mask(
        mask, q_len, k_len, batch=batch, heads=heads, block_q=block_q, block_k=block_k, **options
    )
    return plans.Case(f"seed {seed}", q, k, v, plan, 0.2)


def check(case):
    moved = case.to(DEVICE)
    plans.check(case, *block_sparse.block_sparse_attention(moved.q, moved.k, moved.v, moved.plan, scale=case.scale))


@pytest.mark.parametrize("dtype", plans.DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_against_float64(chosen, dim, dtype):
    """Lengths that fill neither tiles nor blocks."""
    check(case_of(q_len=101, k_len=83, dim=dim, dtype=dtype))
    assert len(chosen) == 1


@pytest.mark.parametrize("tail", ["none", "pooled", "pooled_block"])
@pytest.mark.parametrize("q_order", [False, True])
@pytest.mark.parametrize("k_order", [False, True])
def test_orders_and_tails(chosen, q_order, k_order, tail):
    check(case_of(q_len=70, k_len=95, tail=tail, q_order=q_order, k_order=k_order, seed=3))
    assert len(chosen) == 1


@pytest.mark.parametrize("k_order", [False, True])
def test_what_lies_behind_the_key_length_never_enters(chosen, k_order):
    lengths = torch.tensor([33, 90], dtype=torch.int32)
    case = case_of(q_len=64, k_len=90, key_lengths=lengths, k_order=k_order, tail="pooled_block", seed=5)
    check(case)
    behind = torch.arange(90) >= lengths[:, None]
    behind = behind[:, None].expand(2, 2, -1)
    if k_order:
        order = case.plan.k_order.expand(2, 2, -1)
        behind = torch.zeros_like(behind).scatter_(-1, order, behind)
    behind = behind.transpose(1, 2)[..., None]
    moved = replace(case, k=case.k.masked_fill(behind, torch.nan), v=case.v.masked_fill(behind, torch.inf))
    tail_free = replace(moved, plan=replace(case.plan, tail="none")).to(DEVICE)
    clean = replace(case, plan=replace(case.plan, tail="none")).to(DEVICE)
    got, want = (block_sparse.block_sparse_attention(x.q, x.k, x.v, x.plan, scale=x.scale) for x in (tail_free, clean))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len(chosen) == 3


@pytest.mark.parametrize("block_q, block_k", [(32, 16), (64, 48), (96, 16), (128, 128)])
def test_blocks_of_many_tiles(chosen, block_q, block_k):
    check(case_of(q_len=150, k_len=131, block=(block_q, block_k), seed=7))
    assert len(chosen) == 1


def test_one_short_block(chosen):
    check(case_of(q_len=5, k_len=3, batch=1, heads=1))
    check(case_of(q_len=1, k_len=1, batch=1, heads=3, dim=64))
    assert len(chosen) == 2


def test_values_narrower_than_keys_and_shared_lists(chosen):
    check(case_of(q_len=50, k_len=70, dim=64, dim_v=24))
    dense = BlockPlan.dense(2, 2, 50, 70, block_q=32, block_k=32)
    check(replace(case_of(q_len=50, k_len=70), plan=dense))
    assert len(chosen) == 2


def test_a_row_that_keeps_nothing_is_zero(chosen):
    case = case_of(q_len=64, k_len=64, batch=1, heads=1)
    counts = case.plan.counts.clone()
    counts[..., 1] = 0
    moved = replace(case, plan=replace(case.plan, counts=counts)).to(DEVICE)
    out, lse = block_sparse.block_sparse_attention(moved.q, moved.k, moved.v, moved.plan, scale=1.0)
    assert bool((out[:, 32:] == 0).all() & (lse[..., 32:] == -torch.inf).all() & lse[..., :32].isfinite().all())
    assert len(chosen) == 1


@pytest.mark.parametrize("seed", range(12))
def test_random_plans_go_where_they_belong(chosen, seed):
    """Layouts, lists and features of any kind: right whichever kernel takes them."""
    case = plans.random_case(plans.random_shape(seed), seed)
    check(case)
    variable = case.plan.q_starts is not None or case.plan.k_starts is not None
    assert not (chosen and (variable or case.plan.block_q % 32))


def test_misaligned_rows_go_elsewhere(chosen):
    case = case_of(q_len=40, k_len=40, dim=36, heads=1)
    check(case)
    wide = torch.randn(2, 40, 2, 65, dtype=torch.float16)
    check(replace(case_of(q_len=40, k_len=40, dim=64), q=wide[..., :64]))
    check(replace(case_of(q_len=40, k_len=40, dim=64), q=wide[..., 1:]))
    assert not chosen


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 103, 110, 120, "gfx942", "interpreter"])
def test_which_tiles_are_picked(arch):
    for dtype in plans.DTYPES:
        for head_dim in (40, 64, 96, 128, 256, 264):
            for block_q, block_k in ((128, 128), (128, 64), (64, 64), (96, 64), (64, 24)):
                how = launch.pick_specialized(block_q, block_k, head_dim, dtype, arch)
                may = arch in (90, 100, 103) and dtype != torch.float32 and head_dim <= 256
                if not may or block_q % 64 or block_k % 64:
                    assert how is None
                    continue
                assert how is not None or head_dim == 256
                tail = launch.pick_specialized(block_q, block_k, head_dim, dtype, arch, tail=True)
                assert tail is not None and tail.tiles.block_n <= 64
                if how is not None:
                    assert block_q % how.tiles.block_m == 0 and block_k % how.tiles.block_n == 0


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "strided", "packed"])
@pytest.mark.parametrize("lead", [(1, 1), (2, 3), (1, 3)])
def test_permute_and_back(layout, lead):
    draw = plans.Draw(1)
    x = plans._tensor(draw, (2, 77, 3, 40), layout, torch.float16).to(DEVICE)
    order = draw.permutations(lead, 77).to(DEVICE)
    y = permute(x, order)
    index = order.expand(2, 3, -1)[..., None].expand(-1, -1, -1, 40)
    assert torch.equal(y.transpose(1, 2), x.transpose(1, 2).gather(2, index))
    assert torch.equal(permute(y, order, back=True), x)
    assert permute(x, None) is x
