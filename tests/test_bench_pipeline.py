"""The pipeline benchmark on the CPU, and the check that runs everything."""

import json
import sys

import pytest
import torch

from .bench_scripts import SCRIPTS, module, run

pipeline = module("bench_pipeline")


def test_models_are_the_released_ones():
    sizes = {name: pipeline._tokens(model) for name, model in pipeline.MODELS.items() if "tiny" not in name}
    assert sizes == {"wan-1.3b": 32760, "wan-14b": 75600, "hunyuan": 119056}


def test_method_with_options():
    assert pipeline.parse_method("semantic:density=0.1,tail=none") == ("semantic", {"density": 0.1, "tail": "none"})
    assert pipeline.parse_method("radial") == ("radial", {})


@pytest.mark.parametrize("name", ["tiny", "tiny-hunyuan"])
def test_models_run_in_half_precision(name):
    """As on a GPU: what diffusers keeps in fp32 stays so, the rest is bf16."""
    model = pipeline.MODELS[name]
    built = pipeline.build(model, 2, torch.device("cpu"), torch.bfloat16)
    with torch.no_grad():
        out = built(timestep=torch.full((1,), 999.0), **pipeline.inputs(model, torch.device("cpu"), torch.bfloat16))[0]
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    assert torch.get_default_dtype() == torch.float32


def test_program_on_the_cpu(tmp_path):
    out = tmp_path / "pipeline.json", tmp_path / "pipeline.md"
    done = run(
        sys.executable, str(SCRIPTS / "bench_pipeline.py"), "--models", "tiny,tiny-hunyuan",
        "--method", "topk:density=0.1,impl=torch", "--method", "nope", "--json", str(out[0]), "--table", str(out[1]),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(out[0].read_text())
    assert report["complete"] and [r["model"] for r in report["rows"]] == ["tiny", "tiny-hunyuan"]
    for row in report["rows"]:
        found, other = row["methods"].values()
        assert row["dense_step_s"] > row["attend_s"] > 0
        assert set(found["steps"]) == {"fresh", "refresh", "reuse"} and found["impls"] == {
            "torch": 27 if row["layers"] == 3 else 18
        }
        assert found["steps"]["refresh"]["plan_s"] > found["steps"]["reuse"]["plan_s"]
        assert 0 < found["output_error"] < 1 and found["fallbacks"] == {}
        assert other["status"] == "failed" and "unknown method" in other["reason"]
    assert out[1].read_text() == done.stdout[:-1]


def test_time_that_is_used_up_is_said(tmp_path):
    path = tmp_path / "pipeline.json"
    done = run(
        sys.executable, str(SCRIPTS / "bench_pipeline.py"), "--models", "tiny,tiny-hunyuan", "--seconds", "0.001",
        "--method", "topk:impl=torch", "--json", str(path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert "late" in rows[1]["reason"]


def test_without_diffusers(tmp_path):
    (tmp_path / "diffusers.py").write_text("raise ImportError('not here')")
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(SCRIPTS)!r}]; "
        "import bench_pipeline; bench_pipeline.main(models='tiny')"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 1 and "needs diffusers (not here): pip install diffusers" in done.stderr


def test_gpu_check_runs_every_part(tmp_path):
    done = run("bash", str(SCRIPTS / "gpu_check.sh"), "--tiny", PYTHON=sys.executable, OUT=str(tmp_path), BUDGET="240")
    assert done.returncode == 0, done.stdout + done.stderr
    check = json.loads((tmp_path / "check.json").read_text())
    assert check["ok"] and check["wrong"] == []
    assert [p["part"] for p in check["parts"]] == [
        "kernel tests",
        "GPU tests",
        "kernel benchmark",
        "pipeline benchmark",
    ]
    assert "passed" in check["parts"][0]["result"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"check.json", "kernels.json", "pipeline.json", "summary.md", "tests.log"}
    summary = (tmp_path / "summary.md").read_text()
    assert "# Kernels on" in summary and "# Denoising steps on" in summary


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
