"""Sampling into a folder: whole or not at all, never twice, and nothing but attention differs."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dsattn.errors import UsageError
from dsattn.quality.arms import ArmsDifferError
from dsattn.quality.folder import Folder, sha256
from dsattn.quality.sampling import fingerprint, out_folder, sample_with_pipeline
from dsattn.video import read_mp4

from . import quality_runs

ROOT = Path(__file__).resolve().parents[1]


def test_what_lies_where(tmp_path):
    done = quality_runs.run(tmp_path, samples=2, keep_frames=True)
    assert (done.made, done.found) == (12, 0)
    for arm in ("dense", "topk"):
        names = sorted(p.name for p in (tmp_path / "videos" / arm).iterdir())
        assert names == [f"{p}-{i}.mp4" for p in "abc" for i in (0, 1)], "mp4 files and nothing else"
    side = json.loads((tmp_path / "meta/topk/b-1.json").read_text())
    assert (side["arm"], side["index"], side["prompt"], side["method"]) == ("topk", 1, "b", "topk")
    dense = json.loads((tmp_path / "meta/dense/b-1.json").read_text())
    assert dense["seed"] == side["seed"] and dense["settings"] == side["settings"]
    assert side["sha256"] == sha256(tmp_path / "videos/topk/b-1.mp4")
    with np.load(tmp_path / "frames/topk/b-1.npz") as file:
        np.testing.assert_array_equal(file["frames"], quality_runs.clip("topk", side["seed"]))
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 0
    assert Folder(tmp_path).arms() == ["dense", "topk"]


def test_again_makes_nothing_and_a_new_arm_joins(tmp_path):
    quality_runs.run(tmp_path)
    before = quality_runs.videos(tmp_path)
    done = quality_runs.run(tmp_path, make=quality_runs.refuse)
    assert (done.made, done.found) == (0, 6) and quality_runs.videos(tmp_path) == before
    done = quality_runs.run(tmp_path, arms=["sol"])
    assert (done.made, done.found) == (3, 0) and Folder(tmp_path).arms() == ["dense", "sol", "topk"]
    assert before.items() <= quality_runs.videos(tmp_path).items()


def test_damaged_clips_are_made_again(tmp_path):
    quality_runs.run(tmp_path)
    before = quality_runs.videos(tmp_path)
    (tmp_path / "videos/dense/a-0.mp4").write_bytes(b"torn")
    (tmp_path / "videos/topk/b-0.mp4").unlink()
    (tmp_path / "meta/topk/c-0.json").write_text("{")
    assert quality_runs.run(tmp_path).made == 3
    after = quality_runs.videos(tmp_path)
    assert {name: state[0] for name, state in after.items()} == {name: state[0] for name, state in before.items()}


def test_shards_make_each_clip_once(tmp_path):
    prompts = tuple("abcdefg")
    counts = [quality_runs.run(tmp_path, prompts, shard=(i, 3)).made for i in range(3)]
    assert counts == [6, 4, 4] and len(quality_runs.videos(tmp_path)) == 14
    assert quality_runs.run(tmp_path, prompts, make=quality_runs.refuse).found == 14


def test_two_processes_on_one_shard(tmp_path):
    def meanwhile(arm, item):
        with pytest.raises(UsageError, match="another process works on --shard 0/1"):
            quality_runs.run(tmp_path, make=quality_runs.refuse)
        return quality_runs.make(arm, item)

    assert quality_runs.run(tmp_path, make=meanwhile).made == 6


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"samples": 2}, "samples was 1, now 2"),
        ({"prompts": ("a", "b")}, "the number of entries was 3, now 2"),
        ({"prompts": ("a", "b", "d")}, "'c', now 'd'"),
        ({"arms": ["dense", "topk:density=0.4"]}, "config.density was 0.3, now 0.4"),
    ],
)
def test_other_settings_are_refused(tmp_path, change, word):
    quality_runs.run(tmp_path)
    before = quality_runs.videos(tmp_path)
    with pytest.raises(UsageError, match=word):
        quality_runs.run(tmp_path, make=quality_runs.refuse, **change)
    assert quality_runs.videos(tmp_path) == before


def test_arms_that_differ_in_more_than_attention_fail_loudly(tmp_path):
    def other_steps(arm, item):
        frames, sidecar = quality_runs.make(arm, item)
        if arm.name == "topk":
            sidecar["shape"]["steps"] = 3
        return frames, sidecar

    with pytest.raises(ArmsDifferError, match=r"dense and topk must differ in attention only, but shape is"):
        quality_runs.run(tmp_path, make=other_steps)
    assert list(quality_runs.videos(tmp_path)) == ["dense/a-0.mp4"], "the clip that differs is not kept"


def test_out_folder(tmp_path):
    assert out_folder(tmp_path / "new").root == tmp_path / "new"
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        out_folder(tmp_path / "file")
    with pytest.raises(UsageError, match=r"holds other files and no run.json"):
        out_folder(tmp_path)


def test_fingerprint_sees_other_weights():
    import torch

    class Pipe:
        def __init__(self, value):
            self.components = {"transformer": torch.nn.Linear(4, 4), "scheduler": object()}
            torch.nn.init.constant_(self.components["transformer"].weight, value)
            torch.nn.init.zeros_(self.components["transformer"].bias)

    assert fingerprint(Pipe(1.0)) == fingerprint(Pipe(1.0)) != fingerprint(Pipe(1.5))


def test_a_longer_text_is_generated_under_the_prompts_name(tmp_path):
    """With the shipped model in this process: what the pipeline was given stands in the sidecar."""
    texts = {"a": "a large red circle moves left over a striped background"}
    plan = dataclasses.replace(quality_runs.plan(("a",)), texts=texts)
    plan = dataclasses.replace(plan, job=dataclasses.replace(plan.job, steps=1))
    params = {"model": None, "device": "cpu", "dtype": None, "fps": 8.0, "quiet": True}
    arm = "topk:density=0.4,impl=torch,block_q=16,block_k=16,dense_steps=0"
    _, done = sample_with_pipeline(tmp_path, plan, ["dense", arm], params, "again")
    assert done.made == 2 and sorted(quality_runs.videos(tmp_path)) == ["dense/a-0.mp4", "topk/a-0.mp4"]
    dense, sparse = (json.loads((tmp_path / "meta" / name / "a-0.json").read_text()) for name in ("dense", "topk"))
    assert dense["prompt"] == sparse["prompt"] == texts["a"] and dense["seed"] == sparse["seed"]
    assert dense["method"] == "dense" and dense["density"]["all_calls"] == 1 and sparse["density"]["all_calls"] < 0.6
    settings = json.loads((tmp_path / "run.json").read_text())
    assert settings["texts"] == texts and len(settings["model"]["weights"]) == 64
    assert settings["model"]["scheduler"]["config"] and settings["model"]["device"] == "cpu"


def killed_at(root, moment):
    """Sample, and end by SIGKILL at the given of all moments before and after a file moves or a clip is made."""
    passed = 0

    def tick():
        nonlocal passed
        passed += 1
        if passed == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    real = os.replace

    def replace(*paths):
        tick()
        real(*paths)
        tick()

    def make(arm, item):
        tick()
        return quality_runs.make(arm, item)

    os.replace = replace
    quality_runs.run(root, ("a", "b"), make=make, keep_frames=True)


def test_killed_at_any_moment_nothing_is_lost_or_repeated(tmp_path):
    quality_runs.run(tmp_path / "whole", ("a", "b"), keep_frames=True)
    wanted = {name: state[0] for name, state in quality_runs.videos(tmp_path / "whole").items()}
    root, fork, before, kills = tmp_path / "killed", multiprocessing.get_context("fork"), {}, 0
    # From run to run one moment later: so every moment of a clip's making has its turn.
    for moment in range(1, 60):
        child = fork.Process(target=killed_at, args=(root, moment))
        child.start()
        child.join()
        after = quality_runs.videos(root) if root.exists() else {}
        assert before.items() <= after.items(), f"killed at {moment}: a finished clip was lost or made again"
        for name in after.keys() - before.keys():
            assert after[name][0] == wanted[name], f"killed at {moment}: {name} is not whole"
            assert (root / "meta" / name).with_suffix(".json").is_file()
            assert (root / "frames" / name).with_suffix(".npz").is_file()
        before = after
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        kills += 1
    assert kills >= 12 and {name: state[0] for name, state in before.items()} == wanted
    assert not list((root / "tmp").glob("*/*")), "nothing unfinished is left behind"
    quality_runs.run(root, ("a", "b"), make=quality_runs.refuse)


def test_the_script_is_killed_and_run_again(tmp_path):
    """The real thing: the shipped model in a process of its own, killed as soon as a clip is there."""
    out = tmp_path / "run"
    sizes = ["--steps", "2", "--height", "64", "--width", "64", "--frames", "5"]
    arms = ["--arm", "dense", "--arm", "topk:density=0.4,impl=torch,block_q=16,block_k=16,dense_steps=0"]
    command = [sys.executable, str(ROOT / "scripts/vbench_sample.py"), "--out", str(out), *sizes, *arms, "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list(out.glob("videos/*/*.mp4")) and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        running.kill()
        running.wait()
    before = quality_runs.videos(out)
    assert running.returncode == -signal.SIGKILL and 1 <= len(before) < 8
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{8 - len(before)} clips made, {len(before)} were there" in done.stdout
    after = quality_runs.videos(out)
    assert before.items() <= after.items() and len(after) == 8
    assert all(read_mp4(out / "videos" / name).shape == (5, 64, 64, 3) for name in after)
    side = json.loads(next((out / "meta/topk").glob("*.json")).read_text())
    assert side["method"] == "topk" and side["density"]["all_calls"] < 0.6 and side["fallbacks"] == []
