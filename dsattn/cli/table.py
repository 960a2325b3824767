"""The reports of a comparison and a profile as tables for people."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from dsattn import report_view
from dsattn.wording import counts

# Wide enough for every line where no terminal says how wide it is.
PIPE_WIDTH = 160
# Of the first column.
NAMES = 14


def print_report(report: dict[str, Any], out: Path) -> None:
    """To standard output, as compact as can be; ``out`` is the folder of the report's files."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    console.print(report_view.title(report), markup=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    names = ("", f"dense ({report['protocol']['baseline']})", report["runs"]["sparse"]["method"], "ratio", "")
    for name in names:
        table.add_column(name)
    for row in report_view.rows(report):
        if row.brief:
            table.add_row("  " * row.level + row.name, row.dense, row.sparse, row.ratio, row.note)
    console.print(table)
    for name, text in _lines(report, out):
        console.print(f"{name:<{NAMES}}{text}", markup=False, soft_wrap=True)


def _lines(report: dict[str, Any], out: Path) -> list[tuple[str, str]]:
    files = "  ".join(str(out / name) for key, name in report["files"].items() if not key.endswith("_details"))
    reasons = report["speedup"]["reasons"]
    return [
        ("fidelity", report_view.fidelity(report)),
        *(("fallback", text) for text in report_view.fallbacks(report)),
        ("baseline", report_view.baseline(report)),
        ("apart", report_view.apart(report)),
        *(("why" if i == 0 else "", reason) for i, reason in enumerate(reasons)),
        *([("saved", files)] if files else []),
    ]


def print_profile(report: dict[str, Any], out: Path) -> None:
    """What ``dsattn profile`` found, to standard output: a row per layer and branch."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    grid, model, density = report["grid"], report["model"], report["density"]
    title = (
        f"dsattn profile   {model['id']} ({model['pipeline']})   {grid['frames']}x{grid['height']}x{grid['width']} "
        f"latent grid ({report['tokens']:,} tokens)   {report['steps']} steps   seed {report['seed']}"
    )
    console.print(title, markup=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    layers = report["layers"]
    # What is the same in every row goes without saying.
    where = [name for name in ("model", "branch", "row") if len({layer[name] for layer in layers}) > 1]
    for name in (*where, "layer"):
        table.add_column(name)
    for name, side in (("heads by method", "left"), ("density", "right"), ("estimated error, when measured", "right")):
        table.add_column(name, justify="right" if side == "right" else "left")
    for layer in layers:
        place = [str(layer[name]) for name in (*where, "layer")]
        table.add_row(*place, counts(layer["methods"]), f"{layer['density']:.3f}", f"{layer['error']:.1%}")
    console.print(table)
    sparse = "no sparse call" if density["sparse_calls"] is None else f"{density['sparse_calls']:.3f} of sparse calls"
    error = report["estimated_error"]
    later = "" if error is None else f"; error of the plans in use, estimated over the run: {error:.1%}"
    console.print(f"density {density['all_calls']:.3f} of all calls, {sparse}{later}", markup=False, soft_wrap=True)
    for fallback in report["fallbacks"]:
        console.print(f"fallback {fallback['calls']} calls ran dense: {fallback['reason']}", markup=False)
    names = [report["files"]["profile"], *report["files"]["pictures"]]
    console.print(f"saved {'  '.join(str(out / name) for name in names)}", markup=False, soft_wrap=True)
    if "html" in report["files"]:
        console.print(f"look at it in a browser: {out / report['files']['html']}", markup=False, soft_wrap=True)
    console.print(f"use it with: --profile {out / report['files']['profile']}", markup=False, soft_wrap=True)
