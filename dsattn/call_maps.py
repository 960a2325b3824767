"""What every attention call of a run did, over layer, step and head, as plain values and one picture of masks."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsattn.engine import Engine
from dsattn.profile_report import DENSE, chosen_names
from dsattn.stats import Record
from dsattn.thumbnails import BINS, thumbnail
from dsattn.video import atomic

KINDS = {"dense": "D", "refresh": "R", "reuse": "U", "fallback": "F"}
NO_CALL = "."
# All thumbnails together, in pixels: what a report can carry with it.
PIXELS = 1_500_000
FEWEST_BINS = 12


@dataclass(frozen=True)
class CallMaps:
    """Calls of one run.

    panels: one plain dictionary per (model, guidance branch), see :func:`call_maps`.
    bins: side of a thumbnail.
    masks: ``[rows, columns]`` uint8, thumbnails of the last plans: a row of them per panel and layer, a column per
        head, 255 where all keys are read.
    """

    panels: list[dict[str, Any]]
    bins: int
    masks: NDArray[np.uint8]

    def describe(self, file: str) -> dict[str, Any]:
        """For a report, with the masks in ``file``."""
        return {"panels": self.panels, "thumbnails": {"file": file, "bins": self.bins}}

    def write_masks(self, path: Path) -> None:
        """Write the masks as a PNG, atomically."""
        from PIL import Image

        content = io.BytesIO()
        Image.fromarray(self.masks).save(content, format="png", optimize=True)
        with atomic(path) as part:
            part.write_bytes(content.getvalue())


def call_maps(engine: Engine) -> CallMaps | None:
    """Gather what the current run of an engine did, while its plans are still there; None without any call.

    A panel has ``model``, ``branch``, ``heads``, ``layers``, ``steps`` and, in these orders:

    - ``kinds``: a text per layer with a letter per step, see ``KINDS``;
    - ``density``, ``error``: ``[layer][step]`` a number per head, or None where the call was not sparse (a dense call
      has density 1) or no error was estimated;
    - ``layer_error``: ``[layer][step]`` the error of all heads together;
    - ``methods``: ``[layer]`` a name per head, of the last plan.
    """
    records = [record for record in engine.stats.records if record.layer >= 0]
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.model, record.branch), []).append(record)
    if not groups:
        return None
    panels = [_panel(engine, *key, own) for key, own in groups.items()]
    count = sum(len(panel["layers"]) * panel["heads"] for panel in panels)
    bins = max(FEWEST_BINS, min(BINS, isqrt(PIXELS // max(1, count))))
    rows = [row for panel in panels for row in _mask_rows(engine, panel, bins)]
    width = max(row.shape[1] for row in rows)
    masks = np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]))) for row in rows])
    return CallMaps(panels, bins, masks)


def _panel(engine: Engine, model: str, branch: str, records: Sequence[Record]) -> dict[str, Any]:
    cells = {(record.layer, record.step): record for record in records}
    layers, steps = sorted({record.layer for record in records}), sorted({record.step for record in records})
    heads = max((len(r.density) for r in records if r.density is not None), default=0) or _heads(engine, model, branch)

    def table(value: Any) -> list[list[Any]]:
        return [[value(cells.get((layer, step))) for step in steps] for layer in layers]

    return {
        "model": model,
        "branch": branch,
        "heads": heads,
        "layers": layers,
        "steps": steps,
        "kinds": ["".join(row) for row in table(lambda r: NO_CALL if r is None else KINDS[r.kind])],
        "density": table(lambda r: None if r is None or r.density is None else _short(r.density.tolist())),
        "error": table(lambda r: None if r is None or r.error is None else _short(r.error.tolist())),
        "layer_error": table(
            lambda r: None if r is None or r.layer_error is None else _short([float(r.layer_error)])[0]
        ),
        "methods": [_methods(engine, model, branch, layer, heads) for layer in layers],
    }


def _short(values: Sequence[float]) -> list[float | None]:
    """Four digits are more than an estimate has; what is no finite number has no place in JSON."""
    return [float(f"{value:.4g}") if abs(value) < float("inf") else None for value in values]


def _heads(engine: Engine, model: str, branch: str) -> int:
    found = (e.layout.heads for (m, _, b), e in engine.state.entries.items() if (m, b) == (model, branch))
    return next(found, 1)


def _methods(engine: Engine, model: str, branch: str, layer: int, heads: int) -> list[str]:
    """Method of every head in the last plan; several rows of a batch that differ are named together."""
    entry = engine.state.entries.get((model, layer, branch))
    if entry is None or entry.plan is None:
        return [DENSE] * heads
    profile = entry.memory.shared.get("auto", {}).get(layer)
    if profile is None or not len(profile.choice):
        return [engine.method.name] * heads
    rows = [chosen_names(profile, row, heads) for row in range(profile.weight.shape[0])]
    return [" / ".join(dict.fromkeys(names)) for names in zip(*rows, strict=True)]


def _mask_rows(engine: Engine, panel: dict[str, Any], bins: int) -> list[NDArray[np.uint8]]:
    """``[bins, heads * bins]`` per layer; white where a layer has no plan, as dense attention reads all keys."""
    rows = []
    for layer in panel["layers"]:
        entry = engine.state.entries.get((panel["model"], layer, panel["branch"]))
        row = np.full((bins, panel["heads"] * bins), 255, np.uint8)
        if entry is not None and entry.plan is not None:
            shares = thumbnail(entry.plan, bins).mean(0)
            # A plan may hold for all heads alike; a sequence shorter than the bins is enlarged.
            values = shares.expand(panel["heads"], -1, -1).numpy()
            index = [np.arange(bins) * n // bins for n in values.shape[1:]]
            full = values[:, index[0]][:, :, index[1]]
            row = np.rint(255 * full).astype(np.uint8).transpose(1, 0, 2).reshape(bins, -1)
        rows.append(row)
    return rows
