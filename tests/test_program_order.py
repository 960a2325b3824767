"""Which rows start first, and the lists of keys that clusters share tiles in."""

import importlib.util
from pathlib import Path

import pytest
import torch

from dsattn.block_plan import BlockPlan
from dsattn.kernels import block_sparse, block_sparse_tma, block_tail, launch, permute
from dsattn.kernels.program_order import ends_of_keys, longest_first, order_of_blocks, order_of_tiles
from dsattn.verdict import VerdictRule

from . import plans

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "tile_utilization.py"


def test_rows_of_even_work_keep_their_order():
    assert longest_first(torch.full((2, 3, 5), 7)).tolist() == list(range(30))
    assert longest_first(torch.zeros(1, 2, 4, dtype=torch.int32)).tolist() == list(range(8))


def test_long_rows_come_first_and_the_others_stay_with_their_head():
    work = torch.full((1, 3, 8), 10)
    work[0, 2, 5] = 90
    work[0, 1, 7] = 60
    work[0, 0, 3] = 16
    work[0, 1, 2] = 4
    order = longest_first(work).tolist()
    assert sorted(order) == list(range(24))
    assert order[:2] == [2 * 8 + 5, 1 * 8 + 7]
    heads = [row // 8 for row in order[2:]]
    assert heads == sorted(heads)
    head_0, head_1 = ([row % 8 for row in order[2:] if row // 8 == h] for h in (0, 1))
    assert head_0[0] == 3 and head_0[1:] == [0, 1, 2, 4, 5, 6, 7]
    assert head_1[-1] == 2 and head_1[:-1] == [0, 1, 3, 4, 5, 6]


@pytest.mark.parametrize("slots", [64, 264])
def test_no_slot_waits_for_one_long_row(slots):
    """Greedy placement of dense text rows among sparse ones: near the lower bound, and better than as they stand."""
    work = torch.full((1, 40, 600), 60.0)
    work[..., -4:] = 1182
    order = longest_first(work).long()

    def finish(times):
        ends = [0.0] * slots
        for time in times:
            i = min(range(slots), key=ends.__getitem__)
            ends[i] += time
        return max(ends)

    flat = work.flatten()
    bound = float(flat.sum()) / slots
    assert finish(flat[order].tolist()) <= 1.02 * bound < finish(flat.tolist())


def test_orders_are_made_once_per_plan():
    plan = BlockPlan.dense(2, 2, 100, 100, block_q=16, block_k=16)
    assert order_of_blocks(plan) is order_of_blocks(plan)
    starts = torch.tensor([[[0, 3, 40, 40, 100]]], dtype=torch.int32)
    mask = torch.ones(1, 1, 4, 7, dtype=torch.bool)
    plan = BlockPlan.from_mask(mask, 100, 100, batch=2, heads=2, block_k=16, q_starts=starts)
    order, block, start = order_of_tiles(plan, 16, 11)
    assert order_of_tiles(plan, 16, 11)[0] is order
    assert sorted(order.tolist()) == list(range(44)) and block.shape == start.shape == (2, 2, 11)
    # Surplus programs come last in their head.
    assert (block.flatten()[order.long()].view(4, 11).diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("lengths", [None, [30, 99]])
def test_ends_of_keys(lengths):
    draw = plans.Draw(4)
    starts = plans._starts(draw, (2, 1), 99, 20)
    mask = draw.uniform(1, 3, 6, 20) < 0.5
    key_lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    plan = BlockPlan.from_mask(mask, 96, 99, batch=2, heads=3, block_q=16, k_starts=starts, key_lengths=key_lengths)
    ends = ends_of_keys(plan).expand(2, 3, 6, 20)
    for b in range(2):
        limit = 99 if lengths is None else lengths[b]
        edges = [min(x, limit) for x in starts[b, 0].tolist()]
        for h in range(3):
            for i in range(6):
                count = int(plan.counts[0, h, i])
                blocks = plan.indices[0, h, i, :count].tolist()
                sizes = torch.tensor([edges[j + 1] - edges[j] for j in blocks])
                assert ends[b, h, i, :count].tolist() == sizes.cumsum(0).tolist()


@pytest.mark.parametrize("clusters", [1, 40, 130])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_many_small_clusters_share_tiles(clusters, order, dtype):
    """Empty ones among them, and far more in a tile than it has keys for on average."""
    draw = plans.Draw(clusters)
    q, k, v = (draw.normal(2, n, 2, 64).to(dtype) for n in (70, 150, 150))
    mask = draw.uniform(2, 2, 5, clusters) < 0.4
    mask[:] |= torch.arange(clusters) == clusters // 2
    starts = plans._starts(draw, (2, 2), 150, clusters)
    starts[..., clusters // 2 + 1 :].clamp_(min=60)  # the one that is always kept is not empty
    starts[..., : clusters // 2 + 1].clamp_(max=50)
    plan = BlockPlan.from_mask(
        mask, 70, 150, batch=2, heads=2, block_q=16, block_k=64, k_starts=starts,
        k_order=draw.permutations((2, 2), 150) if order else None,
    )  # fmt: skip
    case = plans.Case(f"{clusters} clusters", q, k, v, plan.validate(), 0.2)
    moved = case.to(DEVICE)
    plans.check(case, *block_sparse.block_sparse_attention(moved.q, moved.k, moved.v, moved.plan, scale=0.2))


def test_tile_utilization():
    spec = importlib.util.spec_from_file_location("tile_utilization", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sizes = torch.tensor([64, 65, 1, 0])
    kept = torch.tensor([[True, True, False, False], [False, False, True, True]])
    assert script.apart(kept, sizes, 64) == pytest.approx(130 / (4 * 64))
    assert script.packed(kept, sizes, 64) == pytest.approx(130 / (4 * 64))
    assert script.packed(kept[:1], sizes, 64) == pytest.approx(129 / (3 * 64))
    generator = torch.Generator().manual_seed(0)
    for spread in (0.0, 0.5, 1.0):
        drawn = script.draw_sizes(75_600, 1000, spread, generator)
        assert int(drawn.sum()) == 75_600 and len(drawn) == 1000
        assert float(drawn.double().std() / drawn.double().mean()) == pytest.approx(spread, abs=0.1)
        rows = torch.rand(50, 1000, generator=generator) < 0.25
        assert script.apart(rows, drawn, 64) < 0.75 and script.packed(rows, drawn, 64) > 0.995


class Refuse(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails on operators that read values back to the host, or whose result's shape depends on values."""

    names = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "repeat_interleave")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        bool_index = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        assert not bool_index and not name.startswith(self.names), f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


class Silent:
    """Takes the place of a kernel: what is launched, and how, without running it."""

    def __getitem__(self, grid):
        assert all(isinstance(n, int) for n in grid)
        return lambda *args, **options: None


@pytest.mark.parametrize("tail", ["none", "pooled", "pooled_block"])
@pytest.mark.parametrize("kind", ["descriptors", "blocks", "clusters", "verdict"])
def test_making_and_launching_reads_nothing_back(kind, tail, monkeypatch):
    """What a CUDA graph can hold: from a block map to the launch, no value decides a shape, a branch or a wait."""
    draw = plans.Draw(0)
    q, k, v = (draw.normal(2, 128, 3, 64).half() for _ in range(3))
    mask = draw.uniform(2, 3, 4, 4) < 0.5
    order = draw.permutations((1, 3), 128)
    starts = plans._starts(draw, (2, 3), 128, 4) if kind == "clusters" else None
    lengths = torch.tensor([100, 128], dtype=torch.int32)
    words = torch.zeros(2, 3, 4, 1, dtype=torch.int32)
    judge = {"rule": VerdictRule(torch.zeros(1, 1)), "needed": words} if kind == "verdict" else {}
    special = launch.Specialized(launch.Tiles(32, 32, 4, 2), True) if kind == "descriptors" else None
    monkeypatch.setattr(block_sparse, "pick_specialized", lambda *_, **__: special)
    for module, name in (
        (block_sparse, "_forward"),
        (block_sparse_tma, "_forward_tma"),
        (block_tail, "_block_tail"),
        (permute, "_permute"),
    ):
        monkeypatch.setattr(module, name, Silent())
    with Refuse():
        plan = BlockPlan.from_mask(
            mask, 128, 128, batch=2, heads=3, block_q=32, block_k=32, q_order=order, k_order=order,
            q_starts=starts, k_starts=starts, key_lengths=lengths, tail=tail,
        )  # fmt: skip
        out, lse = block_sparse.block_sparse_attention(q, k, v, plan, scale=0.1, **judge)
        assert plan.density.shape == (2, 3)
    assert out.shape == q.shape and lse.shape == (2, 3, 128)
