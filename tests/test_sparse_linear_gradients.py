"""sparse_linear: gradients of q, k, v and of the projection, and training it."""

import dataclasses

import pytest
import torch

import dsattn
from dsattn.block_plan import BlockPlan, LinearTail
from dsattn.grid import Call, VideoGrid
from dsattn.kernels import sparse_linear as kernels
from dsattn.methods.sparse_linear import SparseLinearConfig, classify

from . import plans, test_block_sparse_backward
from .method_inputs import dense, tensors
from .sparse_linear_parts import (
    DEVICE,
    SCOPES,
    linear_pairs,
    oracle,
    plan,
    projection,
)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ["softmax", "elu", "hedgehog"])
def test_gradcheck(scope, name):
    """Of q, k, v, weight and bias; relu has a kink."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 11, 2, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    weight, bias = (x.double() for x in projection(3))
    critical = torch.rand(1, 2, 3, 3, generator=generator) < 0.4
    critical[..., 0] = True
    marginal = ~critical & (torch.rand(1, 2, 3, 3, generator=generator) < 0.7)
    blocks = {"global": None, "complement": ~critical, "marginal": marginal}[scope]

    def run(q, k, v, weight, bias):
        tail = LinearTail(weight, bias, name, blocks)
        made = BlockPlan.from_mask(critical, 11, 11, batch=1, heads=2, block_q=4, block_k=4, linear=tail)
        return dsattn.attend(q, k, v, made, impl="torch")

    leaves = [x.requires_grad_() for x in (q, k, v, weight, bias)]
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("scope", SCOPES)
def test_gradients_against_the_oracle(scope, impl):
    grid = VideoGrid(3, 5, 7)
    q, k, v = tensors(grid, batch=2)
    weight, bias = projection(32)
    critical, marginal = classify(q, k, Call(0, 0, grid), SparseLinearConfig(critical=0.4, block_q=32, block_k=16))
    blocks = {"global": None, "complement": ~critical, "marginal": marginal}[scope]
    options = {"batch": 2, "heads": 2, "block_q": 32, "block_k": 16}
    target = torch.randn(q.shape, generator=torch.Generator().manual_seed(5))

    def gradients(dtype, run, device="cpu"):
        leaves = [x.to(device=device, dtype=dtype, copy=True).requires_grad_() for x in (q, k, v, weight, bias)]
        return torch.autograd.grad((run(*leaves) * target.to(device)).sum(), leaves)

    device = DEVICE if impl == "triton" else "cpu"

    def sparse(q, k, v, weight, bias):
        tail = LinearTail(weight, bias, "softmax", None if blocks is None else blocks.to(device))
        made = BlockPlan.from_mask(critical.to(device), 105, 105, **options, linear=tail)
        return dsattn.attend(q, k, v, made, impl=impl)

    exact, linear = (BlockPlan.from_mask(x, 105, 105, **options).to_dense() for x in (critical, marginal))
    pairs = linear_pairs(scope, exact, linear)
    want = gradients(torch.float64, lambda *leaves: oracle(*leaves[:3], exact, pairs, *leaves[3:], "softmax"))
    for got, expected in zip(gradients(torch.float32, sparse, device), want, strict=True):
        # fp32 sums of up to 105 * 32 terms of both signs.
        error = float((got.cpu().double() - expected).abs().max())
        assert error <= 2.0**-24 * 64 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_gradients(dtype, scope, impl):
    """The softmax's own budget, and two roundings each of what the linear branch adds and of their sum."""
    grid = VideoGrid(3, 5, 7)
    leaves = [x.to(dtype) for x in (*tensors(grid, batch=2), *projection(32))]
    critical, marginal = classify(
        *leaves[:2], Call(0, 0, grid), SparseLinearConfig(critical=0.4, block_q=32, block_k=16)
    )
    blocks = {"global": None, "complement": ~critical, "marginal": marginal}[scope]
    options = {"batch": 2, "heads": 2, "block_q": 32, "block_k": 16}
    target = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    plain = BlockPlan.from_mask(critical, 105, 105, **options)
    exact, linear = (BlockPlan.from_mask(x, 105, 105, **options).to_dense() for x in (critical, marginal))
    double = [x.double().requires_grad_() for x in leaves]
    result = oracle(*double[:3], exact, linear_pairs(scope, exact, linear), *double[3:], "softmax")
    want = torch.autograd.grad((result * target.double()).sum(), double)
    case = plans.Case("", *leaves[:3], plain, 32**-0.5)
    softmax, budget = test_block_sparse_backward.oracle(case, target, torch.zeros(2, 2, 105))
    zeros = [torch.zeros_like(x) for x in want[3:]]

    device = DEVICE if impl == "triton" else "cpu"
    own = [x.to(device).requires_grad_() for x in leaves]
    tail = LinearTail(*own[3:], "softmax", None if blocks is None else blocks.to(device))
    made = BlockPlan.from_mask(critical.to(device), 105, 105, **options, linear=tail)
    out = dsattn.attend(*own[:3], made, impl=impl)
    got = torch.autograd.grad(out, own, target.to(device))
    unit = torch.finfo(dtype).eps / 2
    everything = zip(got, want, [*softmax, *zeros], [*budget, *zeros], strict=True)
    for name, (found, expected, of_softmax, allowed) in zip(("q", "k", "v", "weight", "bias"), everything, strict=True):
        assert found.dtype == dtype
        added = (expected - of_softmax).abs()
        allowed = allowed + 2 * unit * (added + expected.abs()) + 2.0**-24 * 64 * max(1.0, float(expected.abs().max()))
        excess = float(((found.cpu().double() - expected).abs() - allowed).max())
        assert excess <= 0, f"gradient of {name} exceeds its budget by {excess:.3g}"


def test_linear_branch_keeps_only_its_inputs_for_the_backward_pass():
    """Features and sums are made anew: a training step holds no fp32 copies of q, k and v."""
    plan = BlockPlan.dense(1, 2, 64, 64, block_q=32, block_k=32)
    q, k, v = (torch.randn(1, 64, 2, 32, dtype=torch.float16).requires_grad_() for _ in range(3))
    tail = LinearTail(*projection(32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        kernels.linear_attention(q, k, v, plan, tail).sum().backward()
    assert not any(x.dtype == torch.float32 and x.numel() >= q.numel() for x in kept)
    assert all(x.grad.isfinite().all() and x.grad.any() for x in (q, k, v))


def test_training_the_projection_lowers_the_error():
    grid = VideoGrid(3, 8, 8)
    qkv = [x * 0.5 for x in tensors(grid)]
    made, want = plan(qkv, Call(0, 0, grid), critical=0.3), dense(qkv)
    weight, bias = torch.zeros(32, 32, requires_grad=True), torch.zeros(32, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.02)
    errors = []
    for _ in range(40):
        out = dsattn.attend(*qkv, dataclasses.replace(made, linear=LinearTail(weight, bias)), impl="torch")
        errors.append((out - want).square().mean())
        optimizer.zero_grad()
        errors[-1].backward()
        optimizer.step()
    assert torch.isclose(errors[0], (dsattn.attend(*qkv, made, impl="torch") - want).square().mean())
    assert errors[-1] < 0.9 * errors[0]
