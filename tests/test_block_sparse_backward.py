"""Gradients of block-sparse attention: torch and Triton against autograd on a dense float64 formula."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.errors import ImplUnavailableError
from dsattn.functional import attend, choose_impl
from dsattn.kernels import autograd, block_sparse_backward

from . import plans

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def dense(case: plans.Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Masked softmax attention, differentiable, in the dtype of q."""
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * case.scale
    logits = logits.masked_fill(~case.plan.to_dense(), -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v), logits.logsumexp(-1)


def oracle(case: plans.Case, d_out: Tensor, d_lse: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients in float64, and elementwise what a correct implementation may be off by.

    Softmax weights and dS are rounded to the dtype before they meet a matrix unit (u each), as are the saved output and
    the result; fp32 arithmetic moves a logit by a few ulps of its size, which moves its weight by as much.
    """
    q, k, v = (x.detach().double().requires_grad_() for x in (case.q, case.k, case.v))
    out, lse = dense(case, q, k, v)
    exact = torch.autograd.grad((out * d_out.double()).sum() + (lse * d_lse.double()).sum(), (q, k, v))
    with torch.no_grad():
        scale, grad = abs(case.scale), d_out.double().abs()
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * case.scale
        p = logits.masked_fill(~case.plan.to_dense(), -torch.inf).softmax(-1)
        delta = (grad * out.abs()).sum(-1).transpose(1, 2) + d_lse.double().abs()
        ds = p * (torch.einsum("bqhd,bkhd->bhqk", grad, v.abs()) + delta[..., None])
        unit = torch.finfo(case.q.dtype).eps / 2 + 16 * 2.0**-24 * (1 + float(logits.abs().max()))
        sums = (
            scale * torch.einsum("bhqk,bkhd->bqhd", ds, k.abs()),
            scale * torch.einsum("bhqk,bqhd->bkhd", ds, q.abs()),
            torch.einsum("bhqk,bqhd->bkhd", p, grad),
        )
        return list(exact), [2 * unit * (total + x.abs()) for total, x in zip(sums, exact, strict=True)]


def check(case: plans.Case, impl: str) -> None:
    draw = plans.Draw(7)
    d_out = draw.normal(*case.q.shape[:3], case.v.shape[-1]).to(case.q.dtype)
    d_lse = draw.normal(case.plan.batch, case.plan.heads, case.plan.q_len)
    exact, budget = oracle(case, d_out, d_lse)
    moved = case.to(DEVICE)
    leaves = [x.detach().requires_grad_() for x in (moved.q, moved.k, moved.v)]
    out, lse = attend(*leaves, moved.plan, impl=impl, return_lse=True, scale=case.scale)
    plans.check(case, out.detach(), lse.detach())
    found = torch.autograd.grad([out, lse], leaves, [d_out.to(DEVICE), d_lse.to(DEVICE)])
    for name, got, want, allowed, leaf in zip("qkv", found, exact, budget, leaves, strict=True):
        assert got.dtype == leaf.dtype and got.shape == leaf.shape
        excess = float(((got.cpu().double() - want).abs() - allowed).max())
        assert excess <= 0, f"{case.name} {impl}: gradient of {name} exceeds its budget by {excess:.3g}"


def case_of(
    lengths=(77, 101), blocks=(32, 16), dim=40, dtype=torch.float32, lead=(2, 2), key_lengths=None, scale=0.2, seed=0
) -> plans.Case:
    """Two batches and two heads, random lists with a block kept by all, q, k and v cut out of wider tensors."""
    draw = plans.Draw(seed)
    q, k, v = (draw.normal(2, n, 3, dim + 8).to(dtype)[:, :, 1:, 4:-4] for n in (lengths[0], lengths[1], lengths[1]))
    mask = draw.uniform(*lead, -(-lengths[0] // blocks[0]), -(-lengths[1] // blocks[1])) < 0.4
    mask[..., 0] = True
    plan = BlockPlan.from_mask(
        mask, *lengths, batch=2, heads=2, block_q=blocks[0], block_k=blocks[1],
        key_lengths=None if key_lengths is None else torch.tensor(key_lengths, dtype=torch.int32),
    )  # fmt: skip
    return plans.Case(f"{lengths} {blocks} d{dim} {dtype}", q, k, v, plan.validate(), scale)


IMPLS = ("torch", "triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", plans.DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_gradients(dim, dtype, impl):
    check(case_of(dim=dim, dtype=dtype), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("blocks", [(16, 64), (64, 16), (128, 128), (48, 24), (8, 100), (64, 64)])
def test_block_sizes(blocks, impl):
    check(case_of(blocks=blocks, lengths=(131, 131)), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", [(1, 1), (5, 3), (1, 200), (200, 7)])
def test_lengths(lengths, impl):
    check(case_of(lengths=lengths), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_shared_lists_padding_and_scales(impl):
    for lead in ((1, 1), (1, 2), (2, 1)):
        check(case_of(lead=lead), impl)
    check(case_of(key_lengths=(101, 9)), impl)
    check(case_of(scale=-0.1), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_padded_keys_get_no_gradient_and_leak_none(impl):
    case = case_of(key_lengths=(60, 9)).to(DEVICE)
    for x in (case.k, case.v):
        x[0, 60:], x[1, 9:] = torch.nan, torch.nan
    leaves = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    dq, dk, dv = torch.autograd.grad(attend(*leaves, case.plan, impl=impl).square().sum(), leaves)
    assert dq.isfinite().all()
    for grad in (dk, dv):
        assert grad.isfinite().all() and not grad[0, 60:].any() and not grad[1, 9:].any() and grad[0, :60].any()


def test_torch_takes_orders_and_clusters():
    """Random plans without a pooled tail, in every layout and dtype."""
    seen = 0
    for seed in range(60):
        shape = plans.random_shape(seed)._replace(tail="none")
        if shape.q_order or shape.k_order or shape.q_clusters or shape.k_clusters:
            check(plans.random_case(shape, seed), "torch")
            seen += 1
    assert seen > 30


def test_gradcheck():
    case = case_of(lengths=(11, 13), blocks=(4, 3), dim=4)
    leaves = [x.double().requires_grad_() for x in (case.q, case.k, case.v)]

    def run(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        return attend(*qkv, case.plan, impl="torch", return_lse=True, scale=case.scale)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_that_keeps_nothing_has_no_gradient(impl):
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    mask[0, 0, 1] = False
    plan = BlockPlan.from_mask(mask, 32, 32, batch=1, heads=1, block_q=16, block_k=16)
    q, k, v = (plans.Draw(i).normal(1, 32, 1, 32).to(DEVICE).requires_grad_() for i in range(3))
    plan = plans.Case("", q, k, v, plan, 1.0).to(DEVICE).plan
    lse = torch.randn(1, 1, 32, device=DEVICE)
    lse[..., 16:] = torch.inf
    kernel = block_sparse_backward.gradients if impl == "triton" else autograd.gradients
    dq, dk, dv = kernel(q.detach(), k.detach(), v.detach(), lse, lse.new_zeros(1, 1, 32), q.detach(), plan, scale=1.0)
    assert dq.isfinite().all() and dk.isfinite().all() and dv.isfinite().all() and not dq[0, 16:].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_one_leaf_is_enough(impl):
    case = case_of().to(DEVICE)
    for which in range(3):
        qkv = [case.q, case.k, case.v]
        qkv[which] = qkv[which].detach().requires_grad_()
        attend(*qkv, case.plan, impl=impl).sum().backward()
        assert qkv[which].grad.isfinite().all()


def test_key_lists_are_the_lists_the_other_way_round():
    plan = case_of().plan
    counts, indices = plan.key_lists
    other = replace(
        plan, q_len=plan.k_len, k_len=plan.q_len, block_q=plan.block_k, block_k=plan.block_q,
        counts=counts, indices=indices,
    )  # fmt: skip
    assert torch.equal(other.block_mask, plan.block_mask.mT)


def test_what_triton_cannot_differentiate_is_refused():
    case = case_of().to(DEVICE)
    leaves = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    order = torch.arange(101, device=DEVICE).flip(0)[None, None]
    starts = torch.tensor([[[0, 10, 20, 30, 40, 50, 60, 101]]], dtype=torch.int32, device=DEVICE)
    for change, said in (
        ({"k_order": order}, "a token order"),
        ({"k_starts": starts}, "blocks of variable size"),
        ({"tail": "pooled"}, "tail='pooled'"),
    ):
        plan = replace(case.plan, **change)
        with pytest.raises(ImplUnavailableError, match=f"triton has no backward pass for {said}; use impl='torch'"):
            attend(*leaves, plan, impl="triton")
        with torch.no_grad():
            attend(*leaves, plan, impl="triton")
        assert choose_impl(leaves[0], "auto", plan)[0] == "torch"
        with pytest.raises(ImplUnavailableError, match=f"no backward pass for {said}"):
            attend(case.q, leaves[1], case.v, plan, impl="triton")


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120, "gfx942", "interpreter"])
@pytest.mark.parametrize("dtype", plans.DTYPES, ids=str)
def test_tiles_never_exceed_blocks(dtype, arch):
    for block_q in (8, 16, 48, 64, 128):
        for head_dim in (32, 64, 96, 128, 256):
            for tiles in block_sparse_backward.pick_tiles(block_q, 64, head_dim, dtype, arch):
                assert 16 <= tiles.block_m < max(17, 2 * block_q) and 16 <= tiles.block_n <= 64
    with pytest.raises(ImplUnavailableError, match="up to 256, got 264"):
        block_sparse_backward.pick_tiles(64, 64, 264, dtype, arch)


@pytest.mark.parametrize("dtype", plans.DTYPES, ids=str)
def test_budget_is_too_small_for_one_wrong_block(dtype):
    case = case_of(dtype=dtype)
    draw = plans.Draw(7)
    d_out, d_lse = draw.normal(*case.q.shape).to(dtype), draw.normal(2, 2, 77)
    exact, budget = oracle(case, d_out, d_lse)
    mask = case.plan.block_mask.clone()
    mask[0, 1, 2, 0] = ~mask[0, 1, 2, 0]
    plan = BlockPlan.from_mask(mask, 77, 101, batch=2, heads=2, block_q=32, block_k=16)
    wrong, _ = oracle(replace(case, plan=plan), d_out, d_lse)
    assert all(((a - b).abs() > allowed).any() for a, b, allowed in zip(wrong, exact, budget, strict=True))
