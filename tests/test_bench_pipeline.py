"""The pipeline benchmark: its models, and a run of the program on the CPU."""

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
        sys.executable, str(SCRIPTS / "bench_pipeline.py"), "--models", "tiny-hunyuan",
        "--method", "topk:density=0.1,impl=torch", "--method", "nope", "--json", str(out[0]), "--table", str(out[1]),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(out[0].read_text())
    assert report["complete"] and [r["model"] for r in report["rows"]] == ["tiny-hunyuan"]
    for row in report["rows"]:
        found, other = row["methods"].values()
        assert row["dense_step_s"] > 0 and row["attend_s"] > 0
        assert set(found["steps"]) == {"fresh", "refresh", "reuse"}
        assert found["impls"] == {"torch": 9 * row["layers"]}
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
