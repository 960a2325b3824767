"""What a profiled run shows: per layer and head the choice, per step density and error, per plan a thumbnail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import nan, sqrt
from typing import Any

from numpy.typing import NDArray

from dsattn.engine import Engine
from dsattn.grid import VideoGrid
from dsattn.head_profile import HeadProfile, LayerProfile
from dsattn.stats import Record
from dsattn.thumbnails import thumbnail

DENSE = "dense"


@dataclass(frozen=True)
class Panel:
    """The layers of one (model, branch, batch row).

    name: branch, and what else it takes to tell panels apart.
    grid: token grid of its calls.
    layers: by index; None where a layer stayed dense and was not measured.
    maps: thumbnails ``[H, n, m]`` of the last plans, by layer.
    """

    name: str
    model: str
    branch: str
    row: int
    grid: VideoGrid
    layers: dict[int, LayerProfile | None]
    maps: dict[int, NDArray[Any]]

    @property
    def heads(self) -> int:
        """Heads of a layer."""
        return next(layer.weight.shape[1] for layer in self.layers.values() if layer is not None)


@dataclass(frozen=True)
class Timeline:
    """Density and estimated error of the run, mean and root mean square over heads and branches.

    steps: indices of the denoising steps.
    dense: those in which no call was sparse.
    density, error: by layer, one value a step; NaN where nothing is known.
    target: the error that was aimed at, None where cost was the budget.
    """

    steps: list[int]
    dense: list[int]
    density: dict[int, list[float]]
    error: dict[int, list[float]]
    target: float | None


@dataclass(frozen=True)
class ProfileReport:
    """All that pictures and tables of a profile show."""

    panels: list[Panel]
    timeline: Timeline

    @property
    def candidates(self) -> list[str]:
        """Names of all candidates, in the order they were tried."""
        layers = (layer for panel in self.panels for layer in panel.layers.values() if layer is not None)
        return list(dict.fromkeys(name for layer in layers for name in layer.candidates))


def chosen_names(layer: LayerProfile | None, row: int, heads: int) -> list[str]:
    """Method of every head; ``DENSE`` where it reads everything, which is no method's merit."""
    if layer is None:
        return [DENSE] * heads
    which, density = (x[row].tolist() for x in layer.chosen())
    return [DENSE if d == 1 else layer.candidates[i] for i, d in zip(which, density, strict=True)]


def profile_report(profile: HeadProfile, engine: Engine) -> ProfileReport:
    """Gather what the current run of an engine shows, while its plans are still there.

    Args:
        profile: of the same run, see ``Handle.head_profile``.

    """
    records = engine.stats.records
    models = {model for model, _, _ in profile.layers}
    panels = []
    for model, branch in dict.fromkeys((model, branch) for model, branch, _ in profile.layers):
        seen = {r.layer for r in records if (r.model, r.branch) == (model, branch)}
        layers = {i: profile.layers.get((model, branch, i)) for i in sorted(seen)}
        maps = {}
        grid = next(e.layout.grid for (m, _, b), e in engine.state.entries.items() if (m, b) == (model, branch))
        for i in layers:
            entry = engine.state.entries.get((model, i, branch))
            if entry is not None and entry.plan is not None:
                maps[i] = thumbnail(entry.plan).numpy()
        rows = next(layer.weight.shape[0] for layer in layers.values() if layer is not None)
        for row in range(rows):
            name = f"{model} {branch}" if len(models) > 1 else branch
            own = {i: m[row] for i, m in maps.items()}
            panels.append(Panel(name if rows == 1 else f"{name} row {row}", model, branch, row, grid, layers, own))
    return ProfileReport(panels, _timeline(records, engine.method_config.target_error))


def _timeline(records: Sequence[Record], target: float | None) -> Timeline:
    known = [r for r in records if r.layer >= 0]
    steps, layers = sorted({r.step for r in known}), sorted({r.layer for r in known})
    cells: dict[tuple[int, int], list[Record]] = {}
    for record in known:
        cells.setdefault((record.layer, record.step), []).append(record)

    def density(found: Iterable[Record]) -> float:
        return _mean([1.0 if r.density is None else float(r.density.mean()) for r in found])

    def error(found: Iterable[Record]) -> float:
        return sqrt(_mean([float(r.error.square().mean()) for r in found if r.error is not None]))

    return Timeline(
        steps,
        [step for step in steps if all(r.density is None for r in known if r.step == step)],
        {i: [density(cells.get((i, step), ())) for step in steps] for i in layers},
        {i: [error(cells.get((i, step), ())) for step in steps] for i in layers},
        target,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else nan


def layer_rows(report: ProfileReport) -> list[dict[str, Any]]:
    """One plain dictionary per panel and layer: methods chosen (heads of each), mean density, estimated error."""
    rows: list[dict[str, Any]] = []
    for panel in report.panels:
        for index, layer in panel.layers.items():
            where = {"model": panel.model, "branch": panel.branch, "row": panel.row, "layer": index}
            methods = dict(Counter(chosen_names(layer, panel.row, panel.heads)).most_common())
            density, error = 1.0, 0.0
            if layer is not None:
                density = float(layer.at_choice("density")[panel.row].mean())
                squares = layer.at_choice("error")[panel.row].square() * layer.weight[panel.row]
                error = sqrt(float(squares.sum()))
            rows.append({**where, "methods": methods, "density": density, "error": error})
    return rows
