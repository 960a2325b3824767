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
}


def read_report(path: Path) -> dict[str, Any]:
    """A report of ``dsattn compare`` or ``dsattn profile``, valid against its schema.

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
            "'dsattn compare' and 'dsattn profile' write a report.json"
        )
    if problem := why_invalid(value, SCHEMAS[name]):
        raise UsageError(f"report {path} is damaged: {problem}; run the command in it again")
    checked: dict[str, Any] = value
    return checked


def is_profile(report: dict[str, Any]) -> bool:
    """Whether a report is one of ``dsattn profile``."""
    return str(report["schema"]).startswith("dsattn.profile-report/")


def why_invalid(value: Any, schema: str) -> str | None:
    """What is wrong with a value, None if it is as its schema says."""
    from jsonschema.exceptions import best_match

    error = best_match(_validator(schema).iter_errors(value))
    if error is None:
        return None
    where = "/".join(map(str, error.absolute_path)) or "the whole"
    return f"{where}: {error.message[:200]}"


@lru_cache
def _validator(schema: str) -> Any:
    from jsonschema import Draft202012Validator

    text = Path(__file__).with_name(schema).read_text(encoding="utf-8")
    return Draft202012Validator(json.loads(text))
