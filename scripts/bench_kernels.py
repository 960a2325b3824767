"""Times attention kernels against dense baselines, and everything around them, in one run.

    python scripts/bench_kernels.py --json kernels.json --table kernels.md

On a GPU the shapes are those of released models, on a CPU a tiny one. Every result is compared with float64 on sampled
rows before it is timed; one that is wrong is reported as wrong. Times are medians of runs that take turns, with the
L2 cache overwritten before each. What does not fit, cannot run or came too late is listed with its reason. The JSON is
rewritten after every group, so that a run that is stopped leaves what it had.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import bench_attention as attention
import bench_cases as cases
import bench_parts as parts
import torch
import typer
from bench_timing import Deadline, Stopwatch, ceilings, machine, measure, ms, smi, table, write_json

from dsattn.config import AUTOTUNE
from dsattn.kernels import tuning

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GROUPS = ("attention", "parts", "options", "backward")
# Share of a shape's time that each group gets.
WEIGHTS = {"attention": 5.0, "parts": 2.0, "options": 1.5, "backward": 1.5}
# What sparse attention may cost, as a share of the best dense kernel: density over this much of its rate, plus a part
# that does not shrink; and what planning may cost beside it.
TILES, CLUSTERS = (0.85, 0.02), (0.75, 0.03)
MAP_SHARE, REUSE_SHARE, COPY_SHARE = 0.03, 0.005, 0.8

Log = Callable[[str], None]


def bench_shape(
    shape: cases.Shape, options: dict[str, Any], watch: Stopwatch, seconds: float, log: Log, save: Callable[[], None],
    rows: list[dict[str, Any]],
) -> None:  # fmt: skip
    """Add the rows of one shape."""
    deadline = Deadline(seconds)
    device, impls = watch.device, options["impls"]
    qkv = cases.make_qkv(shape, device, DTYPES[options["dtype"]])
    blocks = options["block_q"], options["block_k"]
    sparse_goals = [goal for goal in options["densities"] if goal < 1]
    ranked = cases.clusters(shape, *qkv)
    made = {
        **{("tiles", goal): cases.tiles(shape, goal, *blocks, device) for goal in sparse_goals},
        **{("random", goal): cases.random(shape, goal, *blocks, device) for goal in sparse_goals},
        **{("clusters", goal): ranked.at(goal) for goal in sparse_goals},
    }
    if 1 in options["densities"]:
        made["tiles", 1.0] = cases.dense(shape, *blocks, device)
    least_tiles, least_clusters = made["tiles", min(sparse_goals)], made["clusters", min(sparse_goals)]
    own = "triton" if device.type == "cuda" else "torch"
    some = {goal: plan for (kind, goal), plan in made.items() if kind == "tiles" and goal in (0.1, 0.25)}
    groups: dict[str, Callable[[], list[Any]]] = {
        "attention": lambda: [
            *attention.dense_entries(shape, qkv, impls),
            *(
                entry
                for (kind, goal), plan in made.items()
                if kind in options["plans"]
                for entry in attention.sparse_entries(shape, qkv, kind, goal, plan, impls)
            ),
        ],
        "parts": lambda: parts.entries(shape, qkv, least_tiles, least_clusters),
        "options": lambda: attention.option_entries(qkv, {"tiles": least_tiles, "clusters": least_clusters}, own),
        "backward": lambda: attention.backward_entries(shape, qkv, some, own),
    }
    weights = {name: WEIGHTS[name] for name in groups if name in options["groups"]}
    for done, (name, weight) in enumerate(weights.items()):
        share = deadline.left() * weight / sum(list(weights.values())[done:])
        log(f"{shape.name}, {name}: {share:.0f} s")
        with torch.set_grad_enabled(name == "backward"), tuning.using(options["autotune"]):
            found = measure(groups[name](), watch, share, most=options["repeats"], log=log)
        rows += [{"shape": shape.name, **row} for row in found]
        save()


def best_dense(rows: list[dict[str, Any]], shape: str) -> dict[str, Any] | None:
    """The fastest dense baseline of a shape."""
    timed = [r for r in rows if r["shape"] == shape and r["group"] == "dense" and r["status"] == "ok"]
    return min(timed, key=lambda r: r["median_s"], default=None)


def finish(report: dict[str, Any]) -> None:
    """Fill in what follows from the times: shares of the best dense kernel, rates, and the targets."""
    rows, top = report["rows"], report["ceilings"]
    targets: list[dict[str, Any]] = []
    for shape in report["shapes"]:
        base, flops = best_dense(rows, shape), cases.SHAPES[shape].flops
        for row in (r for r in rows if r["shape"] == shape and r["status"] == "ok"):
            if row["group"] in ("dense", "sparse"):
                row["flop_per_s"] = flops * row["density"] / row["median_s"]
            if row.get("bytes"):
                row["of_copy"] = row["bytes"] / row["median_s"] / top["copy_bytes_per_s"]
            if base is not None and row["group"] != "backward":
                row["of_dense"] = row["median_s"] / base["median_s"]
        targets += _targets([r for r in rows if r["shape"] == shape and r["status"] == "ok"], shape)
    report["targets"] = targets


def _targets(rows: list[dict[str, Any]], shape: str) -> list[dict[str, Any]]:
    """What was asked for, what came, and whether it holds; of one shape's own kernels."""
    found = []

    def add(what: str, value: float, limit: float, at_most: bool = True) -> None:
        met = value <= limit if at_most else value >= limit
        found.append({"shape": shape, "target": what, "value": value, "limit": limit, "met": met, "at_most": at_most})

    kinds = {"tiles": TILES, "clusters": CLUSTERS}
    for row in rows:
        if "of_dense" not in row and "of_copy" not in row:
            continue
        if row["group"] == "sparse" and row["plan"] in kinds and row["density"] < 1 and _is_own(row, rows):
            rate, fixed = kinds[row["plan"]]
            what = f"{row['plan']} at density {row['density']:.3f} ({row['impl']}), of dense"
            add(what, row["of_dense"], row["density"] / rate + fixed)
        if row.get("part") == parts.MAP:
            add(f"{parts.MAP}, of dense", row["of_dense"], MAP_SHARE)
        if row.get("part") == parts.REUSE:
            add(f"{parts.REUSE}, of dense", row["of_dense"], REUSE_SHARE)
        if row.get("of_copy") and not row.get("flops") and row["impl"] == "dsattn":
            add(f"{row['part']}, of copy bandwidth", row["of_copy"], COPY_SHARE, at_most=False)
    return [t for t in found if t["value"] is not None]


def _is_own(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """The implementation dsattn would run: Triton, or without it the fastest of the others."""
    same = [
        r for r in rows if r["group"] == "sparse" and (r["plan"], r["goal"]) == (row["plan"], row["goal"])
        and r["impl"] != "flashinfer"
    ]  # fmt: skip
    chosen = next((r for r in same if r["impl"] == "triton"), None) or min(same, key=lambda r: r["median_s"])
    return row is chosen


def markdown(report: dict[str, Any]) -> str:
    """Tables of a report: attention, parts, targets, and what was not timed."""
    facts, top = report["machine"], report["ceilings"]
    lines = [
        f"# Kernels on {report['device_name']}\n",
        f"{report['dtype']}, blocks {report['block_q']}×{report['block_k']}, torch {facts['torch']}, triton "
        f"{facts['triton']}. Copy {top['copy_bytes_per_s'] / 1e9:.0f} GB/s, matrix product "
        f"{top['flop_per_s'] / 1e12:.3g} TFLOP/s. Medians in ms; JIT is what the first call took more than the second."
        + ("" if report["complete"] else " **The run was stopped early.**")
        + "\n",
    ]
    rows = [r for r in report["rows"] if r["status"] == "ok"]
    for shape in report["shapes"]:
        here = [r for r in rows if r["shape"] == shape]
        if not here:
            continue
        grid = cases.SHAPES[shape].grid
        lines += [f"## {shape}: {grid.tokens:,} tokens × {cases.SHAPES[shape].heads} × {cases.SHAPES[shape].dim}\n"]
        head = ("attention", "density", "ms", "of dense", "TFLOP/s", "error", "JIT s", "runs")
        cells = [
            (r["name"], f"{r['density']:.3f}", ms(r["median_s"]), f"{r['of_dense']:.3f}" if "of_dense" in r else "–",
             f"{r['flop_per_s'] / 1e12:.3g}" if "flop_per_s" in r else "–",
             f"{r['error']:.1e}" if "error" in r else "–", f"{r['warmup_s']:.1f}", str(r["runs"]))
            for r in here if r["group"] != "parts"
        ]  # fmt: skip
        lines += [table(head, cells)]
        cells = [
            (r["name"], ms(r["median_s"]), f"{r['of_dense']:.4f}" if "of_dense" in r else "–",
             f"{r['of_copy']:.2f}" if "of_copy" in r else "–", f"{r['warmup_s']:.1f}")
            for r in here if r["group"] == "parts"
        ]  # fmt: skip
        lines += [table(("part", "ms", "of dense", "of copy bandwidth", "JIT s"), cells)] if cells else []
    cells = [
        (f"{t['shape']}: {t['target']}", f"{t['value']:.4f}", f"{'≤' if t['at_most'] else '≥'} {t['limit']:.4f}",
         "yes" if t["met"] else "no")
        for t in report["targets"]
    ]  # fmt: skip
    note = "" if report["machine"]["device"] == "cuda" else "They are set for GPUs.\n"
    lines += ["## Targets\n", note, table(("target", "value", "limit", "met"), cells)] if cells else []
    cells = [
        (f"{t['kernel']} {t['variant']}", " ".join(map(str, t["tiles"])), ms(t["seconds"]), ms(t["static_seconds"]),
         str(t["timed"]), f"{t['tuning_s']:.1f}")
        for t in report["tuning"]
    ]  # fmt: skip
    head = ("tuned", "queries, keys, warps, stages", "ms", "static ms", "shapes timed", "s")
    lines += ["## Autotuning\n", table(head, cells)] if cells else []
    missing: dict[tuple[str, str], list[str]] = {}
    for r in (r for r in report["rows"] if r["status"] != "ok"):
        missing.setdefault((r["status"], r["reason"]), []).append(f"{r['shape']} {r['name']}")
    cells = [(", ".join(names), *why) for why, names in missing.items()]
    lines += ["## Not timed\n", table(("what", "status", "reason"), cells)] if cells else []
    return "\n".join(lines)


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _check(name: str, came: list[str], known: Any) -> list[str]:
    if unknown := [x for x in came if x not in known]:
        raise typer.BadParameter(f"{name}: {', '.join(unknown)} not known; known: {', '.join(known)}")
    return came


def main(
    shapes: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(cases.SHAPES)}.")] = "",
    densities: Annotated[
        str, typer.Option(help="Kept shares of the (query, key) pairs; one is below 1.")
    ] = "1,.5,.25,.1",
    plans: Annotated[str, typer.Option(help="Kinds of plans.")] = "tiles,clusters,random",
    impls: Annotated[str, typer.Option(help="Only these implementations and baselines, such as 'triton,sdpa'.")] = "",
    groups: Annotated[str, typer.Option(help="What to time.")] = ",".join(GROUPS),
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32; by default bf16 on a GPU, fp32 on a CPU.")] = "",
    blocks: Annotated[str, typer.Option(help="Tokens per query and key block.")] = "128x64",
    device: Annotated[str, typer.Option(help="cuda or cpu; by default the GPU if there is one.")] = "",
    seconds: Annotated[float, typer.Option(help="Time for all shapes together.")] = 240,
    autotune: Annotated[str, typer.Option(help=f"Tile shapes: {', '.join(AUTOTUNE)}.")] = "cached",
    repeats: Annotated[int, typer.Option(help="Most runs of each, three at least.")] = 20,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all numbers here.")] = None,
    table_path: Annotated[Path | None, typer.Option("--table", help="Write the tables here.")] = None,
) -> None:
    """Time attention kernels, baselines and planning; print tables."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = where.type == "cuda"
    chosen = _check("--shapes", _list(shapes), cases.SHAPES) or (
        ["wan-720p", "wan-480p", "ltx", "hunyuan-720p"] if on_gpu else ["tiny"]
    )
    block_q, block_k = (int(part) for part in blocks.split("x"))
    options: dict[str, Any] = {
        "densities": [float(x) for x in _list(densities)],
        "plans": _check("--plans", _list(plans), ("tiles", "clusters", "random")),
        "impls": _check("--impls", _list(impls), (*attention.DENSE, *attention.SPARSE, "sdpa")),
        "groups": _check("--groups", _list(groups), GROUPS),
        "dtype": _check("--dtype", [dtype or ("bf16" if on_gpu else "fp32")], DTYPES)[0],
        "block_q": block_q,
        "block_k": block_k,
        "repeats": repeats,
        "autotune": _check("--autotune", [autotune], AUTOTUNE)[0],
    }
    if min(options["densities"], default=1) >= 1:
        raise typer.BadParameter("--densities needs one below 1")
    watch, deadline, began = Stopwatch(where), Deadline(seconds), time.time()
    facts = machine(where)
    report: dict[str, Any] = {
        "schema": 1, "complete": False, "device_name": facts["gpu"] if on_gpu else facts["cpu"], "machine": facts,
        "ceilings": ceilings(watch, DTYPES[options["dtype"]]), "shapes": chosen, **options,
        "rows": [], "targets": [], "smi_after": {},
    }  # fmt: skip

    def save() -> None:
        report["seconds"], report["tuning"] = time.time() - began, tuning.history()
        finish(report)
        if json_path is not None:
            write_json(json_path, report)
        if table_path is not None:
            table_path.parent.mkdir(parents=True, exist_ok=True)
            table_path.write_text(markdown(report), encoding="utf-8")

    log: Log = lambda line: typer.echo(line, err=True)  # noqa: E731
    for done, name in enumerate(chosen):
        # Time grows with the work, and every shape compiles much the same.
        work = [cases.SHAPES[x].flops ** 0.5 for x in chosen[done:]]
        share = deadline.left() * work[0] / sum(work)
        bench_shape(cases.SHAPES[name], options, watch, share, log, save, report["rows"])
        report["smi_after"][name] = smi(where.index or 0) if on_gpu else None
        if on_gpu:
            torch.cuda.empty_cache()
    report["complete"] = True
    save()
    print(markdown(report))


if __name__ == "__main__":
    typer.run(main)
