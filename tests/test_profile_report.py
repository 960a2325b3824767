"""Thumbnails, tables and pictures of head profiles."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dsattn
from dsattn.block_plan import BlockPlan
from dsattn.profile_pictures import draw_all, picture_names
from dsattn.profile_report import layer_rows, profile_report
from dsattn.thumbnails import BINS, thumbnail

from . import tiny_pipelines as tiny
from .plans import random_case, random_shape
from .profile_inputs import report


@pytest.mark.parametrize("seed", range(6))
def test_thumbnails_are_shares_of_the_dense_mask(seed: int) -> None:
    plan = random_case(random_shape(seed), seed).plan
    mask = plan.to_dense().double()
    q_edges, k_edges = (np.rint(np.linspace(0, n, min(7, n) + 1)).astype(int) for n in (plan.q_len, plan.k_len))
    found = thumbnail(plan, bins=7, samples=10_000)
    assert found.shape == (plan.batch, plan.heads, len(q_edges) - 1, len(k_edges) - 1)
    for i in range(len(q_edges) - 1):
        for j in range(len(k_edges) - 1):
            want = mask[:, :, q_edges[i] : q_edges[i + 1], k_edges[j] : k_edges[j + 1]].mean((2, 3))
            assert torch.allclose(found[:, :, i, j].double(), want, atol=1e-5)


def test_thumbnails_of_few_tokens_and_of_everything() -> None:
    assert torch.equal(thumbnail(BlockPlan.dense(1, 2, 5, 3)), torch.ones(1, 2, 5, 3))
    assert thumbnail(BlockPlan.dense(1, 2, 1000, 1000)).shape == (1, 2, BINS, BINS)


@pytest.mark.parametrize("name", ["wan", "cogvideox", "mochi"])  # branches, batch rows, texts of two lengths
def test_report_of_a_run(name: str, tmp_path: Path) -> None:
    pipe, args = tiny.BUILDERS[name]()
    options = {"target_error": 0.3, "rows": 8, "impl": "torch", "dense_steps": 1, "dense_layers": (0,), "refresh": 2}
    with dsattn.enabled(pipe, "auto", **options) as handle:
        tiny.run(pipe, args, height=128, width=128)
        profile = handle.head_profile()
        found = profile_report(profile, handle.engine)
    assert len(found.panels) == 2 and len({panel.name for panel in found.panels}) == 2
    for panel in found.panels:
        assert panel.layers[0] is None and panel.layers[1] is not None
        assert panel.maps.keys() == {1} and panel.maps[1].shape == (panel.heads, BINS, BINS)
        density = panel.layers[1].at_choice("density")[panel.row]
        assert panel.maps[1].mean() == pytest.approx(float(density.mean()), abs=0.1)
    timeline = found.timeline
    assert timeline.steps == [0, 1, 2] and timeline.dense == [0] and timeline.target == 0.3
    assert timeline.density[0] == [1.0, 1.0, 1.0] and timeline.density[1][0] == 1.0
    assert all(math.isnan(e) for e in timeline.error[0]) and 0 <= timeline.error[1][2] < 1
    rows = layer_rows(found)
    assert len(rows) == 4 and all(sum(row["methods"].values()) == found.panels[0].heads for row in rows)
    assert rows[0]["methods"] == {"dense": found.panels[0].heads} and rows[0]["density"] == 1.0
    draw_all(found, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(picture_names(found))
    assert len(picture_names(found)) == 6


@pytest.mark.parametrize(("layers", "heads", "dense"), [(1, 1, 0), (6, 3, 1), (12, 20, 2)])
def test_pictures_of_any_size(layers: int, heads: int, dense: int, tmp_path: Path) -> None:
    drawn = report(layers, heads, dense)
    draw_all(drawn, tmp_path / "new" / "folder")
    for name in ("heads", "steps", "masks", "recall"):
        with Image.open(tmp_path / "new" / "folder" / f"{name}.png") as picture:
            assert min(picture.size) > 300 and max(picture.size) < 4000
            colours = np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)
            assert len(colours) > 10, "something is drawn"
    with Image.open(tmp_path / "new" / "folder" / "heads.png") as picture:
        shown = {tuple(c) for c in np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0).tolist()}
    assert {(0, 0x72, 0xB2), (0xE6, 0x9F, 0), (0, 0x9E, 0x73)} <= shown, "the legend names every candidate"


def test_a_run_without_estimates_says_so(tmp_path: Path) -> None:
    drawn = report(2, 2, steps=2)
    assert all(math.isnan(e) for line in drawn.timeline.error.values() for e in line)
    draw_all(drawn, tmp_path)
