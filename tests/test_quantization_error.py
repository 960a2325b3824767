"""The table of quantisation errors: rows, their order of magnitude, and what smoothing is for."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import dsattn

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("quantization_error", ROOT / "scripts" / "quantization_error.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["quantization_error"] = module
    spec.loader.exec_module(module)
    module.GRID = dsattn.VideoGrid(2, 8, 8)
    return module


def test_inputs_are_seeded_and_have_outliers(script):
    for kind in script.INPUTS:
        first, again, other = (script.make_inputs(kind, 64, seed) for seed in (0, 0, 1))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[1], other[1])
    plain, channels = (script.make_inputs(kind, 64, 0)[1].float() for kind in ("normal", "K channels"))
    assert channels.mean(1).abs().max() > 5 * plain.mean(1).abs().max()


def test_rows_and_table(script, tmp_path):
    script.main(tmp_path, head_dim=[32])
    result = json.loads((tmp_path / "quantization_error.json").read_text())
    assert len(result["rows"]) == 3 * 3 * 4 and result["env"]["torch"] == torch.__version__
    for row in result["rows"]:
        # bfloat16 rounds to 2^-9; the others to a hundredth or so.
        low, high = (1e-4, 2**-8) if row["quantization"] is None else (2e-3, 0.1)
        assert low < row["error"] < high, row
    text = (tmp_path / "quantization_error.md").read_text()
    assert "not measured on a GPU yet" in text and text.count("\n| ") == 11


def test_committed_table_is_that_of_the_committed_numbers(script):
    folder = ROOT / "benchmarks" / "results" / "cpu"
    rows = json.loads((folder / "quantization_error.json").read_text())["rows"]
    assert script.table(rows) in (folder / "quantization_error.md").read_text()
