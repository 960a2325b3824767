"""Error against cost of every method, on q, k, v captured from the shipped model.

    python scripts/frontier.py capture --out captures
    python scripts/frontier.py measure --captures captures --json frontier.json --plot frontier.png

`capture` runs the shipped model densely over a few prompts and keeps what enters chosen attention calls.
`measure` plans and attends every capture with every method and prints a table: relative L2 error of the output against
dense (float64, sampled query rows, mean over heads and captures) by density, and what the density leaves out: pooled
keys, planning, and the time of the whole call against dense SDPA in the same process.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

import dsattn
from dsattn.config import build
from dsattn.functional import find_method
from dsattn.grid import Call, VideoGrid

PROMPTS = (
    "a large red circle moves right over a gradient background",
    "a small blue square moves up over a checkered background",
    "a large yellow star moves left over a cloudy background",
)
DENSITIES = (0.05, 0.1, 0.2, 0.3)
TAUS = (0.5, 0.8, 1.0, 1.3)
ROWS = 256

app = typer.Typer(add_completion=False, help=__doc__)


class Recorder(dsattn.Engine):
    """Dense attention that keeps the inputs of chosen calls."""

    def __init__(self, steps: tuple[int, ...], layers: tuple[int, ...]) -> None:
        super().__init__("dense")
        self.wanted = {(step, layer) for step in steps for layer in layers}
        self.found: dict[tuple[int, int], tuple[tuple[Tensor, Tensor, Tensor], Call]] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **options: Any) -> Tensor:
        """Keep, then attend."""
        if call.branch == "cond" and (call.step, call.layer) in self.wanted:
            self.found[call.step, call.layer] = ((q.clone(), k.clone(), v.clone()), call)
        return super().__call__(q, k, v, call, **options)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


@app.command()
def capture(
    out: Path = typer.Option(..., help="Folder for one safetensors file per prompt."),
    steps: int = typer.Option(12, help="Denoising steps."),
    at: str = typer.Option("2,5,9", help="Steps to keep."),
    layers: str = typer.Option("0,2,3,5", help="Layers to keep."),
    frames: int = 33,
    size: int = typer.Option(256, help="Height and width in pixels."),
    threads: int = 2,
) -> None:
    """Keep q, k, v of chosen layers and steps of the shipped model."""
    from dsattn.pipelines.tiny.loader import load_tiny

    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    pipe = load_tiny()
    for index, prompt in enumerate(PROMPTS):
        engine = Recorder(numbers(at), numbers(layers))
        with dsattn.enabled(pipe, engine):
            pipe(
                prompt,
                height=size,
                width=size,
                num_frames=frames,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(index),
                output_type="latent",
            )
        tensors = {
            f"{step}/{layer}/{name}": x.contiguous()
            for (step, layer), (qkv, _) in engine.found.items()
            for name, x in zip("qkv", qkv, strict=True)
        }
        call = next(iter(engine.found.values()))[1]
        facts = {"prompt": prompt, "steps": str(steps), "grid": json.dumps(asdict(call.grid))}
        save_file(tensors, out / f"{index}.safetensors", metadata=facts)
        typer.echo(f"{prompt}: {len(engine.found)} calls of {call.grid.tokens} tokens")


@dataclass(frozen=True)
class Captured:
    """One attention call: where it came from, its inputs, and dense attention of a few rows in float64."""

    prompt: str
    call: Call
    qkv: tuple[Tensor, Tensor, Tensor]
    rows: Tensor
    exact: Tensor


def load(folder: Path) -> Iterator[Captured]:
    """Captures in the order of prompt, layer and step, so that warm starts meet what they meet in a run."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise typer.BadParameter(f"{folder} holds no captures; make them with 'frontier.py capture --out {folder}'")
    for file in files:
        with safe_open(file, "pt") as opened:
            facts = opened.metadata()
        tensors = load_file(file)
        grid = VideoGrid(**json.loads(facts["grid"]))
        rows = torch.randperm(grid.tokens, generator=torch.Generator().manual_seed(1))[:ROWS]
        keys = sorted({tuple(map(int, name.split("/")[:2])) for name in tensors}, key=lambda key: (key[1], key[0]))
        for step, layer in keys:
            q, k, v = (tensors[f"{step}/{layer}/{name}"] for name in "qkv")
            exact = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q[:, rows], k, v)))
            call = Call(layer, step, grid, num_steps=int(facts["steps"]))
            yield Captured(facts["prompt"], call, (q, k, v), rows, exact.transpose(1, 2))


def cases() -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(label, method, options of every point)."""

    def by_density(**options: Any) -> list[dict[str, Any]]:
        return [{"density": d, **options} for d in DENSITIES]

    combined = {"metric": "logit", "values": 0.1, "routing": "output_error"}
    return [
        ("radial", "radial", [{"decay": d} for d in (0.05, 0.2, 0.5, 1.0)]),
        ("spatial_temporal", "spatial_temporal", by_density()),
        ("spatial_temporal + pooled", "spatial_temporal", by_density(tail="pooled")),
        ("topk raster", "topk", by_density(order="raster", tail="none")),
        ("topk tile", "topk", by_density(order="tile", tail="none")),
        ("topk hilbert", "topk", by_density(order="hilbert", tail="none")),
        ("topk hilbert subblock", "topk", by_density(order="hilbert", tail="none", scorer="subblock")),
        ("topk tile + pooled", "topk", by_density(order="tile")),
        ("topk morton + pooled (Sol-like)", "topk", by_density(order="morton")),
        ("sol", "sol", [{"tau": t} for t in TAUS]),
        ("sol + pooled per block", "sol", [{"tau": t, "tail": "pooled_block"} for t in TAUS]),
        ("topk hilbert + pooled", "topk", by_density(order="hilbert")),
        ("topk hilbert subblock + pooled", "topk", by_density(order="hilbert", scorer="subblock")),
        ("semantic (SVG2-like)", "semantic", by_density(tail="none")),
        ("semantic + pooled", "semantic", by_density()),
        ("semantic by weight error (SVG-EAR-like)", "semantic", by_density(routing="weight_error")),
        ("semantic logit", "semantic", by_density(metric="logit")),
        ("semantic logit, values, by output error", "semantic", by_density(**combined)),
        ("semantic + pooled per block", "semantic", by_density(tail="pooled_block")),
    ]


def median_ms(run: Callable[[], Any], repeats: int = 3) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def measure_point(method: str, options: dict[str, Any], captures: list[Captured], timed: bool) -> dict[str, Any]:
    """Error, density and cost of one method at one setting."""
    chosen = find_method(method)
    config = build(chosen.config, options, method)
    errors: list[float] = []
    densities, tails = [], []
    memory: dict[str, Tensor] = {}
    last = None
    for item in captures:
        if last is None or (item.prompt, item.call.layer) != last:
            memory = {}
        last = (item.prompt, item.call.layer)
        plan = chosen.plan(*item.qkv, item.call, config, memory)
        out = dsattn.attend(*item.qkv, plan)[:, item.rows].double()
        norms = [x.square().sum((1, 3)).sqrt() for x in (out - item.exact, item.exact)]
        errors += (norms[0] / norms[1]).flatten().tolist()
        densities.append(float(plan.density.mean()))
        # Per query row: all pooled keys, or its share of its block's and the one key that is made of them.
        keys = {"none": 0.0, "pooled": plan.num_k_blocks}
        keys["pooled_block"] = 1 + plan.num_q_blocks * plan.num_k_blocks / plan.q_len
        tails.append(keys[plan.tail] / plan.k_len)
    point = {
        "method": method,
        "options": options,
        "error": statistics.mean(errors),
        "worst_head": max(errors),
        "density": statistics.mean(densities),
        "tail_keys": statistics.mean(tails),
    }
    if timed:
        item = captures[len(captures) // 2]
        q, k, v = (x.transpose(1, 2) for x in item.qkv)
        point["dense_ms"] = median_ms(lambda: F.scaled_dot_product_attention(q, k, v))
        point["plan_ms"] = median_ms(lambda: chosen.plan(*item.qkv, item.call, config, memory))
        point["attend_ms"] = median_ms(lambda: dsattn.attend(*item.qkv, plan))
    return point


@app.command()
def measure(
    captures: Path = typer.Option(..., help="Folder that 'capture' wrote."),
    only: str = typer.Option("", help="Measure the labels that contain this text."),
    json_out: Path | None = typer.Option(None, "--json", help="Write every point here."),
    plot: Path | None = typer.Option(None, help="Write a picture (PNG) here."),
    timed: bool = typer.Option(True, help="Also time planning, attention and dense attention."),
    threads: int = 2,
) -> None:
    """Error and cost of every method on the captures."""
    torch.set_num_threads(threads)
    items = list(load(captures))
    results: list[dict[str, Any]] = []
    table = Table(
        "method", "density", "tail keys", "error", "worst head", "plan ms", "attend ms", "dense ms", "× dense"
    )
    for label, method, points in cases():
        if only not in label:
            continue
        for options in points:
            point = {"label": label, **measure_point(method, options, items, timed)}
            results.append(point)
            cells = [f"{point[name]:.4f}" for name in ("density", "tail_keys", "error", "worst_head")]
            if timed:
                total = point["plan_ms"] + point["attend_ms"]
                cells += [f"{point[name]:.1f}" for name in ("plan_ms", "attend_ms", "dense_ms")]
                cells.append(f"{point['dense_ms'] / total:.2f}")
            table.add_row(label, *cells)
            typer.echo(f"{label} {options}: error {point['error']:.4f} at density {point['density']:.3f}", err=True)
    Console(width=150).print(table)
    if json_out:
        machine = {
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "threads": threads,
        }
        json_out.write_text(json.dumps({**machine, "captures": len(items), "points": results}, indent=1) + "\n")
    if plot:
        draw(results, plot)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Error over executed share of keys, pooled keys included."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6))
    for label in dict.fromkeys(p["label"] for p in results):
        points = sorted((p["density"] + p["tail_keys"], p["error"]) for p in results if p["label"] == label)
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="keys read per query / all keys (pooled ones included)")
    axes.set(ylabel="relative L2 error of the attention output", title="Error against cost, shipped model")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    app()
