"""Griffe extension: docstrings as the documentation's tool wants them.

``block_q, block_k: tokens per block`` becomes two entries, so that each gets its type and default, and references such
as ``:func:`enable``` become plain code.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SEVERAL = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+): (?P<text>.+)$")
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([^`]+)`")
SECTION = re.compile(r"^(?P<indent> *)(Args|Attributes):$")


def one_name_a_line(docstring: str) -> str:
    """The docstring with every ``a, b: text`` of its Args and Attributes as ``a: text`` and ``b: text``."""
    lines = docstring.split("\n")
    out: list[str] = []
    inside: int | None = None
    at = 0
    while at < len(lines):
        line = lines[at]
        if found := SECTION.match(line):
            inside = len(found["indent"]) + 4
        elif line.strip() and inside is not None and len(line) - len(line.lstrip()) < inside:
            inside = None
        at += 1
        several = SEVERAL.match(line)
        if inside is None or several is None or len(several["indent"]) != inside:
            out.append(line)
            continue
        rest = []
        while at < len(lines) and lines[at].startswith(" " * (inside + 1)):
            rest.append(lines[at])
            at += 1
        for name in several["names"].split(", "):
            out += [f"{several['indent']}{name}: {several['text']}", *rest]
    return "\n".join(out)


def plain_references(docstring: str) -> str:
    """The docstring with references of Sphinx as plain code."""
    return ROLE.sub(r"`\1`", docstring)


class Docstrings(griffe.Extension):
    """Rewrites docstrings as they are collected."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = plain_references(one_name_a_line(obj.docstring.value))
