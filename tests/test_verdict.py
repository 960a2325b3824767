"""Verdicts of the kernels against an independent float64 oracle, packed bits, and plans that shrink by them."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from dsattn.block_plan import BlockPlan, LinearTail
from dsattn.errors import ImplUnavailableError, UsageError
from dsattn.functional import attend, choose_impl
from dsattn.verdict import VerdictRule, pack_bits, pick_bits, unpack_bits

from . import plans

IMPLS = ("reference", "torch", "triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHUNK = 10


def run(case: plans.Case, impl: str, rule: VerdictRule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Out, LSE and needed tiles ``[B, H, Nq, Nk]`` on the CPU."""
    case = case.to(DEVICE) if impl == "triton" else case
    rule = replace(rule, threshold=rule.threshold.to(case.q.device))
    out, lse, needed = attend(
        case.q, case.k, case.v, case.plan, impl=impl, return_lse=True, scale=case.scale, verdict=rule
    )
    return out.cpu(), lse.cpu(), unpack_bits(needed, case.plan.num_k_blocks).cpu()


def oracle_gains(case: plans.Case) -> torch.Tensor:
    """``[B, H, Nq, Nk]`` float64: gain of every visited tile; +inf for the first, NaN where none was visited."""
    plan = case.plan
    gains = torch.full((plan.batch, plan.heads, plan.num_q_blocks, plan.num_k_blocks), torch.nan, dtype=torch.float64)
    for b in range(plan.batch):
        limit = plan.k_len if plan.key_lengths is None else int(plan.key_lengths[b])
        for h in range(plan.heads):
            logits = case.q[b, :, h].double() @ case.k[b, :, h].double().T * case.scale
            q_tokens, k_tokens = (
                plans._tokens(o, b, h, n) for o, n in ((plan.q_order, plan.q_len), (plan.k_order, plan.k_len))
            )
            q_edges = plans._edges(plan.q_starts, b, h, plan.q_len, plan.block_q)
            k_edges = plans._edges(plan.k_starts, b, h, plan.k_len, plan.block_k)
            bb, hh = b % plan.counts.shape[0], h % plan.counts.shape[1]
            for i in range(plan.num_q_blocks):
                rows = q_tokens[q_edges[i] : q_edges[i + 1]]
                seen: list[int] = []
                for j in plan.indices[bb, hh, i, : int(plan.counts[bb, hh, i])].tolist():
                    columns = k_tokens[k_edges[j] : max(k_edges[j], min(k_edges[j + 1], limit))].tolist()
                    if not columns or not len(rows):
                        continue
                    here = logits[rows][:, columns].amax(1)
                    gain = (here - logits[rows][:, seen].amax(1)).amax() * math.log2(math.e) if seen else torch.inf
                    gains[b, h, i, j] = gain
                    seen += columns
    return gains


def margin(case: plans.Case) -> float:
    """How far fp32 may move a gain: two logits, each as in ``plans.error_budget``, in log2 units."""
    longest = (x.double().norm(dim=-1).max() for x in (case.q, case.k))
    return 2 * math.log2(math.e) * 16 * 2.0**-24 * (1 + abs(case.scale) * float(math.prod(longest)))


def check_bits(case: plans.Case, needed: torch.Tensor, threshold: torch.Tensor) -> int:
    """Fail unless every clear-cut verdict is right; returns how many visited tiles are not needed."""
    gains, threshold = oracle_gains(case), threshold.double()[:, :, None, None]
    want = gains > threshold
    unclear = (gains - threshold).abs() <= margin(case)
    assert torch.equal(needed | unclear, want | unclear), case.name
    return int((~want & ~gains.isnan()).sum())


# -- verdicts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", range(10))
@pytest.mark.parametrize("impl", IMPLS)
def test_random_plans(impl, chunk):
    """Any layout, order, cluster, length and tail: right verdicts, and an output that they leave alone."""
    judged = 0
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        case = plans.random_case(plans.random_shape(seed), seed)
        draw = plans.Draw(seed)
        gains = oracle_gains(case)
        gains = gains[gains.isfinite()].float()
        middle = gains.median() if len(gains) else torch.tensor(0.0)
        lead = draw.pick((1, case.plan.batch)), draw.pick((1, case.plan.heads))
        threshold = middle + draw.uniform(*lead) - 0.5
        out, lse, needed = run(case, impl, VerdictRule(threshold))
        plans.check(case, out, lse)
        judged += check_bits(case, needed, threshold)
    assert judged > 0


def test_cases_have_blocks_of_several_tiles():
    """In the interpreter a tile is at most 64 × 64: larger blocks and clusters are judged over several tiles."""
    shapes = [plans.random_shape(seed) for seed in range(100)]
    seen = Counter()
    for shape in shapes:
        seen["queries"] += shape.block_q == 128 and shape.q_len > 64
        seen["keys"] += shape.block_k == 128 and shape.k_len > 64
        seen["clusters"] += shape.k_clusters > 0 and shape.k_len // shape.k_clusters > shape.block_k
    assert min(seen[name] for name in ("queries", "keys", "clusters")) >= 5, seen


@pytest.mark.parametrize("impl", IMPLS)
def test_limits(impl):
    """-inf needs every readable tile that was visited, +inf the first readable one of each row."""
    for seed in range(20):
        case = plans.random_case(plans.random_shape(seed), seed)
        gains = oracle_gains(case)
        for value, want in ((-torch.inf, ~gains.isnan()), (torch.inf, gains == torch.inf)):
            assert torch.equal(run(case, impl, VerdictRule(torch.full((1, 1), value)))[2], want), case.name


def tame(seed: int, tail: str = "none") -> plans.Case:
    """A case whose rows hold strong and weak tiles, in fp32, blocks that are one tile of every implementation."""
    draw = plans.Draw(seed)
    q, k, v = (draw.normal(2, length, 2, 32) for length in (83, 150, 150))
    k = k * draw.pick((1.0, 3.0)) * torch.linspace(2.0, 0.1, 150)[:, None, None]
    mask = draw.uniform(2, 2, 3, 10) < 0.8
    mask[..., 3] = True
    plan = BlockPlan.from_mask(mask, 83, 150, batch=2, heads=2, block_q=32, block_k=16, tail=tail)
    return plans.Case(f"tame {seed}", q, k, v, plan, 0.3)


@pytest.mark.parametrize("impl", IMPLS)
def test_pv_skip_leaves_out_what_it_says(impl):
    skipped = 0
    for seed in range(10):
        case = tame(seed)
        gains = oracle_gains(case)
        kept = (gains > -1.5) & ~gains.isnan()
        if bool(((gains + 1.5).abs() <= margin(case)).any()):
            continue
        skipped += int((~kept & ~gains.isnan()).sum())
        out, lse, needed = run(case, impl, VerdictRule(torch.full((1, 1), -torch.inf), pv_skip=1.5))
        shrunk = BlockPlan.from_mask(kept, 83, 150, batch=2, heads=2, block_q=32, block_k=16)
        plans.check(replace(case, plan=shrunk), out, lse)
        # Left out of this call, not of the next: the verdict has a threshold of its own.
        assert torch.equal(needed, ~gains.isnan())
    assert skipped > 20


@pytest.mark.parametrize("impl", IMPLS)
def test_pv_skip_far_below_changes_nothing(impl):
    """Every weight left out is below 2^-40 of its row's largest: the result stays within the budget; the tail, too."""
    for seed in range(5):
        case = tame(seed, tail="pooled")
        plans.check(case, *run(case, impl, VerdictRule(torch.zeros(1, 1), pv_skip=40.0))[:2])


def test_pv_skip_agrees_under_a_pooled_tail():
    """A tile that is left out does not come back as a pooled key."""
    case = tame(3, tail="pooled")
    rule = VerdictRule(torch.zeros(1, 1), pv_skip=1.0)
    want = run(case, "reference", rule)
    for impl in ("torch", "triton"):
        out, lse, needed = run(case, impl, rule)
        torch.testing.assert_close(out, want[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse, want[1], rtol=1e-4, atol=1e-5)
        assert torch.equal(needed, want[2])


def test_gradients_flow_around_verdicts():
    case = tame(0)
    q = case.q.clone().requires_grad_()
    for rule in (VerdictRule(torch.zeros(1, 1)), VerdictRule(torch.zeros(1, 1), pv_skip=1.0)):
        out, _ = attend(q, case.k, case.v, case.plan, impl="torch", verdict=rule)
        (gradient,) = torch.autograd.grad(out.sum(), q)
        assert bool(torch.isfinite(gradient).all()) and float(gradient.abs().max()) > 0


def test_a_linear_branch_is_left_alone():
    case = tame(1)
    linear = LinearTail(torch.eye(32), torch.zeros(32))
    plan = replace(case.plan, linear=linear)
    want = attend(case.q, case.k, case.v, plan, impl="torch")
    got, needed = attend(case.q, case.k, case.v, plan, impl="torch", verdict=VerdictRule(torch.zeros(1, 1)))
    torch.testing.assert_close(got, want)
    assert torch.equal(
        unpack_bits(needed, 10), run(replace(case, scale=32**-0.5), "torch", VerdictRule(torch.zeros(1, 1)))[2]
    )


def test_triton_refuses_gradients_with_verdicts():
    case = tame(0)
    q = case.q.clone().requires_grad_()
    with pytest.raises(ImplUnavailableError, match="no backward pass that gives verdicts"):
        attend(q, case.k, case.v, case.plan, impl="triton", verdict=VerdictRule(torch.zeros(1, 1)))


def test_flex_is_passed_over_and_refused():
    case = tame(0)
    name, why = choose_impl(case.q.cpu(), "auto", case.plan, verdict=True)
    assert name == "torch" and "flex gives no verdicts" in why
    with pytest.raises(ImplUnavailableError, match="impl='flex' cannot run: flex gives no verdicts"):
        attend(case.q, case.k, case.v, case.plan, impl="flex", verdict=VerdictRule(torch.zeros(1, 1)))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (VerdictRule(torch.zeros(2)), r"verdict.threshold must be \[1 or 2, 1 or 2\], got \(2,\)"),
        (VerdictRule(torch.zeros(1, 3)), r"got \(1, 3\)"),
        (VerdictRule(torch.zeros(1, 1), pv_skip=-1.0), r"verdict.pv_skip must be a number in \[0, inf\], got -1.0"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(rule, message):
    case = tame(0)
    with pytest.raises(UsageError, match=message):
        attend(case.q, case.k, case.v, case.plan, verdict=rule)


# -- bits and plans -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 100])
def test_bits_round_trip(count):
    mask = torch.rand(2, 3, 5, count, generator=torch.Generator().manual_seed(count)) < 0.5
    mask[0, 0, 0] = True
    bits = pack_bits(mask)
    assert bits.dtype == torch.int32 and bits.shape == (2, 3, 5, -(-count // 32))
    assert torch.equal(unpack_bits(bits, count), mask)
    columns = torch.arange(count).flip(0).expand(1, 1, 5, -1).int()
    assert torch.equal(pick_bits(bits, columns), mask.flip(-1))


def test_restrict_keeps_the_order_of_the_visit():
    for seed in range(30):
        case = plans.random_case(plans.random_shape(seed), seed)
        plan = case.plan
        keep = torch.rand(
            plan.batch, plan.heads, plan.num_q_blocks, plan.num_k_blocks, generator=torch.Generator().manual_seed(seed)
        )
        keep = keep < 0.5
        got = plan.restrict(pack_bits(keep)).validate()
        readable = (plan.k_sizes > 0).expand(plan.batch, plan.heads, -1)
        for b in range(plan.batch):
            for h in range(plan.heads):
                for i in range(plan.num_q_blocks):
                    old, new = (_list(p, b, h, i) for p in (plan, got))
                    want = [j for j in old if keep[b, h, i, j]]
                    if not any(readable[b, h, j] for j in want):
                        first = next((j for j in old if readable[b, h, j]), None)
                        want = [j for j in old if j in want or j == first]
                    assert new == want, case.name


def _list(plan: BlockPlan, b: int, h: int, i: int) -> list[int]:
    b, h = b % plan.counts.shape[0], h % plan.counts.shape[1]
    return plan.indices[b, h, i, : int(plan.counts[b, h, i])].tolist()


def test_restrict_with_no_bits_keeps_the_first_readable_block():
    plan = BlockPlan.dense(2, 3, 50, 90, block_q=16, block_k=16)
    plan = replace(plan, indices=plan.indices.flip(-1), key_lengths=torch.tensor([90, 20], dtype=torch.int32))
    got = plan.restrict(torch.zeros(1, 1, 4, 1, dtype=torch.int32)).validate()
    assert got.counts.shape == (2, 1, 4) and bool((got.counts == 1).all())
    assert got.indices[:, 0, :, 0].tolist() == [[5] * 4, [1] * 4]
