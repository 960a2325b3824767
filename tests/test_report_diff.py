"""Reports read back, and set against each other."""

import copy
import json

import pytest

from dsattn.cli.app import run
from dsattn.cli.errors import USAGE
from dsattn.errors import UsageError
from dsattn.report_diff import diff_reports
from dsattn.report_file import SCHEMAS, read_report

from .report_inputs import COMMITTED, new_report, old_report


def changed(**parts):
    report = copy.deepcopy(old_report())
    for part, values in parts.items():
        report[part].update(values) if isinstance(values, dict) else report.update({part: values})
    return report


def results(found):
    return {row["name"]: row for row in found["results"]}


def test_equal_reports():
    found = diff_reports(old_report(), old_report())
    assert found["settings"] == [] and found["against_speed"] == [] and found["against_fidelity"] == []
    assert results(found)["E2E speedup"]["change"] == "1.00x"


def test_two_methods():
    auto, semantic = (json.loads(path.read_text(encoding="utf-8")) for path in COMMITTED)
    found = diff_reports(auto, semantic)
    assert {"name": "method", "a": "auto", "b": "semantic"} in found["settings"]
    assert {"name": "density", "a": None, "b": 0.06} in found["settings"]
    rows = results(found)
    assert (rows["E2E speedup"]["a"], rows["E2E speedup"]["b"], rows["E2E speedup"]["change"]) == (
        "1.80x",
        "2.08x",
        "1.15x",
    )
    assert rows["PSNR, mean"]["change"] == "-0.5 dB" and rows["estimated error"]["change"] == "+2.8 points"
    assert any("the dense runs took 102.6 s and 108.6 s" in note for note in found["notes"])
    assert any("dsattn itself differs" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("change", "words", "fidelity"),
    [
        ({"env": {"gpu": ["NVIDIA H200"]}}, "gpu: none against NVIDIA H200", True),
        ({"env": {"torch": "2.14.0"}}, "torch: 2.13.0+cpu against 2.14.0", True),
        ({"env": {"threads": 8}}, "threads: 2 against 8", True),
        ({"model": {"dtype": "bfloat16"}}, "dtype: float32 against bfloat16", False),
        ({"shape": {"frames": 81}}, "frames: 33 against 81", False),
        ({"protocol": {"baseline": "flex"}}, "dense baseline (baseline): pipeline against flex", True),
    ],
)
def test_speed_is_not_compared_across_machines_versions_and_shapes(change, words, fidelity):
    found = diff_reports(old_report(), changed(**change))
    assert words in found["against_speed"]
    rows = results(found)
    assert rows["E2E speedup"]["change"] is None and rows["E2E sparse"]["change"] is None
    assert rows["density, all calls"]["change"] is not None
    assert (rows["PSNR, mean"]["change"] is not None) == fidelity


def test_fidelity_is_not_compared_across_clips():
    found = diff_reports(old_report(), changed(seed=1))
    assert found["against_fidelity"] == ["seed: 0 against 1"] and found["against_speed"] == []
    assert results(found)["SSIM, mean"]["change"] is None and results(found)["E2E speedup"]["change"] == "1.00x"


def test_on_the_command_line(tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text(json.dumps(changed(env={"torch": "2.14.0"}, prompt="[red]a[/red] fox")))
    assert run(["diff", str(COMMITTED[0]), str(other)]) == 0
    out = capsys.readouterr().out
    assert "speed is not comparable: torch: 2.13.0+cpu against 2.14.0" in out and "not comparable" in out
    assert "[red]a[/red] fox" in out, "nothing in a report is markup"
    assert run(["diff", str(COMMITTED[0]), str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "dsattn.diff/1"


BAD = {
    "missing.json": (None, ["missing.json", "cannot be read"]),
    "empty.json": ("", ["empty.json", "no JSON"]),
    "half.json": ('{"schema": "dsattn.rep', ["half.json", "no JSON"]),
    "deep.json": ("[" * 100_000, ["deep.json"]),
    "list.json": ("[1]", ["list.json", "no report", "dsattn.report/2"]),
    "run.json": ('{"schema": "dsattn.run/1"}', ["run.json", "'dsattn.run/1'"]),
    "old.json": ('{"schema": "dsattn.report/1"}', ["old.json", "damaged", "required property"]),
    "binary.json": (b"\xff\xfe\x00", ["binary.json", "cannot be read"]),
    "schema.json": ('{"schema": ["x"]}', ["schema.json", "no report"]),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("command", ["report", "diff"])
def test_bad_files_are_one_clear_line(name, command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, words = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(tmp_path.iterdir())
    assert (
        run([command, name, "--html", "x.html"] if command == "report" else [command, str(COMMITTED[0]), name]) == USAGE
    )
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dsattn: error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert sorted(tmp_path.iterdir()) == before


def test_a_report_is_checked_against_its_schema(tmp_path):
    path = tmp_path / "report.json"
    report = new_report()
    path.write_text(json.dumps(report))
    assert read_report(path) == report
    for break_it, words in (
        (lambda r: r["density"].update(all_calls=1.2), "density/all_calls: 1.2"),
        (lambda r: r.pop("maps"), "'maps' is a required property"),
        (lambda r: r["maps"]["panels"][0].update(kinds=["DX"]), "maps"),
        (lambda r: r["inputs"].pop("seed"), "inputs: 'seed'"),
    ):
        broken = copy.deepcopy(report)
        break_it(broken)
        path.write_text(json.dumps(broken))
        with pytest.raises(UsageError, match=words):
            read_report(path)


def test_profiles_cannot_be_compared():
    profile = {**old_report(), "schema": "dsattn.profile-report/2"}
    with pytest.raises(UsageError, match="no dense run"):
        diff_reports(old_report(), profile)
    assert len(set(SCHEMAS.values())) == 3
