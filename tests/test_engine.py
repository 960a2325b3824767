"""Engine: schedule, state per branch and layer, resets, fallbacks, what it records."""

import pytest
import torch

import dsattn
from dsattn import Call, Engine, VideoGrid
from dsattn.functional import choose_impl

GRID = VideoGrid(5, 9, 11)


def tensors(grid: VideoGrid = GRID, batch: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, grid.tokens, 2, 32, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)
    ]


def sdpa(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def kinds(engine: Engine) -> list[str]:
    return [record.kind for record in engine.stats.records]


def test_dense_steps_run_the_given_dense_attention():
    engine = Engine("topk", density=0.2, dense_steps=1, impl="torch")
    marker = torch.zeros(1)
    assert engine(*tensors(), Call(0, 0, GRID), dense=lambda: marker) is marker
    assert engine(*tensors(), Call(0, 1, GRID), dense=lambda: marker).shape == (1, GRID.tokens, 2, 32)
    assert kinds(engine) == ["dense", "refresh"]


def test_dense_method_is_dense():
    qkv = tensors()
    torch.testing.assert_close(Engine("dense")(*qkv, Call(0, 0, GRID)), sdpa(*qkv))


def test_refresh_and_reuse_per_branch_and_layer():
    engine = Engine("topk", density=0.2, refresh=2, impl="torch")
    for step in range(3):
        for layer in range(2):
            for branch in ("cond", "uncond"):
                engine(*tensors(seed=step), Call(layer, step, GRID, branch=branch))
    assert kinds(engine) == ["refresh"] * 4 + ["reuse"] * 4 + ["refresh"] * 4
    assert len(engine.state.entries) == 4


def test_branches_do_not_share_plans():
    """cond with uncond in between gives what cond alone gives."""
    alone, mixed = (Engine("topk", density=0.2, refresh=4, impl="torch") for _ in range(2))
    for step in range(3):
        expected = alone(*tensors(seed=step), Call(0, step, GRID, branch="cond"))
        mixed(*tensors(seed=100 + step), Call(0, step, GRID, branch="uncond"))
        assert torch.equal(mixed(*tensors(seed=step), Call(0, step, GRID, branch="cond")), expected)


def test_reused_plan_reads_current_values():
    """Structure is cached; pooled keys and values are not."""
    engine = Engine("topk", density=0.2, refresh=9, impl="torch")
    first, later = tensors(seed=1), tensors(seed=2)
    engine(*first, Call(0, 0, GRID))
    plan = engine.state.entries["transformer", 0, "cond"].plan
    assert torch.equal(engine(*later, Call(0, 1, GRID)), dsattn.attend(*later, plan, impl="torch"))


def test_second_run_equals_first():
    engine = Engine("topk", density=0.2, refresh=2, impl="torch")
    runs = [[engine(*tensors(seed=step), Call(0, step, GRID)) for step in range(4)] for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
    assert kinds(engine) == ["refresh", "reuse", "refresh", "reuse"]


@pytest.mark.parametrize(
    ("grid", "batch", "dtype"),
    [(VideoGrid(3, 15, 11), 1, torch.float32), (GRID, 2, torch.float32), (GRID, 1, torch.bfloat16)],
)
def test_a_changed_layout_drops_the_plan(grid, batch, dtype):
    engine = Engine("topk", density=0.2, refresh=9, impl="torch")
    engine(*tensors(), Call(0, 0, GRID))
    engine(*tensors(grid, batch, dtype), Call(0, 1, grid))
    assert kinds(engine) == ["refresh", "refresh"]


def test_two_engines_are_independent():
    one, two = (Engine("topk", density=d, refresh=9, impl="torch") for d in (0.1, 0.5))
    one(*tensors(), Call(0, 0, GRID))
    two(*tensors(seed=5), Call(0, 0, GRID))
    again = Engine("topk", density=0.1, refresh=9, impl="torch")
    again(*tensors(), Call(0, 0, GRID))
    assert torch.equal(one(*tensors(seed=1), Call(0, 1, GRID)), again(*tensors(seed=1), Call(0, 1, GRID)))


def test_a_grid_that_does_not_fit_falls_back_with_its_reason():
    engine = Engine("topk", impl="torch")
    qkv = tensors()
    out = engine(*qkv, Call(0, 0, VideoGrid(5, 9, 12)))
    torch.testing.assert_close(out, sdpa(*qkv))
    assert engine.summary()["fallbacks"] == {"495 queries and 495 keys do not fit the grid's 540 tokens": 1}
    assert engine.summary()["density_all_calls"] == 1.0


def test_strict_raises_instead():
    with pytest.raises(dsattn.StrictFallbackError, match=r"strict: dense fallback \(layer 3, step 7\): .*540 tokens"):
        Engine("topk", impl="torch", strict=True)(*tensors(), Call(3, 7, VideoGrid(5, 9, 12)))


def test_dense_method_never_falls_back():
    engine = Engine("dense", strict=True)
    marker = torch.zeros(1)
    assert engine.fallback(None, "mask is not key padding", lambda: marker) is marker
    assert engine.summary()["fallbacks"] == {}
    assert engine.summary()["dense_reasons"] == {"mask is not key padding": 1}


def test_key_lengths_hide_padding():
    grid = VideoGrid(5, 9, 11, text=20)
    q, k, v = tensors(grid, batch=2)
    lengths = torch.tensor([grid.tokens - 15, grid.tokens])
    noisy_k, noisy_v = k.clone(), v.clone()
    noisy_k[0, -15:] = noisy_v[0, -15:] = 1e4
    for method in ("topk", "radial", "dense"):
        outs = [
            Engine(method, impl="torch", refresh=9)(q, a, b, Call(0, 0, grid), key_lengths=lengths)
            for a, b in ((k, v), (noisy_k, noisy_v))
        ]
        if method == "topk":
            # Padding may change which blocks are selected, never what is read from it.
            assert bool(torch.isfinite(outs[1]).all()) and outs[1].abs().max() < 100
        else:
            torch.testing.assert_close(outs[0], outs[1])


def test_summary_weighs_density_by_pairs():
    engine = Engine("topk", density=0.25, dense_steps=1, impl="torch", timing=True)
    for step in range(4):
        engine(*tensors(), Call(0, step, GRID))
    summary = engine.summary()
    sparse = summary["density_sparse_calls"]
    assert 0.2 < sparse < 0.4
    assert summary["density_all_calls"] == pytest.approx((1 + 3 * sparse) / 4)
    assert summary["calls"] == {"dense": 1, "refresh": 3}
    assert summary["attend_s"] > 0 and summary["plan_s"] > 0
    assert summary["plan_bytes"] > 0
    engine.reset()
    assert engine.summary()["calls"] == {} and engine.summary()["plan_bytes"] == 0


def test_named_impl_that_cannot_run_raises():
    q = tensors(dtype=torch.float64)[0]
    with pytest.raises(dsattn.ImplUnavailableError, match=r"impl='flex' cannot run: torch.float64 is not supported"):
        choose_impl(q, "flex")
    name, why = choose_impl(q, "auto")
    assert name == "torch" and "flex: torch.float64 is not supported" in why


def test_gradients_flow_through_torch_and_are_refused_elsewhere():
    qkv = [x.requires_grad_() for x in tensors()]
    plan = dsattn.plan(*qkv, Call(0, 0, GRID), method="topk", density=0.3)
    dsattn.attend(*qkv, plan, impl="torch").sum().backward()
    assert all(x.grad is not None and bool(torch.isfinite(x.grad).all()) for x in qkv)
    with pytest.raises(dsattn.ImplUnavailableError, match="no backward pass"):
        dsattn.attend(*qkv, plan, impl="flex")
