"""Compiles the Triton kernels for many GPUs, on a machine without any, and shows what it needs there.

`python scripts/aot_report.py` prints registers, spills, shared memory and the matrix and copy instructions of every
variant. `--check` compares with kernels/resource_budget.json and fails on a spill or a compile error too many, and on
matrix or copy instructions that a variant had and lost.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from aot_sources import source
from aot_variants import TARGETS, VARIANTS, Helper, Variant, tiles_of, variants_of
from rich.console import Console
from rich.table import Table

from dsattn.kernels import launch

BUDGET = Path(__file__).resolve().parent.parent / "kernels" / "resource_budget.json"
# Instructions whose loss is a failure.
INSTRUCTIONS = ("wgmma", "tcgen05", "mma", "tma", "setmaxnreg", "cp_async", "ldmatrix")


@dataclass(frozen=True)
class Measured:
    """What the compiler made of a variant; counts are static instructions. Spills are registers per thread."""

    registers: int = 0
    spills: int = 0
    shared: int = 0
    wgmma: int = 0
    tcgen05: int = 0
    mma: int = 0
    tma: int = 0
    setmaxnreg: int = 0
    cp_async: int = 0
    ldmatrix: int = 0
    error: str | None = None


def measure(variant: Variant | Helper, target_name: str) -> Measured:
    """Compile one variant; an error of the compiler is a result, not an exception."""
    target = TARGETS[target_name]
    kernel, tiles = source(variant, target), tiles_of(variant, target)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}
    try:
        compiled = triton.compile(kernel, target=target, options=options)
    except Exception as error:  # noqa: BLE001 - whatever the compiler raises is reported
        lines = str(error).strip().splitlines() or [""]
        return Measured(error=f"{type(error).__name__}: {lines[0]}")
    shared = int(compiled.metadata.shared)
    return _nvidia(compiled, shared) if target.backend == "cuda" else _amd(compiled.asm["amdgcn"], shared)


def _nvidia(compiled: Any, shared: int) -> Measured:
    ptx = compiled.asm["ptx"]
    registers, stack = _cubin_usage(compiled.asm["cubin"])
    return Measured(
        registers=registers,
        spills=stack // 4,
        shared=shared,
        wgmma=ptx.count("wgmma.mma_async"),
        tcgen05=ptx.count("tcgen05.mma"),
        mma=ptx.count("mma.sync"),
        tma=ptx.count("cp.async.bulk.tensor"),
        setmaxnreg=ptx.count("setmaxnreg."),
        ldmatrix=ptx.count("ldmatrix."),
        cp_async=len(re.findall(r"cp\.async\.c[ag]\.", ptx)),
    )


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread. The kernel has no arrays of its own: its stack is spills."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage.stdout!r}")
    return int(found[1]), int(found[2])


def _amd(assembly: str, shared: int) -> Measured:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"the assembly names no {name}")
        return int(found[1])

    return Measured(
        registers=field("vgpr_count"),
        spills=field("vgpr_spill_count"),
        shared=shared,
        mma=len(re.findall(r"\bv_mfma_", assembly)),
    )


def violations(results: dict[tuple[str, str], Measured], budget: dict[str, Any]) -> list[str]:
    """One line per compile error, variant without a budget, or figure above it."""
    lines = []
    for (target, name), got in results.items():
        allowed = budget.get(target, {}).get(name)
        if got.error:
            lines.append(f"{target} {name}: does not compile: {got.error}")
        elif allowed is None:
            lines.append(f"{target} {name}: has no budget; add it with --write-budget")
        else:
            lines += [
                f"{target} {name}: {key} {getattr(got, key)}, budget {allowed[key]}"
                for key in ("spills", "shared")
                if getattr(got, key) > allowed[key]
            ]
            lines += [
                f"{target} {name}: has no {key} any more" for key in allowed.get("uses", ()) if not getattr(got, key)
            ]
    return lines


def _write_budget(results: dict[tuple[str, str], Measured], budget: dict[str, Any]) -> None:
    for (target, name), got in results.items():
        if got.error:
            raise SystemExit(f"{target} {name}: does not compile: {got.error}")
        # Compiler versions differ by a few hundred bytes of scratch: budgets are whole KiB with one to spare.
        shared = (got.shared // 1024 + 2) * 1024
        uses = [key for key in INSTRUCTIONS if getattr(got, key)]
        budget.setdefault(target, {})[name] = {"spills": got.spills, "shared": shared, "uses": uses}
    rows = {
        target: "{\n" + ",\n".join(f'    "{name}": {json.dumps(b)}' for name, b in per.items()) + "\n  }"
        for target, per in budget.items()
    }
    BUDGET.write_text("{\n" + ",\n".join(f'  "{target}": {row}' for target, row in rows.items()) + "\n}\n")


def _table(results: dict[tuple[str, str], Measured]) -> Table:
    table = Table(title=f"kernels, Triton {triton.__version__}")
    columns = ("registers", "spills", "shared", *INSTRUCTIONS)
    table.add_column("target")
    table.add_column("kernel, dtype, head_dim, blocks, features")
    table.add_column("tiles")
    for column in columns:
        table.add_column(column, justify="right")
    variants = {variant.name: variant for variant in VARIANTS}
    for (target, name), got in results.items():
        variant = variants[name]
        tiles = tiles_of(variant, TARGETS[target])
        shape = f"{tiles.block_m}x{tiles.block_n} w{tiles.warps} s{tiles.stages}"
        cells = ["error"] if got.error else [str(getattr(got, column) or "-") for column in columns]
        table.add_row(target, name, shape, *cells)
    return table


def main(
    target: Annotated[
        list[str] | None, typer.Option(help=f"GPU, repeatable: {', '.join(TARGETS)}. All by default.")
    ] = None,
    variant: Annotated[str, typer.Option(help="Only variants whose name contains this.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    check: Annotated[bool, typer.Option(help="Exit 1 where a variant exceeds kernels/resource_budget.json.")] = False,
    write_budget: Annotated[bool, typer.Option(help="Make today's figures the budget.")] = False,
    jobs: Annotated[int, typer.Option(help="Processes that compile at once.")] = min(os.cpu_count() or 1, 8),
) -> None:
    """Compile the kernels ahead of time and report what it needs on each GPU."""
    if unknown := set(target or ()) - set(TARGETS):
        raise typer.BadParameter(f"unknown target {', '.join(sorted(unknown))}; known: {', '.join(TARGETS)}")
    if launch.why_unavailable(torch.device("cpu")) is None:
        raise typer.BadParameter("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    work = [(v, t) for t in target or TARGETS for v in variants_of(t) if variant in v.name]
    if not work:
        raise typer.BadParameter(f"no variant contains {variant!r}; there are: {'; '.join(v.name for v in VARIANTS)}")
    with ProcessPoolExecutor(min(jobs, len(work)), mp_context=get_context("spawn")) as pool:
        measured = list(pool.map(measure, *zip(*work, strict=True)))
    results = {(t, v.name): m for (v, t), m in zip(work, measured, strict=True)}

    if as_json:
        listed = [
            {"target": t, "variant": v.name, **tiles_of(v, TARGETS[t])._asdict(), **asdict(m)}
            for (v, t), m in zip(work, measured, strict=True)
        ]
        print(json.dumps({"triton": triton.__version__, "results": listed}, indent=2))
    else:
        Console(width=None if Console().is_terminal else 180).print(_table(results))
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    if write_budget:
        _write_budget(results, budget)
    failed = [f"{t} {name}: {m.error}" for (t, name), m in results.items() if m.error]
    if lines := violations(results, budget) if check else failed:
        for line in lines:
            typer.echo(line, err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
