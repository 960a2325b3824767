"""The attention study from captures to tables and pictures, and what the documentation says about it."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch

import dsattn
from dsattn.cli.app import run as run_app

from .bench_scripts import ROOT, module

capture_qkv = module("capture_qkv")
captures = module("captures")
study = module("attention_study")
figures = module("attention_figures")
tables = module("attention_tables")
claims = module("attention_claims")
statistics = module("attention_statistics")

COMMITTED = ROOT / "benchmarks" / "results" / "cpu" / "attention_study.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Captures of 3 x 8 x 8 tokens: two prompts, two seeds, both branches, two steps."""
    out = tmp_path_factory.mktemp("captures")
    size = ["--frames", "9", "--height", "64", "--width", "64", "--steps", "2", "--at", "0,1", "--layers", "1,4"]
    options = ["--first", "2", "--seeds", "0,1", "--branches", "cond,uncond", "--threads", "1"]
    assert run_app(["--out", str(out), *size, *options], capture_qkv.app, "capture_qkv") == 0
    return out


@pytest.fixture(scope="module")
def result(folder, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("study")
    options = ["--captures", str(folder), "--out", str(out), "--rows", "64", "--blocks", "3", "--threads", "1"]
    assert run_app(["measure", *options], study.app, "attention_study") == 0
    for name in ("attention_study_maps.png", "attention_study_curves.png"):
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    found = json.loads((out / "attention_study.json").read_text())
    assert (out / "attention_study.md").read_text() == tables.report(found)
    return found


def test_every_head_of_every_capture_is_there(result):
    assert result["tokens"] == 192 and result["model"] == ["shipped"] and result["steps"] == ["2"]
    assert len(result["runs"]) == 8 and len(result["heads"]) == 8 * 2 * 2 * 3
    at = {name: i for i, name in enumerate(result["columns"])}
    places = {tuple(row[at[name]] for name in ("run", "step", "layer", "head")) for row in result["heads"]}
    assert places == {(r, s, layer, h) for r in range(8) for s in (0, 1) for layer in (1, 4) for h in range(3)}
    for row in result["heads"]:
        assert all(0 <= row[at[name]] <= 1 for name in ("entropy", "own_frame", "window", "keys@0.1", "tile@0.1"))
        # Blocks hold no more than keys, a larger share no less than a smaller one.
        assert row[at["tile@0.1"]] <= row[at["keys@0.1"]] + 1e-3 <= row[at["keys@0.2"]] + 2e-3
        assert row[at["text"]] == 0


def test_figures_are_those_of_the_whole_attention(folder, result):
    """One head again, with all S x S weights of the sampled rows and a loop over keys."""
    capture = next(c for c in captures.read(folder) if (c.call.layer, c.call.step) == (4, 1))
    q, k = capture.load("qk", head=2)
    weights = (q.double() @ k.double().T / 8).softmax(-1)[study.sample_rows(capture.call.grid, 64, seed=1)]
    frame = torch.arange(192) // 64
    own = (weights * (frame == frame[study.sample_rows(capture.call.grid, 64, seed=1)][:, None])).sum(1).mean()
    best = weights.sort(1, descending=True).values[:, :96].sum(1).mean()
    index = [run["prompt"] for run in result["runs"]].index(capture.facts["prompt"])
    found = figures.Study(result)
    where = {"run": index, "step": 1, "layer": 4, "head": 2}
    assert found.mean("own_frame", **where) == pytest.approx(float(own), rel=1e-3)
    assert found.mean("keys@0.5", **where) == pytest.approx(float(best), rel=1e-3)
    assert found.mean("entropy", **where) == pytest.approx(
        float(-(weights * weights.log()).sum(1).mean() / torch.tensor(192.0).log()), rel=1e-3
    )


def test_what_is_carried_over(folder, result):
    relations = {(entry["relation"], entry["gap"], entry["of"]): entry["pairs"] for entry in result["carried_over"]}
    # Pairs per head: one step later in each of 8 runs; the others at 2 steps, in both directions.
    wanted = {("step", 1): 8, ("seed", 0): 16, ("prompt", 0): 16, ("prompt and seed", 0): 16, ("branch", 0): 16}
    assert relations == {(*kind, of): pairs for kind, pairs in wanted.items() for of in ("keys", "blocks")}
    for entry in result["carried_over"]:
        assert 0 < entry["mass"] <= entry["relative"] <= 1 + 1e-6
    items = [c for c in captures.read(folder) if c.call.layer == 1 and c.run == "00-seed0-cond"]
    rows = study.Sample.of(items[0].call.grid, 64, 3).rows
    first, second = (study.attention_rows(*item.load("qk", 0), rows) for item in items)
    chosen = first.topk(10, 1).indices
    kept = second.gather(1, chosen).sum() / 64, second.gather(1, chosen).sum() / second.topk(10, 1).values.sum()
    seen = [study.Seen(weights, torch.empty(0, 3)) for weights in (first, second)]
    (found,) = study.carried(seen, items)
    assert found[:3] == ("step", 1, "keys") and found[3:] == pytest.approx(tuple(map(float, kept)), rel=1e-5)


def test_even_weights_and_local_weights():
    """Whole figures of two kinds of attention whose answer is known."""
    sample = study.Sample.of(dsattn.VideoGrid(3, 16, 16), 128, 6)
    even, seen = study.look(lambda rows: torch.full((len(rows), 768), 1 / 768), sample)
    assert (
        even["entropy"] == pytest.approx(1) and even["tile@0.1"] == pytest.approx(0.1) and seen.keys.shape == (128, 768)
    )
    own_tile = torch.zeros(768, dtype=torch.long)
    order = study.token_order(sample.grid, "tile", torch.device("cpu"))
    own_tile[order] = torch.arange(768) // 64
    local, _ = study.look(lambda rows: (own_tile[rows][:, None] == own_tile) / 64.0, sample)
    # One tile of twelve holds everything; as tokens stand, a tile is half of each of two runs.
    assert (
        local["raster@0.1"] == pytest.approx(0.6)
        and local["own_frame"] == pytest.approx(1)
        and local["same_place"] == 0
    )
    assert local["effective"] == pytest.approx(64 / 768) and local["frames@0"] == pytest.approx(3)


def test_clips_without_a_whole_block():
    sample = study.Sample.of(dsattn.VideoGrid(2, 4, 4), 16, 3)
    found, seen = study.look(lambda rows: torch.full((len(rows), 32), 1 / 32), sample)
    assert "tile@0.1" not in found and len(seen.blocks) == 0 and found["keys@0.5"] == pytest.approx(0.5)


def test_text_in_the_attention():
    sample = study.Sample.of(dsattn.VideoGrid(3, 8, 8, text=8), 32, 3)
    weights = torch.zeros(200)
    weights[192:] = 1 / 8
    found, seen = study.look(lambda rows: weights.expand(len(rows), -1), sample)
    assert found["text"] == pytest.approx(1) and found["own_frame"] == 0 and seen.keys.shape == (32, 192)


def test_tables_name_every_layer_head_step_and_relation(result):
    assert [line.split(" |")[0] for line in tables.section(result, "layers").splitlines()[2:]] == [
        "| layer 1",
        "| layer 4",
        "| even weights",
    ]
    assert len(tables.section(result, "heads").splitlines()) == 2 + 6 + 1
    assert "| step 1 of 2 |" in tables.section(result, "steps")
    text = tables.section(result, "stability")
    assert all(f"| {label} |" in text for label in (*list(figures.KINDS.values())[1:], "1 step later"))
    assert "guidance branch `cond`" in tables.section(result, "source")
    with pytest.raises(KeyError, match="no table 'nothing'; there are concentration"):
        tables.section(result, "nothing")
    assert figures.percent(0.0994) == "9.9 %" and figures.percent(0.0996) == "10 %" and figures.percent(None) == "–"


def rewritten(result: dict, **values: float | list[float]) -> figures.Study:
    """A study with other figures of every head; a list gives one to each."""
    found = copy.deepcopy(result)
    at = {name: i for i, name in enumerate(found["columns"])}
    for row in found["heads"]:
        for name, value in values.items():
            row[at[name]] = value[row[at["head"]]] if isinstance(value, list) else value
    return figures.Study(found)


def test_verdicts_follow_the_figures(result):
    def verdict(judge, **values):
        return judge(rewritten(result, **values))[1]

    assert verdict(claims.few_keys, **{"keys_for@0.95": 0.14}) == "resembles"
    assert verdict(claims.few_keys, **{"keys_for@0.95": 0.5}) == "differs: attention is less concentrated"
    assert verdict(claims.few_keys, **{"keys_for@0.95": 0.01}) == "differs: attention is more concentrated"
    assert verdict(claims.skewed_weights, above_mean=0.1, tiny=0.5) == "resembles"
    assert verdict(claims.skewed_weights, above_mean=0.1, tiny=0.01) == "resembles in part"
    assert verdict(claims.local_box, window=0.75) == "resembles"
    assert verdict(claims.local_box, window=0.3) == "differs: attention is less local"
    assert verdict(claims.same_over_prompts, window=[0.1, 0.5, 0.9]) == "resembles"
    assert verdict(claims.two_kinds, spatial=[0.9, 0.2, 0.2], temporal=[0.2, 0.9, 0.9]) == "resembles"
    assert verdict(claims.two_kinds, spatial=[0.2, 0.9, 0.9], temporal=[0.9, 0.2, 0.2]).startswith("resembles in part")
    assert verdict(claims.two_kinds, spatial=0.1, temporal=0.9) == "differs: no heads of one kind"
    names = [name for name in result["columns"] if name.startswith(("frames@", "away@"))]
    falling = {name: 1 / (1 + float(name.partition("@")[2])) for name in names}
    rising = {f"frames@{i}": float(i) for i in range(3)}
    assert verdict(claims.decay, **falling) == "resembles"
    assert verdict(claims.decay, **falling | rising) == "resembles in part: it falls over the picture alone"
    assert verdict(claims.decay, **dict.fromkeys(names, 1.0)) == "differs"
    assert verdict(claims.scattered, **{"keys@0.1": 0.8, "tile@0.1": 0.5, "raster@0.1": 0.4}) == "resembles"
    assert verdict(claims.scattered, **{"keys@0.1": 0.8, "tile@0.1": 0.75, "raster@0.1": 0.4}).startswith("differs")
    assert verdict(claims.sinks, common=[0.01, 0.2, 0.01]) == "resembles"
    assert verdict(claims.sinks, common=0.01) == "differs"

    def steady(later, prompt):
        found = copy.deepcopy(result)
        for entry in found["carried_over"]:
            entry["relative"] = later if entry["relation"] == "step" else prompt
        return claims.steady(figures.Study(found))[1]

    assert steady(0.9, 0.5) == "resembles" and steady(0.7, 0.5).startswith("resembles in part")
    assert steady(0.9, 0.95).startswith("differs")


def test_one_prompt_alone_is_not_compared(folder, result):
    only = [c for c in captures.read(folder) if c.run == "00-seed0-cond" and c.call.step == 0]
    found = {**result, **study.study(only, 32, 2, lambda text: None)}
    assert found["carried_over"] == [] == found["agreement"]
    text = tables.section(found, "compared")
    assert text.count("| not measured |") == 3 and text.count("\n") == 1 + len(claims.CLAIMS)
    assert tables.report(found)


class TestCommitted:
    """The committed study, and the page about it."""

    found = json.loads(COMMITTED.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")

    def test_tables_are_those_of_the_figures(self):
        assert COMMITTED.with_suffix(".md").read_text(encoding="utf-8") == tables.report(self.found)
        assert COMMITTED.stat().st_size < 300_000

    def test_the_page_shows_every_table(self):
        assert set(re.findall(r"<!-- table: attention (\w+) -->", self.page)) == set(tables.SECTIONS)

    def test_prose_quotes_no_measured_figure(self):
        """Shares stand in generated tables; what prose may name are the definitions' own."""
        defined = {"0.25", "1", "5", "15.5", "90", "64"}
        shares = set(re.findall(r"([\d.]+) (?:%|per cent)", self.page)) | set(
            re.findall(r"density ([\d.]+)", self.page)
        )
        assert shares <= defined
        assert float(statistics.BAND) == 0.25 and pytest.approx(0.155, abs=0.001) == statistics.WINDOW
        assert study.CARRIED == figures.CLEAR == 0.05 and study.BLOCK == 64
