"""Every implementation of block-sparse attention against an independent float64 oracle, and against its own laws."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dsattn.block_plan import BlockPlan, LinearTail
from dsattn.errors import ImplUnavailableError, UsageError
from dsattn.functional import attend

from . import plans

IMPLS = ("reference", "torch", "flex", "triton")
CHUNK = 10
CHUNKS = range(30)
# FlexAttention compiles for every shape: few shapes, many contents.
FLEX_SHAPES = range(100, 115)
FLEX_CONTENTS = 20


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of tiny tensors: waking a second thread for each takes several times longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(case: plans.Case, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and LSE on the CPU, computed where the implementation runs: Triton needs a GPU where there is one."""
    case = case.to("cuda") if impl == "triton" and torch.cuda.is_available() else case
    out, lse = attend(case.q, case.k, case.v, case.plan, impl=impl, return_lse=True, scale=case.scale)
    return out.cpu(), lse.cpu()


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    error = float((got.double() - want.double()).abs().max())
    assert error <= tolerance, f"off by {error:.3g}, allowed {tolerance:.3g}"


def plain_case(dtype: torch.dtype, mask: torch.Tensor | None = None, seed: int = 0, **options) -> plans.Case:
    """Two batches, three heads, 77 queries, 101 keys, blocks of 32 and 16; everything kept without a mask."""
    draw = plans.Draw(seed)
    q, k, v = (draw.normal(2, length, 3, 40).to(dtype) for length in (77, 101, 101))
    mask = torch.ones(1, 1, 3, 7, dtype=torch.bool) if mask is None else mask
    plan = BlockPlan.from_mask(mask, 77, 101, batch=2, heads=3, block_q=32, block_k=16, **options)
    return plans.Case("plain", q, k, v, plan, 0.2)


# -- random plans -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
def test_random_plans(impl, chunk):
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        case = plans.random_case(plans.random_shape(seed), seed)
        plans.check(case, *run(case, impl))


@pytest.mark.parametrize("shape_seed", FLEX_SHAPES)
def test_random_plans_flex(shape_seed):
    shape = plans.random_shape(shape_seed)
    for seed in range(1000 * shape_seed, 1000 * shape_seed + FLEX_CONTENTS):
        case = plans.random_case(shape, seed, starts_seed=shape_seed)
        plans.check(case, *run(case, "flex"))


def features(seed: int) -> list[str]:
    """What the case of a seed exercises."""
    shape = plans.random_shape(seed)
    case = plans.random_case(shape, seed)
    case.plan.validate()
    flags = {
        "q order": shape.q_order,
        "k order": shape.k_order,
        "q clusters": shape.q_clusters,
        "k clusters": shape.k_clusters,
        "empty cluster": (case.plan.k_edges.diff(dim=-1) == 0).any(),
        "key lengths": shape.key_lengths,
        "pooled tail": shape.tail == "pooled",
        "pooled tail per block": shape.tail == "pooled_block",
        "unequal blocks": shape.block_q != shape.block_k,
        "unequal lengths": shape.q_len != shape.k_len,
        "partial block": shape.k_len % shape.block_k and not shape.k_clusters,
        "long": shape.k_len > 300,
        "lists per head": case.plan.counts.shape[1] > 1,
        "lists for all heads": case.plan.counts.shape[1] < shape.heads,
        "strided": not (case.q.is_contiguous() and case.k.is_contiguous() and case.v.is_contiguous()),
    }
    return [f"{shape.dtype}", *(name for name, on in flags.items() if on)]


FEATURES = 15 + len(plans.DTYPES)


def test_random_plans_cover_every_feature():
    seeds = range(CHUNK * len(CHUNKS))
    seen = Counter(feature for seed in seeds for feature in features(seed))
    assert len(seen) == FEATURES and min(seen.values()) >= 10, seen
    assert {plans.random_shape(seed).dim for seed in seeds} == set(plans.HEAD_DIMS)


def test_flex_shapes_cover_every_feature():
    assert len({feature for seed in FLEX_SHAPES for feature in features(seed)}) == FEATURES


@pytest.mark.parametrize("dtype", plans.DTYPES, ids=str)
def test_budget_is_too_small_for_one_wrong_block(dtype):
    """A tolerance that lets a dropped block or a forgotten weight pass would prove nothing."""
    mask = torch.rand(1, 3, 3, 7, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[..., :2] = True
    case = plain_case(dtype, mask, tail="pooled")
    out, lse = run(case, "reference")
    plans.check(case, out, lse)
    dropped = mask.clone()
    dropped[0, 1, 2, 0] = False
    wrong = replace(case, plan=replace(plain_case(dtype, dropped, tail="pooled").plan))
    with pytest.raises(AssertionError, match="out is off"):
        plans.check(wrong, out, lse)
    with pytest.raises(AssertionError, match="out is off"):
        plans.check(replace(case, plan=replace(case.plan, tail="none")), out, lse)


# -- laws ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", plans.DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_keep_all_equals_dense(impl, dtype):
    case = plain_case(dtype)
    want = F.scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in (case.q, case.k, case.v)), scale=case.scale
    )
    close(run(case, impl)[0], want.transpose(1, 2), plans.error_budget(case).out)


@pytest.mark.parametrize("impl", IMPLS)
def test_default_scale(impl):
    case = plain_case(torch.float32)
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    moved = case.to(device)
    out = attend(moved.q, moved.k, moved.v, moved.plan, impl=impl).cpu()
    want = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (case.q, case.k, case.v)))
    close(out, want.transpose(1, 2), plans.error_budget(replace(case, scale=40**-0.5)).out)


@pytest.mark.parametrize("impl", IMPLS)
def test_complementary_plans_merge(impl):
    """Two plans that share no block combine through their LSEs to the plan with the blocks of both."""
    mask = torch.rand(2, 3, 3, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., 0], mask[..., 6] = True, False
    whole, first, second = (plain_case(torch.float32, m) for m in (mask | ~mask, mask, ~mask))
    (out, lse), (out1, lse1), (out2, lse2) = (run(case, impl) for case in (whole, first, second))
    merged_lse = torch.logaddexp(lse1, lse2)
    weights = [(part - merged_lse).exp().transpose(1, 2)[..., None] for part in (lse1, lse2)]
    budgets = [plans.error_budget(case) for case in (whole, first, second)]
    close(merged_lse, lse, sum(b.lse for b in budgets))
    close(weights[0] * out1 + weights[1] * out2, out, sum(b.out for b in budgets))


@pytest.mark.parametrize("impl", IMPLS)
def test_orders_change_nothing_when_all_is_kept(impl):
    draw = plans.Draw(5)
    orders = {"q_order": draw.permutations((2, 3), 77), "k_order": draw.permutations((1, 3), 101)}
    plain, permuted = plain_case(torch.float32), plain_case(torch.float32, **orders)
    budget = plans.error_budget(plain)
    for got, want, allowed in zip(run(permuted, impl), run(plain, impl), budget, strict=True):
        close(got, want, 2 * allowed)


@pytest.mark.parametrize("tail", ["pooled", "pooled_block"])
@pytest.mark.parametrize("impl", IMPLS)
def test_heads_and_batches_do_not_mix(impl, tail):
    """NaN in one head of one batch stays there."""
    mask = torch.rand(2, 3, 3, 7, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[..., 3] = True
    case = plain_case(torch.float32, mask, tail=tail)
    want = run(case, impl)
    q, k, v = case.q.clone(), case.k.clone(), case.v.clone()
    for x in (q, k, v):
        x[1, :, 2] = torch.nan
    out, lse = run(replace(case, q=q, k=k, v=v), impl)
    assert out[1, :, 2].isnan().all() and lse[1, 2].isnan().all()
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(out.transpose(1, 2)[others], want[0].transpose(1, 2)[others])
    assert torch.equal(lse[others], want[1][others])


@pytest.mark.parametrize("tail", ["none", "pooled", "pooled_block"])
@pytest.mark.parametrize("impl", IMPLS)
def test_padded_keys_never_enter(impl, tail):
    mask = torch.rand(1, 3, 3, 7, generator=torch.Generator().manual_seed(4)) < 0.5
    mask[..., 0] = True
    lengths = torch.tensor([53, 101], dtype=torch.int32)
    case = plain_case(torch.float32, mask, key_lengths=lengths, tail=tail)
    want = run(case, impl)
    k, v = case.k.clone(), case.v.clone()
    k[0, 53:], v[0, 53:] = 100.0, -1e4
    got = run(replace(case, k=k, v=v), impl)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_expanded_heads_and_transposed_storage(impl):
    case = plain_case(torch.float32)
    k = case.k[:, :, :1].expand(-1, -1, 3, -1)  # stride 0 over heads, as in grouped-query attention
    q = case.q.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)  # head_dim outermost in memory
    case = replace(case, q=q, k=k)
    assert case.k.stride(2) == 0 and case.q.stride(3) > 1
    plans.check(case, *run(case, impl))


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("impl", IMPLS)
def test_scale_of_any_sign(impl, scale):
    mask = torch.rand(1, 3, 3, 7, generator=torch.Generator().manual_seed(6)) < 0.5
    mask[..., 1] = True
    for tail in ("pooled", "pooled_block"):
        case = replace(plain_case(torch.float32, mask, tail=tail), scale=scale)
        plans.check(case, *run(case, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_tail_per_block_is_tail_per_row_where_queries_are_alike(impl):
    """Clusters of equal queries, one of them empty, one keeping everything: the mean query is every query."""
    mask = torch.rand(2, 3, 6, 7, generator=torch.Generator().manual_seed(10)) < 0.4
    mask[..., 2], mask[:, :, 4] = True, True
    starts = torch.tensor([[[0, 5, 5, 30, 31, 60, 77]]], dtype=torch.int32)
    order = plans.Draw(11).permutations((2, 3), 77)
    cases = [
        plain_case(torch.float32, mask, q_starts=starts, q_order=order, tail=t) for t in ("pooled", "pooled_block")
    ]
    first = starts[0, 0, torch.searchsorted(starts[0, 0, 1:], torch.arange(77), right=True)].long()
    for b, h in ((b, h) for b in range(2) for h in range(3)):
        for case in cases:
            case.q[b, order[b, h], h] = cases[0].q[b, order[b, h, first], h].clone()
    budgets = [plans.error_budget(case) for case in cases]
    (out, lse), (out_block, lse_block) = (run(case, impl) for case in cases)
    close(out_block, out, sum(b.out for b in budgets))
    close(lse_block, lse, sum(b.lse for b in budgets))


@pytest.mark.parametrize("impl", ["torch", "flex"])
def test_tail_per_block_beside_a_linear_branch(impl):
    """A branch that names its blocks belongs to the plan's keys, not to the queries that are averaged."""
    draw = plans.Draw(13)
    mask, linear = draw.uniform(1, 3, 3, 7) < 0.5, draw.uniform(1, 3, 3, 7) < 0.5
    mask[..., 1], linear[..., 2] = True, True
    branch = LinearTail(draw.normal(40, 40), draw.normal(40), blocks=linear)
    case = plain_case(torch.float32, mask, tail="pooled_block", linear=branch)
    (out, lse), (want, want_lse) = run(case, impl), run(case, "reference")
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


def test_tail_per_block_has_the_gradients_of_its_formula():
    """Rows that skip nothing have a tail of weight zero: its logarithm must not spread NaN."""
    mask = torch.rand(1, 1, 3, 7, generator=torch.Generator().manual_seed(12)) < 0.5
    mask[0, 0, 1] = True
    case = plain_case(torch.float64, mask, tail="pooled_block")
    tensors = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    wanted = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    attend(*tensors, case.plan, impl="torch", scale=case.scale).square().sum().backward()
    plans.oracle(replace(case, q=wanted[0], k=wanted[1], v=wanted[2]))[0].square().sum().backward()
    for x, y in zip(tensors, wanted, strict=True):
        assert float(y.grad.abs().max()) > 0
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_row_is_written(impl):
    """Output memory starts as NaN: rows that no program writes would show."""
    draw = plans.Draw(7)
    q_starts = torch.tensor([[[0, 0, 1, 40, 40, 77]], [[0, 13, 33, 49, 65, 77]]], dtype=torch.int32)
    mask = torch.zeros(1, 1, 5, 7, dtype=torch.bool)
    mask[..., 2] = True
    case = plain_case(
        torch.float32,
        mask,
        q_starts=q_starts,
        q_order=draw.permutations((1, 3), 77),
        k_order=draw.permutations((1, 1), 101),
    )
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        out, lse = run(case, impl)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
    plans.check(case, out, lse)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_query_one_key(impl):
    draw = plans.Draw(8)
    q, k, v = (draw.normal(1, 1, 2, 32) for _ in range(3))
    case = plans.Case("one", q, k, v, BlockPlan.dense(1, 2, 1, 1), 0.3)
    out, lse = run(case, impl)
    assert torch.equal(out, v)
    close(lse[0, :, 0], (q * k).sum(-1)[0, 0] * 0.3, plans.error_budget(case).lse)


# -- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["flex", "triton"])
def test_float64_is_refused_by_fast_implementations(impl):
    case = plain_case(torch.float64)
    with pytest.raises(ImplUnavailableError, match=rf"(?s){impl}.*float64.*(torch|reference)"):
        attend(case.q, case.k, case.v, case.plan, impl=impl)


@pytest.mark.parametrize("tail", ["pooled", "pooled_block"])
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_float64_is_exact(impl, tail):
    mask = torch.rand(2, 3, 3, 7, generator=torch.Generator().manual_seed(9)) < 0.5
    mask[..., 1] = True
    case = plain_case(torch.float64, mask, tail=tail)
    out, lse = attend(case.q, case.k, case.v, case.plan, impl=impl, return_lse=True, scale=case.scale)
    want = plans.oracle(case)
    close(out, want[0], 1e-13)
    close(lse, want[1], 1e-13)


def test_plan_for_other_lengths_is_refused():
    case = plain_case(torch.float32)
    with pytest.raises(UsageError, match="plan is for"):
        attend(case.q[:, :70], case.k, case.v, case.plan)
    with pytest.raises(UsageError, match="impl"):
        attend(case.q, case.k, case.v, case.plan, impl="cuda")
    with pytest.raises(UsageError, match="agree"):
        attend(case.q, case.k, case.v[:, :50], case.plan)
