"""The script that lists what autotuning may time: few candidates, none that spills or does not fit."""

import json
import sys

import pytest

from dsattn.kernels.tuning import MOST_CANDIDATES, load_space

from .bench_scripts import SCRIPTS, module, run

space = module("tuning_space")
report = module("aot_report")


@pytest.mark.parametrize("target", space.SHARED)
def test_candidates_are_few_and_fit_the_blocks(target):
    work = space.work_of(target)
    assert any("tma" in name for name in work) == (target in ("sm_90", "sm_100"))
    for name, listed in work.items():
        shapes = [shape for shape, _ in listed]
        block_q, block_k = map(int, name.split()[2].split("x"))
        assert 1 < len(shapes) == len(set(shapes)) <= MOST_CANDIDATES, name
        assert all(shape[0] <= block_q and shape[1] <= block_k for shape in shapes), name
        # The report compiles what autotuning launches.
        for shape, variant in listed:
            tiles = variant.tiles if len(shape) == 4 else variant.tiles.tiles
            assert shape[:4] == tuple(tiles) == tuple(report.tiles_of(variant, report.TARGETS[target]))


def test_what_spills_or_does_not_fit_is_left_out():
    fine = report.Measured(registers=128, shared=90 << 10)
    assert space.fits(fine, "sm_89")
    for wrong in ({"spills": 1}, {"error": "no"}, {"shared": 100 << 10}):
        assert not space.fits(report.Measured(**{"registers": 128, "shared": 90 << 10} | wrong), "sm_89")
    assert space.fits(report.Measured(shared=100 << 10), "sm_90")


def test_file_round_trip():
    found = {"sm_90": {"kernel d64": [(128, 64, 8, 3), (64, 64, 4, 3, 1)], "other": [(64, 64, 4, 2)]}, "sm_80": {}}
    assert json.loads(space.render(found)) == {
        "sm_90": {"kernel d64": [[128, 64, 8, 3], [64, 64, 4, 3, 1]], "other": [[64, 64, 4, 2]]}, "sm_80": {}
    }  # fmt: skip
    # The committed one was written by it, and autotuning reads it.
    committed = {target: {name: list(shapes) for name, shapes in per.items()} for target, per in load_space().items()}
    assert space.FILE.read_text() == space.render(committed)


def test_program(tmp_path):
    path = tmp_path / "space.json"
    only = "block_sparse_tma d64 64x64"
    done = run(
        sys.executable, str(SCRIPTS / "tuning_space.py"), "--target", "sm_90", "--only", only, "--out", str(path),
        "--jobs", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())["sm_90"]
    assert 1 <= len(found[f"{only} fixed"]) <= MOST_CANDIDATES
    # The others keep what they had.
    assert {k: v for k, v in found.items() if only not in k} == {
        k: [list(shape) for shape in v] for k, v in load_space()["sm_90"].items() if only not in k
    }
    done = run(sys.executable, str(SCRIPTS / "tuning_space.py"), "--target", "sm_10")
    assert done.returncode == 2 and "unknown target sm_10" in done.stderr
