"""Write the README's measured tables from committed results, so that none can be stale.

    python scripts/readme_tables.py            # write them
    python scripts/readme_tables.py --check    # exit with 1 if the README says something else

The README is read as it stands, so a table lies between ``<!-- made: name -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
from typing import Any

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
    cells = [_column(docs_tables.result(name)) for name in REPORTS]
    lines = ["| | dense | default | | dense | `--preset balanced` | |", "|" + "---|" * 7]
    for name, left, right in zip(cells[0], cells[0].values(), cells[1].values(), strict=True):
        lines.append(f"| {name} | {' | '.join(left)} | {' | '.join(right)} |")
    return "\n".join(lines)


def _column(found: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    """Dense, sparse and their ratio, by the name of the row."""
    runs, speed = found["runs"], found["speedup"]
    psnr, error = found["fidelity"]["psnr"], found["estimated_error"]["overall"]
    wanted = runs["sparse"]["config"].get("target_error")
    asked = "" if wanted is None else f" (asked for: {100 * wanted:g} %)"

    def median(mode: str, part: str) -> float:
        values = sorted(runs[mode][part])
        return float(values[len(values) // 2])

    return {
        "end to end": (
            f"{runs['dense']['e2e']['median']:.1f} s",
            f"{runs['sparse']['e2e']['median']:.1f} s",
            f"{speed['e2e']:.2f}×",
        ),
        "attention (+ planning)": (
            f"{median('dense', 'attention_s'):.1f} s",
            f"{median('sparse', 'attention_s'):.1f} s + {median('sparse', 'plan_s'):.1f} s",
            f"{speed['attention_with_plan']:.2f}×",
        ),
        "pairs computed, all calls": ("100 %", f"{100 * found['density']['all_calls']:.0f} %", ""),
        "attention error, estimated": ("–", f"{100 * error:.1f} %{asked}", ""),
        "PSNR against dense": (
            "–",
            f"{psnr['mean']:.1f} dB, worst frame {psnr['worst']:.1f}",
            f"SSIM {found['fidelity']['ssim']['mean']:.3f}".replace("0.", ".", 1),
        ),
    }


def frontier() -> str:
    """Error at equal cost of the methods that the README names."""
    costs, rows = _rows(docs_tables.EQUAL_COST)
    lines = ["| method | cost " + " | ".join(c.lstrip("0") for c in costs) + " |", "|---" * (len(costs) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cell or '–' for cell in rows[label])} |" for label, name in METHODS.items()]
    return "\n".join(lines)


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
