"""Pages of reports: what they hold, that nothing in a report can act in them, and that they work in a browser."""

import json
import re
from pathlib import Path

import pytest

from dsattn.html.charts import Series, fitted, line_chart, log_axis, steps_axis
from dsattn.html.page import data_uri, render, script_json, write_page
from dsattn.report import write_json
from dsattn.report_file import read_report

from .browser import chromium, opened
from .report_inputs import COMMITTED, maps, new_report, old_report, write_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("report")
    write_files(made)
    write_json(made / "report.json", new_report())
    write_page(made / "report.html", read_report(made / "report.json"), made)
    return made


@pytest.fixture(scope="module")
def text(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def test_it_is_one_file(text):
    assert len(text) < 3_000_000 and text.count("data:video/mp4;base64,") == 2 and "data:image/png;base64," in text
    without_data = re.sub(r"data:[a-z/0-9]+;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"""(src|href)=["'](?!data:|#|")""", without_data), "nothing is loaded"
    assert "url(" not in without_data and "@import" not in without_data
    assert set(re.findall(r"https?://[^\s\"']+", without_data)) <= {"http://www.w3.org/2000/svg"}, "a name, no address"


def test_it_shows_what_the_report_holds(text):
    report = new_report()
    for words in (
        "1.80×",
        "End to end",
        "first 3 of",
        "0.24 of all calls",
        "identical" if report["fidelity"]["psnr"]["identical"] else "dB",
        "FLOP bound",
        "reuse of the plan",
        "fallback to dense",
        "AMD EPYC",
        "initial latents",
        "dsattn compare &#39;a large red circle",
    ):
        assert words in text, words


def test_fallbacks_and_reasons_are_shown(folder):
    report = new_report()
    report["runs"]["sparse"]["fallbacks"] = [{"reason": "a mask that no grid fits", "calls": 7}]
    report["speedup"].update(headline="0.93x (slower)", e2e=0.93, reasons=["too few tokens: attention is 9%"])
    page = render(report, folder)
    assert "7 calls ran dense: a mask that no grid fits" in page and "Why it is not faster" in page
    assert "0.93×" in page and "end to end (slower)" in page and "too few tokens" in page


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_old_reports_still_render(path, tmp_path):
    page = render(read_report(path), tmp_path)
    assert page.count("Not recorded") >= 3 and "were not found beside report.json" in page


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028'\"&"


def everywhere(value):
    """The same report with an attack in every text that a schema leaves free."""
    if isinstance(value, dict):
        return {key: everywhere(item) for key, item in value.items()}
    if isinstance(value, list):
        return [everywhere(item) for item in value]
    return value + EVIL if isinstance(value, str) else value


def test_every_text_is_escaped(folder):
    report = everywhere(new_report())
    report["schema"] = "dsattn.report/2"
    report["files"] = {}
    report["runs"]["sparse"]["config"][EVIL] = 1
    report["runs"]["sparse"]["calls"][EVIL] = 1
    for panel in report["maps"]["panels"]:
        panel["kinds"] = [row.removesuffix(EVIL) for row in panel["kinds"]]
    page = render(report, folder)
    assert page.count("<script") == 2 and page.count("</script") == 2 and "<img src=x" not in page
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(data)["panels"][0]["branch"] == f"cond{EVIL}"
    with chromium() as browser:
        (folder / "evil.html").write_text(page, encoding="utf-8")
        with opened(browser, (folder / "evil.html").as_uri()) as shown:
            shown.on("dialog", lambda dialog: pytest.fail("a text became a script"))
            shown.locator("label:has-text('Method')").click()
            assert shown.locator("#map-legend img").count() == 0


def test_script_json():
    assert script_json({"a": "</script>&\u2029"}) == '{"a":"\\u003c/script\\u003e\\u0026\\u2029"}'
    with pytest.raises(ValueError):
        script_json(float("nan"))


def test_files_come_from_the_report_folder_only(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("in/a.png", "b.png", "in/c.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "b.png")
    folder = tmp_path / "in"
    assert data_uri(folder, "a.png") == "data:image/png;base64,eA=="
    for name in ("../b.png", str(tmp_path / "b.png"), "link.png", "c.txt", "missing.png", ".", "a.png/x.png", "\0.png"):
        assert data_uri(folder, name) is None, name


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "report.html").write_text("before")
    broken = new_report()
    del broken["env"]["cpu"]
    with pytest.raises(Exception, match="cpu"):
        write_page(tmp_path / "report.html", broken, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "before"


def test_charts():
    axis = fitted("y", [21.3, None, 24.9])
    assert axis.low <= 21.3 and axis.high >= 24.9 and len(axis.ticks) <= 8
    assert fitted("y", [None]).ticks and fitted("y", [3.0, 3.0]).high > 3 and fitted("y", [5.0], zero=True).low == 0
    assert log_axis("x", [1.5, 10, 100]).place(100) == pytest.approx(100) and log_axis("x", [1.0, 100]).ticks[0] == 1
    chart = line_chart("a & b", [1, 2, 3], [Series("<i>", [21.3, None, 24.9])], steps_axis("x", [1, 2, 3]), axis)
    assert "a &amp; b" in chart and "&lt;i&gt;" in chart and "<i>" not in chart
    assert re.search(r'd="M0.00 [\d.]+M100.00 [\d.]+"', chart), "a gap interrupts the line"
    assert line_chart("one", [0], [Series("", [1.0])], steps_axis("x", [0]), fitted("y", [1.0]))


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


def until(page, expression):
    """Wait for it; the page's own security policy forbids the browser's way of doing so."""
    for _ in range(100):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never true: {expression}")


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


def test_video_plays_and_follows_the_scrubber(browser, folder):
    with opened(browser, (folder / "report.html").as_uri()) as page:
        until(page, "document.getElementById('dense').readyState >= 2")
        until(page, "document.getElementById('sparse').readyState >= 2")
        seen = "[...document.querySelectorAll('video')].map(v => v.currentTime * 16 | 0)"
        colour = """(() => {
            const context = new OffscreenCanvas(64, 64).getContext('2d', { willReadFrequently: true });
            context.drawImage(document.getElementById('difference'), 0, 0);
            return context.getImageData(20, 20, 1, 1).data[0];
        })()"""
        page.locator("#frame").focus()
        for _ in range(4):
            page.keyboard.press("ArrowRight")
        until(page, f"{seen}.join() === '4,4'")
        assert (
            page.locator("#frame-text").inner_text() == "5 of 5" and "PSNR" in page.locator("#frame-note").inner_text()
        )
        assert page.locator("#psnr .cursor").get_attribute("style") == "left: 100%;"
        # 32 levels brighter than the dense one by now, amplified four times.
        until(page, f"{colour} > 80")
        page.locator("#gain").select_option("1")
        until(page, f"{colour} < 60")
        page.keyboard.press("Home")
        page.locator("#frame").focus()
        page.keyboard.press("Home")
        until(page, f"{seen}.join() === '0,0'")
        assert "equal" not in page.locator("#frame-note").inner_text()
        page.locator("#rate").select_option("0.25")
        page.locator("#play").click()
        until(page, f"{seen}[0] >= 1")
        assert page.locator("#play").inner_text() == "Pause"
        page.locator("#play").click()
        assert page.evaluate("document.getElementById('dense').paused && document.getElementById('sparse').paused")
        at = page.evaluate(seen)
        assert abs(at[0] - at[1]) <= 1, "both show the same frame"


def test_views(browser, folder):
    with opened(browser, (folder / "report.html").as_uri()) as page:
        visible = "[...document.querySelectorAll('.screens figure')].map(f => f.offsetWidth > 10).join()"
        assert page.evaluate(visible) == "true,true,true"
        page.locator("#view input[value=difference]").focus()
        page.keyboard.press("Space")
        assert page.evaluate(visible) == "false,false,true"
        page.locator("#view label:has-text('Wipe')").click()
        assert page.evaluate(visible) == "true,true,false" and page.locator("#wipe").is_visible()
        page.locator("#wipe").fill("20")
        assert "20%" in page.evaluate("getComputedStyle(document.getElementById('sparse')).clipPath")


def test_maps(browser, folder):
    panel = maps().panels[0]
    with opened(browser, (folder / "report.html").as_uri()) as page:
        cells = """[...document.querySelectorAll('#grid tbody tr')].map(
            r => [...r.querySelectorAll('td')].map(c => c.textContent))"""

        def shown(values):
            return [["–" if v is None else f"{100 * v:.{1 if v < 0.0995 else 0}f}" for v in row] for row in values]

        assert page.evaluate(cells) == shown([panel["density"][layer][1] for layer in (0, 1)])
        page.locator("#grid td").first.click()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        assert page.locator("#cell-title").inner_text() == "Layer 1, head 1"
        assert "method topk" in page.locator("#cell-text").inner_text()
        pixels = """[...document.getElementById('mask').getContext('2d').getImageData(0, 0, 12, 12).data].filter(
            (_, i) => i % 4 === 0).join()"""
        want = maps().masks[12:24, 12:24].flatten().tolist()
        assert page.evaluate(pixels) == ",".join(map(str, want)), "the mask of layer 1, head 1"
        page.locator("#grid td").nth(5).hover()
        assert page.locator("#cell-title").inner_text() == "Layer 1, head 2"
        page.locator("#step").fill("3")
        assert page.evaluate(cells)[0] == ["100"] * 3 and "fallback" in page.locator("#step-text").inner_text()
        page.locator("#what label:has-text('Error')").click()
        assert (
            page.evaluate(cells)[1] == ["–"] * 3
            and "Steps with an estimate: 2" in page.locator("#map-note").inner_text()
        )
        page.locator("#step").fill("2")
        assert page.evaluate(cells) == shown([panel["error"][layer][2] for layer in (0, 1)])
        page.locator("#what label:has-text('Method')").click()
        assert page.evaluate(cells) == [["se", "to", "de"]] * 2 and page.locator("#map-legend li").count() == 3
        page.locator("#what label:has-text('Kind')").click()
        page.locator("#axes label:has-text('step')").click()
        assert page.evaluate(cells) == [list("DRUF"), list("DRUR")]
        page.locator("#panel").select_option("1")
        page.locator("#what label:has-text('Density')").click()
        second = maps().panels[1]["density"][1][1]
        assert page.evaluate(cells)[1][:2] == ["100", f"{100 * sum(second) / 3:.0f}"]
        assert page.locator("#grid td[tabindex='0']").count() == 1, "one stop of the tab key"


def test_phone_and_themes(browser, folder):
    background = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, (folder / "report.html").as_uri(), width=390, height=844, dark=True) as page:
        assert overflow(page) <= 0
        dark = page.evaluate(background)
        assert page.locator("#theme").inner_text() == "Theme: auto"
        page.locator("#theme").click()
        light = page.evaluate(background)
        assert page.locator("#theme").inner_text() == "Theme: light" and light != dark
        page.locator("#theme").click()
        assert page.evaluate(background) == dark
        for value in ("difference", "wipe"):
            page.locator(f"#view label:has(input[value={value}])").click()
            assert overflow(page) <= 0
    with opened(browser, (folder / "report.html").as_uri()) as page:
        assert page.evaluate(background) == light


@pytest.mark.parametrize("width", [390, 1280])
def test_a_large_model_and_an_old_report_fit(browser, tmp_path, width):
    sizes = {"layers": 40, "heads": 40, "steps": 50, "bins": 12}
    write_files(tmp_path, **sizes)
    report = new_report(**sizes)
    report["prompt"] = "W" * 900
    report["command"] = "x" * 2000
    write_page(tmp_path / "large.html", report, tmp_path)
    assert (tmp_path / "large.html").stat().st_size < 4_000_000
    write_page(tmp_path / "old.html", old_report(), tmp_path)
    for name in ("large", "old"):
        with opened(browser, Path(tmp_path / f"{name}.html").as_uri(), width=width) as page:
            assert overflow(page) <= 0


def test_controls_have_names_and_text_has_contrast(browser, folder):
    for dark in (False, True):
        with opened(browser, (folder / "report.html").as_uri(), dark=dark) as page:
            nameless = page.evaluate(
                """[...document.querySelectorAll('button, input, select, video, canvas, svg[role=img]')].filter(e => !(
                e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.[0]?.textContent.trim()
                )).map(e => e.outerHTML)"""
            )
            assert nameless == []
            assert page.evaluate(CONTRAST) == []
            for what in ("Error", "Method", "Kind"):
                page.locator(f"#what label:has-text('{what}')").click()
                assert page.evaluate(CONTRAST) == []
            # Every shade of the map's scale.
            page.evaluate(
                """document.getElementById('grid').innerHTML = [...Array(101).keys()].map(i =>
                `<tr><td class="heat" style="--share:${i / 100}">${i}</td></tr>`).join('')"""
            )
            assert page.evaluate(CONTRAST) == []


# Text that stands out from what is behind it by less than 4.5 to 1, as WCAG 2.2 counts.
CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = (text) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = (v) => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255];
  };
  const bad = [];
  for (const e of document.querySelectorAll('main *, header *, footer')) {
    if (!e.offsetWidth || ![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    const a = light(rgba(getComputedStyle(e).color)), b = light(behind(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) bad.push(`${e.tagName} ${e.className} "${e.textContent.trim().slice(0, 30)}" ${ratio.toFixed(2)}`);
  }
  return bad;
})()"""
