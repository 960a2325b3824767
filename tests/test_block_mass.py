"""Softmax mass of block pairs: torch and Triton against a dense float64 oracle."""

import pytest
import torch
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.kernels import block_mass as spec
from dsattn.kernels import block_mass_triton

from . import plans

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = {"torch": spec.block_mass, "triton": block_mass_triton.block_mass}


def oracle(case: plans.Case, lse: Tensor) -> Tensor:
    """``[B, H, Nq, Nk]`` in float64, block by block."""
    plan = case.plan
    mass = torch.zeros(plan.batch, plan.heads, plan.num_q_blocks, plan.num_k_blocks, dtype=torch.float64)
    for b in range(plan.batch):
        limit = plan.k_len if plan.key_lengths is None else int(plan.key_lengths[b])
        for h in range(plan.heads):
            logits = case.q[b, :, h].double() @ case.k[b, :, h].double().T * case.scale - lse[b, h, :, None].double()
            logits = logits[plans._tokens(plan.q_order, b, h, plan.q_len)]
            logits = logits[:, plans._tokens(plan.k_order, b, h, plan.k_len)]
            q_edges = plans._edges(plan.q_starts, b, h, plan.q_len, plan.block_q)
            k_edges = plans._edges(plan.k_starts, b, h, plan.k_len, plan.block_k)
            for i in range(plan.num_q_blocks):
                for j in range(plan.num_k_blocks):
                    rows, columns = slice(*q_edges[i : i + 2]), slice(k_edges[j], max(0, min(k_edges[j + 1], limit)))
                    mass[b, h, i, j] = logits[rows, columns].exp().sum()
    return mass


def check(case: plans.Case, impl: str) -> None:
    """Relative error within that of fp32 logits (see `plans.error_budget`), twice for base 2, and of the sum."""
    dense = BlockPlan.from_mask(
        torch.ones(1, 1, 1, 1, dtype=torch.bool), case.plan.q_len, case.plan.k_len, batch=case.plan.batch,
        heads=case.plan.heads, block_q=case.plan.q_len, block_k=case.plan.k_len,
    )  # fmt: skip
    lse = plans.oracle(plans.Case("", case.q, case.k, case.v, dense, case.scale))[1]
    want = oracle(case, lse)
    if case.plan.key_lengths is None:
        torch.testing.assert_close(want.sum(-1), case.plan.q_sizes.double().expand(want.shape[:-1]))
    moved = case.to(DEVICE)
    got = KERNELS[impl](moved.q, moved.k, lse.float().to(DEVICE), moved.plan, scale=case.scale).cpu()
    assert got.shape == want.shape and got.dtype == torch.float32
    longest = float(case.q.double().norm(dim=-1).max() * case.k.double().norm(dim=-1).max())
    relative = 32 * 2.0**-24 * (1 + abs(case.scale) * longest + float(lse.abs().max()))
    excess = float(((got.double() - want).abs() - relative * want).max())
    assert excess <= 1e-30, f"{case.name} {impl}: mass exceeds its budget by {excess:.3g}"


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("seed", range(30))
def test_random_plans(seed, impl):
    check(plans.random_case(plans.random_shape(seed), seed), impl)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
@pytest.mark.parametrize("lengths, blocks", [((77, 101), (32, 16)), ((1, 1), (16, 16)), ((131, 200), (200, 100))])
def test_equal_blocks(lengths, blocks, dim, impl):
    """Lengths that nothing divides, one block, blocks above the tile; non-contiguous tensors."""
    draw = plans.Draw(dim)
    q, k = (draw.normal(2, n, 3, dim + 8)[:, :, 1:, 4:-4] for n in lengths)
    mask = torch.ones(1, 1, -(-lengths[0] // blocks[0]), -(-lengths[1] // blocks[1]), dtype=torch.bool)
    plan = BlockPlan.from_mask(mask, *lengths, batch=2, heads=2, block_q=blocks[0], block_k=blocks[1])
    check(plans.Case(f"{lengths} {blocks}", q, k, k, plan, 0.2), impl)


def test_a_row_that_reads_nothing_has_no_mass():
    q = plans.Draw(0).normal(1, 20, 1, 32).to(DEVICE)
    lse = torch.zeros(1, 1, 20, device=DEVICE)
    lse[..., 16:] = -torch.inf
    mass = spec.block_mass(q, q, lse, BlockPlan.dense(1, 1, 20, 20, block_q=16, block_k=16, device=DEVICE), scale=0.1)
    assert (mass[0, 0, 0] > 0).all() and not mass[0, 0, 1].any()


@pytest.mark.parametrize("impl", KERNELS)
def test_padding_may_hold_anything(impl):
    case = plans.random_case(plans.random_shape(3)._replace(key_lengths=True, batch=2, k_clusters=0), 3)
    lse = torch.zeros(2, case.plan.heads, case.plan.q_len, device=DEVICE)
    clean = KERNELS[impl](case.q.to(DEVICE), case.k.to(DEVICE), lse, case.to(DEVICE).plan, scale=case.scale)
    for b, length in enumerate(case.plan.key_lengths.tolist()):
        for h in range(case.plan.heads):
            case.k[b, plans._tokens(case.plan.k_order, b, h, case.plan.k_len)[length:], h] = torch.nan
    moved = case.to(DEVICE)
    dirty = KERNELS[impl](moved.q, moved.k, lse, moved.plan, scale=case.scale)
    assert torch.equal(clean, dirty)
