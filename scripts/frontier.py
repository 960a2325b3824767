"""Error against cost of every method, on q, k, v captured from the shipped model.

    python scripts/capture_qkv.py --out captures
    python scripts/frontier.py measure --captures captures --json frontier.json --plot frontier.png

`measure` runs every capture through an engine of every method and prints tables: relative L2 error of a layer's output
against dense (float64, sampled query rows; root mean square over layers, steps and prompts) against cost. Cost is
relative to dense attention: keys read exactly, pooled keys, and the measured time of planning, spread over the calls
that reuse a plan. Every method is given its error on the same rows, which no method saw when it planned.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import captures
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

import dsattn
from dsattn.block_plan import BlockPlan
from dsattn.grid import Call
from dsattn.report import environment

DENSITIES = (0.03, 0.05, 0.1, 0.2)
COSTS = (0.06, 0.08, 0.1, 0.15, 0.2)
AUTO_COSTS = (0.06, 0.1, 0.16, 0.26)
# A plan serves so many steps, and a run has so many sparse ones: the defaults of the command line at 20 steps.
REFRESH, SPARSE_STEPS = 4, 17
ROWS = 256

app = typer.Typer(add_completion=False, help=__doc__)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


@dataclass(frozen=True)
class Captured:
    """One attention call: the run it is from, its inputs, and dense attention of a few rows in float64."""

    run: str
    call: Call
    qkv: tuple[Tensor, Tensor, Tensor]
    rows: Tensor
    exact: Tensor


def load(folder: Path, steps: tuple[int, ...] | None = None, prompts: int | None = None) -> Iterator[Captured]:
    """Captures of the conditional branch by run, step and layer: of the first prompts, each with its first seed."""
    found = captures.read(folder)
    first: dict[str, str] = {}
    for capture in found:
        first.setdefault(capture.facts["prompt"], capture.run)
    used = list(first.values())[:prompts]
    for capture in sorted(found, key=lambda capture: (capture.run, capture.call.step, capture.call.layer)):
        if capture.run not in used or (steps is not None and capture.call.step not in steps):
            continue
        q, k, v = capture.load()
        rows = torch.randperm(q.shape[1], generator=torch.Generator().manual_seed(1))[:ROWS]
        exact = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q[:, rows], k, v)))
        yield Captured(capture.run, capture.call, (q, k, v), rows, exact.transpose(1, 2))


def cases() -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(label, method, options of every point)."""

    def by_density(**options: Any) -> list[dict[str, Any]]:
        return [{"density": d, **options} for d in DENSITIES]

    # What the papers describe: Euclidean clusters, as many as in the pilot or as many as ours.
    few = {"q_clusters": 100, "k_clusters": 300}
    plain = {"metric": "euclidean", "routing": "mass", "tail_order": 1}
    ear = {**plain, "routing": "weight_error"}
    return [
        ("radial", "radial", [{"decay": d} for d in (0.05, 0.2, 0.5, 1.0)]),
        ("spatial_temporal", "spatial_temporal", by_density()),
        ("topk raster", "topk", by_density(order="raster", tail="none")),
        ("topk tile", "topk", by_density(order="tile", tail="none")),
        ("topk hilbert, sub-blocks", "topk", by_density(order="hilbert", tail="none", scorer="subblock")),
        ("topk tile + tail", "topk", by_density(order="tile")),
        ("topk hilbert, sub-blocks + tail", "topk", by_density(order="hilbert", scorer="subblock")),
        ("sol", "sol", by_density()),
        ("sol, tail per block", "sol", by_density(tail="pooled_block")),
        ("sparse_linear, untrained", "sparse_linear", [{"critical": d} for d in DENSITIES]),
        ("SVG2, 100/300 clusters", "semantic", by_density(tail="none", **{**plain, **few})),
        ("SVG2, our counts", "semantic", by_density(tail="none", **plain)),
        ("SVG2 + tail, our counts", "semantic", by_density(**plain)),
        ("SVG-EAR, 100/300 clusters", "semantic", by_density(**{**ear, **few})),
        ("SVG-EAR, our counts", "semantic", by_density(**ear)),
        ("semantic (default)", "semantic", by_density()),
        ("semantic, Euclidean", "semantic", by_density(metric="euclidean")),
        ("semantic, by mass", "semantic", by_density(routing="mass")),
        ("semantic, tail of order 1", "semantic", by_density(tail_order=1)),
        ("semantic, budget per head", "semantic", by_density(budget="head")),
        ("semantic, groups of clusters", "semantic", by_density(k_clusters=512, k_groups=256)),
        ("semantic, 512 key clusters", "semantic", by_density(k_clusters=512)),
        ("semantic, by output error", "semantic", by_density(routing="output_error")),
        ("semantic, values .1, output error", "semantic", by_density(values=0.1, routing="output_error")),
        ("auto, semantic alone", "auto", [{"cost": c, "candidates": "semantic"} for c in AUTO_COSTS]),
        ("auto", "auto", [{"cost": c} for c in AUTO_COSTS]),
        ("temporal", "temporal", [{"threshold": t} for t in (-6.0, -3.0)]),
        ("temporal + tail", "temporal", [{"threshold": t, "tail": "pooled"} for t in (-3.0, -1.0)]),
    ]


def measure_point(method: str, options: dict[str, Any], captured: list[Captured]) -> dict[str, Any]:
    """Error, density and cost of one method at one setting, with the state it would have in a run."""
    errors: list[Tensor] = []
    rows: list[tuple[float, float, float, float]] = []
    observed = []
    for _, group in itertools.groupby(captured, key=lambda item: item.run):
        items = list(group)
        first = items[0].call.step
        engine = dsattn.Engine(method, dense_steps=first, monitor=0, timing=True, **options)
        opening = [item for item in items if item.call.step == first]
        for item in opening:
            # The first captured step stands for the last dense one too, and is where temporal looks first.
            early = replace(item.call, step=first - 1)
            if engine.method.observe is not None:
                engine(*item.qkv, early, dense=lambda: torch.empty(0))
                observed.append(engine.stats.records[-1].plan_s)
            if engine.method.before is not None:
                engine(*item.qkv, item.call)
        for item in items:
            out = engine(*item.qkv, item.call)[:, item.rows].double()
            errors.append(torch.stack([x.square().sum((1, 3)) for x in (out - item.exact, item.exact)]).flatten(1))
            record = engine.stats.records[-1]
            plan = engine.state.entries[item.call.model, item.call.layer, item.call.branch].plan
            rows.append((float(record.density.mean()), tail_keys(plan), record.plan_s, record.attend_s))
    squares = torch.stack(errors)
    q, k, v = (x.transpose(1, 2) for x in captured[len(captured) // 2].qkv)
    dense_s = median_s(lambda: F.scaled_dot_product_attention(q, k, v))
    density, tail, plan_times, attend_times = zip(*rows, strict=True)
    plan_s, attend_s = statistics.median(plan_times), statistics.median(attend_times)
    observe_s = statistics.median(observed) if observed else 0.0
    planning = (plan_s / REFRESH + observe_s / SPARSE_STEPS) / dense_s
    return {
        "method": method,
        "options": options,
        "error": float((squares[:, 0].sum(1) / squares[:, 1].sum(1)).mean().sqrt()),
        "error_of_heads": float((squares[:, 0] / squares[:, 1]).sqrt().mean()),
        "worst_head": float((squares[:, 0] / squares[:, 1]).sqrt().max()),
        "density": statistics.mean(density),
        "tail_keys": statistics.mean(tail),
        "planning": planning,
        "cost": statistics.mean(density) + statistics.mean(tail) + planning,
        "plan_ms": 1000 * plan_s,
        "observe_ms": 1000 * observe_s,
        "attend_ms": 1000 * attend_s,
        "dense_ms": 1000 * dense_s,
    }


def tail_keys(plan: BlockPlan) -> float:
    """Pooled keys that a query reads, per key of the sequence."""
    blocks = float((plan.k_sizes > 0).sum(-1).float().mean()) / plan.k_len
    return {"none": 0.0, "pooled": blocks, "pooled_block": blocks * plan.num_q_blocks / plan.q_len}[plan.tail]


def median_s(run: Callable[[], Any], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@app.command()
def measure(
    folder: Path = typer.Option(..., "--captures", help="Folder that capture_qkv.py wrote."),
    only: str = typer.Option("", help="Measure the labels that contain this text."),
    at: str = typer.Option("", help="Use the captures of these steps; all by default."),
    prompts: int | None = typer.Option(None, help="Use the captures of the first so many prompts; all by default."),
    json_out: Path | None = typer.Option(None, "--json", help="Write every point here."),
    markdown: Path | None = typer.Option(None, help="Write the tables here."),
    plot: Path | None = typer.Option(None, help="Write a picture (PNG) here."),
    threads: int = 2,
) -> None:
    """Error and cost of every method on the captures."""
    torch.set_num_threads(threads)
    items = list(load(folder, numbers(at) if at else None, prompts))
    if not items:
        raise typer.BadParameter(f"{folder} holds no captures of the steps {at}")
    results: list[dict[str, Any]] = []
    for label, method, points in cases():
        if only not in label:
            continue
        for options in points:
            # Verdicts run on the torch path, slowly at high density: the first step of one prompt.
            some = items if method != "temporal" else first_step(items)
            point = {"label": label, "captures": len(some), **measure_point(method, options, some)}
            results.append(point)
            typer.echo(f"{label} {options}: error {point['error']:.4f} at cost {point['cost']:.3f}", err=True)
    facts = {
        "env": environment(),
        "threads": threads,
        "captures": len(items),
        "steps": sorted({item.call.step for item in items}),
        "tokens": items[0].call.grid.tokens,
        "refresh": REFRESH,
        "sparse_steps": SPARSE_STEPS,
    }
    text = tables(results)
    typer.echo(text)
    if json_out:
        json_out.write_text(json.dumps({**facts, "points": results}, indent=1) + "\n")
    if markdown:
        markdown.write_text(text)
    if plot:
        draw(results, plot)


def first_step(items: list[Captured]) -> list[Captured]:
    """Captures of the first run's first step."""
    return [item for item in items if (item.run, item.call.step) == (items[0].run, items[0].call.step)]


@app.command()
def render(
    points: Path = typer.Option(..., "--json", help="What 'measure' wrote."),
    markdown: Path = typer.Option(..., help="Write the tables here."),
    plot: Path = typer.Option(..., help="Write the picture (PNG) here."),
) -> None:
    """Tables and picture from measured points."""
    results = json.loads(points.read_text())["points"]
    markdown.write_text(tables(results))
    draw(results, plot)


def tables(results: list[dict[str, Any]]) -> str:
    """Markdown: every point, and the errors at equal cost, with and without planning, and how ``auto`` compares."""
    names = ("density", "tail_keys", "planning", "cost", "error", "error_of_heads", "worst_head")
    rows = [["method", *(name.replace("_", " ") for name in names), "attend / dense"]]
    for p in results:
        rows.append([p["label"], *(f"{p[name]:.3f}" for name in names), f"{p['attend_ms'] / p['dense_ms']:.2f}"])
    parts = ["Every point\n", markdown_table(rows)]
    for title, of in (
        ("Error at equal cost: exact keys and pooled keys", lambda p: p["density"] + p["tail_keys"]),
        ("Error at equal total cost: planning on this machine included", lambda p: p["cost"]),
    ):
        rows = [["method", *(f"{c:g}" for c in COSTS), *(f"auto / it at {c:g}" for c in COSTS)]]
        best = [at_cost(results, "auto", c, of) for c in COSTS]
        for label in dict.fromkeys(p["label"] for p in results):
            own = [at_cost(results, label, c, of) for c in COSTS]
            ratios = [b / o if b and o else None for b, o in zip(best, own, strict=True)]
            if any(own):
                rows.append([label, *(number(x, 3) for x in own), *(number(x, 2) for x in ratios)])
        parts += [f"\n{title}\n", markdown_table(rows)]
    return "\n".join(parts)


def markdown_table(rows: list[list[str]]) -> str:
    """First row as head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def number(value: float | None, digits: int) -> str:
    """Empty for None."""
    return "" if value is None else f"{value:.{digits}f}"


def at_cost(
    results: list[dict[str, Any]], label: str, cost: float, of: Callable[[dict[str, Any]], float]
) -> float | None:
    """Error at a cost, between measured points straight in logarithms; None outside of them."""
    points = sorted((math.log(of(p)), math.log(p["error"])) for p in results if p["label"] == label)
    x = math.log(cost)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1:
            return math.exp(y0 + (y1 - y0) * (x - x0) / max(x1 - x0, 1e-9))
    return None


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Error over executed share of keys, pooled keys included."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 6))
    labels = list(dict.fromkeys(p["label"] for p in results))
    for index, label in enumerate(labels):
        points = sorted((p["density"] + p["tail_keys"], p["error"]) for p in results if p["label"] == label)
        style = {
            "color": plt.get_cmap("tab10")(index % 10),
            "marker": "osD"[index // 10],
            "ls": ("-", "--", ":")[index // 10],
        }
        axes.plot(*zip(*points, strict=True), label=label, lw=3 if label == "auto" else 1.3, **style)
    axes.set(xscale="log", yscale="log", xlabel="exact and pooled keys per query / all keys")
    axes.set(ylabel="relative L2 error of the attention output", title="Error against cost, shipped model")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    app()
