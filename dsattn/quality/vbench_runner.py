"""Run one dimension with the official ``vbench`` package: executed by that package's interpreter, not by ours.

Uses the package's Python interface, as its command line insists on CUDA and looks for videos by itself.
Imports nothing of dsattn.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import types
from pathlib import Path
from typing import Any


class _Absent(types.ModuleType):
    """Has every name, and refuses to do anything."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **options: Any) -> Any:
        raise RuntimeError(f"{self.__name__} was called, but torchvision is not here")


def main(dimension: str, info: str, device: str, out: str, stand_in: str) -> None:
    """Write ``run_eval_results.json`` and ``facts.json`` into ``out``."""
    if stand_in == "1":
        for name in ("torchvision", "torchvision.transforms"):
            sys.modules[name] = _Absent(name)
    import torch
    from vbench import VBench  # type: ignore[import-not-found]

    class Given(VBench):  # type: ignore[misc]
        """Evaluates the videos it is given; looking for them would stop at the first file that is none."""

        def build_full_info_json(self, *args: Any, **options: Any) -> str:
            return info

    Given(torch.device(device), info, out).evaluate(videos_path="", name="run", dimension_list=[dimension])
    facts = {name: importlib.metadata.version(name) for name in ("vbench", "torch", "numpy")}
    facts["torchvision"] = "stand-in" if stand_in == "1" else importlib.metadata.version("torchvision")
    facts["python"] = sys.version.split()[0]
    (Path(out) / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
