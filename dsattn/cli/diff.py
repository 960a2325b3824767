"""``dsattn diff``: two reports of ``dsattn compare`` beside each other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dsattn.cli.options import Json
from dsattn.cli.output import print_json
from dsattn.cli.table import PIPE_WIDTH
from dsattn.report_diff import diff_reports
from dsattn.report_file import read_report

First = Annotated[Path, typer.Argument(metavar="A", help="A report.json of 'dsattn compare'.")]
Second = Annotated[Path, typer.Argument(metavar="B", help="Another one.")]


def command(a: First, b: Second, json: Json = False) -> None:
    """Show what two comparisons were set to differently, and how speed, density, error and fidelity differ."""
    found = diff_reports(read_report(a), read_report(b))
    if json:
        print_json(found)
    else:
        _print(found, a, b)


def _print(found: dict[str, Any], a: Path, b: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    for name, path in (("a", a), ("b", b)):
        about = found[name]
        say(f"{name}  {path}   {about['method']}   {about['headline']}   {about['hardware']}   {about['created']}")
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for name in ("", "a", "b", "b against a"):
        table.add_column(name)
    for row in found["settings"]:
        table.add_row(*(escape(_word(row[key])) for key in ("name", "a", "b")), "")
    if not found["settings"]:
        table.add_row("settings", "equal", "equal", "")
    table.add_section()
    table.add_row("", "", "", "")
    for row in found["results"]:
        refused = "not comparable" if row["part"] in _refused(found) else ""
        table.add_row(row["name"], row["a"], row["b"], row["change"] or refused)
    console.print(table)
    for part, key in (("speed", "against_speed"), ("fidelity", "against_fidelity")):
        if found[key]:
            say(f"{part} is not comparable: {'; '.join(found[key])}")
    for note in found["notes"]:
        say(f"note: {note}")


def _refused(found: dict[str, Any]) -> set[str]:
    speed = {"speed", "memory"} if found["against_speed"] else set()
    return speed | ({"fidelity"} if found["against_fidelity"] else set())


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_word, value)) or "none"
    return "–" if value is None else str(value)
