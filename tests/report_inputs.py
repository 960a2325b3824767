"""Reports of any size without a model, and files to go with them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np

from dsattn.call_maps import CallMaps
from dsattn.video import write_mp4

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = sorted((ROOT / "tests" / "data").glob("compare_*.json"))


def old_report() -> dict[str, Any]:
    """A committed one of the first version: no maps, timeline and inputs."""
    return json.loads(COMMITTED[0].read_text(encoding="utf-8"))


def maps(layers: int = 2, heads: int = 3, steps: int = 4, bins: int = 12) -> CallMaps:
    """Step 0 dense, then refresh and reuse in turns; layer 0 falls back in the last step."""
    rng = np.random.default_rng(0)
    kinds = ["D" + "RU" * steps for _ in range(layers)]
    kinds = [row[:steps] for row in kinds]
    kinds[0] = kinds[0][:-1] + "F"
    sparse = [[kind in "RU" for kind in row] for row in kinds]

    def values(there: bool) -> Any:
        return [round(float(x), 4) for x in rng.uniform(0.02, 0.9, heads)] if there else None

    panels = []
    for branch in ("cond", "uncond"):
        panels.append(
            {
                "model": "transformer",
                "branch": branch,
                "heads": heads,
                "layers": list(range(layers)),
                "steps": list(range(steps)),
                "kinds": kinds,
                "density": [[values(there) for there in row] for row in sparse],
                "error": [[values(there and s % 2 == 0) for s, there in enumerate(row)] for row in sparse],
                "layer_error": [
                    [0.1 if there and s % 2 == 0 else None for s, there in enumerate(row)] for row in sparse
                ],
                "methods": [["semantic", "topk", "dense"][:heads] + ["topk"] * (heads - 3) for _ in range(layers)],
            }
        )
    masks = rng.integers(0, 256, (2 * layers * bins, heads * bins), dtype=np.uint8)
    return CallMaps(panels, bins, masks)


def new_report(**sizes: int) -> dict[str, Any]:
    """The same of the second version."""
    report = copy.deepcopy(old_report())
    shape = report["shape"]
    found = maps(**sizes)
    steps = len(found.panels[0]["steps"])
    shape.update(frames=5, height=64, width=64, steps=steps)
    report["schema"] = "dsattn.report/2"
    report["inputs"] = {
        **{name: report[name] for name in ("prompt", "negative_prompt", "seed")},
        **{name: shape[name] for name in ("height", "width", "frames", "steps", "guidance")},
        **{"scheduler": "FlowMatch", "schedule": "ab", "dtype": "float32"},
        **{"prompt_embeddings": "cd", "initial_latents": None},
    }
    times = [0.1 * (i + 1) for i in range(steps)]
    report["timeline"] = {"dense_step_s": times, "sparse_step_s": times[::-1], "refresh_reasons": {"no plan yet": 4}}
    report["maps"] = found.describe("masks.png")
    report["files"] = {"report": "report.json", "dense": "dense.mp4", "sparse": "sparse.mp4", "masks": "masks.png"}
    for name in ("psnr", "ssim"):
        report["fidelity"][name]["per_frame"] = report["fidelity"][name]["per_frame"][:5]
    report["fidelity"]["psnr"]["per_frame"][2] = None
    return report


def write_files(folder: Path, **sizes: int) -> None:
    """Videos and masks of :func:`new_report`; the sparse video is brighter from frame to frame."""
    rng = np.random.default_rng(1)
    frames = rng.integers(0, 200, (1, 64, 64, 3), dtype=np.uint8).repeat(5, 0)
    brighter = (frames + np.arange(5, dtype=np.uint8)[:, None, None, None] * 8).astype(np.uint8)
    write_mp4(folder / "dense.mp4", frames, 16)
    write_mp4(folder / "sparse.mp4", brighter, 16)
    maps(**sizes).write_masks(folder / "masks.png")
