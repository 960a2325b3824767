"""Pictures of an attention study, as PNG files: everything drawn comes with its JSON."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from attention_figures import Study, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with every kind of colour vision.
KIND_COLOURS = {"spatial": "#0072B2", "temporal": "#D55E00", "unclear": "#888888"}
# Panel title, figure, and whether the scale is about zero.
MAPS = (
    ("keys that hold 90 % of the mass", "keys_for@0.9"),
    ("mass in the query's own frame", "own_frame"),
    ("mass at the same place in other frames", "same_place"),
    ("mass in a local box around the query", "window"),
    ("spatial band less temporal band", "band"),
    ("mass on 1 % of keys that most queries share", "common"),
)
# More cells than this in a panel carry no figures.
WRITTEN = 130


def draw_maps(result: dict[str, Any], path: Path) -> None:
    """Layer (down) by head and step (across), a panel per figure."""
    study = Study(result)
    layers, steps = study.distinct("layer"), study.distinct("step")
    heads = len({head["head"] for head in study.heads})
    columns = heads * len(steps)
    width, height = max(4.2, 0.36 * columns + 1.6), max(2.0, 0.36 * len(layers) + 1.3)
    figure = _figure(3 * width, 2 * height)
    for axis, (title, name) in zip(figure.subplots(2, 3).flat, MAPS, strict=True):
        values = np.array([[_value(study, name, i, h, s) for h in range(heads) for s in steps] for i in layers])
        signed = name == "band"
        bound = float(np.nanmax(np.abs(values))) or 1.0
        scale = {"cmap": "RdBu", "vmin": -bound, "vmax": bound} if signed else {"cmap": "viridis", "vmin": 0}
        image = axis.imshow(100 * values, aspect="auto", **{k: v * 100 if k != "cmap" else v for k, v in scale.items()})
        figure.colorbar(image, ax=axis, pad=0.01, format="%g %%")
        axis.set_title(title, fontsize=10)
        axis.set_yticks(range(len(layers)), [f"layer {i}" for i in layers])
        axis.set_xticks(range(columns), [str(step) for _ in range(heads) for step in steps], fontsize=7)
        for head in range(heads):
            middle = ((head + 0.5) / heads, 0)
            style = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center", "va": "top"}
            axis.annotate(f"head {head}", middle, (0, -14), **style)
            if head:
                axis.axvline(head * len(steps) - 0.5, color="white", lw=2)
        axis.tick_params(length=0)
        if values.size <= WRITTEN:
            _write(axis, 100 * values, image)
    figure.suptitle(
        f"Attention of {study.model}, {result['tokens']:,} tokens, steps {', '.join(map(str, steps))} of "
        f"{result['steps'][0]}: mean over prompts and seeds"
    )
    figure.savefig(path, dpi=110)


def _value(study: Study, name: str, layer: int, head: int, step: int) -> float:
    if name == "band":
        return _value(study, "spatial", layer, head, step) - _value(study, "temporal", layer, head, step)
    return study.mean(name, layer=layer, head=head, step=step)


def _write(axis: Axes, values: Any, image: Any) -> None:
    """Figures in the cells, in black or white, whichever stands out."""
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
            axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7, color=ink)


def draw_curves(result: dict[str, Any], path: Path) -> None:
    """Mass over density, and weight per key over distance in time and in the picture; a thin line per head."""
    study = Study(result)
    figure = _figure(15, 4.6)
    mass, frames, away = figure.subplots(1, 3)
    _mass_curves(mass, study)
    _decay_curves(frames, study, "frames", "frames between query and key")
    _decay_curves(away, study, "away", "rows or columns between query and key, from")
    frames.legend(*_kinds(study), fontsize=8)
    figure.suptitle(
        f"Attention of {study.model}, {result['tokens']:,} tokens: every head of every layer, "
        "mean over prompts, seeds and steps"
    )
    figure.savefig(path, dpi=110)


def _mass_curves(axis: Axes, study: Study) -> None:
    points = [float(name.partition("@")[2]) for name in study.names("keys")]
    x = [100 * point for point in (*points, 1.0)]
    for head in study.heads:
        y = [100 * study.mean(name, **head) for name in study.names("keys")]
        axis.plot(x, [*y, 100], color=KIND_COLOURS[study.kind(**head)], lw=0.8, alpha=0.6)
    for kind, label, style in (
        ("keys", "single keys", "-"),
        ("tile", "tiles of 8 × 8", "--"),
        ("raster", "runs of 64", ":"),
    ):
        names = study.names(kind)
        if names:
            y = [100 * statistics.median(study.by_head(name)) for name in names]
            axis.plot(x, [*y, 100], color="black", lw=2, ls=style, label=f"{label}, median head")
    axis.plot(x, x, color="#999999", lw=1, label="even weights")
    axis.set(xscale="log", xlabel="share of keys read, best first, %", ylabel="mass kept, %", ylim=(0, 104))
    axis.set_xticks(x, [f"{value:g}" for value in x])
    axis.set_xticks([], minor=True)
    axis.set_title("Mass kept over density", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right", framealpha=0.6)


def _decay_curves(axis: Axes, study: Study, prefix: str, label: str) -> None:
    names = [name for name in study.names(prefix) if study.values(name)]
    ticks = [name.partition("@")[2] for name in names]
    for head in study.heads:
        y = [study.mean(name, **head) for name in names]
        axis.plot(range(len(names)), y, color=KIND_COLOURS[study.kind(**head)], lw=0.8, alpha=0.6)
    middle = [statistics.median(study.by_head(name)) for name in names]
    axis.plot(range(len(names)), middle, color="black", lw=2)
    axis.axhline(1, color="#999999", lw=1)
    axis.set(yscale="log", xlabel=label, ylabel="weight per key, 1 = even")
    axis.set_xticks(range(len(names)), ticks)
    axis.set_title(f"Weight per key over {'time' if prefix == 'frames' else 'the picture'}", fontsize=10)
    axis.grid(alpha=0.3, which="both")


def _kinds(study: Study) -> tuple[list[Any], list[str]]:
    """Handles and labels of the kinds that heads are of."""
    from matplotlib.lines import Line2D

    kinds = [study.kind(**head) for head in study.heads]
    there = [kind for kind in KIND_COLOURS if kind in kinds]
    lines = [Line2D([], [], color=KIND_COLOURS[kind]) for kind in there]
    labels = [f"{kind} heads ({percent(kinds.count(kind) / len(kinds))})" for kind in there]
    return [*lines, Line2D([], [], color="black", lw=2)], [*labels, "median head"]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
