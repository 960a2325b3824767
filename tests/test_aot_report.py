"""The compile report for one GPU: what it prints, and that `--check` fails where it must."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import aot_report  # noqa: E402
import aot_variants  # noqa: E402

SCRIPT = ROOT / "scripts" / "aot_report.py"


def report(*arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    # The interpreter of the other tests compiles nothing.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(root / "scripts" / "aot_report.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_report_on_one_gpu():
    done = report("--target", "sm_90", "--variant", "d128 128x64 fixed", "--json", "--check", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [(r["target"], r["variant"]) for r in results] == [
        ("sm_90", "bf16 d128 128x64 fixed"),
        ("sm_90", "fp16 d128 128x64 fixed"),
    ]
    for result in results:
        assert result["error"] is None and result["spills"] == 0
        assert 64 <= result["registers"] <= 255 and result["shared"] > 16384
        assert result["wgmma"] > 0 and result["tcgen05"] == 0 and result["cp_async"] > 0


def test_unknown_target_and_variant():
    done = report("--target", "sm_75")
    assert done.returncode == 2 and "sm_75" in done.stderr and "sm_80" in done.stderr
    done = report("--variant", "int4")
    assert done.returncode == 2 and "int4" in done.stderr


def test_violations_name_target_variant_figure_and_budget():
    results = {
        ("sm_90", "a"): aot_report.Measured(spills=4, shared=2000, wgmma=8),
        ("sm_90", "b"): aot_report.Measured(error="CompilationError: no"),
        ("gfx942", "a"): aot_report.Measured(spills=1),
        ("gfx942", "c"): aot_report.Measured(spills=9),
    }
    budget = {
        "sm_90": {"a": {"spills": 0, "shared": 1000, "uses": ["wgmma", "tma"]}},
        "gfx942": {"a": {"spills": 1, "shared": 0}},
    }
    assert aot_report.violations(results, budget) == [
        "sm_90 a: spills 4, budget 0",
        "sm_90 a: shared 2000, budget 1000",
        "sm_90 a: has no tma any more",
        "sm_90 b: does not compile: CompilationError: no",
        "gfx942 c: has no budget; add it with --write-budget",
    ]


def test_budget_covers_every_variant_and_allows_no_spills_in_common_ones():
    budget = json.loads((ROOT / "kernels" / "resource_budget.json").read_text())
    assert set(budget) == set(aot_variants.TARGETS)
    for target, variants in budget.items():
        assert set(variants) == {variant.name for variant in aot_variants.variants_of(target)}, target
        for name, allowed in variants.items():
            assert allowed["spills"] == 0 or name.endswith(" all"), f"{target} {name}"
            assert allowed["spills"] <= 4 and allowed["shared"] <= 227 * 1024


def test_budget_holds_the_instructions_that_make_each_target_fast():
    """So that a budget without them cannot be written unseen."""
    budget = json.loads((ROOT / "kernels" / "resource_budget.json").read_text())
    for target, matrix in (("sm_90", "wgmma"), ("sm_100", "tcgen05")):
        for variant in (v for v in aot_variants.VARIANTS if v.special):
            allowed, how = budget[target][variant.name], aot_variants.how_of(variant, aot_variants.TARGETS[target])
            assert allowed["spills"] == 0 and {matrix, "tma"} <= set(allowed["uses"]), f"{target} {variant.name}"
            assert how.roles == ("setmaxnreg" in allowed["uses"]), f"{target} {variant.name}"
    for target, matrix in (("sm_80", "mma"), ("sm_89", "mma"), ("sm_120", "mma"), ("sm_90", "wgmma")):
        for features in ("fixed", "order", "clusters", "tail"):
            uses = budget[target][f"bf16 d128 128x64 {features}"]["uses"]
            assert {matrix, "cp_async"} <= set(uses), f"{target} {features}"
            assert matrix == "wgmma" or "ldmatrix" in uses, f"{target} {features}"
