"""The kernel benchmark: its inputs, its check against float64, its targets, and a run of the program on the CPU."""

import json
import sys
import types

import pytest
import torch

import dsattn

from .bench_scripts import SCRIPTS, module, run

cases, kernels, attention = (module(name) for name in ("bench_cases", "bench_kernels", "bench_attention"))
CPU = torch.device("cpu")
TINY = cases.SHAPES["tiny"]


@pytest.fixture(scope="module")
def qkv():
    return cases.make_qkv(TINY, CPU, torch.float32)


def plans(qkv, goal):
    yield "tiles", cases.tiles(TINY, goal, 128, 64, CPU)
    yield "random", cases.random(TINY, goal, 128, 64, CPU)
    yield "clusters", cases.clusters(TINY, *qkv).at(goal)


def test_shapes_are_those_of_the_models():
    sizes = {name: (s.grid.tokens, s.heads, s.dim) for name, s in cases.SHAPES.items() if name != "tiny"}
    assert sizes == {
        "wan-480p": (32760, 12, 128),
        "wan-720p": (75600, 40, 128),
        "hunyuan-720p": (119056, 24, 128),
        "ltx": (28672, 32, 128),
    }


@pytest.mark.parametrize("goal", [0.5, 0.25])
def test_plans_are_valid_and_keep_what_was_asked_for(qkv, goal):
    for kind, plan in plans(qkv, goal):
        plan.validate()
        assert float(plan.density.mean()) == pytest.approx(goal, abs=0.06), kind
        if kind == "tiles":
            counts = plan.counts.float()
            assert counts.std() > 0 and not torch.equal(counts[:, 0], counts[:, 1])


def test_large_plans_keep_the_density():
    plan = cases.tiles(cases.SHAPES["wan-480p"], 0.1, 128, 64, CPU)
    assert float(plan.density.mean()) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("tail", ["none", "pooled"])
def test_check_passes_the_reference_and_fails_a_wrong_result(qkv, tail):
    for kind, plan in plans(qkv, 0.25):
        plan = dsattn.block_plan.replace(plan, tail=tail)
        out = dsattn.attend(*qkv, plan, impl="torch")
        check = cases.checker(*qkv, plan)
        error, allowed = check(out)
        assert error < allowed, kind
        # What a kernel may get wrong: another plan, a row left out, NaN.
        assert check(dsattn.attend(*qkv, cases.random(TINY, 0.2, 128, 64, CPU, seed=5), impl="torch"))[0] > allowed
        broken = out.clone()
        broken[:, -1] = 0
        assert check(broken)[0] > allowed
        broken[:, 0] = torch.nan
        assert not check(broken)[0] <= allowed


def test_dense_baselines_agree(qkv):
    for entry in attention.dense_entries(TINY, qkv, ["sdpa flash", "sdpa math"]):
        error, allowed = entry.check(entry.run())
        assert error < allowed, entry.name


def test_flashinfer_gets_sizes_and_permuted_tensors(qkv, monkeypatch):
    """A stand-in with the interface of FlashInfer's documentation, which computes by a dense mask."""
    seen = {}

    class Wrapper:
        def __init__(self, workspace):
            assert workspace.dtype == torch.uint8

        def plan(self, *, block_mask_map, block_row_sz, block_col_sz, **options):
            seen.update(options)
            self.mask = torch.stack(
                [
                    mask.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
                    for mask, rows, columns in zip(block_mask_map, block_row_sz, block_col_sz, strict=True)
                ]
            )

        def run(self, q, k, v):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)

    library = types.ModuleType("flashinfer")
    library.sparse = types.SimpleNamespace(VariableBlockSparseAttentionWrapper=Wrapper)
    library.single_prefill_with_kv_cache = lambda q, k, v, causal: torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), is_causal=causal
    ).transpose(0, 1)
    monkeypatch.setitem(sys.modules, "flashinfer", library)
    entries = attention.dense_entries(TINY, qkv, ["flashinfer"])
    for kind, plan in plans(qkv, 0.25):
        entries += attention.sparse_entries(TINY, qkv, kind, 0.25, plan, ["flashinfer"])
    assert len(entries) == 4
    for entry in entries:
        error, allowed = entry.check(entry.run())
        assert error < allowed, entry.name
    assert seen == {"num_qo_heads": 2, "num_kv_heads": 2, "head_dim": 64, "q_data_type": torch.float32}


def test_gradients_are_checked(qkv):
    plan = cases.tiles(TINY, 0.25, 128, 64, CPU)
    entry = attention.backward_entries(TINY, qkv, {0.25: plan}, "torch")[-1]
    got = entry.run()
    error, allowed = entry.check(got)
    assert error < allowed
    for wrong in range(3):
        broken = [2 * x if i == wrong else x for i, x in enumerate(got)]
        assert entry.check(broken)[0] > allowed
    assert not entry.check([got[0] * torch.nan, *got[1:]])[0] <= allowed


def test_exact_gradients_are_those_of_autograd():
    q, k, v, grad = (torch.randn(1, 150, 2, 16, dtype=torch.float64) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mask = torch.rand(1, 2, 3, 5) < 0.5
    mask[..., 0] = True
    plan = dsattn.block_plan.BlockPlan.from_mask(mask, 150, 150, batch=1, heads=2, block_q=64, block_k=32)
    logits = (torch.einsum("bshd,bthd->bhst", q, k) / 4).masked_fill(~plan.to_dense(), -torch.inf)
    out = torch.einsum("bhst,bthd->bshd", logits.softmax(-1), v)
    want = torch.autograd.grad(out, leaves, grad)
    tokens = torch.tensor([0, 63, 149])
    with torch.no_grad():
        got = cases._exact_gradients(q, k, v, out, logits.logsumexp(-1), plan, grad, tokens, 1)
    for mine, exact in zip(got, want, strict=True):
        torch.testing.assert_close(mine, exact[0, tokens, 1])


def row(group, name, seconds, **rest):
    return {"shape": "tiny", "group": group, "name": name, "impl": name, "status": "ok", "median_s": seconds, **rest}


def test_targets():
    rows = [
        row("dense", "sdpa flash", 2.0, density=1.0),
        row("dense", "sdpa cudnn", 1.0, density=1.0),
        {"shape": "tiny", "group": "dense", "name": "flex", "status": "wrong", "reason": "-"},
        row("sparse", "triton", 0.6, density=0.5, plan="tiles", goal=0.5),
        row("sparse", "flex", 0.1, density=0.5, plan="tiles", goal=0.5),
        row("sparse", "triton", 0.5, density=0.25, plan="clusters", goal=0.25),
        row("sparse", "triton", 0.1, density=0.1, plan="random", goal=0.1),
        row("parts", "map", 0.04, part="k-means, map and order") | {"impl": "dsattn"},
        row("parts", "reuse", 0.004, part="reuse step, planning") | {"impl": "dsattn"},
        row("parts", "pool", 1.0, part="pool", bytes=90, flops=None) | {"impl": "dsattn"},
        row("parts", "gather", 1.0, part="permute", bytes=10, flops=None) | {"impl": "torch"},
    ]
    report = {"rows": rows, "shapes": ["tiny"], "ceilings": {"copy_bytes_per_s": 100.0, "flop_per_s": 1.0}}
    kernels.finish(report)
    found = [(t["value"], round(t["limit"], 3), t["met"]) for t in report["targets"]]
    assert found == [
        (0.6, round(0.5 / 0.85 + 0.02, 3), True),
        (0.5, round(0.25 / 0.75 + 0.03, 3), False),
        (0.04, 0.03, False),
        (0.004, 0.005, True),
        (0.9, 0.8, True),
    ]
    assert rows[0]["of_dense"] == 2.0
    kernels.finish(report)
    assert len(report["targets"]) == 5


def test_tables():
    rows = [
        row("dense", "sdpa flash", 2.0, density=1.0, error=0.001, warmup_s=0.5, runs=3),
        {"shape": "tiny", "group": "dense", "name": "dense flex", "status": "late", "reason": "no time"},
        {"shape": "tiny", "group": "dense", "name": "dense xformers", "status": "late", "reason": "no time"},
    ]
    tuned = {
        "kernel": "block_sparse", "variant": "d64", "tiles": [64, 64, 4, 2], "seconds": 0.001, "static_seconds": 0.002,
        "timed": 5, "tuning_s": 9.0,
    }  # fmt: skip
    report = {
        "rows": rows, "shapes": ["tiny"], "ceilings": {"copy_bytes_per_s": 1e9, "flop_per_s": 1e12}, "dtype": "bf16",
        "machine": {"torch": "2", "triton": "3", "device": "cuda"}, "device_name": "A GPU", "block_q": 128,
        "block_k": 64, "complete": False, "tuning": [tuned],
    }  # fmt: skip
    kernels.finish(report)
    text = kernels.markdown(report)
    for line in (
        "# Kernels on A GPU", "**The run was stopped early.**", "| sdpa flash | 1.000 | 2000 | 1.000 |",
        "| tiny dense flex, tiny dense xformers | late | no time |",
        "| block_sparse d64 | 64 64 4 2 | 1 | 2 | 5 | 9.0 |",
    ):  # fmt: skip
        assert line in text, text


def test_triton_is_timed_where_it_runs(tmp_path):
    """In the interpreter: the path that a GPU takes."""
    path = tmp_path / "kernels.json"
    done = run(
        sys.executable, str(SCRIPTS / "bench_kernels.py"), "--impls", "triton,sdpa", "--densities", ".1", "--repeats",
        "3", "--plans", "clusters", "--groups", "attention", "--json", str(path), TRITON_INTERPRET="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert {r["impl"] for r in report["rows"] if r["status"] == "ok" and r["group"] == "sparse"} == {"triton"}
    assert ["triton" in t["target"] for t in report["targets"]] == [True]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--shapes", "huge"), "huge not known"),
        (("--impls", "cuda"), "cuda not known"),
        (("--densities", "1"), "below 1"),
    ],
)
def test_usage_errors(arguments, message):
    done = run(sys.executable, str(SCRIPTS / "bench_kernels.py"), *arguments)
    assert done.returncode == 2 and message in done.stderr
