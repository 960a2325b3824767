"""Entry point: commands are declared here and in their modules, errors end here."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from dsattn.cli import compare, diff, doctor, generate, methods, profile, report
from dsattn.cli.errors import explain

app = typer.Typer(
    name="dsattn",
    help="Sparse attention for video diffusion transformers. Without --model, commands use the small model that "
    "ships with the package: no network and no GPU needed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(name="generate")(generate.command)
app.command(name="compare")(compare.command)
app.command(name="profile")(profile.command)
app.command(name="report")(report.command)
app.command(name="diff")(diff.command)
app.command(name="methods")(methods.command)
app.command(name="doctor")(doctor.command)


def _show_version(wanted: bool) -> None:
    if wanted:
        import dsattn

        typer.echo(f"dsattn {dsattn.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")] = False,
) -> None:
    """Options of every command."""


def run(arguments: Sequence[str], application: typer.Typer = app, name: str = "dsattn") -> int:
    """Run one command line; the exit code. The scripts bring their own application.

    0 done, 1 failed, 2 wrong usage, 3 a dense fallback under ``--strict``, 4 out of memory, 5 ``--min-psnr`` missed.
    """
    words = [word for word in arguments if word != "--debug"]
    try:
        code = application(args=words, prog_name=name, standalone_mode=False, obj=list(arguments))
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - nothing may reach the user as a traceback
        status, line = explain(error)
        if len(words) < len(arguments):
            traceback.print_exception(error)
        typer.echo(f"{name}: error: {line}", err=True)
        return status
    return code if isinstance(code, int) else 0


def main() -> None:
    """Run the command line of this process."""
    sys.exit(run(sys.argv[1:]))
