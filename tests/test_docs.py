"""The documentation: every method has a page, and what it mentions exists. The build checks links (`make docs`)."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import docs_checks  # noqa: E402
import docs_tables  # noqa: E402
import readme_tables  # noqa: E402
import run_readme  # noqa: E402

from dsattn.methods import METHODS  # noqa: E402

PAGES = sorted((ROOT / "docs").rglob("*.md"))


def test_nothing_is_wrong():
    assert docs_checks.problems() == []


def test_the_readme_says_what_was_measured():
    text = readme_tables.README.read_text(encoding="utf-8")
    assert {m["name"] for m in readme_tables.PLACE.finditer(text)} == set(readme_tables.TABLES)
    assert readme_tables.filled(text) == text


def test_every_page_is_in_the_navigation():
    # Names with "!" are mkdocs' own business.
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/]+\.md", json.dumps(yaml.safe_load(text)["nav"])))
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_can_be_made(page):
    filled = docs_tables.fill(page.read_text(encoding="utf-8"))
    assert "<!-- table:" not in filled


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dense"])
def test_method_pages_say_what_users_need(name):
    text = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    wanted = ("How it differs", "When to use it", "Cost", "Measured", "Options")
    assert [h for h in wanted if not any(found.startswith(h) for found in headings)] == []
    assert f"::: dsattn.methods.{name}.{METHODS[name].config.__name__}" in text and "Source" in text


def test_a_method_without_a_page_is_found(tmp_path):
    (tmp_path / "methods").mkdir()
    for name in [*METHODS, "invented"]:
        if name != "sol":
            (tmp_path / "methods" / f"{name}.md").write_text("#")
    assert docs_checks.problems(tmp_path) == [
        "the method 'sol' has no page methods/sol.md",
        "methods/invented.md is about no method of dsattn.METHODS",
    ]


BAD = {
    "```bash\ndsattn generat x\n```": "there is no command 'generat'",
    "```bash\ndsattn generate x --hight 64\n```": "--hight",
    "```bash\ndsattn generate x \\\n    -O densty=0.1\n```": "'densty'",
    "```bash\ndsattn generate x --method topk -O density=2\n```": "density",
    "```bash\ndsattn compare x --preset quick\n```": "preset",
    "```bash\nmake everything\n```": "'everything'",
    "```bash\npython scripts/nothing.py\n```": "there is no scripts/nothing.py",
    "```bash\npython scripts/run_readme.py --fast README.md\n```": "--fast",
    "```yaml\nmethod: semantic\ntop_q: 0.9\n```": "'top_q'",
    "Use `--no-such-option`.": "--no-such-option",
    "Use `dsattn explain`.": "'explain'",
    "See `dsattn.attention`.": "attention",
    "See `dsattn.Engine.start()`.": "start",
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:40].replace("\n", " "))
def test_what_does_not_exist_is_found(text):
    found = list(docs_checks.check_page(text))
    assert len(found) == 1 and BAD[text] in found[0]


def test_what_exists_passes():
    text = """
`--dense-steps 3`, `-O density=0.1`, `dsattn compare`, `dsattn --help`, `dsattn.attend(q, k, v, plan)`, `make aot`
`python scripts/aot_report.py` has `--write-budget`.
```bash
dsattn profile --out p  # then
.venv/bin/dsattn generate "x" --profile p/profile.json -O cost=0.2
python scripts/aot_report.py --target sm_90
pip install anything --at-all
```
"""
    assert list(docs_checks.check_page(text)) == []


def test_unknown_tables_and_fields_without_words_are_errors(monkeypatch):
    with pytest.raises(KeyError, match="no table is called 'nothing'"):
        docs_tables.fill("<!-- table: nothing -->")
    monkeypatch.delitem(docs_tables.MEANINGS, "speedup.headline")
    with pytest.raises(ValueError, match=r"speedup\.headline"):
        docs_tables.report_fields("speedup")


def test_meanings_are_of_fields_that_exist_and_say_nothing_themselves():
    schema = json.loads((ROOT / "dsattn" / "report.schema.json").read_text(encoding="utf-8"))
    for path in docs_tables.MEANINGS:
        node = schema
        for part in path.split("."):
            node = node["properties"][part]
        assert "description" not in node, path


def test_loading_from_elsewhere_is_found(tmp_path):
    good = '<a href="https://a.b">x</a><script src="js/x.js"></script><link rel="canonical" href="https://a.b">'
    (tmp_path / "good.html").write_text(good)
    for at, bad in enumerate(
        (
            '<script src="https://a.b/x.js"></script>',
            "<script async src=//a.b/x.js></script>",
            '<link rel="stylesheet" href="https://a.b/x.css">',
            '<img alt="" src="http://a.b/x.png">',
            "<style>@import 'x.css'</style>",
        )
    ):
        (tmp_path / f"bad{at}.html").write_text(bad)
    (tmp_path / "x.css").write_text("a { background: url(https://a.b/x.png) }")
    assert len(docs_checks.external_resources(tmp_path)) == 6


def test_code_of_a_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "```python\na = 1\n```\n<!-- not run: a reason -->\n```python\n1 / 0\n```\n"
        "```bash\ndsattn nothing\n```\n<!-- run -->\n```bash\ndsattn methods \\\n    --json\n```\n"
        "```python\nassert a == 1\n```\n",
        encoding="utf-8",
    )
    assert run_readme.run_file(page) == 3
    assert "not run: a reason" in capsys.readouterr().out
    page.write_text("<!-- run -->\n```bash\ndsattn nothing\n```\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="exit code 2"):
        run_readme.run_file(page)
    page.write_text("<!-- run -->\n```bash\nrm -r out\n```\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="only dsattn commands and scripts"):
        run_readme.run_file(page)


def test_docstrings_are_prepared():
    import griffe

    assert griffe
    import docs_griffe

    text = """Do it, see :func:`~a.b`.

    Args:
        x, y: two of them
            over two lines.
        z: one, two: three.

    Names: a, b: stays.
    """
    expected = text.replace(
        "        x, y: two of them\n            over two lines.\n",
        "        x: two of them\n            over two lines.\n        y: two of them\n            over two lines.\n",
    )
    assert docs_griffe.one_name_a_line(text) == expected
    assert docs_griffe.plain_references(":func:`~a.b` and :meth:`C.d`") == "`a.b` and `C.d`"


def test_warnings_of_the_build_are_errors():
    """mkdocs counts the warnings it shows: --quiet would let all of them pass."""
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    (build,) = [line.split() for line in lines if "mkdocs build" in line]
    assert "--strict" in build and not {"-q", "--quiet"} & set(build)
    validation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["validation"]
    assert {level for part in validation.values() for level in part.values()} == {"warn"}
