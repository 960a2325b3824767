"""Reading reports from disk. They may come from anywhere: they are checked before anything is made of them."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from dsattn.errors import UsageError

# Name of a report's schema, and the file beside this one that describes it.
SCHEMAS = {
    "dsattn.report/1": "report.schema.json",
    "dsattn.report/2": "report.schema.json",
    "dsattn.profile-report/1": "profile_report.schema.json",
    "dsattn.profile-report/2": "profile_report.schema.json",
    "dsattn.quality/1": "quality.schema.json",
}


def read_report(path: Path) -> dict[str, Any]:
    """A report of ``dsattn compare``, ``dsattn profile`` or a scored suite, valid against its schema.

    Raises:
        UsageError: the file cannot be read, is no JSON, or is no report of a known version.

    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"report {path} cannot be read: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(
            f"report {path} is no JSON file ({error}); expected report.json of 'dsattn compare'"
        ) from error
    name = value.get("schema") if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in SCHEMAS:
        raise UsageError(
            f"{path} is no report: its schema is {str(name)[:80]!r}, expected one of {', '.join(SCHEMAS)}; "
            "'dsattn compare' and 'dsattn profile' write a report.json, scripts/vbench_eval.py a quality.json"
        )
    if problem := why_invalid(value, SCHEMAS[name]) or _strange_arm(value):
        raise UsageError(f"report {path} is damaged: {problem}; run the command in it again")
    checked: dict[str, Any] = value
    return checked


def kind(report: dict[str, Any]) -> str:
    """``compare``, ``profile`` or ``quality``: what a report is of."""
    name = str(report["schema"]).partition("/")[0]
    return {"dsattn.profile-report": "profile", "dsattn.quality": "quality"}.get(name, "compare")


def why_invalid(value: Any, schema: str) -> str | None:
    """What is wrong with a value, None if it is as its schema says."""
    from jsonschema.exceptions import best_match

    error = best_match(_validator(schema).iter_errors(value))
    if error is None:
        return None
    where = "/".join(map(str, error.absolute_path)) or "the whole"
    return f"{where}: {error.message[:200]}"


def _strange_arm(report: dict[str, Any]) -> str | None:
    """A name in a suite's report that none of its arms has; a schema cannot say it."""
    if kind(report) != "quality":
        return None
    names = [report["reference"], *(video["arm"] for video in report["videos"])]
    strange = next((name for name in names if name not in report["arms"]), None)
    return None if strange is None else f"it has no arm {strange[:80]!r}"


@lru_cache
def _validator(schema: str) -> Any:
    from jsonschema import Draft202012Validator

    text = Path(__file__).with_name(schema).read_text(encoding="utf-8")
    return Draft202012Validator(json.loads(text))
