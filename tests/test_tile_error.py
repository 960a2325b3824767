"""temporal's target error: the estimate is the error, the target is met and used up."""

from dataclasses import asdict, replace

import pytest
import torch

import dsattn
from dsattn import Call, VideoGrid
from dsattn.block_plan import LinearTail
from dsattn.errors import UsageError
from dsattn.methods.base import Memory
from dsattn.methods.estimate import RowSample, relative_error
from dsattn.methods.temporal import TemporalConfig, _fit, calibrate, own_frame_first
from dsattn.methods.tile_error import BlockSample, draw_blocks
from dsattn.verdict import pack_bits

from .method_inputs import dense
from .temporal_runs import GRID, SMALL, density, engine, error, local


@pytest.mark.parametrize(
    "base", [("dense", {}), ("dense", {"tail": "pooled"}), ("topk", {}), ("topk", {"tail": "pooled_block"})], ids=str
)
@pytest.mark.parametrize("grid", [VideoGrid(5, 7, 9), VideoGrid(4, 7, 9, text=19, prefix=3)], ids=str)
def test_estimate_is_the_error_of_the_next_step(grid, base):
    """Sampled blocks, judged as the kernel judges them, give the error that attend then has on their rows."""
    method, options = base
    qkv = local(grid, batch=2)
    made = options | ({"base": method} if method != "dense" else SMALL)
    config = TemporalConfig(threshold=-3, **made)
    run = engine(**{k: v for k, v in asdict(config).items() if v is not None})
    memory = Memory()
    plan = run.method.plan(*qkv, Call(0, 0, grid), config, memory)
    blocks = draw_blocks(grid, plan.block_q, 3, seed=1)
    shrunk, rule = run.method.before(plan, Call(0, 0, grid), config, memory)
    order = own_frame_first(grid, plan.block_q, plan.block_k, torch.device("cpu"))[blocks]
    allowed = pack_bits(plan.block_mask).expand(2, 2, -1, -1)[:, :, blocks]
    always = (memory["temporal.rows"].expand(-1, -1, plan.num_q_blocks, -1)[:, :, blocks]) | memory["temporal.columns"]
    sample = BlockSample.of(*qkv, plan, blocks, order, allowed, always)
    estimate = sample.error(torch.full((2, 2), -3.0))

    _, needed = dsattn.attend(*qkv, shrunk, impl="reference", verdict=rule)
    run.method.after(needed, Call(0, 0, grid), config, memory)
    shrunk, _ = run.method.before(plan, Call(0, 1, grid), config, memory)
    out = dsattn.attend(*qkv, shrunk, impl="reference")
    rows = _tokens(plan, blocks)
    got = relative_error(*(x.transpose(1, 2)[:, :, rows] for x in (out, dense(qkv))))
    torch.testing.assert_close(estimate, got, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(RowSample.of(*qkv, rows).error(shrunk), got, rtol=1e-4, atol=2e-6)


def _tokens(plan: dsattn.BlockPlan, blocks: torch.Tensor) -> torch.Tensor:
    positions = (blocks[:, None] * plan.block_q + torch.arange(plan.block_q)).flatten()
    positions = positions[positions < plan.q_len]
    return positions if plan.q_order is None else plan.q_order[0, 0, positions]


@pytest.mark.parametrize("target", [0.02, 0.1])
def test_target_error_is_met_and_used_up(target):
    qkv = local(batch=2, strength=3.5)
    run = engine(target_error=target, sample_blocks=100, refresh=9)
    for step in range(2):
        out = run(*qkv, Call(0, step, GRID))
    want = dense(qkv)
    errors = relative_error(*(x[:, GRID.video_start : GRID.video_end].transpose(1, 2) for x in (out, want)))
    assert float(errors.max()) <= target * 1.001 and float(errors.min()) > target / 4
    assert density(run)[1] < 0.8


def test_target_error_counts_what_is_dropped_already():
    """With plans made at every step and changing values, later verdicts stop where the sum of them is enough."""
    steps = [local(seed=step, strength=3.5) for step in range(6)]
    config = TemporalConfig(sample_blocks=100)
    table = [calibrate(*qkv, Call(0, 0, GRID), config, 0.05) for qkv in steps]
    runs = engine(target_error=0.05, sample_blocks=100), engine(threshold=table)
    for step, qkv in enumerate(steps):
        aware, unaware = (error(run(*qkv, Call(0, step, GRID)), qkv) for run in runs)
    assert aware < 0.06 < unaware


def test_calibrated_thresholds_meet_the_target_and_fit_a_config():
    qkv, call = local(batch=2, strength=3.5), Call(1, 0, GRID)
    config = TemporalConfig(sample_blocks=100)
    loose, strict = (calibrate(*qkv, call, config, target) for target in (0.1, 0.01))
    assert len(loose) == 2 and all(-20 <= s < x <= 0 for x, s in zip(loose, strict, strict=True))
    run = engine(threshold={1: [loose, strict]}, refresh=9)
    for step in range(2):
        out = run(*qkv, Call(1, step, GRID))
    assert 0.01 < error(out, qkv) < 0.1
    # The base alone is further off than the target: nothing more is dropped.
    off = TemporalConfig(base="topk", base_options={"density": 0.05, "tail": "none"})
    assert calibrate(*qkv, call, off, 0.01) == (float("-inf"), float("-inf"))


def test_target_error_refuses_clusters():
    with pytest.raises(UsageError, match="target_error needs blocks of one size, base 'semantic' makes clusters"):
        engine(base="semantic", target_error=0.1)(*local(), Call(0, 0, GRID))


def test_target_error_refuses_a_linear_branch():
    qkv, config = local(), TemporalConfig(base="sparse_linear", target_error=0.1)
    linear = LinearTail(torch.eye(32), torch.zeros(32))
    plan = replace(dsattn.plan(*qkv, Call(0, 0, GRID), method="sparse_linear"), linear=linear)
    with pytest.raises(UsageError, match="target_error does not see the linear branch of base 'sparse_linear'"):
        _fit(*qkv, plan, Call(0, 0, GRID), config, Memory(), 0.1)
