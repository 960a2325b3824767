"""Write the README's measured tables from committed results, so that none can be stale.

    python scripts/readme_tables.py            # write them
    python scripts/readme_tables.py --check    # exit with 1 if the README says something else

The README is read as it stands, so a table lies between ``<!-- made: name -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re

import docs_tables
import typer

README = docs_tables.ROOT / "README.md"
PLACE = re.compile(r"(?P<head><!-- made: (?P<name>\w+) -->\n).*?(?P<tail><!-- end -->)", re.DOTALL)
REPORTS = ("compare_semantic_gradient_20_steps.json", "compare_auto_balanced_gradient_20_steps.json")
METHODS = {
    "topk tile": "topk tile",
    "sol": "sol",
    "SVG2, our counts": "SVG2, our counts",
    "SVG-EAR, our counts": "SVG-EAR, our counts",
    "semantic (default)": "semantic (default)",
    "semantic, tail of order 1": "the same, tail of order 1",
    "semantic, by mass": "the same, by mass",
    "semantic, Euclidean": "the same, Euclidean",
    "auto": "auto",
}
"""Labels of frontier.json, and what the README calls them."""
app = typer.Typer(add_completion=False, help=__doc__)


def compared() -> str:
    """Both committed comparisons side by side."""
    left, right = (docs_tables.comparison_rows(docs_tables.result(name)) for name in REPORTS)
    header = ("", "dense", "default", "", "dense", "`--preset balanced`", "")
    return docs_tables.table(header, [(*a, *b[1:]) for a, b in zip(left, right, strict=True)])


def frontier() -> str:
    """Error at equal cost of the methods that the README names."""
    costs, rows = _rows(docs_tables.EQUAL_COST)
    header = ("method", *(f"cost {cost}" for cost in costs))
    return docs_tables.table(
        header, [(name, *(cell or "–" for cell in rows[label])) for label, name in METHODS.items()]
    )


def with_planning() -> str:
    """Errors at a total cost of .15, planning on this machine included."""
    costs, rows = _rows(docs_tables.EQUAL_TOTAL_COST)
    at = costs.index("0.15")
    found = {label: rows[label][at] if label in rows else "" for label in METHODS}
    parts = [f"{name} {found[label] or 'not reached'}" for label, name in METHODS.items() if "the same" not in name]
    return f"With planning, at a total cost of .15: {'; '.join(parts)}."


def _rows(title: str) -> tuple[list[str], dict[str, list[str]]]:
    """Costs, and errors by label, of a section of frontier.md."""
    header, _, *lines = [
        [cell.strip() for cell in line.strip("| ").split(" |")]
        for line in docs_tables.frontier_section(title).splitlines()
    ]
    costs = [name.removeprefix("cost ") for name in header[1:]]
    return costs, {line[0]: ["" if cell == "–" else cell for cell in line[1:]] for line in lines}


TABLES = {"compared": compared, "frontier": frontier, "with_planning": with_planning}


def filled(text: str) -> str:
    """The README with its tables made anew."""
    return PLACE.sub(lambda m: f"{m['head']}\n{TABLES[m['name']]()}\n\n{m['tail']}", text)


@app.command()
def main(check: bool = typer.Option(False, help="Write nothing; say whether something would change.")) -> None:
    """Make the README's tables."""
    text = README.read_text(encoding="utf-8")
    made = filled(text)
    if check and made != text:
        typer.echo("README.md differs from the committed results; run python scripts/readme_tables.py", err=True)
        raise typer.Exit(1)
    if not check:
        README.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    app()
