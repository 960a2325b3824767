"""The check that runs tests and benchmarks on a GPU machine: a small run of every part."""

import json
import sys

import pytest
import torch

from .bench_scripts import SCRIPTS, module, run


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("check")
    done = run("bash", str(SCRIPTS / "gpu_check.sh"), "--tiny", PYTHON=sys.executable, OUT=str(out), BUDGET="240")
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_part_runs(results):
    check = json.loads((results / "check.json").read_text())
    assert check["ok"] and check["wrong"] == []
    assert [p["part"] for p in check["parts"]] == [
        "kernel tests",
        "GPU tests",
        "kernel benchmark",
        "pipeline benchmark",
    ]
    assert "passed" in check["parts"][0]["result"]
    names = {path.name for path in results.iterdir()}
    assert names == {"check.json", "kernels.json", "pipeline.json", "summary.md", "tests.log"}
    summary = (results / "summary.md").read_text()
    assert "# Kernels on" in summary and "## Targets" in summary and "# Denoising steps on" in summary


def test_kernels(results):
    report = json.loads((results / "kernels.json").read_text())
    assert report["complete"] and report["ceilings"]["flop_per_s"] > 0
    timed = {r["name"]: r for r in report["rows"] if r["status"] == "ok"}
    assert {"dense sdpa flash", "tiles 0.25 torch", "clusters 0.25 torch", "random 0.25 torch"} <= set(timed)
    assert {"tiles pooled tail", "k-means, map and order", "reuse step, planning"} <= set(timed)
    assert any(name.startswith("backward tiles 0.25") for name in timed)
    assert all(r["median_s"] >= 0 and r["runs"] >= 3 for r in timed.values())
    assert not [r for r in report["rows"] if r["status"] in ("wrong", "failed", "late")]
    assert {t["target"].split(" at density")[0] for t in report["targets"]} >= {
        "tiles",
        "clusters",
        "k-means, map and order, of dense",
        "reuse step, planning, of dense",
        "pool clusters, of copy bandwidth",
    }


def test_pipeline(results):
    report = json.loads((results / "pipeline.json").read_text())
    found = report["rows"][0]["methods"]["topk:density=0.1,impl=torch"]
    assert report["complete"] and found["status"] == "ok" and set(found["steps"]) == {"fresh", "refresh", "reuse"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_without_a_gpu():
    done = run("bash", str(SCRIPTS / "gpu_check.sh"), PYTHON=sys.executable)
    assert done.returncode == 1 and "torch sees no GPU" in done.stderr
    assert run("bash", str(SCRIPTS / "gpu_check.sh"), "--all").returncode == 2


def test_summary_tells_what_went_wrong(tmp_path):
    summary = module("gpu_summary")
    parts, log = tmp_path / "parts", "..F\n1 failed, 2 passed in 3.00s\n"
    parts.write_text("kernel tests\t1\t3\nGPU tests\t124\t50\nkernel benchmark\t0\t9\npipeline benchmark\t127\t0\n")
    found = summary.read_parts(parts, log)
    assert [p["status"] for p in found] == ["failed", "cut short", "ok", "not installed"]
    assert found[0]["result"] == "1 failed, 2 passed"
    wrong = {"shape": "tiny", "name": "tiles 0.1 triton", "status": "wrong", "reason": "relative error 1, allowed 0.1"}
    (tmp_path / "kernels.json").write_text(json.dumps({"rows": [wrong, {"name": "x", "status": "ok"}]}))
    assert summary.wrong_results(tmp_path) == ["tiny tiles 0.1 triton: wrong: relative error 1, allowed 0.1"]
