"""Pictures of a head profile, as PNG files. Drawing only: everything shown comes with a ``ProfileReport``."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsattn.grid import VideoGrid
from dsattn.head_profile import LayerProfile
from dsattn.profile_report import DENSE, Panel, ProfileReport, Timeline, chosen_names
from dsattn.video import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with every kind of colour vision.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_DENSE = "#BBBBBB"
_DPI = 110
# More layers or heads than this are drawn as median and range, or in smaller cells.
_MANY = 8
# Inches that a title and a legend need.
_NARROW = 6.0


def picture_names(report: ProfileReport) -> list[str]:
    """Files that :func:`draw_all` writes."""
    return [f"{name}.png" for name in _pictures(report)]


def draw_all(report: ProfileReport, folder: Path) -> None:
    """Write every picture into ``folder``.

    Raises:
        OSError: one cannot be written.

    """
    for name, draw in _pictures(report).items():
        content = io.BytesIO()
        draw().savefig(content, format="png", dpi=_DPI)
        with atomic(folder / f"{name}.png") as part:
            part.write_bytes(content.getvalue())


def _pictures(report: ProfileReport) -> dict[str, Callable[[], Figure]]:
    pictures: dict[str, Callable[[], Figure]] = {
        "heads": partial(draw_heads, report),
        "steps": partial(draw_steps, report.timeline),
    }
    for panel in report.panels:
        suffix = f"_{_slug(panel.name)}" if len(report.panels) > 1 else ""
        pictures[f"masks{suffix}"] = partial(draw_masks, report, panel)
        pictures[f"recall{suffix}"] = partial(draw_recall, report, panel)
    return pictures


def draw_heads(report: ProfileReport) -> Figure:
    """Layer by head: the chosen method as colour, its executed density in per cent as text; one map per panel."""
    panels = report.panels
    heads, layers = max(p.heads for p in panels), max(len(p.layers) for p in panels)
    beside = heads <= 2 * _MANY
    cell = 0.5 if heads <= 2 * _MANY else 0.4
    size = max(3.6, heads * cell + 1), max(1.0, layers * min(cell, 0.42)) + 0.9
    columns, rows = (len(panels), 1) if beside else (1, len(panels))
    figure, axes = _figure(size[0] * columns, size[1] * rows, rows, columns, foot=0.9)
    colours = _palette(report)
    for axis, panel in zip(axes, panels, strict=True):
        _head_map(axis, panel, colours, 9 if heads <= 2 * _MANY else 7.5)
        axis.set_title(panel.name)
    _legend(figure, colours)
    _title(figure, "Method of every head, and its density in % (keys read exactly)")
    return figure


def _head_map(axis: Axes, panel: Panel, colours: dict[str, str], font: float) -> None:
    from matplotlib.colors import to_rgb

    image = np.zeros((len(panel.layers), panel.heads, 3))
    for y, layer in enumerate(panel.layers.values()):
        density = [1.0] * panel.heads if layer is None else layer.at_choice("density")[panel.row].tolist()
        for x, name in enumerate(chosen_names(layer, panel.row, panel.heads)):
            image[y, x] = to_rgb(colours[name])
            text = f"{100 * density[x]:.0f}" if density[x] >= 0.0995 else f"{100 * density[x]:.1f}"
            axis.text(x, y, text, ha="center", va="center", fontsize=font, color=_ink(colours[name]))
    axis.imshow(image, aspect="auto", interpolation="nearest")
    _head_and_layer_ticks(axis, panel, np.arange(panel.heads), np.arange(len(panel.layers)))
    axis.set_xticks(np.arange(panel.heads + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(len(panel.layers) + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="both", length=0)


def draw_steps(timeline: Timeline) -> Figure:
    """Density and estimated error over denoising steps: a line per layer, or median and range of many."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(8.5, 6.5, 2, 1, foot=0.0, sharex=True)
    # Layers that always stay dense would only widen the range of the others.
    sparse = [i for i, line in timeline.density.items() if min(line) < 1] or list(timeline.density)
    curves = (
        (timeline.density, "density\n(keys read exactly, %)"),
        (
            timeline.error,
            "estimated error of the\noutput (relative L2, %)",
        ),
    )
    for axis, (values, label) in zip(axes, curves, strict=True):
        _over_steps(axis, timeline.steps, {i: values[i] for i in sparse})
        for i, step in enumerate(timeline.dense):
            axis.axvspan(step - 0.5, step + 0.5, color=_DENSE, alpha=0.4, lw=0, label="dense step" if i == 0 else None)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    if timeline.target is not None:
        axes[1].axhline(100 * timeline.target, color="black", ls="--", lw=1, label="target")
        axes[1].set_ylim(top=max(axes[1].get_ylim()[1], 115 * timeline.target))
    axes[1].set_xlabel("denoising step")
    axes[1].set_xlim(min(timeline.steps) - 0.5, max(timeline.steps) + 0.5)
    axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes:
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, frameon=False)
    _title(figure, "Density and error over the run, mean over heads and branches")
    return figure


def _over_steps(axis: Axes, steps: list[int], values: dict[int, list[float]]) -> None:
    table = 100 * np.array(list(values.values()))
    if not np.isfinite(table).any():
        axis.text(0.5, 0.5, "no estimate in this run", transform=axis.transAxes, ha="center", va="center")
    elif len(table) <= _MANY:
        from matplotlib import colormaps

        shades = colormaps["viridis"](np.linspace(0, 0.92, len(table)))
        for line, layer, colour in zip(table, values, shades, strict=True):
            known = np.isfinite(line)
            axis.plot(np.array(steps)[known], line[known], marker="o", ms=4, color=colour, label=f"layer {layer}")
    else:
        known = np.isfinite(table).any(0)
        x, table = np.array(steps)[known], table[:, known]
        low, middle, high = np.nanpercentile(table, [0, 50, 100], axis=0)
        axis.fill_between(
            x, low, high, color=_COLOURS[0], alpha=0.25, lw=0, label=f"range of {len(table)} sparse layers"
        )
        axis.plot(x, middle, color=_COLOURS[0], marker="o", ms=4, label="median layer")


def draw_masks(report: ProfileReport, panel: Panel) -> Figure:
    """Thumbnails of the last plans, layer by head: share of the keys read; marks at the edge are frame borders."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.patches import Patch

    bins = next(iter(panel.maps.values())).shape[-1] if panel.maps else 1
    # Pixels of a thumbnail, and of the margin that its frame marks and method stand in.
    side = bins * max(1, min(4, 1200 // (bins * panel.heads))) if panel.heads <= 2 * _MANY else bins
    margin = 8
    canvas = np.ones((len(panel.layers) * (side + margin), panel.heads * (side + margin), 3))
    colours, rgb = _palette(report), colormaps["cividis"]
    borders = _frame_borders(panel.grid, side)
    for y, (index, layer) in enumerate(panel.layers.items()):
        for x, name in enumerate(chosen_names(layer, panel.row, panel.heads)):
            top, left = y * (side + margin) + margin, x * (side + margin) + margin
            values = panel.maps[index][x] if index in panel.maps else np.ones((bins, bins))
            image = np.kron(rgb(values)[..., :3], np.ones((side // bins, side // bins, 1)))
            _paint(canvas, top, left, image, borders, colours[name])
    figure, axis = _pixel_axes(canvas)
    centre = margin + side / 2
    ticks = [np.arange(n) * (side + margin) + centre for n in (panel.heads, len(panel.layers))]
    _head_and_layer_ticks(axis, panel, *ticks)
    axis.tick_params(length=0)
    for edge in axis.spines.values():
        edge.set_visible(False)
    scale = axis.inset_axes((1.01, 0.0, 16 / canvas.shape[1], min(1.0, 330 / canvas.shape[0])))
    figure.colorbar(ScalarMappable(cmap=rgb), cax=scale).set_label("share of the keys read exactly")
    _legend(figure, colours, [Patch(color="black", label="frame borders")])
    title = f"Keys (across) that queries (down) read, in token order: {panel.name}"
    _title(figure, f"{title}\nstrip above and left of a map: method; black marks: frame borders")
    return figure


def _pixel_axes(canvas: NDArray[Any]) -> tuple[Figure, Axes]:
    """Figure that shows an image pixel by pixel, with room for labels, scale and legend around it."""
    from matplotlib.figure import Figure

    left, right, top, bottom = 0.7, 1.1, 0.9, 1.3  # inches
    height, width = canvas.shape[0] / _DPI, canvas.shape[1] / _DPI
    size = max(_NARROW, width + left + right), height + top + bottom
    figure = Figure(figsize=size)
    left += max(0.0, (size[0] - width - left - right) / 2)
    axis = figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))
    axis.imshow(canvas, interpolation="nearest", aspect="auto")
    return figure, axis


def _frame_borders(grid: VideoGrid, side: int) -> NDArray[Any]:
    """Pixels in a thumbnail at which latent frames begin, and the end of the last one."""
    # Marks closer than five pixels would be a line: every second, third ... frame then.
    every = -(-5 * grid.tokens // (side * grid.frame_tokens))
    tokens = np.arange(grid.video_start, grid.video_end, grid.frame_tokens * every)
    return np.unique((np.append(tokens, grid.video_end) * side / grid.tokens).round().astype(int).clip(0, side - 1))


def _paint(canvas: NDArray[Any], top: int, left: int, image: NDArray[Any], borders: NDArray[Any], colour: str) -> None:
    """One thumbnail; above and left of it a strip in the method's colour, and in front of that the frame marks."""
    from matplotlib.colors import to_rgb

    side = len(image)
    canvas[top : top + side, left : left + side] = image
    canvas[top - 3 : top, left - 3 : left + side] = to_rgb(colour)
    canvas[top - 3 : top + side, left - 3 : left] = to_rgb(colour)
    canvas[top - 6 : top - 3, left + borders] = 0
    canvas[top + borders, left - 6 : left - 3] = 0


def draw_recall(report: ProfileReport, panel: Panel) -> Figure:
    """Softmax mass of the keys read over density, a picture per layer; thin lines are heads, dots what they chose."""
    measured = {i: layer for i, layer in panel.layers.items() if layer is not None}
    columns = min(len(measured), 3 if len(measured) <= _MANY else 8)
    rows = -(-len(measured) // columns)
    size = (3.4, 2.8) if len(measured) <= _MANY else (2.3, 2.0)
    figure, axes = _figure(size[0] * columns, size[1] * rows + 0.4, rows, columns, foot=0.9, sharex=True, sharey=True)
    colours = _palette(report)
    for axis, (index, layer) in zip(axes, measured.items(), strict=False):
        _recall_of(axis, layer, panel.row, colours)
        axis.set_title(f"layer {index}", fontsize=10)
    for axis in axes[len(measured) :]:
        axis.set_visible(False)
    for position, axis in enumerate(axes[: len(measured)]):
        last = position + columns >= len(measured)
        axis.tick_params(labelbottom=last)
        axis.set_xlabel("density, %" if last else "")
        axis.set_ylabel("" if position % columns else "recall, %")
    from matplotlib.lines import Line2D

    heavy = Line2D([], [], color="black", lw=2, label="median head")
    dot = Line2D([], [], color="white", marker="o", markeredgecolor="black", label="chosen by a head")
    _legend(figure, colours, [heavy, dot])
    title = f"Softmax mass that the exact keys of each candidate hold (recall) over their share (density): {panel.name}"
    _title(figure, title)
    return figure


def _recall_of(axis: Axes, layer: LayerProfile, row: int, colours: dict[str, str]) -> None:
    from matplotlib.collections import LineCollection

    density, recall = (100 * x[:, :, row].numpy() for x in (layer.density, layer.recall))
    heads = density.shape[-1]
    few = heads <= _MANY
    for c, name in enumerate(layer.candidates):
        lines = [np.stack([density[c, :, h], recall[c, :, h]], 1) for h in range(heads)]
        axis.add_collection(LineCollection(lines, colors=colours[name], lw=0.8, alpha=0.5 if few else 0.2))
        middle = np.median(density[c], -1), np.median(recall[c], -1)
        axis.plot(*middle, color=colours[name], lw=2)
    x, y = (100 * layer.at_choice(name)[row].numpy() for name in ("density", "recall"))
    inside = [colours[name] for name in chosen_names(layer, row, heads)]
    axis.scatter(x, y, c=inside, s=34 if few else 16, edgecolors="black", zorder=3, lw=0.8)
    axis.set_xscale("log")
    axis.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axis.set_xticks([], minor=True)
    axis.set_ylim(0, 104)
    axis.grid(alpha=0.3)


# -- shared -----------------------------------------------------------------------------------------------------------


def _figure(
    width: float, height: float, rows: int, columns: int, *, foot: float, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Figure of ``width`` × ``height`` inches and ``foot`` more for a legend, and its axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(_NARROW, width), height + foot), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def _title(figure: Figure, text: str) -> None:
    width = int(11 * figure.get_figwidth())
    figure.suptitle("\n".join(line for part in text.splitlines() for line in textwrap.wrap(part, width)), fontsize=11)


def _legend(figure: Figure, colours: dict[str, str], more: list[Any] | None = None) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=name) for name, colour in colours.items()] + (more or [])
    columns = max(1, min(len(handles), int(figure.get_figwidth() // 1.9)))
    # "outside" makes room by itself where the layout does the placing.
    where: Any = "lower center" if figure.get_layout_engine() is None else "outside lower center"
    figure.legend(handles=handles, loc=where, ncols=columns, frameon=False, fontsize=10)


def _head_and_layer_ticks(axis: Axes, panel: Panel, x: NDArray[Any], y: NDArray[Any]) -> None:
    axis.set_xticks(x, [str(h) for h in range(panel.heads)])
    axis.set_yticks(y, [str(layer) for layer in panel.layers])
    axis.set_xlabel("head")
    axis.set_ylabel("layer")


def _palette(report: ProfileReport) -> dict[str, str]:
    return {**{name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(report.candidates)}, DENSE: _DENSE}


def _ink(colour: str) -> str:
    """Black or white, whichever stands out from a colour."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(colour)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")
