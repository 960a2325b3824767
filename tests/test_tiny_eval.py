"""The evaluation of the small model: what it sees in clips of known truth, its scores, and the script."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from dsattn.pipelines.tiny import data
from dsattn.pipelines.tiny.loader import WEIGHTS, load_tiny
from dsattn.pipelines.tiny.render import render, render_background
from tests import bench_scripts

vision = bench_scripts.module("tiny_vision")
texture = bench_scripts.module("tiny_texture")
scoring = bench_scripts.module("tiny_scores")
evaluation = bench_scripts.module("eval_tiny")
docs_scores = bench_scripts.module("docs_scores")

SIZE = (13, 96, 128)
SCENES = scoring.held_out_scenes(60)


def shares(found: list[dict[str, Any]], scenes: list[data.Scene] = SCENES) -> dict[str, float]:
    judged = [scoring.judge(scene, clip) for scene, clip in zip(scenes, found, strict=False)]
    return {name: row["share"] for name, row in scoring.scores(judged).items()}


# ---- clips of known truth ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [((13, 96, 128), 50), ((17, 128, 96), 30)])
def test_rendered_clips_are_seen_as_they_are(size: tuple[int, int, int], count: int) -> None:
    found = scoring.validate(SCENES[-count:], size, load_tiny().vae, 2)
    assert scoring.distrusted(found) == []
    assert set(found["scores"]) == set(scoring.CONDITIONS)
    assert all(table["colour"]["clips"] == count for table in found["scores"].values())
    assert 0.9 < found["flickering"] < 1 and found["codec_psnr_db"] > 28


def test_every_motion_is_told() -> None:
    base = data.ShapeSpec("green", "square", "small", "left", 0.13, (0.5, 0.5), 0.42, 0.1, 0.3)
    for motion in data.MOTIONS:
        spec = replace(base, motion=motion, travel=0.0 if motion == "still" else 0.42)
        for phase in (0.0, 0.37, 0.8):
            scene = data.Scene((replace(spec, phase=phase),), "cloudy", 1, False, "", False, "")
            assert vision.look(render(scene, 17, 96, 128)).motion == motion


def test_objects_are_counted() -> None:
    places = (("red", 0.2), ("blue", 0.5), ("red", 0.8))  # two of one colour are two objects
    specs = [data.ShapeSpec(c, "star", "small", "still", 0.13, (x, 0.5), 0.0, 0.0) for c, x in places]
    for count in (1, 2, 3):
        scene = data.Scene(tuple(specs[:count]), "striped", 1, False, "", False, "")
        assert vision.look(render(scene, 5, 96, 160)).objects == count
    stream = data.clips(3)
    crowd = [s for s in (next(stream) for _ in range(60)) if len(s.shapes) > 1][:8]
    assert len(crowd) == 8
    assert sum(vision.look(render(scene, 9, 96, 128)).objects > 1 for scene in crowd) >= 7  # some hide one another


# ---- wrong clips ---------------------------------------------------------------------------------------------------


def test_reversed_clips_go_the_wrong_way() -> None:
    found = [scoring.measure(render(scene, *SIZE)[::-1]) for scene in SCENES[:30]]
    got = shares(found)
    assert got["direction"] == 0.0
    assert got["colour"] == got["shape"] == got["background"] == 1.0
    turning = [(s, f) for s, f in zip(SCENES, found, strict=False) if s.shapes[0].motion in data.TURNS]
    assert turning and all(f["motion"] == data.OPPOSITE[s.shapes[0].motion] for s, f in turning)


def test_frozen_clips_do_not_move() -> None:
    got = shares([scoring.measure(render(scene, 1, 96, 128).repeat(13, axis=0)) for scene in SCENES[:20]])
    assert got["moves"] == got["motion"] == got["direction"] == got["all"] == 0.0
    assert got["colour"] == got["shape"] == 1.0


def test_mirrored_clips_swap_left_and_right() -> None:
    swap = {"left": "right", "right": "left"}
    for scene in [s for s in SCENES if s.shapes[0].motion in data.DIRECTIONS][:12]:
        seen = vision.look(render(scene, *SIZE)[:, :, ::-1])
        assert seen.direction == "-".join(swap.get(word, word) for word in scene.shapes[0].motion.split("-"))


def test_another_colour_shape_or_size_is_seen() -> None:
    for scene in SCENES[:10]:
        spec = scene.shapes[0]
        colour = "cyan" if spec.colour != "cyan" else "orange"
        shape = "star" if spec.shape != "star" else "circle"
        size, radius = ("small", 0.13) if spec.size == "large" else ("large", 0.22)
        other = replace(scene, shapes=(replace(spec, colour=colour, shape=shape, size=size, radius=radius),))
        found = scoring.measure(render(other, *SIZE))
        right = scoring.judge(scene, found)
        assert not (right["colour"] or right["shape"] or right.get("size", False))
        assert (found["colour"], found["shape"], found["size"]) == (colour, shape, size)


def test_a_background_pasted_behind_is_seen() -> None:
    for scene in SCENES[:15]:
        kind = data.BACKGROUNDS[(data.BACKGROUNDS.index(scene.background) + 1) % 5]
        clip = render(scene, *SIZE)
        muted = (vision.label_colours(clip) < 0)[..., None]
        behind = render_background(kind, 5, *SIZE[1:])[None]
        found = scoring.measure(np.where(muted, behind, clip))
        assert found["background"] == kind
        assert not scoring.judge(scene, found)["background"]


def test_nothing_is_seen_where_nothing_is() -> None:
    empty = render_background("cloudy", 0, 96, 96)[None].repeat(13, axis=0)
    found = scoring.measure(empty)
    assert found["colour"] == found["shape"] == found["motion"] == "none" and found["objects"] == 0
    flat = np.full((13, 96, 96, 3), 0.4, np.float32)
    assert scoring.measure(flat)["background"] == "none"
    noise = np.random.default_rng(0).random((13, 96, 96, 3), np.float32)
    found = scoring.measure(noise)
    assert found["shape"] == "none" and found["motion"] in ("none", "still")


def test_an_object_that_jumps_about_has_no_motion() -> None:
    clip = render(next(s for s in SCENES if s.shapes[0].motion == "left"), 17, 96, 128)
    order = np.random.default_rng(1).permutation(17)
    assert vision.look(clip[order]).motion == "none"


def test_a_blob_is_no_shape() -> None:
    clip = np.full((9, 96, 128, 3), 0.4, np.float32)
    clip[:, 40:52, 10:110] = data.COLOURS["red"]
    seen = vision.look(clip)
    assert seen.colour == "red" and seen.shape == "none"


# ---- scores --------------------------------------------------------------------------------------------------------


def test_wilson_interval_against_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for right, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert scoring.wilson(right, count) == pytest.approx((low, high), abs=5e-5)
    assert scoring.wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_scores_ask_only_what_the_caption_says() -> None:
    straight = sum(s.shapes[0].motion in data.DIRECTIONS for s in SCENES)
    sized = sum(any(w in s.caption.split() for o in data.SIZE_WORDS.values() for w in o) for s in SCENES)
    found = {"colour": "none", "shape": "none", "direction": "none", "motion": "none", "background": "none"}
    found |= {"size": "none", "moves": False, "objects": 0}
    table = scoring.scores([scoring.judge(scene, found) for scene in SCENES])
    assert {n: row["clips"] for n, row in table.items()} == dict.fromkeys(scoring.CHANCE, 60) | {
        "direction": straight,
        "size": sized,
    }
    assert all(row["right"] == 0 for row in table.values())
    groups = scoring.by_value(SCENES, [scoring.judge(scene, found) for scene in SCENES])
    assert sum(t["all"]["clips"] for name, t in groups.items() if name.startswith("motion ")) == 60


# ---- the script ----------------------------------------------------------------------------------------------------

APP = typer.Typer()
APP.command()(evaluation.main)


def run(*options: str | Path) -> Any:
    small = ["--grid", "5x64x64", "--steps", "2", "--limit", "2", "--seeds", "2", "--threads", "1", "--truth", "2"]
    return CliRunner().invoke(APP, [*small, *map(str, options)])


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five frames of 64 pixels are too little to see by; what the gate does is tested on its own."""
    monkeypatch.setattr(scoring, "TRUSTED", 0.0)


def test_script_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusting: None) -> None:
    whole = tmp_path / "whole.json"
    result = run("--parts", tmp_path / "a", "--json", whole, "--sheet", tmp_path / "a.png", "--by")
    assert result.exit_code == 0, result.output
    assert "generated, 4 of 4 clips" in result.output and "codec PSNR" in result.output
    assert "background " in result.output.split("temporal flickering")[1]
    assert (tmp_path / "a.png").stat().st_size > 10_000

    measure, count = scoring.measure, 0

    def killed(video: Any) -> Any:
        nonlocal count
        count += 1
        if count > 6 + 3:  # two clips of known truth in three conditions, then the fourth clip
            raise KeyboardInterrupt
        return measure(video)

    monkeypatch.setattr(scoring, "measure", killed)
    assert run("--parts", tmp_path / "b").exit_code != 0
    assert len(list((tmp_path / "b").glob("0*.json"))) == 3
    monkeypatch.setattr(scoring, "measure", measure)
    calls = []
    monkeypatch.setattr(evaluation, "generate", _counted(evaluation.generate, calls))
    again = tmp_path / "again.json"
    assert run("--parts", tmp_path / "b", "--json", again).exit_code == 0
    assert len(calls) == 1 and again.read_text() == whole.read_text()

    found = json.loads(whole.read_text())
    assert found["clips_done"] == found["clips_wanted"] == len(found["clips"]) == 4
    assert len({(row["prompt"], row["seed"]) for row in found["clips"]}) == 4
    assert "--weights" not in found["command"]
    assert len(json.dumps(found["clips"])) / 4 * 192 < 100_000
    assert run("--parts", tmp_path / "b", "--steps", "3").exit_code == 2  # other settings are refused

    results = tmp_path / "results"
    (results / "cpu").mkdir(parents=True)
    shutil.copy(whole, results / "cpu" / "eval_tiny_5x64x64.json")
    page = docs_scores.model_scores(results, "tiny", lambda header, rows: "\n".join(map(str, [header, *rows])))
    assert "5 × 64 × 64, 2 steps: 4 of 4 clips" in page and found["command"] in page
    assert f"{found['scores']['colour']['share']:.1%}" in page
    assert docs_scores.model_scores(results, "tiny-joint", str).startswith("Not measured")

    (results / "cpu" / "checkpoints").mkdir()
    shutil.copy(whole, results / "cpu" / "checkpoints" / "eval_tiny_30.json")
    log = [{"step": 3, "loss": 0.5}] + [{"step": 3 * n, "held_out": {"0.5": 1 / n, "0.9": 2.0}} for n in range(1, 40)]
    log.insert(0, {"step": 0, "held_out": {"0.5": 4.0, "0.9": 2.0}})
    (results / "cpu" / "train_tiny.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    header, *rows = _curve(results / "cpu")
    assert header[:3] == ["step", "loss at 0.5", "loss at 0.9"] and "shape" in header
    assert rows[-1][:3] == ["117", "0.026", "2.000"] and 9 <= len(rows) <= 12
    assert rows[0][:2] == ["0", "4.000"]
    (scored,) = (row for row in rows if row[0] == "30")
    assert scored[header.index("colour")] == f"{found['scores']['colour']['share']:.0%}"
    (results / "cpu" / "train_tiny.jsonl").write_text("")
    with pytest.raises(ValueError, match="no held-out loss"):
        _curve(results / "cpu")


def test_the_command_names_other_weights(tmp_path: Path, trusting: None) -> None:
    out = tmp_path / "scores.json"
    result = run("--weights", WEIGHTS, "--limit", "1", "--seeds", "1", "--parts", tmp_path / "a", "--json", out)
    assert result.exit_code == 0, result.output
    assert f"--weights {WEIGHTS} " in json.loads(out.read_text())["command"]


def test_caption_curve_has_a_line_for_every_step(tmp_path: Path) -> None:
    answers = [
        {"word": w, "level": 0.8, "clips": 64, "right": share} for w, share in (("shape", 0.5), ("motion", 0.75))
    ]
    content = {"grid": [5, 12, 12], "weights": {"0": answers, "1200": answers[::-1]}}
    (tmp_path / "classify_tiny.json").write_text(json.dumps(content))
    got = docs_scores.caption_curve(tmp_path, "tiny", lambda header, rows, left: json.dumps([header, *rows]))
    rows = json.loads(got.split("\n\n")[0])
    assert rows[:2] == [["step", "shape, noise 0.8", "motion, noise 0.8"], ["0", "50%", "75%"]]
    assert rows[2][0] == "1,200" and "64 held-out clips of 5 × 12 × 12 tokens" in got


def _curve(folder: Path) -> list[list[str]]:
    rows: list[list[str]] = []
    docs_scores.training_curve(folder, "tiny", lambda header, found, left: rows.extend([header, *found]) or "")
    return [list(row) for row in rows]


def _counted(function: Any, calls: list[Any]) -> Any:
    def call(*args: Any) -> Any:
        calls.append(args)
        return function(*args)

    return call


def test_script_stops_in_time_and_says_how_far_it_came(tmp_path: Path, trusting: None) -> None:
    result = run("--parts", tmp_path / "a", "--json", tmp_path / "s.json", "--minutes", "0.0001", "--batch", "2")
    assert result.exit_code == 0 and "generated, 2 of 4 clips" in result.output
    found = json.loads((tmp_path / "s.json").read_text())
    assert (found["clips_done"], found["clips_wanted"]) == (2, 4)
    assert {row["seed"] for row in found["clips"]} == {0}  # every prompt once before any twice


def test_a_broken_classifier_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "tell_background", lambda video, labels: "striped")
    monkeypatch.setattr(evaluation, "generate", lambda *args: pytest.fail("no clip may be judged"))
    result = run("--parts", tmp_path / "a", "--json", tmp_path / "s.json", "--limit", "8")
    assert result.exit_code == 1 and not (tmp_path / "s.json").exists()
    assert "background on clips 'codec':" in result.output and "expected at least 98%" in result.output


def test_other_weights_and_models(tmp_path: Path, trusting: None) -> None:
    shutil.copytree(WEIGHTS, tmp_path / "weights")
    pipe = evaluation.open_pipeline("tiny", "float32", tmp_path / "weights", "cpu")
    assert evaluation.fingerprint(pipe) == evaluation.fingerprint(load_tiny())
    with torch.no_grad():
        pipe.transformer.proj_out.bias += 1
    assert evaluation.fingerprint(pipe) != evaluation.fingerprint(load_tiny())
    assert run("--weights", tmp_path, "--parts", tmp_path / "a").exit_code == 2
    assert run("--model", "./nowhere", "--parts", tmp_path / "a").exit_code == 2
    assert run("--grid", "256x256", "--parts", tmp_path / "a").exit_code == 2


@pytest.mark.parametrize("model", ["tiny", "tiny-joint"])
def test_what_is_judged_are_pixels_from_0_to_1(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusting: None
) -> None:
    seen = []
    make = evaluation.generate
    monkeypatch.setattr(evaluation, "generate", lambda *args: seen.extend(make(*args)) or seen[-2:])
    assert run("--model", model, "--seeds", "1", "--batch", "2", "--parts", tmp_path).exit_code == 0
    assert len(seen) == 2  # HunyuanVideo's pipeline returns pictures of 0 to 255 unless told
    assert all(v.shape == (5, 64, 64, 3) and v.dtype == np.float32 and 0 <= v.min() < v.max() <= 1 for v in seen)


def test_scripts_see_one_another() -> None:
    assert sys.modules["tiny_scores"] is scoring and evaluation.tiny_scores is scoring
