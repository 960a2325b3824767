"""Coarse centroids in the first of two iterations: what they cost, and the committed table of it."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import dsattn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("kmeans_precision", ROOT / "scripts" / "kmeans_precision.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_clusters_are_as_good(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script.quantization_error, "GRID", dsattn.VideoGrid(4, 8, 8))
    monkeypatch.setattr(script, "COUNT", 16)
    script.main(tmp_path, head_dim=64)
    rows = json.loads((tmp_path / "kmeans_precision.json").read_text())["rows"]
    assert [(row["input"], row["side"]) for row in rows] == [("normal", "q"), ("normal", "k"), ("K channels", "k")]
    for row in rows:
        assert row["coarse, exact"]["same_label"] >= 0.99
        assert row["coarse, exact"]["distance"] == pytest.approx(1, abs=2e-3)
    assert script.table(rows) in (tmp_path / "kmeans_precision.md").read_text()


def test_a_bad_start_would_show(script):
    """The same measure tells iterations apart that do differ."""
    q, _, _ = script.quantization_error.make_inputs("normal", 64, 0)
    start = script.first_centroids(q, script.COUNT, 0)
    (one, farther), (two, nearer) = (script.run(q, start, (False,) * n) for n in (1, 3))
    assert (one == two).float().mean() < 0.95 and farther > 1.01 * nearer


def test_committed_table_is_that_of_the_committed_numbers(script):
    folder = ROOT / "benchmarks" / "results" / "cpu"
    rows = json.loads((folder / "kmeans_precision.json").read_text())["rows"]
    assert script.table(rows) in (folder / "kmeans_precision.md").read_text()
