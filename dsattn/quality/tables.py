"""An evaluation as tables, for a terminal and as markdown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from dsattn.cli.table import PIPE_WIDTH
from dsattn.quality.summary import FIDELITY

Rows = list[list[str]]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown of rows, the first of which is the head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def print_tables(report: dict[str, Any]) -> None:
    """A report of :func:`dsattn.quality.summary.build`, to standard output."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    console.print(title(report), markup=False, soft_wrap=True)
    for rows in tables(report):
        print_rows(rows)
    for line in lines(report):
        console.print(line, markup=False, soft_wrap=True)


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """Rows, the first of which is the head, to standard output."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for index, name in enumerate(rows[0]):
        table.add_column(escape(name), justify="left" if index == 0 else "right")
    for row in rows[1:]:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)


def markdown(report: dict[str, Any]) -> str:
    """The same as markdown, with the definitions of its figures."""
    parts = [title(report), "", *(markdown_table(rows) for rows in tables(report))]
    parts += [f"- {line}" for line in lines(report)]
    parts += ["", *(f"- `{name}`: {text}" for name, text in report["definitions"].items())]
    return "\n".join(parts) + "\n"


def title(report: dict[str, Any]) -> str:
    """What was evaluated, in a line."""
    run = report["run"]
    return (
        f"quality   {run['model']['id']}   suite {run['suite']}: {report['prompts']} prompts x {run['samples']}, "
        f"seed {run['seed']}"
    )


def tables(report: dict[str, Any]) -> list[Rows]:
    """A table per arm that is compared with the reference; of the reference alone, where it is the only one."""
    reference = report["reference"]
    others = [name for name in report["arms"] if name != reference]
    return [_pair(report, reference, name) for name in others] or [_pair(report, reference, None)]


def lines(report: dict[str, Any]) -> list[str]:
    """Totals, what was not computed and why, notes and problems."""
    found = []
    for name, arm in report["arms"].items():
        group = arm["totals"]
        total = group["total_why"] if group["total"] is None else f"{group['total']:.4f}"
        quality, semantic = ("n/a" if group[part] is None else f"{group[part]:.4f}" for part in ("quality", "semantic"))
        share = "" if arm["density"] is None else f"   density {arm['density']:.3f} of all calls"
        found.append(f"{name}: VBench Quality {quality}, Semantic {semantic}, Total {total}{share}")
        if arm["identical_to_reference"]:
            found.append(f"{name}: {arm['identical_to_reference']} clips are identical to {report['reference']}")
        if arm["fallbacks"]:
            found.append(f"{name}: {arm['fallbacks']} calls fell back to dense attention")
    found += [f"{metric} n/a ({why})" for metric, why in report["missing"].items()]
    if report["fidelity_on"]:
        found.append(f"fidelity is measured on {' and '.join(report['fidelity_on'])}")
    found += report["notes"]
    found += [f"problem: {problem['why']}" for problem in report["problems"]]
    return found


def _pair(report: dict[str, Any], reference: str, name: str | None) -> Rows:
    base, other = report["arms"][reference], report["arms"][name] if name else None
    if other is None:
        head = ["", f"{reference} [95 %]", "clips"]
        return [head, *([m, _with_interval(s), str(s["videos"])] for m, s in base["scores"].items())]
    rows = [["", reference, str(name), "difference [95 %]", "prompts"]]
    for metric in dict.fromkeys([*base["scores"], *other["scores"]]):
        a, b = (arm["scores"].get(metric) for arm in (base, other))
        gap = b["difference"] if b else None
        rows.append([metric, _score(a), _score(b), _interval(gap, "+"), str(gap["prompts"]) if gap else "0"])
    for metric in FIDELITY:
        if found := other["fidelity"].get(metric):
            unit = " dB" if metric == "psnr" else ""
            digits = 2 if metric == "psnr" else 4
            value = f"{found['mean']:.{digits}f}{unit}"
            rows.append([f"{metric} to {reference}", "", value, _ends(found, "", digits), str(found["prompts"])])
    return rows


def _score(found: dict[str, Any] | None) -> str:
    return "n/a" if found is None or found["score"] is None else f"{found['score']:.4f}"


def _with_interval(found: dict[str, Any]) -> str:
    return f"{_score(found)} {_ends(found['interval'], '', 4)}".strip()


def _interval(found: dict[str, Any] | None, sign: str) -> str:
    if found is None:
        return "n/a"
    return f"{found['mean']:{sign}.4f} {_ends(found, sign, 4)}"


def _ends(found: dict[str, Any] | None, sign: str, digits: int) -> str:
    if found is None or found["low"] is None:
        return "[one prompt]" if found else ""
    return f"[{found['low']:{sign}.{digits}f}, {found['high']:{sign}.{digits}f}]"
