"""Sums up a run of gpu_check.sh: check.json and summary.md from what its parts left; exit status 1 if one failed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from bench_timing import table, write_json

# Exit statuses that say more than a number; pytest ends with 5 where nothing was collected.
ENDINGS = {0: "ok", 5: "nothing to run", 124: "cut short", 127: "not installed", 130: "cut short", 137: "killed"}


def read_parts(path: Path, log: str) -> list[dict[str, Any]]:
    """One per part: name, status (see ``ENDINGS``, or "failed"), seconds, and what pytest counted."""
    counts = re.findall(r"^(?:=+ )?(\d+ (?:passed|failed|skipped|deselected|error).*) in [\d.]+s", log, re.MULTILINE)
    parts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        name, code, seconds = line.split("\t")
        ending = ENDINGS.get(int(code), "failed")
        part: dict[str, Any] = {"part": name, "status": ending, "code": int(code), "seconds": int(seconds)}
        if name.endswith("tests") and counts:
            part["result"] = counts.pop(0)
        parts.append(part)
    return parts


def wrong_results(folder: Path) -> list[str]:
    """Benchmarked results that did not pass their check."""
    found = []
    for name in ("kernels.json", "pipeline.json"):
        file = folder / name
        report = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": []}
        for row in report["rows"]:
            methods = row.get("methods", {}).items()
            for what, result in [(row.get("name"), row), *((f"{row.get('model')} {key}", r) for key, r in methods)]:
                if result.get("status") in ("wrong", "failed"):
                    where = f"{row['shape']} " if "shape" in row else ""
                    found.append(f"{where}{what}: {result['status']}: {result['reason']}")
    return found


def main(
    parts: Annotated[Path, typer.Option(help="Lines of name, exit status and seconds, separated by tabs.")],
    tests: Annotated[Path, typer.Option(help="What pytest printed.")],
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    tables: Annotated[list[Path], typer.Option(help="Tables to put into the summary; missing ones are left out.")],
) -> None:
    """Write check.json and summary.md."""
    found = read_parts(parts, tests.read_text(encoding="utf-8", errors="replace"))
    wrong = wrong_results(out)
    ok = not wrong and all(part["status"] in ("ok", "nothing to run") for part in found)
    write_json(out / "check.json", {"ok": ok, "parts": found, "wrong": wrong})
    cells = [(p["part"], p["status"], str(p["seconds"]), p.get("result", "–")) for p in found]
    text = ["# Check\n", table(("part", "status", "seconds", "tests"), cells)]
    text += [*(f"- {line}" for line in wrong), ""] if wrong else []
    text += [path.read_text(encoding="utf-8") for path in tables if path.exists()]
    (out / "summary.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))
    raise typer.Exit(0 if ok else 1)


if __name__ == "__main__":
    typer.run(main)
