"""Scoring a run: what is measured, what is said of broken files, and the scripts end to end."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dsattn import metrics
from dsattn.cli.app import run
from dsattn.cli.errors import FAILED, USAGE
from dsattn.errors import UsageError
from dsattn.quality import sweep
from dsattn.quality.arms import ArmsDifferError
from dsattn.quality.clips import ClipError, read_clip
from dsattn.quality.evaluate import evaluate
from dsattn.quality.folder import Folder
from dsattn.quality.summary import build, save
from dsattn.quality.tables import lines, markdown, tables
from dsattn.quality.vbench import Scores, read_results
from dsattn.video import read_mp4, write_mp4

from . import quality_runs
from .test_vbench import FAKE

ROOT = Path(__file__).resolve().parents[1]
FLICKERING = "temporal_flickering"


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.app


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """Five prompts, two clips each, frames kept."""
    root = tmp_path_factory.mktemp("run")
    quality_runs.run(root, tuple("abcde"), samples=2, keep_frames=True)
    return root


@pytest.fixture(scope="module")
def report(sampled):
    return build(evaluate(Folder(sampled)), "vbench_eval")


def test_scores_are_those_of_the_files(sampled, report):
    dense, sparse = report["arms"]["dense"], report["arms"]["topk"]
    assert dense["videos"] == sparse["videos"] == 10 and report["problems"] == []
    names = [f"{p}-{i}" for p in "abcde" for i in (0, 1)]
    read = {arm: [read_mp4(sampled / "videos" / arm / f"{n}.mp4") for n in names] for arm in ("dense", "topk")}
    flicker = {arm: [metrics.temporal_flickering(v) for v in clips] for arm, clips in read.items()}
    assert dense["scores"][FLICKERING]["score"] == pytest.approx(np.mean(flicker["dense"]))
    by_prompt = (np.array(flicker["topk"]) - flicker["dense"]).reshape(5, 2).mean(axis=1)
    found = sparse["scores"][FLICKERING]["difference"]
    assert found["mean"] == pytest.approx(by_prompt.mean()) and found["prompts"] == 5
    want = stats.bootstrap((by_prompt,), np.mean, method="percentile", random_state=np.random.default_rng(1))
    width = want.confidence_interval.high - want.confidence_interval.low
    assert found["low"] == pytest.approx(want.confidence_interval.low, abs=0.1 * width)
    assert found["high"] == pytest.approx(want.confidence_interval.high, abs=0.1 * width)
    assert sparse["density"] == pytest.approx(0.3) and dense["scores"][FLICKERING]["difference"] is None


def test_fidelity_is_measured_before_encoding_where_frames_were_kept(sampled, report, tmp_path):
    assert report["fidelity_on"] == ["uint8 frames before encoding"]
    seeds = [json.loads(p.read_text())["seed"] for p in sorted((sampled / "meta/topk").iterdir())]
    want = np.mean([metrics.psnr(quality_runs.clip("dense", s), quality_runs.clip("topk", s)).mean for s in seeds])
    assert report["arms"]["topk"]["fidelity"]["psnr"]["mean"] == pytest.approx(want)
    quality_runs.run(tmp_path, ("a",))
    other = build(evaluate(Folder(tmp_path)), "")
    assert other["fidelity_on"][0].startswith("decoded mp4")
    dense, sparse = (read_mp4(tmp_path / "videos" / arm / "a-0.mp4") for arm in ("dense", "topk"))
    assert other["arms"]["topk"]["fidelity"]["psnr"]["mean"] == pytest.approx(metrics.psnr(dense, sparse).mean)


def test_what_is_not_measured_is_said(report):
    text = "\n".join(lines(report))
    assert "ms_ssim n/a (frames have 32 pixels a side, it needs 176)" in text
    assert "lpips n/a (not asked for)" in text
    assert "Total n/a (1/16 dimensions, suite smoke)" in text and "Quality n/a" in text


def test_lpips_is_used_when_it_is_there(sampled):
    class Fake(metrics.Lpips):
        def __call__(self, reference, other):
            return metrics.Fidelity((0.25,) * len(reference))

    report = build(evaluate(Folder(sampled), lpips=Fake((), ())), "")
    # Frames of 32 pixels are too small for it.
    assert report["missing"]["lpips"] == "frames have 32 pixels a side, it needs 63"


def test_totals_only_of_everything(sampled):
    result = evaluate(Folder(sampled))
    every = {name: Scores(0.5, {}) for name in (*quality_runs.QUALITY, *sweep_semantic())}
    for arm in result.clips:
        result.official[arm] = dict(every)
    found = build(result, "")["arms"]["dense"]["totals"]
    assert found["quality"] is not None and found["semantic"] is not None
    assert found["total"] is None and found["total_why"] == "n/a (suite smoke)"
    result.settings = {**result.settings, "suite": "full"}
    found = build(result, "")["arms"]["dense"]["totals"]
    assert found["total"] == pytest.approx((4 * found["quality"] + found["semantic"]) / 5)
    result.clips["dense"].pop()
    assert build(result, "")["arms"]["dense"]["totals"]["total_why"] == "n/a (9/10 videos)"


def sweep_semantic():
    from dsattn.quality.vbench import SEMANTIC

    return SEMANTIC


def test_vbenchs_files_are_written(sampled):
    report = save(Folder(sampled), evaluate(Folder(sampled)), "again")
    assert json.loads((sampled / "quality.json").read_text()) == json.loads(json.dumps(report))
    info = json.loads((sampled / "vbench/topk_full_info.json").read_text())
    assert info[0]["prompt_en"] == "a" and [Path(p).name for p in info[0]["video_list"]] == ["a-0.mp4", "a-1.mp4"]
    scores = read_results(sampled / "vbench/dense_eval_results.json")
    assert scores[FLICKERING].score == report["arms"]["dense"]["scores"][FLICKERING]["score"]
    assert len(scores[FLICKERING].videos) == 10 and set(scores) == {FLICKERING}


def test_tables(report):
    (rows,) = tables(report)
    assert rows[0] == ["", "dense", "topk", "difference [95 %]", "prompts"]
    named = {row[0]: row for row in rows}
    assert named[FLICKERING][3][0] in "+-" and named[FLICKERING][4] == "5"
    assert named["psnr to dense"][2].endswith(" dB") and "proxy_flow" in named
    text = markdown(report)
    assert "| temporal_flickering |" in text and "- `psnr`: dB against the dense clip" in text


def broken(root):
    """One clip of each kind of damage; words that must name it."""
    folder = root / "videos/topk"
    good = read_mp4(folder / "a-0.mp4")
    (folder / "a-0.mp4").write_bytes(b"no video at all" * 50)
    (folder / "b-0.mp4").write_bytes(b"")
    whole = (folder / "c-0.mp4").read_bytes()
    (folder / "c-0.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    write_mp4(folder / "d-0.mp4", good[:, :16, :16].repeat(2, axis=2), 8)
    write_mp4(folder / "e-0.mp4", good[:1], 8)
    (folder / "f-0.mp4").unlink()
    damaged = bytearray((folder / "g-0.mp4").read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    (folder / "g-0.mp4").write_bytes(damaged)
    write_mp4(folder / "h-0.mp4", good[:4], 8)
    (root / "meta/topk/i-0.json").unlink()
    return {
        "a-0": "cannot be read as a video",
        "b-0": "is empty (0 bytes)",
        "c-0": "(damaged or truncated)",
        "d-0": "is 5x16x32 (frames x height x width), expected 5x32x48",
        "e-0": "has 1 frame",
        "f-0": "is missing",
        "g-0": "g-0.mp4",
        "h-0": "is 4x32x48 (frames x height x width), expected 5x32x48",
        "i-0": "has no sidecar",
    }


def test_broken_videos_are_named_and_the_rest_is_scored(tmp_path, capsys):
    quality_runs.run(tmp_path, tuple("abcdefghij"))
    wanted = broken(tmp_path)
    assert run([str(tmp_path), "--quiet"], script("vbench_eval"), "vbench_eval") == FAILED
    out, err = capsys.readouterr()
    report = json.loads((tmp_path / "quality.json").read_text())
    said = {Path(problem["file"]).stem: problem["why"] for problem in report["problems"]}
    assert said.keys() == wanted.keys()
    for name, words in wanted.items():
        assert words in said[name] and f"{name}.mp4" in said[name], said[name]
        assert said[name] in out
    assert err.startswith("vbench_eval: error: 9 of the files") and err.count("\n") == 1
    assert report["arms"]["dense"]["videos"] == 10 and report["arms"]["topk"]["videos"] == 1
    assert report["arms"]["topk"]["scores"][FLICKERING]["difference"]["prompts"] == 1
    # Sampling again mends them all, and makes nothing else.
    done = quality_runs.run(tmp_path, tuple("abcdefghij"))
    assert (done.made, done.found) == (9, 11) and not evaluate(Folder(tmp_path)).problems


def test_kept_frames_that_are_damaged(tmp_path):
    quality_runs.run(tmp_path, keep_frames=True)
    (tmp_path / "frames/topk/b-0.npz").write_bytes(b"PK torn")
    result = evaluate(Folder(tmp_path))
    assert [Path(file).name for file, _ in result.problems] == ["b-0.mp4"] and "b-0.npz" in result.problems[0][1]
    found = build(result, "")["arms"]["topk"]
    assert found["fidelity"]["psnr"]["prompts"] == 2 and found["videos"] == 3


def test_without_opencv_proxies_are_not_computed(sampled, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    report = build(evaluate(Folder(sampled)), "")
    assert "pip install opencv-python-headless" in report["missing"]["proxy_flow"] and not report["problems"]
    assert set(report["arms"]["dense"]["scores"]) == {FLICKERING}


def test_any_video_of_two_frames_can_be_read_without_a_shape(tmp_path):
    write_mp4(tmp_path / "x.mp4", quality_runs.clip("dense", 0)[:2], 8)
    assert len(read_clip(tmp_path / "x.mp4")) == 2
    with pytest.raises(ClipError, match="missing"):
        read_clip(tmp_path / "y.mp4")


def test_sidecars_that_differ_stop_everything(tmp_path):
    quality_runs.run(tmp_path)
    path = tmp_path / "meta/topk/b-0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "negative_prompt": "ugly"}))
    with pytest.raises(ArmsDifferError, match=r"'b'.*negative_prompt is None and 'ugly'"):
        evaluate(Folder(tmp_path))


def test_wrong_folder_and_arm(tmp_path, sampled):
    with pytest.raises(UsageError, match=r"run\.json is missing"):
        evaluate(Folder(tmp_path))
    with pytest.raises(UsageError, match="no arm 'sol'; it has dense, topk"):
        evaluate(Folder(sampled), ["sol"])
    (tmp_path / "run.json").write_text('{"schema": "other"}')
    with pytest.raises(UsageError, match="must have the schema"):
        evaluate(Folder(tmp_path))


def test_results_from_elsewhere(sampled, tmp_path, capsys):
    """A file of the official package, computed on another machine: its videos are paired by their names."""
    for arm, shift in (("dense", 0.0), ("topk", -0.1)):
        rows = [
            {"video_path": f"/x/{p}-{i}.mp4", "video_results": 50 + k + 100 * shift}
            for k, (p, i) in enumerate((p, i) for p in "abcde" for i in (0, 1))
        ]
        (tmp_path / f"{arm}.json").write_text(json.dumps({"imaging_quality": [0.545 + shift, rows]}))
    given = [f"--results={arm}={tmp_path / arm}.json" for arm in ("dense", "topk")]
    assert run([str(sampled), "--quiet", "--json", *given], script("vbench_eval"), "vbench_eval") == 0
    score = json.loads(capsys.readouterr().out)["arms"]["topk"]["scores"]["imaging_quality"]
    assert score["by"] == "vbench" and score["score"] == pytest.approx(0.445)
    assert score["difference"]["mean"] == pytest.approx(-0.1) and score["difference"]["low"] == pytest.approx(-0.1)
    (tmp_path / "dense.json").write_text('{"color": [0.5, [{"video_path": "z-0.mp4", "video_results": 0.5}]]}')
    assert run([str(sampled), "--quiet", given[0]], script("vbench_eval"), "vbench_eval") == USAGE
    assert "does not have, such as 'z-0.mp4'" in capsys.readouterr().err


def test_the_official_package_scores_what_can_be_read(tmp_path, capsys):
    """With a package of vbench's interface in another interpreter; its figures go into table and files."""
    root = tmp_path / "run"
    quality_runs.run(root, ("a", "b"))
    (root / "videos/topk/b-0.mp4").write_bytes(b"")
    python = tmp_path / "python"
    python.write_text(FAKE.format(python=sys.executable, tv="yes"))
    python.chmod(0o755)
    dimensions = [f"--dimension={name}" for name in ("motion_smoothness", "aesthetic_quality", "color")]
    given = [str(root), "--quiet", "--vbench-python", str(python), "--device", "cpu", *dimensions]
    assert run(given, script("vbench_eval"), "vbench_eval") == FAILED
    capsys.readouterr()
    report = json.loads((root / "quality.json").read_text())
    score = report["arms"]["topk"]["scores"]["motion_smoothness"]
    assert (score["score"], score["by"], score["videos"], score["difference"]["prompts"]) == (0.5, "vbench", 1, 1)
    assert report["arms"]["dense"]["scores"]["motion_smoothness"]["videos"] == 2
    assert report["vbench_package"]["vbench"] == "0.1.5"
    assert report["missing"]["color"] == "no clip of a prompt for it in the suite smoke"
    files = [problem["file"] for problem in report["problems"]]
    assert [Path(file).name for file in files] == ["b-0.mp4", "aesthetic_quality", "aesthetic_quality"]
    assert set(read_results(root / "vbench/dense_eval_results.json")) == {FLICKERING, "motion_smoothness"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dimension", "color"], "--vbench-python"),
        (["--results", "x=y.json"], "--results must be ARM=FILE"),
        (["--vbench-python", "p", "--dimension", "colour"], "VBench has no dimension colour"),
        (["--lpips-weights", "nowhere"], "weights not found"),
    ],
)
def test_wrong_usage(sampled, arguments, words, capsys):
    assert run([str(sampled), "--quiet", *arguments], script("vbench_eval"), "vbench_eval") == USAGE
    assert words in capsys.readouterr().err


def point(arm, density, psnr, identical=False):
    return {"arm": arm, "density": density, "psnr": psnr, "time": None, "identical": identical}


def test_pareto():
    """Brute force on random points: a point is best when none that costs no more is closer."""
    rng = np.random.default_rng(0)
    report = {"reference": "dense", "arms": {"dense": arm_report(1.0, None)}}
    for i in range(40):
        report["arms"][f"m@{i}"] = arm_report(float(rng.integers(1, 12)) / 12, float(rng.integers(15, 30)))
    found = sweep.points(report)
    assert [p["density"] for p in found] == sorted(p["density"] for p in found)
    for p in found:
        beaten = any(
            (o["density"] < p["density"] and o["psnr"] >= p["psnr"])
            or (o["density"] <= p["density"] and o["psnr"] > p["psnr"])
            for o in found
        )
        assert p["best"] is not beaten
    report["arms"]["same"] = {**arm_report(0.01, None), "identical_to_reference": 4}
    assert [p["arm"] for p in sweep.points(report) if p["best"]] == ["same"], "identical clips are infinitely close"
    assert sweep.rows(sweep.points(report), "density")[1][3] == "identical"
    with pytest.raises(UsageError, match="--against"):
        sweep.points(report, "money")


def arm_report(density, psnr):
    fidelity = {} if psnr is None else {"psnr": {"mean": psnr}}
    return {
        "videos": 4,
        "density": density,
        "denoise_s": 1.0,
        "identical_to_reference": 0,
        "scores": {},
        "fidelity": fidelity,
    }


def test_arms_of_a_sweep():
    assert sweep.arms_of(["topk", "auto"], [0.1, 0.25]) == [
        "topk@0.1=topk:density=0.1",
        "topk@0.25=topk:density=0.25",
        "auto@0.1=auto:cost=0.1",
        "auto@0.25=auto:cost=0.25",
    ]
    with pytest.raises(UsageError, match="radial has no density or cost"):
        sweep.arms_of(["radial"], [0.1])
    with pytest.raises(UsageError, match="no method 'x'"):
        sweep.arms_of(["x"], [0.1])


def test_sweep_end_to_end_with_the_shipped_model(tmp_path, capsys, monkeypatch):
    """Generates, scores and draws; then again from what is there, then the other script on the same folder."""
    monkeypatch.chdir(tmp_path)
    small = ["--steps", "2", "--height", "64", "--width", "64", "--frames", "5", "--quiet"]
    low = "low=topk:density=0.2,block_q=16,block_k=16,dense_steps=0,impl=torch"
    options = ["--methods", "topk", "--targets", "0.5", "--impl", "torch", "--arm", low, "--arm", "safe:impl=torch"]
    compare = script("compare_quality")
    assert run([*small, *options, "--out", "s"], compare, "compare_quality") == 0
    out, err = capsys.readouterr()
    assert "topk@0.5" in out and "best for its density" in out and err == ""
    value = json.loads(Path("s/pareto.json").read_text())
    assert {p["arm"] for p in value["points"]} == {"topk@0.5", "low", "safe"}
    first = value["points"][0]
    assert first["arm"] == "low" and first["best"] and first["density"] < 0.4 and 10 < first["psnr"] < 40
    assert Path("s/pareto.png").read_bytes()[:4] == b"\x89PNG" and "| topk@0.5 |" in Path("s/pareto.md").read_text()
    before = quality_runs.videos(Path("s"))
    assert run(["--existing", "--out", "s", "--json"], compare, "compare_quality") == 0
    assert json.loads(capsys.readouterr().out)["points"] == value["points"]
    assert quality_runs.videos(Path("s")) == before
    assert run(["s", "--arm", "low"], script("vbench_eval"), "vbench_eval") == 0
    out, err = capsys.readouterr()
    assert "psnr to dense" in out and "topk@0.5" not in out and "1/4" in err
    assert run(["--out", "s", "--targets", "x"], compare, "compare_quality") == USAGE
    assert run(["--out", "s", "--suite", "mini", "--prompts", "no"], script("vbench_sample"), "x") == USAGE
