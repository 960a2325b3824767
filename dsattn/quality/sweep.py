"""Methods at several targets: how much fidelity each keeps for what it computes, and which nobody beats."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsattn.errors import UsageError
from dsattn.methods import METHODS
from dsattn.quality.arms import DENSE
from dsattn.video import atomic

# By what name a method is told how much to compute.
TARGETS = ("density", "cost")
# Coordinates of a point: (name in a table, whether less is better).
COSTS = {"density": "density of all calls", "time": "denoising time / dense"}


def arms_of(methods: Sequence[str], targets: Sequence[float], impl: str | None = None) -> list[str]:
    """Arms ``method:density=target`` (``cost`` of ``auto``) for every method and target.

    Args:
        impl: implementation of all of them; None leaves it to the default.

    Raises:
        UsageError: there is no such method, or it has no such option.

    """
    arms = []
    for name in methods:
        if name not in METHODS:
            raise UsageError(f"there is no method {name!r}; see 'dsattn methods'")
        known = {field.name for field in dataclasses.fields(METHODS[name].config)}
        option = next((target for target in TARGETS if target in known), None)
        if option is None:
            raise UsageError(
                f"{name} has no {' or '.join(TARGETS)}; give its points with --arm, such as --arm {name}:option=value"
            )
        more = f",impl={impl}" if impl else ""
        arms += [f"{name}@{target:g}={name}:{option}={target:g}{more}" for target in targets]
    return arms


def points(report: dict[str, Any], cost: str = "density") -> list[dict[str, Any]]:
    """A point per arm that was compared with the reference, cheapest first.

    Args:
        report: of :func:`dsattn.quality.summary.build`.
        cost: ``density`` or ``time``; ``time`` is of runs that were not made in turns, and of which the first holds
            compilation, so it is for clips that take long.

    Returns:
        dicts with ``arm``, ``density``, ``time``, ``psnr``, ``ssim``, ``flickering`` (difference), ``identical`` and
        ``best`` (no other point costs no more and has a higher PSNR); None where something is not known.

    Raises:
        UsageError: there is no such cost.

    """
    if cost not in COSTS:
        raise UsageError(f"--against must be one of {', '.join(COSTS)}; got {cost!r}")
    dense = report["arms"][report["reference"]]
    found: list[dict[str, Any]] = []
    for name, arm in report["arms"].items():
        if name == report["reference"] or not arm["videos"]:
            continue
        flickering = (arm["scores"].get("temporal_flickering") or {}).get("difference")
        found.append(
            {
                "arm": name,
                "videos": arm["videos"],
                "density": arm["density"],
                "time": arm["denoise_s"] / dense["denoise_s"] if dense["denoise_s"] else None,
                "psnr": (arm["fidelity"].get("psnr") or {}).get("mean"),
                "ssim": (arm["fidelity"].get("ssim") or {}).get("mean"),
                "flickering": flickering["mean"] if flickering else None,
                "identical": arm["identical_to_reference"] == arm["videos"],
            }
        )
    for point in found:
        point["best"] = not any(_beats(other, point, cost) for other in found)
    return sorted(found, key=lambda point: (point[cost] is None, point[cost] or 0.0))


def rows(found: Sequence[dict[str, Any]], cost: str) -> list[list[str]]:
    """The points as a table, its head first."""
    head = ["arm", "density", "time / dense", "PSNR dB", "SSIM", "flickering - dense", "clips", f"best for its {cost}"]
    lines = [head]
    for p in found:
        values = (("density", ".3f"), ("time", ".2f"), ("psnr", ".2f"), ("ssim", ".4f"), ("flickering", "+.5f"))
        cells = ["n/a" if p[name] is None else f"{p[name]:{form}}" for name, form in values]
        cells[2] = "identical" if p["identical"] else cells[2]
        lines.append([p["arm"], *cells, str(p["videos"]), "yes" if p["best"] else ""])
    return lines


def draw(found: Sequence[dict[str, Any]], cost: str, path: Path, title: str) -> None:
    """PSNR over cost as a PNG, with a line through the best points; identical clips, which have none, stay out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5))
    shown = [p for p in found if p["psnr"] is not None and p[cost] is not None]
    families = list(dict.fromkeys(p["arm"].partition("@")[0] for p in shown))
    for index, family in enumerate(families):
        own = [p for p in shown if p["arm"].partition("@")[0] == family]
        style: dict[str, Any] = {"color": plt.get_cmap("tab10")(index % 10), "marker": "osD^v"[index // 10 % 5]}
        axes.plot([p[cost] for p in own], [p["psnr"] for p in own], lw=1, label=family, **style)
    best = [p for p in shown if p["best"]]
    axes.plot([p[cost] for p in best], [p["psnr"] for p in best], color="black", lw=3, alpha=0.25, label="best")
    axes.set(xlabel=COSTS[cost], ylabel=f"PSNR to {DENSE}, dB", title=title)
    axes.grid(alpha=0.3)
    if shown:
        axes.legend(fontsize=8)
    with atomic(path) as part:
        figure.savefig(part, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _beats(one: dict[str, Any], other: dict[str, Any], cost: str) -> bool:
    """``one`` costs no more and is closer, or costs less and is as close; an unknown value beats nothing."""
    a, b = (_place(point, cost) for point in (one, other))
    if a is None or b is None:
        return a is not None
    return a[0] <= b[0] and a[1] >= b[1] and a != b


def _place(point: dict[str, Any], cost: str) -> tuple[float, float] | None:
    fidelity = float("inf") if point["identical"] else point["psnr"]
    return None if fidelity is None or point[cost] is None else (point[cost], fidelity)
