"""How concentrated, how local and how stable attention is, per layer, head, step and prompt, on captured q and k.

    python scripts/capture_qkv.py --out captures --steps 20 --at 4,5,9,15 --first 2 --seeds 0,1
    python scripts/attention_study.py measure --captures captures --out benchmarks/results/cpu

Everything is measured in exact attention of sampled query rows, and of sampled query blocks of 64 rows, the same in all
captures. `measure` writes figures (JSON), tables (Markdown) and pictures (PNG); `render` makes the last two again.
What each figure is stands in docs/attention.md; the arithmetic is in attention_statistics.py.
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import attention_statistics as statistics
import captures
import torch
import typer
from attention_pictures import draw_curves, draw_maps
from attention_tables import report
from torch import Tensor

from dsattn.cli.app import run as run_app
from dsattn.errors import UsageError
from dsattn.grid import VideoGrid
from dsattn.methods.estimate import sample_rows
from dsattn.orders import token_order
from dsattn.report import environment, write_json

SCHEMA = "dsattn.attention-study/1"
BLOCK = 64
ORDERS = ("raster", "tile")
# Share of keys, and of blocks, whose choice is carried over to another capture.
CARRIED = 0.05
# Figures by which heads are ranked, to see whether a head keeps its character.
RANKED = ("entropy", "keys@0.05", "own_frame", "same_place", "first_frame")

app = typer.Typer(add_completion=False, help=__doc__)


@dataclass(frozen=True)
class Sample:
    """Query rows ``[R]`` and, by token order, query blocks ``[n, 64]`` that are looked at in every capture."""

    grid: VideoGrid
    rows: Tensor
    blocks: dict[str, Tensor]

    @classmethod
    def of(cls, grid: VideoGrid, rows: int, blocks: int) -> Sample:
        """Drawn over the whole clip, video tokens only; on a clip of fewer than 64 tokens there are no blocks."""
        found = {}
        for name in ORDERS:
            order = _order(grid, name)
            order = torch.arange(grid.tokens) if order is None else order
            whole = order[: grid.tokens // BLOCK * BLOCK].view(-1, BLOCK)
            whole = whole[((whole >= grid.video_start) & (whole < grid.video_end)).all(1)]
            drawn = torch.randperm(len(whole), generator=torch.Generator().manual_seed(2))[:blocks]
            found[name] = whole[drawn.sort().values]
        return cls(grid, sample_rows(grid, rows, seed=1), found)


@dataclass(frozen=True)
class Seen:
    """What is kept of one head in one capture: weights of video keys ``[R, S]`` and mass of tile blocks ``[n, N]``."""

    keys: Tensor
    blocks: Tensor


def _order(grid: VideoGrid, name: str) -> Tensor | None:
    return token_order(grid, name, torch.device("cpu"))  # type: ignore[arg-type]


def attention_rows(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """Softmax weights ``[R, S]`` float32 of some queries of one head; q, k ``[S, D]``."""
    return (q[rows] @ k.T * q.shape[1] ** -0.5).softmax(-1)


def look(rows_of: Callable[[Tensor], Tensor], sample: Sample) -> tuple[dict[str, float], Seen]:
    """Figures of one head, means over its rows.

    Args:
        rows_of: softmax weights ``[R, S]`` of query tokens ``[R]``.

    """
    grid = sample.grid
    weights, places = rows_of(sample.rows), statistics.Places.of(grid, sample.rows)
    by_row = statistics.concentration(weights) | statistics.character(weights, places)
    figures = {name: float(values.nanmean()) for name, values in by_row.items()}
    figures["common"] = statistics.common_keys(weights)
    blocks = {}
    for name, queries in sample.blocks.items():
        order = _order(grid, name)
        mass = [statistics.block_mass(rows_of(tokens), order, BLOCK)[0].mean(0) for tokens in queries]
        sizes = statistics.block_mass(weights[:1], order, BLOCK)[1]
        blocks[name] = torch.stack(mass) if mass else torch.empty(0, len(sizes))
        if mass:
            curve = statistics.Curve.of(blocks[name], sizes)
            densities, levels = statistics.DENSITIES, statistics.LEVELS
            figures |= _means(statistics.named(name, densities, curve.mass_at(densities)))
            figures |= _means(statistics.named(f"{name}_for", levels, curve.density_for(levels)))
    frames, distances = statistics.by_frame_distance(weights, places), statistics.by_distance(weights, places)
    figures |= {f"frames@{i}": float(x) for i, x in enumerate(frames)}
    figures |= {f"away@{start}": float(x) for start, x in zip(statistics.BINS, distances, strict=True)}
    return figures, Seen(weights[:, grid.video_start : grid.video_end], blocks["tile"])


def _means(values: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(x.mean()) for name, x in values.items()}


def relation(a: captures.Capture, b: captures.Capture) -> tuple[str, int] | None:
    """What differs between two calls of one layer, and by how many steps; None where it is not looked at."""
    same = {name: a.facts[name] == b.facts[name] for name in ("prompt", "seed", "branch")}
    gap = b.call.step - a.call.step
    if gap:
        return ("step", gap) if gap > 0 and all(same.values()) else None
    what = [name for name, equal in same.items() if not equal]
    return (" and ".join(what), 0) if what in (["prompt"], ["seed"], ["branch"], ["prompt", "seed"]) else None


def carried(seen: Sequence[Seen], items: Sequence[captures.Capture]) -> Iterator[tuple[str, int, str, float, float]]:
    """How much the best keys, and the best tile blocks, of one capture hold in another, for every related pair.

    Yields:
        relation, steps between, ``"keys"`` or ``"blocks"``, mass held, and that over what the best there hold.

    """
    best: list[dict[str, Tensor]] = []
    for one in seen:
        counts = {name: max(1, round(CARRIED * getattr(one, name).shape[1])) for name in ("keys", "blocks")}
        best.append({name: getattr(one, name).topk(count, 1).indices for name, count in counts.items()})
    for (i, a), (j, b) in itertools.permutations(enumerate(items), 2):
        kind = relation(a, b)
        # Both ways, but for steps, which only ever serve later ones.
        if kind is not None:
            for name, chosen in best[i].items():
                if len(chosen):
                    yield (*kind, name, *statistics.overlap(chosen, getattr(seen[j], name)))


def study(found: Sequence[captures.Capture], rows: int, blocks: int, say: Callable[[str], None]) -> dict[str, Any]:
    """All figures of some captures, layer by layer and head by head, so that little is held at a time."""
    samples = {capture.call.grid: Sample.of(capture.call.grid, rows, blocks) for capture in found}
    shapes = {(grid.frames, grid.height, grid.width) for grid in samples}
    if len(shapes) > 1:
        raise UsageError(f"captures must be of one grid, these are of {len(shapes)}: {sorted(shapes)}")
    runs = {capture.run: {n: capture.facts[n] for n in ("prompt", "seed", "branch")} for capture in found}
    records: list[dict[str, float]] = []
    pairs: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for layer in sorted({capture.call.layer for capture in found}):
        items = [capture for capture in found if capture.call.layer == layer]
        for head in range(items[0].heads):
            seen = []
            for item in items:
                q, k = item.load("qk", head)
                figures, kept = look(lambda tokens, q=q, k=k: attention_rows(q, k, tokens), samples[item.call.grid])
                place = {"run": list(runs).index(item.run), "step": item.call.step, "layer": layer, "head": head}
                records.append(place | figures)
                seen.append(kept)
            for kind, gap, what, mass, relative in carried(seen, items):
                pairs.setdefault((kind, gap, what, layer, head), []).append((mass, relative))
        say(f"layer {layer}: {len(items)} calls")
    grid = next(iter(samples))
    even, _ = look(lambda tokens: torch.full((len(tokens), grid.tokens), 1 / grid.tokens), samples[grid])
    return {
        "runs": list(runs.values()),
        "grid": asdict(grid),
        "tokens": grid.tokens,
        "rows": len(samples[grid].rows),
        "query_blocks": len(samples[grid].blocks["tile"]),
        "block": BLOCK,
        "carried": CARRIED,
        "window": statistics.window_sizes(grid),
        "window_share": _digits(math.prod(statistics.window_sizes(grid)) / grid.video_tokens),
        "band": statistics.BAND,
        "even": {name: _digits(value) for name, value in even.items()},
        "columns": list(records[0]),
        "heads": [[_digits(record[name]) for name in records[0]] for record in records],
        "carried_over": [
            {
                **dict(zip(("relation", "gap", "of", "layer", "head"), key, strict=True)),
                "mass": _digits(sum(m for m, _ in values) / len(values)),
                "relative": _digits(sum(r for _, r in values) / len(values)),
                "pairs": len(values),
            }
            for key, values in pairs.items()
        ],
        "agreement": agreement(found, records, list(runs)),
    }


def agreement(
    found: Sequence[captures.Capture], records: Sequence[dict[str, float]], runs: Sequence[str]
) -> list[dict[str, Any]]:
    """Rank correlation, over all heads of all layers, of figures in two captured moments; mean over related pairs."""
    moments = {(c.run, c.call.step): c for c in found}
    heads: dict[tuple[str, int], dict[tuple[float, float], dict[str, float]]] = {}
    for record in records:
        moment = runs[int(record["run"])], int(record["step"])
        heads.setdefault(moment, {})[record["layer"], record["head"]] = record
    totals: dict[tuple[str, int, str], list[float]] = {}
    for a, b in itertools.combinations(moments, 2):
        kind = relation(moments[a], moments[b])
        if kind is None:
            continue
        shared = [head for head in heads[a] if head in heads[b]]
        for name in RANKED:
            sides = ([heads[moment][head][name] for head in shared] for moment in (a, b))
            if (value := statistics.rank_correlation(*sides)) is not None:
                totals.setdefault((*kind, name), []).append(value)
    return [
        {"relation": kind, "gap": gap, "figure": name, "correlation": _digits(sum(x) / len(x)), "pairs": len(x)}
        for (kind, gap, name), x in totals.items()
    ]


def _digits(value: float) -> float | int | None:
    """Four significant digits, whole numbers as they are; None for what is no number."""
    if isinstance(value, int):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None


@app.command()
def measure(
    context: typer.Context,
    folder: Annotated[Path, typer.Option("--captures", help="Folder that capture_qkv.py wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for figures, tables and pictures.")],
    name: Annotated[str, typer.Option(help="What their files begin with.")] = "attention_study",
    rows: Annotated[int, typer.Option(help="Query rows of every head.", min=4)] = 256,
    blocks: Annotated[int, typer.Option(help="Query blocks of every head and token order.", min=1)] = 12,
    threads: int = 2,
) -> None:
    """Measure captures of all guidance branches."""
    torch.set_num_threads(threads)
    began = time.perf_counter()
    found = captures.read(folder, None)
    facts = study(found, rows, blocks, lambda text: typer.echo(text, err=True))
    words = context.obj if isinstance(context.obj, list) else sys.argv[1:]
    result = {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "scripts/attention_study.py", *words]),
        "env": environment(),
        "seconds": round(time.perf_counter() - began),
        # Kilobytes on Linux.
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1),
        **{key: sorted({c.facts[key] for c in found}) for key in ("model", "steps", "guidance", "dtype", "stored")},
        **facts,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{name}.json", result)
    render(out / f"{name}.json")
    typer.echo(f"{out / name}.json: {len(result['heads'])} heads and moments in {result['seconds']} s")


@app.command("render")
def render_command(
    figures: Annotated[Path, typer.Option("--json", help="What 'measure' wrote; the rest is written beside it.")],
) -> None:
    """Make tables and pictures from figures."""
    render(figures)


def render(figures: Path) -> None:
    """Write Markdown and PNG files beside a JSON file."""
    result = json.loads(figures.read_text(encoding="utf-8"))
    figures.with_suffix(".md").write_text(report(result), encoding="utf-8")
    draw_maps(result, figures.with_name(f"{figures.stem}_maps.png"))
    draw_curves(result, figures.with_name(f"{figures.stem}_curves.png"))


if __name__ == "__main__":
    sys.exit(run_app(sys.argv[1:], app, "attention_study"))
