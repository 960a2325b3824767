"""The reports of a comparison and a profile as tables for people."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Any

from dsattn.cli.output import counts, seconds

# Wide enough for every line where no terminal says how wide it is.
PIPE_WIDTH = 160


def print_report(report: dict[str, Any], out: Path) -> None:
    """To standard output, as compact as can be."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    console.print(_title(report), markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    table.add_column("")
    table.add_column(f"dense ({report['protocol']['baseline']})")
    table.add_column(report["runs"]["sparse"]["method"])
    table.add_column("ratio")
    table.add_column("")
    for row in _rows(report):
        table.add_row(*row)
    console.print(table)
    for line in _lines(report, out):
        console.print(line, markup=False, soft_wrap=True)


def print_profile(report: dict[str, Any], out: Path) -> None:
    """What ``dsattn profile`` found, to standard output: a row per layer and branch."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    grid, model, density = report["grid"], report["model"], report["density"]
    title = (
        f"dsattn profile   {model['id']} ({model['pipeline']})   {grid['frames']}x{grid['height']}x{grid['width']} "
        f"latent grid ({report['tokens']:,} tokens)   {report['steps']} steps   seed {report['seed']}"
    )
    console.print(title, markup=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    layers = report["layers"]
    # What is the same in every row goes without saying.
    where = [name for name in ("model", "branch", "row") if len({layer[name] for layer in layers}) > 1]
    for name in (*where, "layer"):
        table.add_column(name)
    for name, side in (("heads by method", "left"), ("density", "right"), ("estimated error, when measured", "right")):
        table.add_column(name, justify="right" if side == "right" else "left")
    for layer in layers:
        place = [str(layer[name]) for name in (*where, "layer")]
        table.add_row(*place, counts(layer["methods"]), f"{layer['density']:.3f}", f"{layer['error']:.1%}")
    console.print(table)
    sparse = "no sparse call" if density["sparse_calls"] is None else f"{density['sparse_calls']:.3f} of sparse calls"
    error = report["estimated_error"]
    later = "" if error is None else f"; error of the plans in use, estimated over the run: {error:.1%}"
    console.print(f"density {density['all_calls']:.3f} of all calls, {sparse}{later}", markup=False, soft_wrap=True)
    for fallback in report["fallbacks"]:
        console.print(f"fallback {fallback['calls']} calls ran dense: {fallback['reason']}", markup=False)
    names = [report["files"]["profile"], *report["files"]["pictures"]]
    console.print(f"saved {'  '.join(str(out / name) for name in names)}", markup=False, soft_wrap=True)
    console.print(f"use it with: --profile {out / report['files']['profile']}", markup=False, soft_wrap=True)


def _title(report: dict[str, Any]) -> str:
    shape, env, model = report["shape"], report["env"], report["model"]
    hardware = (
        ", ".join(env["gpu"]) if model["device"].startswith("cuda") else f"{env['cpu']}, {env['threads']} threads"
    )
    return (
        f"dsattn compare   {model['id']} ({model['pipeline']})   {shape['width']}x{shape['height']}x{shape['frames']} "
        f"({shape['tokens']:,} tokens)   {shape['steps']} steps   seed {report['seed']}   {model['dtype']}   "
        f"{hardware}   torch {env['torch']}"
    )


def _rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    runs, speed, protocol = report["runs"], report["speedup"], report["protocol"]
    dense, sparse = runs["dense"], runs["sparse"]
    low, high = speed["e2e_range"]
    spread = f"median of {protocol['repeats']} ({protocol['order']}), range {low:.2f}x-{high:.2f}x; warm-up excluded"
    rows: list[tuple[str, ...]] = [
        ("E2E", seconds(dense["e2e"]["median"]), seconds(sparse["e2e"]["median"]), speed["headline"], spread),
        (
            "  denoise",
            seconds(dense["denoise"]["median"]),
            seconds(sparse["denoise"]["median"]),
            _times(speed["denoise"]),
            f"first {sparse['dense_steps']} of {report['shape']['steps']} steps dense{_layers(sparse['config'])}; "
            f"a sparse step {_mid(sparse['sparse_step'])}, a dense one {_mid(dense['dense_step'])}",
        ),
        (
            "  attention",
            _median(dense["attention_s"]),
            f"{_median(sparse['attention_s'])} + plan {_median(sparse['plan_s'])}",
            _times(speed["attention_with_plan"]),
            f"calls by kernel: {counts(sparse['impls'])}",
        ),
        ("  text", _median(dense["text_s"]), _median(sparse["text_s"]), "", ""),
        ("  decode", _median(dense["vae_s"]), _median(sparse["vae_s"]), "", ""),
        (
            "warm-up",
            seconds(dense["warmup_s"]),
            seconds(sparse["warmup_s"]),
            "",
            "compilation included; not in the rest",
        ),
    ]
    rows += _memory(dense["peak_memory"], sparse["peak_memory"])
    density, flops = report["density"], report["flops"]
    share = "no sparse call" if density["sparse_calls"] is None else f"{density['sparse_calls']:.2f} of sparse calls"
    rows.append(
        (
            "density",
            "1.00",
            f"{density['all_calls']:.2f} all calls",
            "",
            f"{share}; attention is {flops['attention_share']:.0%} of the transformer's FLOPs",
        )
    )
    error = report["estimated_error"]
    if error["overall"] is not None:
        note = f"of the attention output, estimated on {error['rows']} rows a head"
        rows.append(("attention error", "0", f"{error['overall']:.1%}", "", note))
    rows.append(("FLOPs", f"{flops['dense']:.2e}", f"{flops['sparse']:.2e}", _times(flops["bound"]), "FLOP bound"))
    return rows


def _memory(dense: dict[str, int], sparse: dict[str, int]) -> list[tuple[str, ...]]:
    names = {"allocated": "GPU memory, peak allocated", "reserved": "GPU memory, peak reserved"}
    return [
        (
            "peak memory",
            f"{dense[key] / 2**30:.2f} GiB",
            f"{sparse[key] / 2**30:.2f} GiB",
            "",
            names.get(key, "resident set of the whole process"),
        )
        for key in sorted(dense.keys() & sparse.keys())
    ]


def _lines(report: dict[str, Any], out: Path) -> list[str]:
    fidelity, protocol, speed = report["fidelity"], report["protocol"], report["speedup"]
    psnr, ssim, floor = fidelity["psnr"], fidelity["ssim"], fidelity["noise_floor"]
    if psnr["identical"]:
        line = "fidelity     identical to dense"
    else:
        line = f"fidelity     PSNR {psnr['mean']:.1f} dB (worst frame {psnr['worst']:.1f})   SSIM {ssim['mean']:.3f} (worst {ssim['worst']:.3f})"  # noqa: E501
    if fidelity["latent_relative_l2"] is not None:
        line += f"   latents rel. L2 {fidelity['latent_relative_l2']:.3f}"
    between = "not measured" if floor is None else "identical" if floor["identical"] else f"{floor['psnr']:.1f} dB"
    lines = [f"{line}   [dense against dense: {between}]"]
    for fallback in report["runs"]["sparse"]["fallbacks"]:
        lines.append(f"fallback     {fallback['calls']} calls ran dense: {fallback['reason']}")
    probes = ", ".join(
        f"{name} {ms:.1f} ms" if ms is not None else f"{name} not available"
        for name, ms in protocol["dense_probe_ms"].items()
    )
    lines.append(f"baseline     {protocol['baseline']}, the fastest dense attention here; one call: {probes}")
    if protocol["own_dense_e2e_s"] is not None:
        lines.append(
            f"             with the pipeline's own dense attention: E2E {seconds(protocol['own_dense_e2e_s'])}, "
            f"{_times(speed['e2e_over_own_dense'])} over it (one run)"
        )
    lines += [f"{'why' if i == 0 else '':<13}{reason}" for i, reason in enumerate(speed["reasons"])]
    files = "  ".join(str(out / name) for key, name in report["files"].items() if not key.endswith("_details"))
    return [*lines, f"saved        {files}"]


def _layers(config: dict[str, Any]) -> str:
    layers = ", ".join(map(str, config.get("dense_layers", ())))
    return f", layers {layers} too" if layers else ""


def _median(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return seconds(median(known)) if known else "n/a"


def _mid(spread: dict[str, float] | None) -> str:
    return seconds(spread["median"]) if spread else "n/a"


def _times(ratio: float | None) -> str:
    return "n/a" if ratio is None else f"{ratio:.2f}x"
