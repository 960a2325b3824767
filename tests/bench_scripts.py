"""The benchmark scripts as modules, and as programs."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"


def module(name: str):
    """A script imported as the other scripts import it, from its own folder."""
    if str(SCRIPTS) not in sys.path:
        sys.path.append(str(SCRIPTS))
    return importlib.import_module(name)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in the repository's root; without Triton's interpreter, as a user would."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env = kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
