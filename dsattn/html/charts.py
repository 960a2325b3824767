"""Line charts as HTML: SVG for the curves, text beside it, so that labels keep their size on a narrow screen.

Colours come from the page's style sheet; series differ in dashes and in the marks of their points too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

STYLES = 6
MANY_POINTS = 60


@dataclass(frozen=True)
class Series:
    """One curve.

    values: one per x; None where there is none, which interrupts the line.
    style: class of colour and dash, taken modulo ``STYLES``.
    dots: mark the points, unless they are very many.
    """

    name: str
    values: Sequence[float | None]
    style: int = 0
    dots: bool = True


@dataclass(frozen=True)
class Axis:
    """One axis: its label, the ends of its range, its ticks, and whether it is logarithmic."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def place(self, value: float) -> float:
        """In percent of the axis' length."""
        if self.log:
            return 100 * math.log(value / self.low) / math.log(self.high / self.low)
        return 100 * (value - self.low) / (self.high - self.low)


def fitted(label: str, values: Sequence[float | None], *, zero: bool = False, count: int = 5) -> Axis:
    """Axis with round ticks around the known values; ``zero`` makes it begin there."""
    known = [value for value in values if value is not None] or [0.0, 1.0]
    low, high = (0.0 if zero else min(known)), max(known)
    if high <= low:
        high = low + (abs(low) or 1.0) * 0.1
    step = _round_step((high - low) / count)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [round(i * step, 10) for i in range(first, last + 1)]
    return Axis(label, ticks[0], ticks[-1], ticks)


def steps_axis(label: str, values: Sequence[float], count: int = 10) -> Axis:
    """Axis over whole numbers, from the first to the last."""
    every = max(1, -(-len(values) // count))
    high = values[-1] if values[-1] > values[0] else values[0] + 1
    return Axis(label, values[0], high, list(values[::every]))


def log_axis(label: str, values: Sequence[float]) -> Axis:
    """Logarithmic axis over numbers above 0, with ticks at 1, 2, 5, 10 and so on."""
    low, high = min(values), max(values)
    ticks = [f * 10.0**p for p in range(-3, 4) for f in (1, 2, 5) if low <= f * 10.0**p <= high * 1.001]
    return Axis(label, low, high if high > low else low * 10, ticks, log=True)


def line_chart(
    description: str, x: Sequence[float], series: Sequence[Series], across: Axis, up: Axis, *, name: str = ""
) -> Markup:
    """A figure.

    Args:
        description: what a screen reader says instead of the picture.
        x: where the values of all series stand.
        name: id of the plot, whose cursor the script moves.

    """
    curves = Markup("").join(_curve(x, one, across, up) for one in series)
    grid = Markup("").join(
        Markup('<line class="grid" x1="0" x2="100" y1="{0:.2f}" y2="{0:.2f}"/>').format(100 - up.place(tick))
        for tick in up.ticks
    )
    labels = Markup("").join(
        Markup('<span class="tick {}" style="{}:{:.2f}%">{}</span>').format(side, edge, axis.place(tick), f"{tick:g}")
        for axis, side, edge in ((up, "up", "bottom"), (across, "across", "left"))
        for tick in axis.ticks
    )
    legend = Markup("").join(
        Markup(
            '<li><svg class="key" viewBox="0 0 28 8" aria-hidden="true"><path class="curve s{}" d="M0 4H28"/></svg>'
            "{}</li>"
        ).format(one.style % STYLES, one.name)
        for one in series
        if one.name
    )
    return Markup(
        '<figure class="chart"><div class="unit">{}</div><div class="plot"{}>'
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{}">{}{}</svg>'
        '<span class="cursor" hidden></span>{}</div><div class="unit below">{}</div>{}</figure>'
    ).format(
        up.label,
        Markup(' id="{}" data-low="{}" data-high="{}"').format(name, across.low, across.high) if name else "",
        description,
        grid,
        curves,
        labels,
        across.label,
        Markup('<ul class="legend">{}</ul>').format(legend) if legend else "",
    )


def _curve(x: Sequence[float], one: Series, across: Axis, up: Axis) -> Markup:
    path, dots, open_ = [], [], False
    for place, value in zip(x, one.values, strict=True):
        if value is None:
            open_ = False
            continue
        point = f"{across.place(place):.2f} {100 - up.place(value):.2f}"
        path.append(f"L{point}" if open_ else f"M{point}")
        dots.append(f"M{point}h0")
        open_ = True
    # A line of no length is a dot, by its round ends.
    few = "".join(dots) if len(dots) <= MANY_POINTS and one.dots else ""
    return Markup('<path class="curve s{0}" d="{1}"><title>{2}</title></path><path class="dots s{0}" d="{3}"/>').format(
        one.style % STYLES, "".join(path), one.name, few
    )


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * 0.999)
