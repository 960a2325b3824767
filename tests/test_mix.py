"""Joined plans: every head does in one call what it would do alone with its own plan."""

from dataclasses import replace

import pytest
import torch

import dsattn
from dsattn.block_plan import BlockPlan, LinearTail
from dsattn.grid import Call, VideoGrid
from dsattn.mix import join_plans, split_heads

from .method_inputs import tensors
from .plans import Case, check

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

GRID = VideoGrid(3, 5, 7)
TEXT = VideoGrid(3, 5, 7, text=19)
FIRST = VideoGrid(2, 5, 9, text=21, text_first=True, prefix=4)

# Equal blocks without an order, with one, of two sizes, clusters with empty ones among them, and both band orders.
METHODS = [
    ("radial", {"block": 32, "tail": "pooled"}),
    ("topk", {"density": 0.3, "block_q": 32, "block_k": 16, "order": "hilbert"}),
    ("topk", {"density": 0.3, "block_q": 16, "block_k": 64, "order": "raster"}),
    ("semantic", {"density": 0.3, "q_clusters": 3, "k_clusters": 40}),
    ("spatial_temporal", {"density": 0.4, "block": 16, "tail": "pooled"}),
]


def parts_of(qkv, grid, owners, methods=METHODS, **options):
    """One part per method; head ``n`` of all rows follows method ``owners[n]``."""
    parts = []
    for index in sorted(set(owners)):
        heads = torch.tensor([n for n, owner in enumerate(owners) if owner == index])
        name, own = methods[index]
        mine = [split_heads(x, heads) for x in qkv]
        parts.append((heads, dsattn.plan(*mine, Call(0, 0, grid), method=name, **{**own, **options})))
    return parts


def attend(qkv, plan, impl):
    """Out and log-sum-exp, computed on a GPU where there is one, and checked against the oracle."""
    case = Case(impl, *qkv, plan, qkv[0].shape[-1] ** -0.5)
    moved = case.to(DEVICE)
    found = dsattn.attend(moved.q, moved.k, moved.v, moved.plan, impl=impl, return_lse=True)
    check(case, *found)
    return tuple(x.cpu() for x in found)


def one_by_one(qkv, parts, impl="reference"):
    """What heads give that run alone, each with its own plan; out and log-sum-exp."""
    batch, length, heads, dim = qkv[0].shape
    out, lse = torch.empty(batch, heads, length, dim), torch.empty(batch, heads, length)
    for index, plan in parts:
        mine = [x.transpose(1, 2).reshape(1, batch * heads, length, dim)[:, index].transpose(1, 2) for x in qkv]
        found, found_lse = dsattn.attend(*mine, plan, impl=impl, return_lse=True)
        out.view(-1, length, dim)[index] = found[0].transpose(0, 1).float()
        lse.view(-1, length)[index] = found_lse[0]
    return out.transpose(1, 2), lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_some_heads_of_all_rows_as_heads_of_one_row(batch, dtype):
    x = torch.randn(batch, 7, 3, 4).to(dtype)[:, ::2]
    flat = torch.cat(list(x), 1)
    for heads in (torch.arange(batch * 3), torch.tensor([0, 3 * batch - 1]), torch.tensor([1])):
        found = split_heads(x, heads)
        assert found.dtype == dtype and torch.equal(found, flat[None, :, heads])


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
@pytest.mark.parametrize(
    ("grid", "batch", "owners"),
    [
        (GRID, 1, [0, 1, 2, 3, 4]),
        (TEXT, 1, [3, 1, 4, 3, 0]),
        (FIRST, 2, [4, 3, 1, 3]),
        (TEXT, 2, [2, 2]),
    ],
)
def test_heads_give_what_they_give_alone(grid, batch, owners, impl):
    heads = len(owners) // batch
    qkv = tensors(grid, batch, heads)
    parts = parts_of(qkv, grid, owners)
    plan = join_plans(parts, batch, heads).validate()
    assert (plan.batch, plan.heads, plan.q_len, plan.tail) == (batch, heads, grid.tokens, "pooled")
    found = attend(qkv, plan, impl)
    # Reference sums in the same order, alone or not: a wrong block would show far above rounding.
    for got, want in zip(found, one_by_one(qkv, parts), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    densities = torch.cat([p.density[0] for _, p in parts])[torch.cat([i for i, _ in parts]).argsort()]
    torch.testing.assert_close(plan.density, densities.view(batch, heads))


@pytest.mark.parametrize("tail", ["none", "pooled_block"])
def test_other_tails_join(tail):
    qkv = tensors(TEXT, heads=4)
    methods = [("topk", {"density": 0.3, "block_q": 16}), ("semantic", {"density": 0.3, "q_clusters": 5})]
    parts = parts_of(qkv, TEXT, [1, 0, 1, 0], methods, tail=tail)
    plan = join_plans(parts, 1, 4).validate()
    found = attend(qkv, plan, "torch")
    torch.testing.assert_close(found[0], one_by_one(qkv, parts)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_key_lengths_are_set_on_the_joined_plan(impl):
    """Padded text at the end: what stands there is never read, whatever the head's method."""
    qkv = tensors(TEXT, heads=4)
    plan = join_plans(parts_of(qkv, TEXT, [1, 3, 4, 0]), 1, 4)
    plan = plan.with_key_lengths(torch.tensor([TEXT.tokens - 11], dtype=torch.int32)).validate()
    found = attend(qkv, plan, impl)
    noisy = [qkv[0], *(x.clone() for x in qkv[1:])]
    for x in noisy[1:]:
        x[:, -11:] = 1e4
    moved = Case("", *noisy, plan, 1.0).to(DEVICE)
    torch.testing.assert_close(dsattn.attend(moved.q, moved.k, moved.v, moved.plan, impl=impl).cpu(), found[0])


def test_pairs_that_are_read_are_those_of_the_parts():
    qkv = tensors(FIRST, 2, 2)
    parts = parts_of(qkv, FIRST, [1, 3, 0, 4])
    joined = join_plans(parts, 2, 2).to_dense().flatten(0, 1)
    for heads, plan in parts:
        assert torch.equal(joined[heads], plan.to_dense()[0])


def test_one_block_joins_many():
    """One key block and one query block beside many: rows behind the last are empty and stay so."""
    grid = VideoGrid(1, 3, 7)
    qkv = tensors(grid, heads=2)
    methods = [("topk", {"block_q": 128, "block_k": 128, "density": 0.1}), ("semantic", {"q_clusters": 21, "top_p": 1})]
    plan = join_plans(parts_of(qkv, grid, [0, 1], methods), 1, 2).validate()
    assert plan.num_q_blocks == 21 and plan.counts[0, 0].tolist() == [1] + [0] * 20
    torch.testing.assert_close(
        dsattn.attend(*qkv, plan, impl="torch"), dsattn.attend(*qkv, BlockPlan.dense(1, 2, 21, 21), impl="reference")
    )


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_half_precision(impl):
    qkv = [x.half() for x in tensors(TEXT, heads=3)]
    plan = join_plans(parts_of(qkv, TEXT, [4, 3, 1]), 1, 3)
    attend(qkv, plan, impl)


def test_one_part_of_one_row_is_that_plan():
    qkv = tensors(GRID, heads=3)
    ((heads, plan),) = parts_of(qkv, GRID, [1, 1, 1])
    assert join_plans([(heads, plan)], 1, 3) is plan


def test_what_cannot_be_joined_is_refused():
    qkv = tensors(GRID, heads=2)
    (heads, plan), other = parts_of(qkv, GRID, [0, 1])
    lengths = torch.tensor([GRID.tokens - 1], dtype=torch.int32)
    linear = LinearTail(torch.zeros(32, 32), torch.zeros(32))
    longer = parts_of(tensors(TEXT, heads=2), TEXT, [0, 1])[0][1]
    for bad, message in [
        (plan.with_key_lengths(lengths), "key lengths cannot be joined"),
        (replace(plan, linear=linear), "a linear branch cannot be joined"),
        (replace(plan, tail="none"), "agree in"),
        (longer, "agree in"),
        (replace(plan, batch=2), "batch 1, got 2 x 1 heads"),
        (replace(plan, heads=2), "batch 1, got 1 x 2 heads"),
    ]:
        with pytest.raises(ValueError, match=message):
            join_plans([(heads, bad), other], 1, 2)
    with pytest.raises(ValueError, match="each of the 3 heads once, got 2"):
        join_plans([(heads, plan), other], 1, 3)
    with pytest.raises(ValueError, match="key lengths cannot be joined"):
        join_plans([(heads, plan.with_key_lengths(lengths))], 1, 1)
