"""What is particular to the Triton kernel: tile choice, the map from programs to tiles, unusual plans, refusals."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from dsattn.block_plan import BlockPlan
from dsattn.errors import ImplUnavailableError
from dsattn.kernels import block_sparse, block_tail, launch, pooling, program_order

from . import plans

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of tiny tensors: waking a second thread for each takes several times longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(case: plans.Case) -> None:
    moved = case.to(DEVICE)
    plans.check(case, *block_sparse.block_sparse_attention(moved.q, moved.k, moved.v, moved.plan, scale=case.scale))


def case_of(plan: BlockPlan, dim: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32) -> plans.Case:
    draw = plans.Draw(seed)
    q, k, v = (draw.normal(plan.batch, n, plan.heads, dim).to(dtype) for n in (plan.q_len, plan.k_len, plan.k_len))
    return plans.Case("", q, k, v, plan, 0.3)


# -- tiles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 103, 120, "gfx942", "gfx90a", "interpreter"])
@pytest.mark.parametrize("dtype", plans.DTYPES, ids=str)
def test_tiles_never_exceed_blocks_or_limits(dtype, arch):
    """Powers of two from 16 on, no larger than the block rounded up, registers for the accumulator."""
    for block_q in (8, 16, 48, 64, 128, 1000):
        for head_dim in (32, 40, 64, 96, 128, 160, 256):
            tiles = launch.pick_tiles(block_q, 64, head_dim, dtype, arch)
            assert tiles.block_m & (tiles.block_m - 1) == 0 and tiles.block_n & (tiles.block_n - 1) == 0
            assert 16 <= tiles.block_m < max(17, 2 * block_q) and 16 <= tiles.block_n <= 64
            if arch != "interpreter":
                assert tiles.warps in (4, 8)
                accumulator = tiles.block_m * max(64, 2 ** (head_dim - 1).bit_length()) // (tiles.warps * 32)
                assert accumulator <= 128  # fp32 registers per thread on NVIDIA, half of them


def test_head_dim_above_256_is_refused():
    with pytest.raises(ImplUnavailableError, match="up to 256, got 264"):
        launch.pick_tiles(64, 64, 264, torch.bfloat16, 90)


def test_tile_table_covers_every_query_once():
    draw = plans.Draw(0)
    for _ in range(20):
        length, blocks = draw.integer(1, 300), draw.integer(1, 12)
        starts = plans._starts(draw, (2, 3), length, blocks)
        mask = torch.ones(1, 1, blocks, 1, dtype=torch.bool)
        plan = BlockPlan.from_mask(mask, length, 16, batch=2, heads=3, q_starts=starts, block_k=16)
        programs = -(-length // 32) + blocks
        block, start = program_order.tile_table(plan, 32, programs)
        assert block.shape == start.shape == (2, 3, programs)
        for b in range(2):
            for h in range(3):
                edges = starts[b, h].tolist()
                seen = [
                    p
                    for i, s in zip(block[b, h].tolist(), start[b, h].tolist(), strict=True)
                    if i < blocks
                    for p in range(s, min(s + 32, edges[i + 1]))
                ]
                assert sorted(seen) == list(range(length))


# -- plans off the beaten track -----------------------------------------------------------------------------


@pytest.mark.parametrize("block_q, block_k", [(48, 24), (8, 100), (200, 5), (128, 128)])
def test_any_block_size(block_q, block_k):
    """Not powers of two, smaller than a tile, larger than one."""
    draw = plans.Draw(block_q)
    mask = draw.uniform(1, 2, -(-301 // block_q), -(-150 // block_k)) < 0.4
    mask[..., 0] = True
    for tail in ("none", "pooled", "pooled_block"):
        plan = BlockPlan.from_mask(mask, 301, 150, batch=1, heads=2, block_q=block_q, block_k=block_k, tail=tail)
        check(case_of(plan))


def test_first_tile_of_a_row_may_be_unreadable():
    """The list starts with an empty block and with one behind the key length: still no NaN."""
    starts = torch.tensor([[[0, 0, 20, 70, 90]]], dtype=torch.int32)
    indices = torch.tensor([[[[0, 3, 1, 2], [3, 2, 0, 1]]]], dtype=torch.int32)
    plan = BlockPlan(
        batch=2, heads=1, q_len=50, k_len=90, block_q=32, block_k=16, counts=torch.tensor([[[4, 3]]]).int(),
        indices=indices, k_starts=starts, key_lengths=torch.tensor([60, 21], dtype=torch.int32),
    )  # fmt: skip
    check(case_of(plan.validate()))
    fixed = BlockPlan(
        batch=1, heads=1, q_len=32, k_len=128, block_q=32, block_k=128, counts=torch.ones(1, 1, 1).int(),
        indices=torch.zeros(1, 1, 1, 1).int(), key_lengths=torch.tensor([3], dtype=torch.int32),
    )  # fmt: skip
    check(case_of(fixed))


def test_values_may_be_narrower_than_keys():
    draw = plans.Draw(1)
    q, k, v = draw.normal(1, 70, 2, 64), draw.normal(1, 90, 2, 64), draw.normal(1, 90, 2, 24)
    mask = torch.rand(1, 2, 5, 6, generator=draw.generator) < 0.5
    mask[..., 2] = True
    for tail in ("pooled", "pooled_block"):
        plan = BlockPlan.from_mask(mask, 70, 90, batch=1, heads=2, block_q=16, block_k=16, tail=tail)
        check(plans.Case("", q, k, v, plan, 0.2))


@pytest.mark.parametrize("clusters", [False, True])
def test_block_tail_over_many_tiles(clusters):
    """More query blocks and key blocks than a tile holds, in the last tile of each only a few."""
    draw = plans.Draw(20 + clusters)
    q, k, v = draw.normal(2, 301, 2, 40), draw.normal(2, 333, 2, 40), draw.normal(2, 333, 2, 24)
    mask = draw.uniform(1, 2, 38, 37) < 0.3
    mask[..., 7, :] = True  # skips nothing
    options = {"key_lengths": torch.tensor([101, 333], dtype=torch.int32), "k_order": draw.permutations((2, 1), 333)}
    if clusters:
        options |= {
            "q_starts": plans._starts(draw, (2, 2), 301, 38),
            "k_starts": plans._starts(draw, (1, 2), 333, 37),
        }
    plan = BlockPlan.from_mask(mask, 301, 333, batch=2, heads=2, block_q=8, block_k=9, tail="pooled_block", **options)
    case = plans.Case("", q, k, v, plan, 0.2).to(DEVICE)
    value, weight = block_tail.block_tail(
        case.q, case.k, case.v, case.plan,
        scale_log2=0.2 * launch.LOG2E, block_m=16, block_n=16, warps=4, stages=1, precision="ieee",
    )  # fmt: skip
    want, log_weight = pooling.pool_tail(*(x.double() for x in (case.q, case.k, case.v)), case.plan, 0.2)
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.double() / launch.LOG2E, log_weight, rtol=1e-5, atol=1e-5)
    assert bool((weight[:, :, 7] == -torch.inf).all()) and bool((value[:, :, 7] == 0).all())


def test_large_logits_do_not_overflow():
    plan = BlockPlan.dense(1, 1, 40, 200, block_q=16, block_k=32)
    case = case_of(plan, dtype=torch.float16)
    case = replace(case, q=case.q * 50, k=case.k * 50, scale=1.0)
    out, lse = block_sparse.block_sparse_attention(
        *(x.to(DEVICE) for x in (case.q, case.k, case.v)), case.to(DEVICE).plan, scale=1.0
    )
    assert out.isfinite().all() and lse.isfinite().all() and float(lse.max()) > 1e4
    check(case)


def test_a_row_that_keeps_nothing_is_zero():
    """No valid plan has one; NaN would spread through the model."""
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    mask[0, 0, 1] = False
    plan = BlockPlan.from_mask(mask, 32, 32, batch=1, heads=1, block_q=16, block_k=16)
    moved = case_of(plan).to(DEVICE)
    out, lse = block_sparse.block_sparse_attention(moved.q, moved.k, moved.v, moved.plan, scale=1.0)
    assert torch.equal(out[0, 16:], torch.zeros_like(out[0, 16:]))
    assert (lse[0, 0, 16:] == -torch.inf).all() and lse[0, 0, :16].isfinite().all()


# -- refusals -----------------------------------------------------------------------------------------------

ON_CPU = """
import torch
from dsattn.block_plan import BlockPlan
from dsattn.errors import ImplUnavailableError
from dsattn.functional import attend
from dsattn.kernels import block_sparse

x = torch.zeros(1, 16, 1, 32)
plan = BlockPlan.dense(1, 1, 16, 16)
for call in (
    lambda: block_sparse.block_sparse_attention(x, x, x, plan, scale=1.0),
    lambda: attend(x, x, x, plan, impl="triton"),
):
    try:
        call()
    except ImplUnavailableError as error:
        print(error)
"""


def test_cpu_tensors_are_refused_without_the_interpreter():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", ON_CPU], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout
    for line in lines:
        assert "impl='triton'" in line and "needs CUDA tensors" in line and "cpu" in line
        assert "pass impl='flex', 'torch' or 'reference'" in line


def test_mixed_dtypes_are_refused():
    case = case_of(BlockPlan.dense(1, 1, 16, 16)).to(DEVICE)
    with pytest.raises(ImplUnavailableError, match=r"one dtype.*float16, torch\.float32"):
        block_sparse.block_sparse_attention(case.q, case.k.half(), case.v, case.plan, scale=1.0)
