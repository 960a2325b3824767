"""One page from a report, with everything it shows inside."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dsattn.html.compare_view import compare_view
from dsattn.html.profile_view import profile_view
from dsattn.html.quality_view import quality_view
from dsattn.report_file import kind
from dsattn.video import atomic

_MIME = {".mp4": "video/mp4", ".png": "image/png"}
# What a page carries at most of each file; larger ones are named instead.
LARGEST = 64 * 2**20
VIEWS = {"compare": compare_view, "profile": profile_view, "quality": quality_view}


def write_page(path: Path, report: dict[str, Any], folder: Path) -> None:
    """Write the page of a report atomically.

    Args:
        report: valid against its schema, see ``dsattn.report_file``.
        folder: where the files it names are; those that are missing are left out, and the page says so.

    Raises:
        OSError: it cannot be written.

    """
    text = render(report, folder)
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def render(report: dict[str, Any], folder: Path) -> str:
    """The page as text. Every value of the report is escaped."""
    from jinja2 import Environment, StrictUndefined

    here = Path(__file__).parent
    style, script = (here.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    template = here.joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)

    def embed(name: str | None) -> str | None:
        return None if name is None else data_uri(folder, name)

    page, data = VIEWS[kind(report)](report, embed)
    # Scripts run by their hash alone, so that no text of a report can become one.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.from_string(template).render(
        page=page,
        style=Markup(style),
        script=Markup(script),
        script_hash=Markup("sha256-{}").format(digest),
        data=script_json(data),
    )


def data_uri(folder: Path, name: str) -> str | None:
    """A file that a report names, as a data URI; None if it is missing, too large, or not in the report's folder."""
    try:
        file = (folder / name).resolve()
        # A report may come from somebody else: it must not make the page carry other files of this machine.
        if not file.is_relative_to(folder.resolve()) or file.suffix not in _MIME:
            return None
        if not file.is_file() or file.stat().st_size > LARGEST:
            return None
        content = file.read_bytes()
    except (OSError, ValueError):  # a name with a zero byte is no OSError
        return None
    return f"data:{_MIME[file.suffix]};base64,{base64.b64encode(content).decode()}"


def script_json(value: Any) -> Markup:
    """JSON that may stand inside a script element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
