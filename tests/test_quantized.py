"""Quantised attention: its arithmetic against float64 with bounds from the quantisation steps, its kernel, its face."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import dsattn
from dsattn.block_plan import BlockPlan
from dsattn.config import QUANTIZATIONS
from dsattn.errors import ImplUnavailableError, UsageError
from dsattn.functional import attend, choose_impl, why_not
from dsattn.kernels import quantize, quantize_triton, quantized_attention, quantized_reference
from dsattn.kernels.quantize import FP8_MAX, INT8_MAX, KeyTiles

from . import plans

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = tuple(QUANTIZATIONS)
# Of e4m3: half an ulp, relative, and half the smallest number.
ULP, SMALLEST = 2.0**-4, 2.0**-10


def fp8_runs() -> bool:
    return DEVICE == "cpu" or torch.cuda.get_device_capability() >= (8, 9)


IMPLS = ("reference", "triton")


def run(case: plans.Case, kind: str, impl: str) -> tuple[Tensor, Tensor]:
    if impl == "triton" and "fp8" in kind and not fp8_runs():
        pytest.skip("FP8 needs compute capability 8.9")
    moved = case.to(DEVICE)
    out, lse = attend(
        moved.q, moved.k, moved.v, moved.plan, impl=impl, scale=case.scale, return_lse=True, quantization=kind
    )
    return out.cpu(), lse.cpu()


def dense_bounds(case: plans.Case, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Out and LSE in float64 from token pairs, and what quantisation may move each of them by.

    INT8: a number is off by at most half a step, so a logit by ``scale (|q - q̂|·|k'| + |q̂|·|k' - k̂|)``, elementwise
    with ``|q - q̂| <= Δq / 2`` and ``|k' - k̂| <= Δk / 2``; if all logits of a row are off by at most ε, the LSE is off
    by at most ε and a weight by a factor of at most e^(2ε). FP8: a weight is off by ULP of itself or SMALLEST / 448 of
    the largest, a value by ULP of itself or SMALLEST of its scale.
    """
    int8_qk, fp8_pv = QUANTIZATIONS[kind]
    plan = case.plan
    q, k, v = (x.transpose(1, 2).double() for x in (case.q, case.k, case.v))
    mask = plan.to_dense()
    readable = quantize.KeyTiles.of(plan).tokens(plan)
    seen = torch.zeros(plan.batch, plan.heads, plan.k_len + 1, dtype=torch.bool)
    seen.scatter_(2, readable[0].masked_fill(~readable[1], plan.k_len).flatten(2), True)
    seen = seen[..., :-1, None]
    logits = (q @ k.mT * case.scale).masked_fill(~mask, -torch.inf)
    lse, p = logits.logsumexp(-1), logits.softmax(-1)
    moved = torch.zeros(())
    if int8_qk:
        k = k.masked_fill(~seen, 0)
        mean = k.sum(2, keepdim=True) / seen.sum(2, keepdim=True)
        smooth = (k - mean).masked_fill(~seen, 0)
        q_step = q.abs().amax(-1, keepdim=True) / INT8_MAX
        k_step = tile_steps(plan, smooth)
        q_off = q_step / 2 * smooth.abs().sum(-1)[:, :, None]
        k_off = (q.abs().sum(-1, keepdim=True) + q_step / 2 * q.shape[-1]) * k_step[:, :, None] / 2
        moved = abs(case.scale) * ((q_off + k_off) * mask).amax(-1)
    v = v.masked_fill(~seen, 0)
    size = p @ v.abs()
    growth = torch.expm1(2 * moved)[..., None]
    allowed = growth * size
    if fp8_pv:
        v_step = v.abs().amax(2, keepdim=True) / FP8_MAX
        # Against the largest weight so far a weight is at least as large as against the largest of all.
        weights = ULP * p + SMALLEST / FP8_MAX * p.amax(-1, keepdim=True) * mask
        off = weights @ (v.abs() * (1 + ULP) + SMALLEST * v_step) + p @ (ULP * v.abs() + SMALLEST * v_step)
        allowed = allowed + (1 + growth) * off
    return (p @ v).transpose(1, 2), lse, allowed.transpose(1, 2), moved.expand(lse.shape)


def tile_steps(plan: BlockPlan, keys: Tensor) -> Tensor:
    """``[B, H, Sk]``: quantisation step of every token's tile, from the plan's definition alone."""
    size = min(64, max(32, 1 << (plan.block_k - 1).bit_length()))
    steps = torch.zeros(keys.shape[:3], dtype=torch.float64)
    for b in range(plan.batch):
        for h in range(plan.heads):
            order = plans._tokens(plan.k_order, b, h, plan.k_len)
            edges = plans._edges(plan.k_starts, b, h, plan.k_len, plan.block_k)
            for start, end in zip(edges[:-1], edges[1:], strict=True):
                for first in range(start, end, size):
                    tokens = order[first : min(first + size, end)]
                    steps[b, h, tokens] = keys[b, h, tokens].abs().max() / INT8_MAX
    return steps


def check(case: plans.Case, kind: str, impl: str) -> None:
    """Without a tail. Rounding of the dtype comes on top: the budget of an implementation in full precision."""
    want, lse, allowed, moved = dense_bounds(case, kind)
    plain = plans.error_budget(case)
    got, got_lse = run(case, kind, impl)
    assert got.dtype == case.q.dtype and got.shape == want.shape and got_lse.dtype == torch.float32
    excess = float(((got.double() - want).abs() - allowed - plain.out).max())
    assert excess <= 0, f"{case.name} {kind} {impl}: out exceeds its bound by {excess:.3g}"
    excess = float(((got_lse.double() - lse).abs() - moved - plain.lse).max())
    assert excess <= 0, f"{case.name} {kind} {impl}: lse exceeds its bound by {excess:.3g}"


def case_of(lengths=(77, 101), blocks=(32, 16), dim=40, dtype=torch.float16, scale=0.2, seed=0, **plan) -> plans.Case:
    """Two batches and two heads, a block kept by all, keys with a common offset, tensors cut out of wider ones."""
    draw = plans.Draw(seed)
    q, k, v = (draw.normal(2, n, 3, dim + 8).to(dtype)[:, :, 1:, 4:-4] for n in (lengths[0], lengths[1], lengths[1]))
    k = k + 4 * draw.normal(1, 1, 2, dim).to(dtype)
    mask = draw.uniform(1, 2, -(-lengths[0] // blocks[0]), -(-lengths[1] // blocks[1])) < 0.4
    mask[..., 0] = True
    made = BlockPlan.from_mask(mask, *lengths, batch=2, heads=2, block_q=blocks[0], block_k=blocks[1], **plan)
    return plans.Case(f"{lengths} {blocks} d{dim} {dtype}", q, k, v, made.validate(), scale)


# -- the arithmetic -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_error_stays_within_the_steps(dim, dtype, kind, impl):
    check(case_of(dim=dim, dtype=dtype), kind, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(24))
def test_random_plans(seed, kind, impl):
    """Orders, clusters, partial blocks, key lengths, shared lists, one block, strided tensors."""
    shape = plans.random_shape(seed)._replace(tail="none")
    shape = shape._replace(dtype=torch.float16 if shape.dtype == torch.float32 else shape.dtype)
    check(plans.random_case(shape, seed), kind, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tail", ["pooled", "pooled_block"])
@pytest.mark.parametrize("kind", KINDS)
def test_tail_has_no_error_of_its_own(kind, tail, impl):
    """Its logits and weights are exact: what the kept keys may be off by is all there is."""
    case = case_of(tail=tail, scale=0.05)
    exact, lse = plans.oracle(case)
    _, _, allowed, moved = dense_bounds(replace(case, plan=replace(case.plan, tail="none")), kind)
    # Kept weights off by up to e^(2ε) move the shares of the tail's too.
    shares = (2 * moved).expm1().mT[..., None] * case.v.double().abs().max()
    budget = plans.error_budget(case, (exact, lse))
    got, got_lse = run(case, kind, impl)
    assert ((got_lse.double() - lse).abs() <= moved + budget.lse).all()
    assert ((got.double() - exact).abs() <= allowed + shares + budget.out).all()


def predicted_square_error(case: plans.Case, kind: str) -> Tensor:
    """``[B, H, Sq]``: squared error of the output to first order, if every rounding is independent and uniform.

    Rounding to steps of size Δ has variance Δ²/12. A logit moves by the rounding of its key times q, and with all
    others of its row by that of the query times k'; the output moves by ``Σ p_k (v_k - o) δs_k``.
    """
    int8_qk, fp8_pv = QUANTIZATIONS[kind]
    q, k, v = (x.transpose(1, 2).double() for x in (case.q, case.k, case.v))
    logits = (q @ k.mT * case.scale).masked_fill(~case.plan.to_dense(), -torch.inf)
    p = logits.softmax(-1)
    total = torch.zeros(p.shape[:3], dtype=torch.float64)
    if int8_qk:
        smooth = k - k.mean(2, keepdim=True)
        q_step, k_step = q.abs().amax(-1) / INT8_MAX, tile_steps(case.plan, smooth)
        # c[r, k, :] = p (v_k - o), the change of the output by a logit.
        change = p[..., None] * (v[:, :, None] - (p @ v)[:, :, :, None])
        of_keys = (change.square().sum(-1) * k_step.square()[:, :, None]).sum(-1) * q.square().sum(-1)
        of_query = torch.einsum("bhrkv,bhkd->bhrvd", change, smooth).square().sum((-1, -2)) * q_step.square()
        total = total + case.scale**2 / 12 * (of_keys + of_query)
    if fp8_pv:
        weights = p / p.amax(-1, keepdim=True) * FP8_MAX
        values = v / (v.abs().amax(2, keepdim=True) / FP8_MAX)
        w_step, v_step = (torch.exp2(x.abs().clamp(min=2.0**-6).log2().floor() - 3) for x in (weights, values))
        of_weights = ((w_step / weights.clamp(min=1e-30) * p).square() @ v.square()).sum(-1)
        of_values = (p.square() @ (v_step / values * v).square().nan_to_num(0)).sum(-1)
        total = total + (of_weights + of_values) / 12
    return total


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_error_is_what_rounding_predicts(kind, impl):
    """Over thousands of roundings, within a fifth; one wrong block of 32 would be ten times as large."""
    case = case_of(lengths=(128, 256), blocks=(64, 32), dim=64, scale=0.125)
    predicted = float(predicted_square_error(case, kind).sum())
    exact = plans.oracle(case)[0]
    measured = float((run(case, kind, impl)[0].double() - exact).square().sum())
    assert 0.8 < measured / predicted < 1.2, f"{measured:.4g} measured, {predicted:.4g} predicted"
    mask = case.plan.block_mask.clone()
    mask[0, 1, 1, 3] = ~mask[0, 1, 1, 3]
    plan = BlockPlan.from_mask(mask, 128, 256, batch=2, heads=2, block_q=64, block_k=32)
    wrong = plans.oracle(replace(case, plan=plan))[0]
    assert float((wrong - exact).square().sum()) > 10 * predicted


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_computes_what_the_specification_says(kind, seed):
    """From the same quantised tensors. Weights in FP8 are rounded against another peak: two roundings apart."""
    if "fp8" in kind and not fp8_runs():
        pytest.skip("FP8 needs compute capability 8.9")
    shape = plans.random_shape(seed + 40)._replace(dtype=torch.float16)
    case = plans.random_case(shape, seed + 40).to(DEVICE)
    int8_qk, fp8_pv = QUANTIZATIONS[kind]
    how = {"scale": case.scale, "int8_qk": int8_qk, "fp8_pv": fp8_pv}
    made = quantize_triton.quantize(case.k, case.v, case.plan, int8_qk=int8_qk, fp8_pv=fp8_pv)
    got = quantized_attention.block_sparse_attention(case.q, case.k, case.v, case.plan, quantized=made, **how)
    want = quantized_reference.block_sparse_attention(case.q, case.k, case.v, case.plan, quantized=made, **how)
    budget = plans.error_budget(case.to("cpu"))
    largest = float(case.v.float().abs().max())
    apart = 2 * ULP * largest if fp8_pv else 0.0
    assert float((got[0].double() - want[0].double()).abs().max()) <= budget.out + apart
    assert float((got[1].double() - want[1].double()).abs().max()) <= budget.lse


@pytest.mark.parametrize("seed", range(12))
def test_quantising_kernel(seed):
    """Means are summed in another order: a number at the middle between two integers may fall on either side."""
    shape = plans.random_shape(seed)._replace(dtype=torch.float16)
    case = plans.random_case(shape, seed).to(DEVICE)
    if not fp8_runs():
        pytest.skip("FP8 needs compute capability 8.9")
    got = quantize_triton.quantize(case.k, case.v, case.plan, int8_qk=True, fp8_pv=True)
    moved = case.to("cpu")
    want = quantize.quantize(moved.k, moved.v, moved.plan, int8_qk=True, fp8_pv=True)
    apart = (got.k.cpu().int() - want.k.int()).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3
    torch.testing.assert_close(got.k_scale.cpu(), want.k_scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.k_mean.cpu(), want.k_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.v_scale.cpu(), want.v_scale, rtol=0, atol=0)
    # On a GPU a quotient may end one fp32 rounding away: one step of e4m3 at a tie.
    torch.testing.assert_close(got.v.cpu().float(), want.v.float(), rtol=2 * ULP, atol=2 * SMALLEST)


# -- smoothing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_a_common_offset_of_all_keys_changes_nothing_but_the_lse(impl):
    """K + c: out stays bit for bit where the mean is exact, and the LSE moves by scale q·c."""
    draw = plans.Draw(0)
    q, v = (draw.normal(1, 64, 2, 32).to(torch.float16) for _ in range(2))
    # Numbers with few digits: every sum here is exact in fp16 and fp32.
    k = (draw.normal(1, 64, 2, 32) * 4).round() / 4
    k = torch.cat([k, -k], 1).to(torch.float16)
    v = torch.cat([v, v.flip(1)], 1)
    offset = torch.arange(-16, 16).to(torch.float16)
    plan = BlockPlan.dense(1, 2, 64, 128, block_q=32, block_k=32)
    base = plans.Case("", q, k, v, plan, 0.2)
    out, lse = run(base, "int8_qk", impl)
    shifted, shifted_lse = run(replace(base, k=k + offset), "int8_qk", impl)
    assert torch.equal(out, shifted)
    moved = (q.double() * offset.double()).sum(-1).transpose(1, 2) * 0.2
    torch.testing.assert_close(shifted_lse.double(), lse.double() + moved, rtol=1e-6, atol=1e-5)


def test_smoothing_pays_where_keys_share_an_offset():
    """Outlier channels as in video models: without smoothing the offset takes all of the 127 steps."""
    case = case_of(dim=64, lengths=(128, 256), blocks=(64, 64), scale=0.125)
    case = replace(case, k=case.k + 40 * (torch.arange(64) % 16 == 3).to(torch.float16))
    exact = plans.oracle(case)[0]
    smooth = run(case, "int8_qk", "reference")[0].double()
    k = case.k.transpose(1, 2).double()
    step = k.abs().amax((2, 3), keepdim=True) / INT8_MAX
    rough_k = ((k / step).round() * step).transpose(1, 2)
    rough = plans.oracle(replace(case, k=rough_k))[0]
    assert (smooth - exact).norm() * 8 < (rough - exact).norm()


def test_lse_merges_with_full_precision():
    """Two halves of the keys, one of them quantised, merge to the whole: the LSE is in the same units."""
    case = case_of(lengths=(70, 128), blocks=(32, 32), dim=64)
    halves = []
    for first, impl, kind in ((0, "reference", "int8_qk"), (64, "torch", None)):
        k, v = case.k[:, first : first + 64], case.v[:, first : first + 64]
        plan = BlockPlan.dense(2, 2, 70, 64, block_q=32, block_k=32)
        halves.append(attend(case.q, k, v, plan, impl=impl, scale=0.2, return_lse=True, quantization=kind))
    whole = torch.logaddexp(halves[0][1], halves[1][1])
    shares = [(lse - whole).exp().transpose(1, 2)[..., None] for _, lse in halves]
    merged = sum(out.float() * share for (out, _), share in zip(halves, shares, strict=True))
    dense = replace(case, plan=BlockPlan.dense(2, 2, 70, 128, block_q=32, block_k=32))
    exact, lse, allowed, moved = dense_bounds(dense, "int8_qk")
    budget = plans.error_budget(dense)
    assert ((whole.double() - lse).abs() <= moved + budget.lse).all()
    # Errors of the halves' shares, of one half alone, come to at most the bound for all keys.
    assert ((merged.double() - exact).abs() <= allowed + 2 * budget.out).all()


# -- corners ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths, blocks", [((1, 1), (16, 16)), ((5, 3), (64, 64)), ((131, 200), (200, 100))])
def test_lengths(lengths, blocks, kind, impl):
    check(case_of(lengths=lengths, blocks=blocks), kind, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_may_hold_anything(kind, impl):
    """It enters neither the mean nor a scale, and leaks no NaN."""
    lengths = torch.tensor([60, 9], dtype=torch.int32)
    case = case_of(key_lengths=lengths)
    clean = run(case, kind, impl)
    for x in (case.k, case.v):
        x[0, 60:], x[1, 9:] = torch.nan, torch.inf
    dirty = run(case, kind, impl)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.0, -0.1])
def test_any_scale(scale, kind, impl):
    check(case_of(scale=scale), kind, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_constant_tensors(impl):
    """Keys all equal (nothing left after smoothing), values and queries of zero."""
    plan = BlockPlan.dense(1, 1, 40, 50, block_q=32, block_k=32)
    q, ones = torch.zeros(1, 40, 1, 32, dtype=torch.float16), torch.ones(1, 50, 1, 32, dtype=torch.float16)
    out, lse = run(plans.Case("", q, ones, ones * 0, plan, 1.0), "int8_qk_fp8_pv", impl)
    assert not out.any()
    torch.testing.assert_close(lse, torch.full((1, 1, 40), 50.0).log())


def test_tiles_cover_every_position_once():
    for seed in range(30):
        plan = plans.random_case(plans.random_shape(seed), seed).plan
        tiles = KeyTiles.of(plan)
        tokens, exists = tiles.tokens(plan)
        sizes = plan.k_sizes.clamp(min=0).sum(-1).expand(plan.batch, plan.heads)
        for b in range(plan.batch):
            for h in range(plan.heads):
                found = tokens[b, h][exists[b, h]]
                assert len(found) == int(sizes[b, h]) == len(found.unique())
        assert tiles.size in (32, 64) and (tiles.start[..., 1:] >= tiles.start[..., :-1]).all()


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120, "gfx942", "interpreter"])
def test_tiles_never_exceed_blocks(arch):
    for block_q in (8, 16, 48, 64, 128):
        for head_dim in (32, 64, 96, 128, 256):
            for tail in (False, True):
                tiles = quantized_attention.pick_tiles(block_q, 64, head_dim, arch, tail)
                assert 16 <= tiles.block_m < max(17, 2 * block_q) and tiles.block_n == 64
    with pytest.raises(ImplUnavailableError, match="up to 256, got 264"):
        quantized_attention.pick_tiles(64, 64, 264, arch)


# -- the face -----------------------------------------------------------------------------------------------


def test_refusals():
    case = case_of().to(DEVICE)
    with pytest.raises(UsageError, match="quantization must be one of int8_qk, fp8_pv, int8_qk_fp8_pv; got 'int4'"):
        attend(case.q, case.k, case.v, case.plan, quantization="int4")
    with pytest.raises(UsageError, match="quantization must be one of"):
        dsattn.Engine("topk", quantization="int4")
    with pytest.raises(ImplUnavailableError, match="flex has no quantization"):
        attend(case.q, case.k, case.v, case.plan, impl="flex", quantization="int8_qk")
    with pytest.raises(ImplUnavailableError, match="takes float16 or bfloat16, got torch.float32"):
        attend(case.q.float(), case.k.float(), case.v.float(), case.plan, impl="triton", quantization="int8_qk")
    with pytest.raises(ImplUnavailableError, match="gives no verdicts"):
        choose_impl(case.q, "torch", case.plan, verdict=True, quantization="int8_qk")
    # Nobody asked for an implementation: the message says which one emulates it.
    with pytest.raises(
        ImplUnavailableError, match=r"float32; leave quantization out, or name impl='torch' \(--impl to"
    ):
        attend(case.q.float(), case.k.float(), case.v.float(), case.plan, quantization="int8_qk")
    with pytest.raises(ImplUnavailableError) as refused:  # and is silent where that one cannot either
        choose_impl(case.q.float(), "auto", case.plan, verdict=True, quantization="int8_qk")
    assert "impl='torch'" not in str(refused.value)
    with pytest.raises(ImplUnavailableError, match="no backward pass; use quantization=None"):
        attend(case.q, case.k.detach().requires_grad_(), case.v, case.plan, impl="torch", quantization="int8_qk")


def test_old_gpus_are_refused(monkeypatch):
    for arch, kind, reason in (
        (75, "int8_qk", "INT8 products need compute capability 8.0, this GPU has 7.5"),
        (80, "int8_qk", None),
        (80, "int8_qk_fp8_pv", "FP8 products need compute capability 8.9, this GPU has 8.0"),
        (86, "fp8_pv", "FP8 products need compute capability 8.9, this GPU has 8.6"),
        (89, "int8_qk_fp8_pv", None),
        ("gfx942", "int8_qk", None),
        ("gfx942", "fp8_pv", "FP8 products are for NVIDIA GPUs from compute capability 8.9 on, this is gfx942"),
    ):
        monkeypatch.setattr(quantized_attention, "architecture", lambda device, arch=arch: arch)
        assert quantized_attention.why_unavailable(torch.device("cuda"), *QUANTIZATIONS[kind]) == reason


def test_a_cpu_is_refused_with_the_way_out():
    """Without the interpreter that the other tests run in."""
    code = """
import torch, dsattn
q = torch.randn(1, 64, 1, 32, dtype=torch.bfloat16)
plan = dsattn.BlockPlan.dense(1, 1, 64, 64)
for impl in ("auto", "triton"):
    try:
        dsattn.attend(q, q, q, plan, impl=impl, quantization="int8_qk")
    except dsattn.ImplUnavailableError as error:
        assert "impl='torch' or 'reference' emulates it" in str(error), error
    else:
        raise SystemExit("it ran")
assert dsattn.attend(q, q, q, plan, impl="torch", quantization="int8_qk").shape == q.shape
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_engine_passes_it_on():
    grid = dsattn.VideoGrid(2, 8, 8)
    q, k, v = (plans.Draw(i).normal(1, grid.tokens, 2, 32) for i in range(3))
    call = dsattn.Call(0, 0, grid)
    outs = {}
    for kind in (None, "int8_qk_fp8_pv"):
        engine = dsattn.Engine("topk", impl="torch", quantization=kind, monitor=0)
        outs[kind] = engine(q, k, v, call)
        assert engine.summary()["config"]["quantization"] == kind
    relative = (outs[None] - outs["int8_qk_fp8_pv"]).norm() / outs[None].norm()
    assert 1e-3 < relative < 0.1
    assert why_not(q, "torch", quantization="int8_qk") is None
