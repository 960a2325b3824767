"""Run the code of Markdown files: documents must not lie.

Python blocks of a file run in order, in one namespace. A block that follows a line ``<!-- not run: reason -->`` is left
out, and its reason printed. Blocks of ``dsattn`` commands and the project's scripts (```` ```bash ````) run where a
line ``<!-- run -->`` stands before them. Every file has an empty folder of its own to work in.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import typer

SCRIPTS = Path(__file__).resolve().parent
BLOCK = re.compile(
    r"^(?:<!-- (?:not run: (?P<reason>.*?)|(?P<run>run)) -->\n)?```(?P<language>python|bash)\n(?P<code>.*?)^```",
    re.DOTALL | re.MULTILINE,
)


def main(paths: list[Path]) -> None:
    """Run the code of PATHS; exits with 1 if a block fails, or if none ran."""
    ran = 0
    home = Path.cwd()
    for path in (path.resolve() for path in paths):
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                here = run_file(path)
            finally:
                os.chdir(home)
        if here:
            print(f"{path.name}: {here} blocks ran, {time.perf_counter() - began:.0f} s", flush=True)
        ran += here
    print(f"{ran} blocks ran")
    sys.exit(0 if ran else 1)


def run_file(path: Path) -> int:
    """Run one file's blocks in the current folder; how many there were."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    ran = 0
    for match in BLOCK.finditer(path.read_text(encoding="utf-8")):
        if match["reason"]:
            print(f"{path.name}: not run: {match['reason']}")
        elif match["language"] == "python":
            exec(compile(match["code"], f"{path}, block {ran + 1}", "exec"), namespace)
            ran += 1
        elif match["run"]:
            for line in match["code"].replace("\\\n", " ").splitlines():
                run_command(shlex.split(line, comments=True), f"{path}: {line}")
            ran += 1
    return ran


def run_command(words: list[str], where: str) -> None:
    """Run a ``dsattn`` command in this process, or one of the project's scripts."""
    from dsattn.cli.app import run

    if not words:
        return
    if words[0] == "python" and words[1].startswith("scripts/"):
        code = subprocess.run([sys.executable, str(SCRIPTS / Path(words[1]).name), *words[2:]], check=False).returncode
    elif words[0] == "dsattn":
        code = run(words[1:])
    else:
        sys.exit(f"{where}: only dsattn commands and scripts can be run here")
    if code:
        sys.exit(f"{where}: exit code {code}")


if __name__ == "__main__":
    typer.run(main)
