"""The report: valid against its schema, true to its runs, honest in its headline."""

import copy
import json
import math
from pathlib import Path

import jsonschema
import pytest

import dsattn
from dsattn import Config, report, report_view
from dsattn.compare import compare
from dsattn.measure import Job
from dsattn.metrics import psnr
from dsattn.pipelines.tiny.loader import load_tiny
from dsattn.survey import BASELINES

SCHEMA = json.loads(Path(dsattn.__file__).with_name("report.schema.json").read_text(encoding="utf-8"))
JOB = Job("a small blue square moves right over a dotted background", seed=1, height=48, width=64, frames=5, steps=4)
MODEL = {"id": "shipped", "revision": None, "pipeline": "TinyPipeline", "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def pipe():
    return load_tiny()


@pytest.fixture(scope="module")
def result(pipe):
    config = Config(
        "topk", {"density": 0.5, "block_q": 16, "block_k": 16}, dense_steps=0.5, dense_layers="0", impl="torch"
    )
    return compare(pipe, JOB, config, repeats=2, baseline=BASELINES["pipeline"])


@pytest.fixture(scope="module")
def built(result):
    return report.build_report(
        result, JOB, model=MODEL, fps=16, command="dsattn compare", load_s=1.0, files={"a": "b.mp4"}
    )


def check(value):
    jsonschema.validate(value, SCHEMA, format_checker=jsonschema.FormatChecker())


def test_schema_is_itself_valid_and_strict(built):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    check(built)
    check(json.loads(json.dumps(built, allow_nan=False)))
    for break_it in (
        lambda r: r.update(extra=1),
        lambda r: r["runs"]["sparse"].pop("plan_s"),
        lambda r: r["density"].update(all_calls=1.2),
        lambda r: r["protocol"].update(order="DD"),
    ):
        broken = copy.deepcopy(built)
        break_it(broken)
        with pytest.raises(jsonschema.ValidationError):
            check(broken)


def test_shape_and_runs(built, result):
    shape = built["shape"]
    assert (shape["height"], shape["width"], shape["frames"], shape["steps"]) == (48, 64, 5, 4)
    assert (shape["tokens"], shape["latent_thw"], shape["heads"], shape["layers"]) == (96, [2, 6, 8], 3, 6)
    dense, sparse = built["runs"]["dense"], built["runs"]["sparse"]
    assert dense["e2e_s"] == [run.e2e_s for run in result.dense]
    assert dense["dense_steps"] == 4 and sparse["dense_steps"] == 2
    assert dense["sparse_step"] is None and sparse["sparse_step"]["min"] > 0
    assert sparse["config"]["density"] == 0.5 and sparse["config"]["dense_layers"] == [0]
    assert sparse["dense_reasons"] == {"dense_steps": 24, "dense_layers": 4}
    assert len(sparse["attention_s"]) == len(sparse["plan_s"]) == 2
    assert sparse["warmup_s"] > 0 and sparse["peak_memory"]["process_rss"] > 0
    assert dense["compile_s"] == sparse["compile_s"] == 0


def test_compiling_is_told_apart(built, result):
    assert "compiling" not in report_view.apart(built)
    value = copy.deepcopy(built)
    value["runs"]["sparse"]["compile_s"] = 1.5
    assert "(1.50 s of it compiling attention)" in report_view.apart(value)
    row = next(row for row in report_view.rows(value) if row.name == "compiling")
    assert (row.dense, row.sparse, row.pair) == ("0.0 ms", "1.50 s", (0.0, 1.5))
    late = copy.deepcopy(result)
    late.sparse[0].summary["compile_s"] = 0.25
    notes = report.build_report(late, JOB, model=MODEL, fps=16, command="x")["protocol"]["notes"]
    assert "kernels were compiled for 0.25 s during measured runs: times are too long" in notes


def test_density_and_flops_agree(built):
    """2 of 4 steps and 1 of 6 layers are dense: all_calls is a known mix of 1 and sparse_calls."""
    density, flops = built["density"], built["flops"]
    share = 2 / 4 * 5 / 6
    assert density["all_calls"] == pytest.approx(1 - share + share * density["sparse_calls"], abs=1e-6)
    assert density["by_layer"][0] == {"layer": 0, "density": 1.0}
    assert [row["density"] for row in density["by_step"][:2]] == [1.0, 1.0]
    assert flops["dense"] == flops["attention_dense"] + flops["other"]
    attention = 4 * 64 * 3 * 96**2 * 6 * 2 * 4
    assert flops["attention_dense"] == attention
    assert flops["sparse"] == pytest.approx(flops["other"] + attention * density["all_calls"], abs=1)
    assert flops["bound"] == pytest.approx(flops["dense"] / flops["sparse"])


def test_fidelity(built, result):
    fidelity = built["fidelity"]
    want = psnr(result.dense[0].frames, result.sparse[0].frames)
    assert fidelity["psnr"]["mean"] == want.mean and len(fidelity["psnr"]["per_frame"]) == 5
    assert fidelity["noise_floor"] == {"psnr": None, "identical": True}
    assert 0 < fidelity["latent_relative_l2"] < math.inf and fidelity["latents_from"] == "last step"
    assert -1 <= fidelity["ssim"]["worst"] <= fidelity["ssim"]["mean"] <= 1


def test_speedup(built):
    speed, dense, sparse = built["speedup"], built["runs"]["dense"], built["runs"]["sparse"]
    assert speed["e2e"] == pytest.approx(dense["e2e"]["median"] / sparse["e2e"]["median"])
    assert speed["e2e_range"][0] <= speed["e2e"] <= speed["e2e_range"][1]
    assert speed["attention_with_plan"] < speed["attention"]
    assert speed["ceiling"] == pytest.approx(1 / (1 - speed["attention_share_of_dense_e2e"]))


def test_one_repeat_has_no_floor_and_identical_runs_have_no_psnr(pipe):
    """Every layer dense: the sparse run is the dense run, bit for bit."""
    config = Config("topk", {"block_q": 16, "block_k": 16}, dense_layers="0-5")
    found = compare(pipe, JOB, config, repeats=1, baseline=BASELINES["pipeline"])
    value = report.build_report(found, JOB, model=MODEL, fps=16, command="x")
    check(value)
    assert value["fidelity"]["noise_floor"] is None
    assert value["fidelity"]["psnr"] == {
        "mean": None,
        "worst": None,
        "worst_frame": None,
        "identical": True,
        "per_frame": [None] * 5,
    }
    assert value["fidelity"]["latent_relative_l2"] == 0
    assert value["density"]["sparse_calls"] is None and value["density"]["all_calls"] == 1
    assert any("one run per mode" in note for note in value["protocol"]["notes"])


def verdict(built, **changes):
    value = copy.deepcopy(built)
    value["speedup"].update({"e2e": 0.8, "e2e_range": [0.79, 0.81], "attention": 2.0, **changes.pop("speedup", {})})
    for part, values in changes.items():
        value[part].update(values)
    return report._verdict(value)


def test_slower_is_said_and_explained(built):
    slow = verdict(
        built,
        speedup={"attention_share_of_dense_e2e": 0.1, "ceiling": 1.11},
        density={"all_calls": 0.9},
    )
    assert slow["headline"] == "0.80x (slower)"
    text = " ".join(slow["reasons"])
    assert "attention is 10% of the dense run at 96 tokens" in text and "1.11x" in text
    assert "90% of the attention pairs" in text


def test_planning_and_kernel_are_named(built):
    value = copy.deepcopy(built)
    value["runs"]["sparse"].update(plan_s=[2.0], e2e={"median": 10.0, "min": 10.0, "max": 10.0})
    value["runs"]["sparse"]["fallbacks"] = [{"reason": "mask", "calls": 7}]
    value["density"]["all_calls"] = 0.2
    value["speedup"].update(e2e=0.9, e2e_range=[0.9, 0.9], attention=1.1)
    text = " ".join(report._verdict(value)["reasons"])
    assert "planning is 20%" in text and "7 calls fell back" in text and "fewer pairs per second" in text


def test_headlines(built):
    assert verdict(built, speedup={"e2e": 1.62, "e2e_range": [1.6, 1.64]}) == {"headline": "1.62x", "reasons": []}
    assert verdict(built, speedup={"e2e": 1.01})["headline"] == "1.01x (no difference)"
    unsteady = verdict(built, speedup={"e2e": 1.2, "e2e_range": [0.8, 1.7]})
    assert unsteady["headline"] == "1.20x" and "overlap" in unsteady["reasons"][0]


def test_write_json(tmp_path):
    report.write_json(tmp_path / "new" / "a.json", {"ü": [1, None]})
    assert json.loads((tmp_path / "new" / "a.json").read_text(encoding="utf-8")) == {"ü": [1, None]}
    with pytest.raises(ValueError):
        report.write_json(tmp_path / "b.json", {"x": math.inf})
    assert not (tmp_path / "b.json").exists()
    value = {"a": [1, -2.5e-07, None], "b": [[1], [2, 3]], "c": ["1", "[\n 1\n]"], "d": [], "e": [1, {"x": [4, 5]}]}
    report.write_json(tmp_path / "c.json", value)
    text = (tmp_path / "c.json").read_text(encoding="utf-8")
    assert json.loads(text) == value and "[1, -2.5e-07, null]" in text and "[2, 3]" in text


def test_environment_names_what_matters():
    env = report.environment()
    assert env["dsattn"] == dsattn.__version__ and env["threads"] >= 1 and env["cpu"]
    assert report.version_of("no-such-package-here") is None
