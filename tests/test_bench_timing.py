"""Timing of the benchmarks with a fake clock: what is checked, skipped, timed in turns and reported."""

import json

import pytest
import torch

from dsattn.errors import ImplUnavailableError

from .bench_scripts import module

timing = module("bench_timing")


class FakeWatch:
    """Every call takes what its entry says; counts the order of the calls."""

    device = torch.device("cpu")

    def __init__(self, seconds):
        self.seconds, self.calls = seconds, []

    def wall(self, run):
        result = run()
        self.calls.append(result)
        return self.seconds[result] * (10 if self.calls.count(result) == 1 else 1), result

    def once(self, run):
        result = run()
        self.calls.append(result)
        return self.seconds[result]


def entry(name, **rest):
    return timing.Entry(name, lambda: name, **rest)


def test_runs_take_turns_and_the_first_call_is_apart():
    watch = FakeWatch({"a": 1.0, "b": 2.0})
    rows = timing.measure([entry("a", info={"impl": "x"}), entry("b")], watch, 1000, most=3)
    assert [(r["name"], r["status"], r["median_s"], r["runs"]) for r in rows] == [
        ("a", "ok", 1.0, 3),
        ("b", "ok", 2.0, 3),
    ]
    assert (rows[0]["impl"], rows[0]["first_s"], rows[0]["warmup_s"]) == ("x", 10.0, 9.0)
    assert watch.calls == [*"aabb", *"ab", *"ba", *"ab"]


def test_budget_bounds_the_rounds_but_not_below_the_least(monkeypatch):
    rows = timing.measure([entry("a")], FakeWatch({"a": 3.0}), 16, most=20)
    assert rows[0]["runs"] == 5
    rows = timing.measure([entry("a"), entry("b")], FakeWatch({"a": 3.0, "b": 1.0}), 8, most=20)
    assert [r["status"] for r in rows] == ["ok", "late"] and rows[0]["runs"] == 3


@pytest.mark.parametrize("error", [1.0, float("nan"), float("inf")])
def test_a_wrong_result_is_reported_and_not_timed(error):
    watch = FakeWatch({"a": 1.0, "b": 1.0})
    rows = timing.measure([entry("a", check=lambda got: (error, 0.1)), entry("b")], watch, 100, most=3)
    assert rows[0]["status"] == "wrong" and "allowed 0.1" in rows[0]["reason"] and "median_s" not in rows[0]
    assert watch.calls.count("a") == 1 and rows[1]["status"] == "ok"
    json.dumps(rows, allow_nan=False)


def test_what_cannot_run_does_not_stop_the_others():
    def broken(error):
        def run():
            raise error

        return run

    rows = timing.measure(
        [
            timing.Entry("missing", broken(ImplUnavailableError("no package"))),
            timing.Entry("broken", broken(ValueError("bad\nmore"))),
            timing.Entry("large", broken(torch.OutOfMemoryError("out of memory"))),
            entry("huge", memory=1e18),
            entry("fine", check=lambda got: (0.01, 0.1)),
        ],
        FakeWatch({"fine": 1.0}),
        100,
    )
    assert [r["status"] for r in rows] == ["unavailable", "failed", "skipped", "skipped", "ok"]
    assert rows[1]["reason"] == "ValueError: bad" and "GiB are free" in rows[3]["reason"]
    assert rows[4]["error"] == 0.01


def test_one_that_fails_later_does_not_stop_the_others():
    runs = iter("aaa")

    def run():
        return next(runs)

    rows = timing.measure([timing.Entry("a", run), entry("b")], FakeWatch({"a": 1.0, "b": 1.0}), 100, most=3)
    assert rows[0]["status"] == "failed" and rows[0]["reason"].startswith("run 4: StopIteration")
    assert rows[1]["status"] == "ok" and rows[1]["runs"] == 3


def test_part_of_a_run_can_be_what_counts():
    rows = timing.measure([entry("a", read=lambda: 0.25)], FakeWatch({"a": 1.0}), 100, most=3)
    assert rows[0]["median_s"] == 0.25


def test_files_and_tables(tmp_path):
    path = tmp_path / "folder" / "a.json"
    timing.write_json(path, {"x": 1})
    timing.write_json(path, {"x": 2})
    assert json.loads(path.read_text()) == {"x": 2} and [p.name for p in path.parent.iterdir()] == ["a.json"]
    assert timing.table(("a", "b"), [("x|y", "1")]) == "| a | b |\n| :-- | --: |\n| x/y | 1 |\n"
    assert (timing.ms(None), timing.ms(0.0012345), timing.ms(2.5)) == ("–", "1.23", "2500")
    assert timing.machine(torch.device("cpu"))["torch"] == torch.__version__


def test_ceilings_are_rates():
    found = timing.ceilings(timing.Stopwatch(torch.device("cpu")), torch.float32)
    assert found["copy_bytes_per_s"] > 1e8 and found["flop_per_s"] > 1e8
