"""What every call did, against the engine's own records and plans."""

import numpy as np
import pytest
import torch
from PIL import Image

from dsattn import Call, Engine, VideoGrid
from dsattn.call_maps import FEWEST_BINS, KINDS, call_maps
from dsattn.thumbnails import BINS, thumbnail

GRID = VideoGrid(3, 5, 7, text=4)


def run(engine, layers=3, steps=4, heads=2, batch=1, grid=GRID, branches=("cond", "uncond")):
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for branch in branches:
            for layer in range(layers):
                q, k, v = torch.randn(3, batch, grid.tokens, heads, 32, generator=generator)
                engine(q, k, v, Call(layer, step, grid, layers, steps, branch=branch))
    return engine


def test_maps_are_what_the_records_say():
    options = {"block_q": 16, "block_k": 16, "density": 0.4, "impl": "torch", "monitor": 8}
    engine = run(Engine("topk", dense_steps=1, dense_layers=(0,), refresh=2, **options))
    found = call_maps(engine)
    assert [panel["branch"] for panel in found.panels] == ["cond", "uncond"] and found.bins == BINS
    panel = found.panels[1]
    assert (panel["layers"], panel["steps"], panel["heads"]) == ([0, 1, 2], [0, 1, 2, 3], 2)
    assert panel["kinds"] == ["DDDD", "DRUR", "DRUR"]
    assert panel["methods"] == [["dense"] * 2, ["topk"] * 2, ["topk"] * 2]
    for record in engine.stats.records:
        if record.branch == "uncond":
            got = panel["density"][record.layer][record.step], panel["error"][record.layer][record.step]
            for value, tensor in zip(got, (record.density, record.error), strict=True):
                assert value is None if tensor is None else value == pytest.approx(tensor.tolist(), rel=1e-3)
            assert (panel["layer_error"][record.layer][record.step] is None) == (record.layer_error is None)
    rows = found.masks.reshape(2, 3, BINS, 2, BINS)
    assert (rows[:, 0] == 255).all(), "dense layers read everything"
    want = thumbnail(engine.state.entries["transformer", 2, "uncond"].plan)[0, 1]
    assert np.array_equal(rows[1, 2, :, 1], np.rint(255 * want.numpy()))


def test_methods_of_auto_and_batches():
    grid = VideoGrid(4, 8, 8)
    engine = run(Engine("auto", dense_steps=1, impl="torch", rows=8, target_error=0.2), 2, 2, 3, 2, grid, ("both",))
    panel = call_maps(engine).panels[0]
    assert panel["heads"] == 3 and all(len(names) == 3 for names in panel["methods"])
    known = {"semantic", "topk", "spatial_temporal", "dense"}
    assert all(set(name.split(" / ")) <= known for names in panel["methods"] for name in names)


def test_calls_that_are_missing_or_fell_back():
    engine = Engine("topk", impl="torch", block_q=16, block_k=16)
    assert call_maps(engine) is None
    q = torch.randn(1, GRID.tokens, 2, 32)
    engine(q, q, q, Call(0, 0, GRID))
    engine(q, q, q, Call(1, 1, GRID))
    engine.fallback(Call(0, 1, GRID), "a mask", lambda: q, q)
    engine.fallback(None, "no call", lambda: q)
    found = call_maps(engine)
    assert found.panels[0]["kinds"] == ["RF", ".R"] and set(KINDS.values()) == set("DRUF")
    assert found.panels[0]["density"][0][1] is None and found.panels[0]["density"][1][0] is None
    dense = run(Engine("dense"), 1, 1)
    assert call_maps(dense).panels[0]["methods"] == [["dense"]] and (call_maps(dense).masks == 255).all()


def test_errors_that_are_no_numbers_and_short_sequences(tmp_path):
    options = {"impl": "torch", "block_q": 16, "block_k": 16, "monitor": 4, "refresh": 1}
    engine = run(Engine("topk", **options), 1, 1, grid=VideoGrid(1, 2, 3), branches=("cond",))
    engine.stats.records[0].error = torch.tensor([float("nan"), float("inf")])
    found = call_maps(engine)
    assert found.panels[0]["error"] == [[[None, None]]] and found.masks.shape == (BINS, 2 * BINS)
    found.write_masks(tmp_path / "new" / "masks.png")
    with Image.open(tmp_path / "new" / "masks.png") as picture:
        assert np.array_equal(np.asarray(picture), found.masks)
    assert found.describe("masks.png")["thumbnails"] == {"file": "masks.png", "bins": BINS}


def test_large_models_get_small_thumbnails(monkeypatch):
    monkeypatch.setattr("dsattn.call_maps.PIXELS", 100)
    found = call_maps(run(Engine("topk", impl="torch", block_q=16, block_k=16), 2, 1))
    assert found.bins == FEWEST_BINS and found.masks.shape == (4 * FEWEST_BINS, 2 * FEWEST_BINS)
