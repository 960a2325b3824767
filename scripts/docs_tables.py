"""Tables of the documentation, made from committed results and from the code itself, so that none can be stale.

A page asks for one by a line ``<!-- table: name argument -->``. Every function here returns Markdown.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import attention_tables
import docs_scores
import typer.main

from dsattn.cli.app import app
from dsattn.functional import AUTO
from dsattn.methods import METHODS
from dsattn.metrics import DEFINITIONS
from dsattn.pipelines.registry import FAMILIES
from dsattn.presets import PRESETS, SHIPPED, preset

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
MARKER = re.compile(r"^<!-- table: (?P<name>\w+)(?: (?P<argument>.+?))? -->$", re.MULTILINE)
EQUAL_COST = "Error at equal cost: exact keys and pooled keys"
EQUAL_TOTAL_COST = "Error at equal total cost: planning on this machine included"


# Fields of report.json whose schema entry says nothing.
MEANINGS = {
    "schema": "name and version of this form",
    "command": "the command line, to run it again",
    "prompt": "what the video shows",
    "negative_prompt": "what it should not show; null if none was given",
    "seed": "of the initial noise, the same in both modes",
    "model": "id, revision, pipeline class, dtype, device",
    "shape": "pixels, frames, steps, guidance scale, tokens, latent grid, batch, heads, head_dim, layers",
    "env": "versions and hardware",
    "protocol": "what was timed, in which order, against which baseline, with notes",
    "runs": "what each mode took: `dense` and `sparse`",
    "density": "share of pairs computed exactly",
    "fidelity": "how far the sparse video is from the dense one of the same seed",
    "speedup": "dense time over sparse time",
    "runs.sparse.e2e": "median, minimum and maximum of `e2e_s`",
    "runs.sparse.denoise": "median, minimum and maximum of `denoise_s`",
    "runs.sparse.method": "the sparse method",
    "density.sparse_calls": "the same over sparse calls alone; null without any",
    "density.by_layer": "per layer, dense calls counted as 1",
    "density.by_step": "per denoising step, dense calls counted as 1",
    "estimated_error.overall": "root mean square over all calls where it was estimated; null if none was",
    "estimated_error.by_layer": "per layer",
    "estimated_error.by_step": "per denoising step",
    "flops.dense": "of the dense run",
    "flops.sparse": "of the sparse run; planning and pooled tails are not counted",
    "flops.attention_dense": "of dense self-attention alone",
    "flops.other": "of everything else in the transformer",
    "flops.attention_share": "attention's share of the dense run's",
    "flops.saved_share": "share of the dense run's that the sparse run does not compute",
    "fidelity.on": "what is compared",
    "fidelity.ssim": "structural similarity, 1 for equal frames",
    "fidelity.latent_relative_l2": "relative L2 difference of the final latents; null where they cannot be had",
    "fidelity.latents_from": "where the latents were taken",
    "protocol.repeats": "measured runs of each mode",
    "protocol.timed": "what the times hold",
    "protocol.load_s": "seconds it took to load the model, in no other figure",
    "protocol.dense_probe_failures": "why a backend cannot run here",
    "protocol.own_dense_denoise_s": "the denoising loop of that run",
    "protocol.notes": "what else to know about the figures",
    "timeline": "seconds of every denoising step, and why plans were made",
    "timeline.sparse_step_s": "the same of the sparse run",
    "inputs.prompt": "what both runs were asked for",
    "inputs.negative_prompt": "what both were to avoid",
    "inputs.scheduler": "class of the scheduler",
    "inputs.schedule": "digest of the time steps and noise levels",
    "inputs.dtype": "of the pipeline",
    "inputs.prompt_embeddings": "digest of what the text encoders gave",
    "inputs.initial_latents": "digest of the initial noise",
    "inputs.seed": "of the initial noise",
    "inputs.height": "pixels",
    "inputs.width": "pixels",
    "inputs.frames": "of the video",
    "inputs.steps": "denoising steps",
    "inputs.guidance": "guidance scale",
    "speedup.denoise": "the denoising loop alone",
    "speedup.attention": "self-attention alone, planning left out",
    "speedup.attention_share_of_dense_e2e": "attention's share of the dense run's time",
    "speedup.headline": "the end-to-end ratio in words: `(slower)` below 0.98, `(no difference)` below 1.02",
    "speedup.reasons": "why there is not more, where the gain is small",
}


def fill(markdown: str) -> str:
    """A page with its tables in place.

    Raises:
        KeyError: there is no such table.
        ValueError: its source does not hold what it needs.

    """

    def make(match: re.Match[str]) -> str:
        if match["name"] not in TABLES:
            raise KeyError(f"no table is called {match['name']!r}; there are {', '.join(TABLES)}")
        return TABLES[match["name"]](match["argument"] or "")

    return MARKER.sub(make, markdown)


def table(header: Iterable[str], rows: Iterable[Iterable[Any]], left: int = 1) -> str:
    """Markdown table; columns from ``left`` on are aligned to the right."""
    header, rows = list(header), [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    if not rows:
        raise ValueError(f"a table of {', '.join(header)} has no rows")
    align = ["---" if at < left else "---:" for at in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, align, *rows))


def result(name: str) -> dict[str, Any]:
    """A committed result."""
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def frontier_section(title: str) -> str:
    """A table of frontier.md at equal cost, without its columns of ratios; rows by their error at the middle cost."""
    text = (RESULTS / "frontier.md").read_text(encoding="utf-8")
    _, found, rest = text.partition(f"{title}\n\n")
    if not found:
        raise ValueError(f"frontier.md has no section {title!r}")
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in rest.split("\n\n", 1)[0].strip().splitlines()
        if line.startswith("|")
    ]
    keep = [at for at, name in enumerate(header) if "/" not in name]
    middle = keep[len(keep) // 2]
    rows.sort(key=lambda row: float(row[middle] or "inf"))
    columns = ["method", *(f"cost {header[at]}" for at in keep[1:])]
    return table(columns, ([row[at] or "–" for at in keep] for row in rows))


def frontier_points(method: str) -> str:
    """Every measured point of a method: what it computed, what planning cost, what error it made."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for point in result("frontier.json")["points"]:
        if point["method"] == method:
            groups.setdefault(point["label"], []).append(point)
    rows, settings = [], []
    for label, points in groups.items():
        shared = {
            name: value
            for name, value in points[0]["options"].items()
            if len(points) > 1 and all(point["options"].get(name) == value for point in points)
        }
        settings.append(f"- **{label}**: {_words(shared)}")
        for point in points:
            varied = {name: value for name, value in point["options"].items() if name not in shared}
            figures = (point[name] for name in ("density", "tail_keys", "planning", "error", "worst_head"))
            time = f"{point['attend_ms'] / point['dense_ms']:.2f}"
            rows.append((label, _words(varied), *(f"{figure:.3f}" for figure in figures), time))
    header = ("setting", "budget", "density", "pooled keys", "planning", "error", "worst head", "time / dense")
    return "\n\n".join(
        (table(header, rows, left=2), "Options of the settings:", "\n".join(settings), frontier_source(""))
    )


def _words(options: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in options.items()) or "defaults"


def frontier_source(_: str) -> str:
    """Where the frontier was measured."""
    found = result("frontier.json")
    env = found["env"]
    return (
        f"Measured on the shipped model: {found['captures']} captured attention calls of {found['tokens']:,} tokens, "
        f"{env['cpu']}, {found['threads']} threads, torch {env['torch']}, commit `{env['git'][:9]}`, no GPU. "
        "Density, pooled keys and planning are shares of dense attention; planning is spread over the calls that "
        "reuse a plan. Error is relative L2, the worst head's beside it. Options that are not named have their "
        "defaults at that commit. "
        "Source: `benchmarks/results/cpu/frontier.json`, made by `python scripts/frontier.py measure`."
    )


def attention(argument: str) -> str:
    """A table of an attention study: its name, and its file where that is not the shipped model's."""
    name, _, file = argument.partition(" ")
    return attention_tables.section(result(file or "attention_study.json"), name)


def comparison_rows(found: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """What a `dsattn compare` report says of both modes: name, dense, sparse, ratio."""
    runs, speed, fidelity = found["runs"], found["speedup"], found["fidelity"]
    dense, sparse = runs["dense"], runs["sparse"]

    def mid(mode: dict[str, Any], part: str) -> float:
        values = sorted(mode[part])
        return float(values[len(values) // 2])

    return [
        ("end to end", f"{dense['e2e']['median']:.1f} s", f"{sparse['e2e']['median']:.1f} s", f"{speed['e2e']:.2f}×"),
        (
            "attention (+ planning)",
            f"{mid(dense, 'attention_s'):.1f} s",
            f"{mid(sparse, 'attention_s'):.1f} s + {mid(sparse, 'plan_s'):.1f} s",
            f"{speed['attention_with_plan']:.2f}×",
        ),
        ("pairs computed, all calls", "100 %", f"{found['density']['all_calls']:.0%}", ""),
        ("attention error, estimated", "–", f"{found['estimated_error']['overall']:.1%}", ""),
        ("PSNR against dense, mean", "–", f"{fidelity['psnr']['mean']:.1f} dB", ""),
        ("PSNR, worst frame", "–", f"{fidelity['psnr']['worst']:.1f} dB", ""),
        ("SSIM against dense, mean", "–", f"{fidelity['ssim']['mean']:.3f}", ""),
    ]


def comparison(name: str) -> str:
    """One committed `dsattn compare` report."""
    found = result(name)
    shape, env, model = found["shape"], found["env"], found["model"]
    # Where the files went is not part of what was measured.
    words = shlex.split(re.sub(r" --out \S+| --quiet", "", found["command"]))
    command = " ".join(f'"{word}"' if " " in word else word for word in words)
    source = (
        f"`{command}`: {model['id']} model, {shape['width']} × {shape['height']}, {shape['frames']} frames "
        f"({shape['tokens']:,} tokens), {shape['steps']} steps, seed {found['seed']}, {model['dtype']}, {env['cpu']}, "
        f"{env['threads']} threads, torch {env['torch']}, {found['protocol']['repeats']} run of each mode. "
        f"Source: `benchmarks/results/cpu/{name}`."
    )
    return table(("", "dense", found["runs"]["sparse"]["method"], "ratio"), comparison_rows(found)) + "\n\n" + source


def methods(_: str) -> str:
    """The registry."""
    rows = [
        (
            f"[`{method.name}`]({method.name}.md)",
            method.summary,
            "the grid" if method.static else "q and k",
            "yes" if method.rank is not None else "no",
            method.source,
        )
        for method in METHODS.values()
    ]
    return table(("method", "keeps", "decides by", "a density can be asked for", "source"), rows, left=5)


def presets(_: str) -> str:
    """What the presets set, for models whose families have figures of their own."""
    families = {SHIPPED: "shipped model", **{f: f for f in sorted({f.name for f in FAMILIES.values()})}}
    rows = []
    for family, label in families.items():
        values = [preset(name, family) for name in PRESETS]
        rows.append((label, *(f"{value['dense_steps']:.0%}" for value in values), len(values[0]["dense_layers"])))
    first = table(
        ("preset", "`target_error`", "`refresh`"),
        ((f"`{name}`", preset(name)["target_error"], preset(name)["refresh"]) for name in PRESETS),
    )
    header = ("model family", *(f"dense steps, `{name}`" for name in PRESETS), "dense layers")
    return f"{first}\n\n{table(header, rows)}"


def families(_: str) -> str:
    """Model families and their transformers."""
    names: dict[str, list[str]] = {}
    for transformer, family in FAMILIES.items():
        names.setdefault(family.name, []).append(f"`{transformer}`")
    where = {family.name: family.extra for family in FAMILIES.values()}
    rows = [(name, ", ".join(found), where[name].replace("_", " ")) for name, found in names.items()]
    return table(("family", "transformers", "tokens beside the video, if any"), rows, left=3)


def implementations(_: str) -> str:
    """What `impl="auto"` tries, by device."""
    words = {"cuda": "GPU", "cpu": "CPU, blocks of equal size", "cpu clusters": "CPU, clusters (`semantic`)"}
    rows = [(words.get(kind, kind), ", then ".join(f"`{name}`" for name in names)) for kind, names in AUTO.items()]
    return table(("device and plan", "tried in this order"), rows, left=2)


def kernel_resources(_: str) -> str:
    """Variants, spills and the most shared memory per GPU target, from the committed budget."""
    budget = json.loads((ROOT / "kernels" / "resource_budget.json").read_text(encoding="utf-8"))
    rows = []
    for target, variants in budget.items():
        spilling = [name for name, figures in variants.items() if figures["spills"]]
        most = max(variants, key=lambda name: variants[name]["shared"])
        rows.append((target, len(variants), len(spilling), f"{variants[most]['shared'] // 1024} KiB", f"`{most}`"))
    header = ("target", "variants", "variants that spill", "most shared memory", "by")
    return table(header, rows)


def cli(_: str) -> str:
    """Every command with its options."""
    parts = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        rows = []
        for parameter in command.params:
            names = ", ".join(f"`{word}`" for word in parameter.opts)
            given = parameter.default is not None and parameter.default is not False
            default = f"`{parameter.default}`" if given else ""
            rows.append((names, getattr(parameter, "help", None) or "", default))
        parts.append(f"## dsattn {name}\n\n{command.help}\n\n{table(('option', 'meaning', 'default'), rows, left=3)}")
    return "\n\n".join(parts)


def report_fields(path: str) -> str:
    """Fields of a part of report.json with their descriptions in the schema; ``path`` such as ``runs.sparse``."""
    schema = json.loads((ROOT / "dsattn" / "report.schema.json").read_text(encoding="utf-8"))

    def resolve(node: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        return node

    node = schema
    for part in filter(None, path.split(".")):
        node = resolve(node["properties"][part])
    rows = []
    for name, value in node["properties"].items():
        full = f"{path}.{name}" if path else name
        meaning = value.get("description") or resolve(value).get("description") or MEANINGS.get(full)
        if not meaning:
            raise ValueError(f"report.json's {full} has a description neither in report.schema.json nor in MEANINGS")
        rows.append((f"`{name}`", meaning))
    return table(("field", "meaning"), rows, left=2)


def vbench_check(_: str) -> str:
    """What the comparison with VBench's package found."""
    found = result("vbench_check.json")
    versions = found["vbench"]
    return (
        f"Recorded: {len(found['videos'])} clips of the suite {found['run']['suite']}, vbench {versions['vbench']} on "
        f"torch {versions['torch']}, largest difference {found['largest_difference']:.1e} "
        f"(asked for: {found['tolerance']:.0e}). "
        "Source: `benchmarks/results/cpu/vbench_check.json`."
    )


def quantization_error(_: str) -> str:
    """Largest error of every number format by input, over head_dims and plans, and that of the plan of `semantic`."""
    rows = result("quantization_error.json")["rows"]
    formats = list(dict.fromkeys(row["quantization"] for row in rows))
    cells = []
    for kind in dict.fromkeys(row["input"] for row in rows):
        of_kind = [row for row in rows if row["input"] == kind]
        largest = (max(row["error"] for row in of_kind if row["quantization"] == name) for name in formats)
        plan = max(row["error_of_plan"] for row in of_kind if row["plan"].startswith("semantic"))
        cells.append((kind, *(f"{error:.4f}" for error in largest), f"{plan:.2f}"))
    header = ("input", *(f"`{name}`" if name else "bfloat16" for name in formats), "plan of `semantic`")
    return table(header, cells)


def engine_options(_: str) -> str:
    """Names of the engine's options, as flags and as ``-O`` take them."""
    from dsattn.config import Config

    names = [f.name for f in dataclasses.fields(Config) if f.name not in ("method", "options")]
    return ", ".join(f"`{name}`" for name in names)


def definitions(_: str) -> str:
    """What every metric is."""
    return table(("figure", "what it is"), ((f"`{name}`", text) for name, text in DEFINITIONS.items()), left=2)


TABLES: dict[str, Callable[[str], str]] = {
    "attention": attention,
    "caption_curve": lambda model: docs_scores.caption_curve(RESULTS, model, table),
    "cli": cli,
    "comparison": comparison,
    "definitions": definitions,
    "engine_options": engine_options,
    "equal_cost": lambda _: frontier_section(EQUAL_COST),
    "equal_total_cost": lambda _: frontier_section(EQUAL_TOTAL_COST),
    "families": families,
    "frontier_points": frontier_points,
    "frontier_source": frontier_source,
    "implementations": implementations,
    "kernel_resources": kernel_resources,
    "methods": methods,
    "model_scores": lambda model: docs_scores.model_scores(RESULTS.parent, model, table),
    "presets": presets,
    "quantization_error": quantization_error,
    "report_fields": report_fields,
    "training_curve": lambda model: docs_scores.training_curve(RESULTS, model, table),
    "vbench_check": vbench_check,
}
