"""``dsattn methods``: what there is to choose from."""

from __future__ import annotations

import dataclasses
from typing import Any

import typer

from dsattn.cli.options import Json
from dsattn.cli.output import print_json
from dsattn.methods import METHODS


def command(json: Json = False) -> None:
    """List the methods with their options and defaults."""
    methods = catalogue()
    width = max(map(len, methods)) + 2
    if json:
        print_json(methods)
        return
    for name, method in methods.items():
        typer.echo(f"{name:<{width}}{method['summary']}")
        typer.echo(f"{'':<{width}}source: {method['source']}")
        options = " ".join(f"{option}={_plain(value)}" for option, value in method["options"].items())
        typer.echo(f"{'':<{width}}options: {options or 'none'}")
    typer.echo("\nSet an option with -O name=value, the method with --method.")


def catalogue() -> dict[str, dict[str, Any]]:
    """Every method: summary, source, whether its plan depends on the values, options with defaults."""
    return {
        name: {
            "summary": method.summary,
            "source": method.source,
            "static": method.static,
            "options": dataclasses.asdict(method.config()),
        }
        for name, method in sorted(METHODS.items())
    }


def _plain(value: Any) -> str:
    """As ``-O`` takes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
