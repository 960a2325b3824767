"""The script that measures anew what is said of the shipped weights: every part at the smallest size."""

import json
import sys

from .bench_scripts import SCRIPTS, run

SCRIPT = str(SCRIPTS / "measure_shipped.sh")


def test_every_part_runs(tmp_path):
    done = run("bash", SCRIPT, "--tiny", PYTHON=sys.executable, OUT=str(tmp_path), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    results = tmp_path / "results"
    assert {path.suffix for path in results.iterdir()} == {".json", ".md", ".png"}
    for name in ("semantic", "auto_balanced"):
        report = json.loads((results / f"compare_{name}_gradient_20_steps.json").read_text())
        assert report["schema"] == "dsattn.report/2" and report["shape"]["steps"] == 4
    assert json.loads((results / "attention_study.json").read_text())["schema"] == "dsattn.attention-study/1"
    assert {p["label"] for p in json.loads((results / "frontier.json").read_text())["points"]} == {"radial"}
    assert json.loads((results / "eval_tiny_17x96x96.json").read_text())["clips_done"] == 1
    assert (tmp_path / "sheet_17x96x96.png").exists()


def test_unknown_parts_are_refused():
    refused = run("bash", SCRIPT, "frontiers", PYTHON=sys.executable)
    assert refused.returncode == 2 and "unknown argument frontiers" in refused.stderr and "frontier" in refused.stderr
