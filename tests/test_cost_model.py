"""The analytic cost model: formulas against counts made here, occupancy against known cases, the rendered note."""

import json
import re
import sys
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import aot_variants  # noqa: E402
import cost_model  # noqa: E402

NOTE = ROOT / "benchmarks" / "notes" / "cost_model.md"


def test_formulas():
    """Counted by hand for a shape small enough."""
    by_name = {cost.kernel: cost for cost in cost_model.costs(cost_model.Shape(256, 1, 128))}
    mass = by_name["block mass given LSE"]
    assert mass.bf16 == 2 * 256 * 256 * 128 and mass.exp == 256 * 256
    assert mass.moved == 2 * 256 * 128 * 2 + 256 * 4 + 2 * 4 * 4
    full, int8 = by_name["attention, bf16 (for comparison)"], by_name["attention, int8_qk"]
    assert full.bf16 == 4 * 256 * 256 * 128 / 4 and int8.int8 == int8.bf16 == full.bf16 / 2
    # A quantised tensor has half the bytes.
    assert full.moved - int8.moved == 256 * 128
    backward = by_name["backward: dQ"].bf16 + by_name["backward: dK, dV"].bf16
    assert backward == 3.5 * full.bf16


def test_bounds():
    gpu = cost_model.GPUS["H100 SXM"]
    streaming = cost_model.Cost("", None, moved=3.35e9, vector=1.0)
    assert streaming.times(gpu)["memory"] == pytest.approx(1.0)
    assert cost_model.bound_cell(streaming, gpu, None) == "1 memory"
    assert cost_model.bound_cell(streaming, gpu, 1.25) == "1 memory, measured 1.25 (80%)"
    product = cost_model.Cost("", None, moved=1.0, bf16=989e9, fp8=1979e9)
    assert product.times(gpu)["tensor cores"] == pytest.approx(2.0)
    assert cost_model.bound_cell(product, cost_model.GPUS["A100 SXM"], None) == "no such products"


def test_occupancy():
    """The vendors' rules: 65,536 registers per SM, 512 per lane of a SIMD, shared memory, resident warps."""
    h100, mi300 = cost_model.GPUS["H100 SXM"], cost_model.GPUS["MI300X"]
    assert cost_model.occupancy({"warps": 8, "registers": 255, "shared": 1024}, h100) == 8 / 64
    assert cost_model.occupancy({"warps": 8, "registers": 128, "shared": 1024}, h100) == 16 / 64
    assert cost_model.occupancy({"warps": 4, "registers": 32, "shared": 100 << 10}, h100) == 8 / 64
    assert cost_model.occupancy({"warps": 4, "registers": 32, "shared": 0}, h100) == 1
    assert cost_model.occupancy({"warps": 4, "registers": 256, "shared": 0}, mi300) == 8 / 32
    assert cost_model.occupancy({"warps": 4, "registers": 64, "shared": 40 << 10}, mi300) == 4 / 32


def test_every_kernel_names_a_variant_of_the_resource_report():
    names = {variant.name for variant in aot_variants.VARIANTS}
    for cost in cost_model.costs(cost_model.SHAPES["wan-720p"]):
        assert cost.variant is None or cost.variant in names, cost.kernel
    assert {gpu.target for gpu in cost_model.GPUS.values()} <= set(aot_variants.TARGETS)


def test_note_shows_what_was_measured(tmp_path):
    rows = {"triton": "3.9.0", "results": []}
    (tmp_path / "resources.json").write_text(json.dumps(rows))
    (tmp_path / "measured.json").write_text(json.dumps({"H200 SXM": {"pooling of k and v": 1.0}}))
    cost_model.main(tmp_path / "resources.json", tmp_path / "note.md", "ltx", tmp_path / "measured.json")
    note = (tmp_path / "note.md").read_text()
    assert note.count("measured 1 (") == 1 and "not measured" not in note and "28,672 tokens" in note
    (tmp_path / "measured.json").write_text(json.dumps({"H200 SXM": {"pooling": 1.0}}))
    with pytest.raises(typer.BadParameter, match="unknown kernel pooling"):
        cost_model.main(tmp_path / "resources.json", tmp_path / "note.md", "ltx", tmp_path / "measured.json")
    with pytest.raises(typer.BadParameter, match="shape must be one of"):
        cost_model.main(tmp_path / "resources.json", tmp_path / "note.md", "wan", None)


def test_committed_note_is_up_to_date():
    """All but the occupancy, which needs a compiler."""

    def formulas(text: str) -> str:
        return re.sub(r"Triton [\d.]+", "", text.split("Occupancy")[0])

    rendered = cost_model.render({"triton": "3.9.0", "results": []}, {}, "wan-720p")
    assert formulas(NOTE.read_text()) == formulas(rendered)
