"""What the documentation may not get wrong: methods without a page, commands, options and names that do not exist.

Used by the documentation's build (scripts/docs_hook.py) and by tests/test_docs.py; needs no documentation tool.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import typer
import typer.main
import yaml

from dsattn.cli import options
from dsattn.cli.app import app
from dsattn.config import Config
from dsattn.engine import Engine
from dsattn.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*).*?\n(?P<text>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
SCRIPT = re.compile(r"\bpython (scripts/\w+\.py)\b")
NAME = re.compile(r"dsattn(\.\w+)+")
EXTERNAL = re.compile(
    r"""<(?:script|img|iframe|source|video)\b[^>]*\bsrc=["']?(?:https?:)?//|<link\b(?![^>]*\brel=["']?(?:canonical|license|prev|next|edit))[^>]*\bhref=["']?(?:https?:)?//|@import|url\(["']?(?:https?:)?//"""
)


def problems(folder: Path = DOCS) -> list[str]:
    """Everything that is wrong, one line each."""
    found = list(missing_pages(folder))
    for page in sorted(folder.rglob("*.md")):
        where = page.relative_to(folder)
        found += [f"{where}: {problem}" for problem in check_page(page.read_text(encoding="utf-8"))]
    return found


def missing_pages(folder: Path) -> Iterator[str]:
    """Methods without a page, and pages without a method."""
    pages = {page.stem for page in (folder / "methods").glob("*.md")} - {"index"}
    for name in sorted(set(METHODS) - pages):
        yield f"the method {name!r} has no page methods/{name}.md"
    for name in sorted(pages - set(METHODS)):
        yield f"methods/{name}.md is about no method of dsattn.METHODS"


def check_page(text: str) -> Iterator[str]:
    """Problems of one page's Markdown."""
    for block in FENCE.finditer(text):
        body = "\n".join(line[len(block["indent"]) :] for line in block["text"].splitlines())
        if block["language"] in ("bash", "sh", "console", "shell"):
            for line in command_lines(body):
                yield from check_command(line)
        elif block["language"] == "yaml":
            yield from _attempt(
                f"the configuration {body.strip()!r}", lambda body=body: Engine(Config.from_dict(yaml.safe_load(body)))
            )
    named = {ROOT / name for name in SCRIPT.findall(text) if (ROOT / name).is_file()}
    known = cli_options().union(*map(script_options, named))
    for code in INLINE.findall(FENCE.sub("", text)):
        yield from check_inline(code, known)


def command_lines(block: str) -> list[str]:
    """Commands of a shell block: continued lines joined, comments and prompts left out."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line.strip().removeprefix("$ ") for line in lines if line.strip() and not line.strip().startswith("#")]


def check_command(line: str) -> Iterator[str]:
    """Problems of a command line; programs that are not the project's pass."""
    words = shlex.split(line, comments=True)
    words[0] = words[0].removeprefix(".venv/bin/")
    if words[:3] == ["python", "-m", "dsattn"]:
        words = words[2:]
    if words[0] == "dsattn":
        yield from _attempt(line, lambda: parse(words[1:]))
    elif words[0] == "make":
        known = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        yield from (
            f"{line}: the Makefile has no {word!r}" for word in words[1:] if "=" not in word and word not in known
        )
    elif words[0] == "python" and words[1].startswith(("scripts/", "benchmarks/")):
        if not (ROOT / words[1]).is_file():
            yield f"{line}: there is no {words[1]}"
        else:
            yield from _attempt(line, lambda: _parse_script(ROOT / words[1], words[2:]))


def check_inline(code: str, known: frozenset[str]) -> Iterator[str]:
    """Problems of inline code: options (those of dsattn and of scripts the page names), commands, and names."""
    if re.fullmatch(r"--[a-z][\w-]*( .*)?", code):
        option = code.split()[0]
        if option not in known:
            yield f"{code}: no dsattn command or script named on the page has the option {option}"
    elif code.startswith(("dsattn ", "make ", "python scripts/")):
        # A mention may leave out what a run needs.
        yield from (problem for problem in check_command(code) if ": Missing " not in problem)
    elif found := NAME.match(code):
        yield from _attempt(code, lambda: resolve(found[0]))


def parse(words: list[str]) -> None:
    """Parse a command line of dsattn without running it; options of methods are checked too.

    Raises:
        Exception: as the command line would.

    """
    if not words or words[0] in root_options():
        return
    if words[0] not in commands():
        raise ValueError(f"there is no command {words[0]!r}")
    with commands()[words[0]].make_context(words[0], list(words[1:]), obj=list(words)) as context:
        # A file that is named need not exist here. A profile is of the method auto.
        if context.params.get("profile") is not None:
            context.params["method"] = context.params.get("method") or "auto"
        context.params.update({name: None for name in ("profile", "config") if name in context.params})
        if "option" in context.params:
            options.Request.of(context)


def resolve(name: str) -> Any:
    """Object of a dotted name.

    Raises:
        AttributeError: there is none.

    """
    module, *rest = name.split(".")
    value: Any = importlib.import_module(module)
    for part in rest:
        try:
            value = getattr(value, part)
        except AttributeError:
            value = importlib.import_module(f"{value.__name__}.{part}")
    return value


@lru_cache
def commands() -> dict[str, Any]:
    """The commands of the command line, by name."""
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@lru_cache
def cli_options() -> frozenset[str]:
    """Every option of every command."""
    own = {word for command in commands().values() for parameter in command.params for word in parameter.opts}
    return frozenset(own | root_options())


@lru_cache
def root_options() -> frozenset[str]:
    """Options of ``dsattn`` itself."""
    return frozenset(word for parameter in typer.main.get_command(app).params for word in parameter.opts) | {"--help"}


@lru_cache
def _script(path: Path) -> Any:
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module = importlib.import_module(path.stem)
    script = getattr(module, "app", None)
    if script is None:
        script = typer.Typer(add_completion=False)
        script.command()(module.main)
    return typer.main.get_command(script)


@lru_cache
def script_options(path: Path) -> frozenset[str]:
    """Every option of a script."""
    command = _script(path)
    parts = [command, *getattr(command, "commands", {}).values()]
    return frozenset(word for part in parts for parameter in part.params for word in parameter.opts)


def _parse_script(path: Path, words: list[str]) -> None:
    command = _script(path)
    name = path.name
    if hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    with command.make_context(name, list(words)):
        pass


def _attempt(what: str, action: Any) -> Iterator[str]:
    try:
        action()
    except Exception as error:  # noqa: BLE001 - whatever the parser or the library has to say is the finding
        describe = getattr(error, "format_message", None)
        yield f"{what}: {' '.join((describe() if callable(describe) else str(error) or repr(error)).split())}"


def external_resources(site: Path) -> list[str]:
    """Places in a built site that load something from elsewhere."""
    found = []
    for file in sorted(site.rglob("*")):
        if file.suffix in (".html", ".css"):
            for match in EXTERNAL.finditer(file.read_text(encoding="utf-8")):
                found.append(f"{file.relative_to(site)}: {match[0][:120]}")
    return found


def main() -> None:
    """Print what is wrong with the pages and exit with 1 if anything is."""
    found = problems()
    for line in found:
        print(line)
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
