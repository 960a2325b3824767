"""The page of a scored suite: what it holds, what it leaves out and says so, and that it works in a browser."""

import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest

import dsattn
from dsattn.cli.app import run
from dsattn.errors import UsageError
from dsattn.html.page import render, write_page
from dsattn.html.quality_view import quality_view
from dsattn.quality.evaluate import evaluate
from dsattn.quality.folder import Folder
from dsattn.quality.summary import build, save
from dsattn.report_diff import diff_reports
from dsattn.report_file import read_report, why_invalid
from dsattn.video import write_mp4

from . import quality_runs
from .browser import chromium, opened
from .test_html import CONTRAST, EVIL, everywhere, overflow, until

SCHEMA = json.loads(Path(dsattn.__file__).with_name("quality.schema.json").read_text(encoding="utf-8"))
PROMPTS = ("a red circle", "a blue square & more", "a star")
SECTIONS = ("video", "scores", "prompts", "settings")


def score(value, low=None, high=None, difference=None):
    ends = {"mean": value, "low": low, "high": high, "prompts": 3}
    return {"score": value, "by": "dsattn", "videos": 3, "interval": ends, "difference": difference}


def interval(mean, low, high):
    return {"mean": mean, "low": low, "high": high, "prompts": 3}


def arm(density, scores, fidelity):
    totals = {"quality": None, "semantic": None, "total": None, "dimensions": 1, "total_why": "n/a (suite smoke)"}
    return {
        "videos": 3,
        "expected": 3,
        "config": {"method": "topk"},
        "identical_to_reference": 0,
        "density": density,
        "denoise_s": 1.5,
        "fallbacks": 0,
        "scores": scores,
        "fidelity": fidelity,
        "totals": totals,
    }


def video(name, prompt, *, of=None):
    fidelity = {"psnr": 21.25, "ssim": 0.5} if name != "dense" else {}
    return {
        "arm": name,
        "file": f"{of or prompt}-0.mp4",
        "prompt": prompt,
        "index": 0,
        "seed": 2**62 + 1,
        "scores": {"temporal_flickering": 0.9},
        "fidelity": fidelity,
        "identical": False,
    }


def synthetic(arms=("topk",)):
    """A report without a model; three prompts."""
    names = ("dense", *arms)
    flicker = {"temporal_flickering": score(0.98, 0.97, 0.99)}
    made = {"dense": arm(1.0, flicker, {})}
    for name in arms:
        gap = interval(-0.01, -0.02, 0.005)
        made[name] = arm(
            0.25, {"temporal_flickering": score(0.97, 0.96, 0.98, gap)}, {"psnr": interval(21.25, 20.5, 22.0)}
        )
    return {
        "schema": "dsattn.quality/1",
        "created": "2026-01-01T00:00:00+00:00",
        "command": "python scripts/vbench_eval.py run",
        "sampled_by": ["python scripts/vbench_sample.py --out run"],
        "env": {"dsattn": "0", "gpu": [], "cpu": "CPU", "threads": 1, "torch": "2"},
        "run": {
            "suite": "smoke",
            "samples": 1,
            "seed": 0,
            "job": {"width": 64, "height": 64, "frames": 9, "steps": 2},
            "fps": 8.0,
            "model": {"id": "drawn", "revision": None, "pipeline": "P", "dtype": "float32", "device": "cpu"},
        },
        "prompts": 3,
        "reference": "dense",
        "fidelity_on": ["decoded mp4 files"],
        "vbench_package": None,
        "arms": made,
        "missing": {"lpips": "weights not found"},
        "problems": [],
        "definitions": {"temporal_flickering": "VBench's dimension", "interval": "95 % bootstrap"},
        "notes": ["suite smoke: not comparable"],
        "videos": [video(name, prompt) for name in names for prompt in PROMPTS],
    }


def write_clips(folder, arms=("dense", "topk"), prompts=PROMPTS):
    """Nine frames of 64 x 64; every prompt and arm has a brightness of its own, and the frames grow brighter."""
    for a, name in enumerate(arms):
        (folder / "videos" / name).mkdir(parents=True, exist_ok=True)
        for p, prompt in enumerate(prompts):
            frames = np.full((9, 64, 64, 3), 20 + 60 * p + 30 * a, np.uint8)
            frames += (5 * np.arange(9, dtype=np.uint8))[:, None, None, None]
            write_mp4(folder / "videos" / name / f"{prompt}-0.mp4", frames, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("suite")
    write_clips(made)
    (made / "quality.json").write_text(json.dumps(synthetic()))
    write_page(made / "quality.html", read_report(made / "quality.json"), made)
    return made


def test_the_schema_is_valid_and_strict():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert why_invalid(synthetic(), "quality.schema.json") is None
    for break_it in (
        lambda r: r.update(extra=1),
        lambda r: r.pop("videos"),
        lambda r: r["arms"]["topk"].update(density=1.5),
        lambda r: r["arms"]["topk"]["scores"]["temporal_flickering"].pop("difference"),
        lambda r: r["videos"][0].update(index=-1),
        lambda r: r["run"]["model"].pop("id"),
    ):
        broken = synthetic()
        break_it(broken)
        assert why_invalid(broken, "quality.schema.json")


def test_what_the_script_writes_is_valid_and_shown(tmp_path, capsys):
    """From drawn clips, one missing and one damaged, to the page by the documented command."""
    quality_runs.run(tmp_path, ("a", "b", "c"))
    (tmp_path / "videos/topk/b-0.mp4").unlink()
    (tmp_path / "videos/dense/c-0.mp4").write_bytes(b"torn")
    save(Folder(tmp_path), evaluate(Folder(tmp_path)), "score it")
    page = tmp_path / "suite.html"
    assert run(["report", str(tmp_path / "quality.json"), "--html", str(page)]) == 0
    assert "temporal_flickering" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert text.count("data:video/mp4;base64,") == 2, "the one pair that is whole"
    assert "4 of 6" in text and "2 clips or dimensions: see Problems" in text
    assert "b-0.mp4 is missing" in text and "c-0.mp4 cannot be read as a video" in text
    assert "topk could not be scored" in text and "dense could not be scored" in text
    assert all(f'id="{name}"' in text for name in (*SECTIONS, "problems"))


def test_commands_and_settings_of_the_arms_are_kept(tmp_path):
    def make(arm, item):
        frames, sidecar = quality_runs.make(arm, item)
        return frames, {**sidecar, "command": "sample it", "config": {"density": 0.3}}

    quality_runs.run(tmp_path, ("a",), make=make)
    report = build(evaluate(Folder(tmp_path)), "score it")
    assert report["sampled_by"] == ["sample it"] and report["arms"]["topk"]["config"] == {"density": 0.3}
    assert why_invalid(report, "quality.schema.json") is None
    assert "sample it\nscore it" in render(report, tmp_path)


def test_it_is_one_file_and_shows_the_figures(folder):
    text = (folder / "quality.html").read_text(encoding="utf-8")
    assert text.count("data:video/mp4;base64,") == 6
    without_data = re.sub(r"data:[a-z/0-9]+;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"""(src|href)=["'](?!data:|#|")""", without_data), "nothing is loaded"
    for words in (
        "topk against dense on 3 prompts",
        "6 of 6",
        "21.25 dB",
        "95 %: 20.50 to 22.00 dB",
        "25 %",
        "-0.0100 [-0.0200, +0.0050]",
        "3 prompts, not told apart",
        "VBench&#39;s dimension",
        "0.9000 → 0.9000",
        "lpips n/a: weights not found",
        "a blue square &amp; more",
        str(2**62 + 1),
        "python scripts/vbench_sample.py --out run\npython scripts/vbench_eval.py run",
    ):
        assert words in text, words
    assert 'id="maps"' not in text and 'id="timeline"' not in text


def test_clips_that_are_not_there(tmp_path):
    write_clips(tmp_path, prompts=PROMPTS[:1])
    text = render(synthetic(), tmp_path)
    assert "2 pairs are not shown: the files were not found" in text and text.count("file not found") == 2
    text = render(synthetic(), tmp_path / "elsewhere")
    assert "No pair of clips can be shown." in text and 'id="viewer"' not in text


def test_files_outside_of_the_folder_are_not_carried(tmp_path):
    write_clips(tmp_path)
    inside = tmp_path / "in"
    inside.mkdir()
    report = synthetic()
    for found in report["videos"]:
        found["file"] = f"../../../videos/{found['arm']}/{found['file']}"
    assert "data:video" not in render(report, inside)


def test_a_page_carries_no_more_than_its_limit():
    """Pairs of 2 x 30 bytes; the dense clip of two arms counts once."""
    uri = "x" * 40
    page, data = quality_view(synthetic(("topk", "sol")), lambda name: f"{uri}", limit=90)
    assert len(data["media"]) == 3 and [(p["dense"], p["sparse"]) for p in data["pairs"]] == [(0, 1), (0, 2)]
    assert [row["why"] for row in page["clips"]] == ["", "", *["left out"] * 4]
    assert page["not_shown"][0].startswith("4 pairs are left out")
    assert "of one page are at most 64 MiB" in quality_view(synthetic(), lambda name: "x" * 2**27)[0]["not_shown"][0]


def test_one_arm_alone(tmp_path):
    report = synthetic(())
    text = render(report, tmp_path)
    assert "dense alone on 3 prompts" in text and 'id="video"' not in text and "0.9800 [0.9700, 0.9900]" in text


def test_identical_clips(tmp_path):
    report = synthetic()
    report["arms"]["topk"].update(fidelity={}, identical_to_reference=3)
    for found in report["videos"]:
        found.update(fidelity={}, identical=found["arm"] == "topk")
    write_clips(tmp_path)
    text = render(report, tmp_path)
    assert "every frame is equal" in text and "Both clips are identical" in text


def test_damaged_reports_and_diff(tmp_path):
    report = synthetic()
    report["reference"] = "other"
    (tmp_path / "quality.json").write_text(json.dumps(report))
    with pytest.raises(UsageError, match="no arm 'other'"):
        read_report(tmp_path / "quality.json")
    with pytest.raises(UsageError, match="a suite has many clips"):
        diff_reports(synthetic(), synthetic())


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


def test_every_text_is_escaped(browser, folder):
    report = everywhere(synthetic())
    for found, original in zip(report["videos"], synthetic()["videos"], strict=True):
        found.update(arm=original["arm"], file=original["file"])
    report.update(schema="dsattn.quality/1", reference="dense")
    report["missing"][EVIL] = report["definitions"][EVIL] = "x"
    report["problems"] = [{"file": EVIL, "why": EVIL}]
    report["arms"]["topk"]["scores"][EVIL] = report["arms"]["topk"]["scores"]["temporal_flickering"]
    report["arms"]["dense"]["totals"]["total_why"] = EVIL
    page = render(report, folder)
    assert page.count("<script") == 2 and page.count("</script") == 2 and "<img src=x" not in page
    (folder / "evil.html").write_text(page, encoding="utf-8")
    with opened(browser, (folder / "evil.html").as_uri()) as shown:
        shown.on("dialog", lambda dialog: pytest.fail("a text became a script"))
        shown.locator("[data-pair='1']").click()
        assert shown.locator("main img").count() == 0


def test_pairs_play_side_by_side(browser, folder):
    with opened(browser, (folder / "quality.html").as_uri()) as page:
        ready = "[...document.querySelectorAll('video')].every(v => v.readyState >= 2 && !v.seeking)"
        at = "[...document.querySelectorAll('video')].map(v => v.currentTime * 8 | 0).join()"
        red = """(id) => {
            const context = new OffscreenCanvas(64, 64).getContext('2d', { willReadFrequently: true });
            context.drawImage(document.getElementById(id), 0, 0);
            return context.getImageData(20, 20, 1, 1).data[0];
        }"""
        until(page, ready)
        assert abs(page.evaluate(red, "dense") - 20) < 8 and abs(page.evaluate(red, "sparse") - 50) < 8
        until(page, "document.getElementById('frame-text').textContent === '1 of 9'")
        assert "PSNR 21.25 dB" in page.locator("#frame-note").inner_text()
        assert page.locator(".sparse figcaption").inner_text() == "Compared: topk"
        page.locator("#frame").focus()
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        until(page, f"{at} === '3,3'")
        # From the list, by keyboard: the third prompt.
        page.locator("[data-pair='2']").focus()
        page.keyboard.press("Enter")
        until(page, f"{ready} && {at} === '0,0'")
        assert abs(page.evaluate(red, "dense") - 140) < 8 and abs(page.evaluate(red, "sparse") - 170) < 8
        assert page.locator("#clip").input_value() == "2"
        assert page.evaluate("document.activeElement.id") == "play"
        page.locator("#rate").select_option("0.25")
        page.locator("#clip").select_option("1")
        until(page, ready)
        assert page.evaluate("document.getElementById('dense').playbackRate") == 0.25
        assert abs(page.evaluate(red, "dense") - 80) < 8
        page.locator("#play").click()
        until(page, f"{at}[0] >= 1")
        page.locator("#play").click()
        assert page.evaluate("document.getElementById('dense').paused && document.getElementById('sparse').paused")


def test_phone_themes_names_and_contrast(browser, folder):
    report = synthetic(("topk", "sol"))
    for found in report["videos"]:
        found["prompt"] = "W" * 300
    report["problems"] = [{"file": "x", "why": "/long/" + "w" * 400}]
    write_page(folder / "long.html", report, folder)
    for name, width, dark in (("quality", 390, True), ("quality", 1280, False), ("long", 390, False)):
        with opened(browser, (folder / f"{name}.html").as_uri(), width=width, dark=dark) as page:
            assert overflow(page) <= 0
            assert page.evaluate(CONTRAST) == []
            nameless = page.evaluate(
                """[...document.querySelectorAll('button, input, select, video, canvas')].filter(e => !(
                e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.[0]?.textContent.trim()
                )).map(e => e.outerHTML)"""
            )
            assert nameless == []
            page.locator("#theme").click()
            assert page.locator("#theme").inner_text() == "Theme: light"
