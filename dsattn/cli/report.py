"""``dsattn report``: show a report again, in the terminal and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsattn.cli.table import print_profile, print_report
from dsattn.errors import UsageError
from dsattn.html.page import write_page
from dsattn.quality.tables import print_tables
from dsattn.report_file import kind, read_report
from dsattn.video import check_writable

File = Annotated[
    Path,
    typer.Argument(
        metavar="REPORT", help="A report.json of 'dsattn compare' or 'dsattn profile', or a suite's quality.json."
    ),
]
Html = Annotated[
    Path | None, typer.Option(help="Write the page here; videos and masks are taken from beside the report.")
]


def command(report: File, html: Html = None) -> None:
    """Show a report as the table it was printed as, and write its page."""
    if html is not None:
        if html.suffix.lower() not in (".html", ".htm"):
            raise UsageError(f"--html must end in .html, got {str(html)!r}")
        check_writable(html)
    found = read_report(report)
    folder = report.parent
    if kind(found) == "profile":
        print_profile(found, folder)
    elif kind(found) == "quality":
        print_tables(found)
    else:
        there = {name: file for name, file in found["files"].items() if (folder / file).is_file()}
        print_report({**found, "files": there}, folder)
    if html is not None:
        write_page(html, found, folder)
        typer.echo(f"wrote {html}")
