"""Run the Python blocks of a Markdown file, in order, in one namespace: documents must not lie.

A block that follows a line ``<!-- not run: reason -->`` is left out, and its reason printed.
"""

import re
import sys
from pathlib import Path

import typer

BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.*?) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)


def main(path: Path) -> None:
    """Run PATH's Python blocks."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    ran = 0
    for match in BLOCK.finditer(path.read_text(encoding="utf-8")):
        if match["reason"]:
            print(f"not run: {match['reason']}")
            continue
        exec(compile(match["code"], f"{path}, block {ran + 1}", "exec"), namespace)
        ran += 1
    print(f"{ran} blocks ran")
    sys.exit(0 if ran else 1)


if __name__ == "__main__":
    typer.run(main)
