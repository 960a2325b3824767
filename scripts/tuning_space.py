"""Writes kernels/tuning_space.json: the tile shapes that autotuning may time, by GPU, from the compiler's report.

    python scripts/tuning_space.py                 # all targets; --target sm_90 does one and keeps the others

Every candidate is compiled ahead of time, as in scripts/aot_report.py. Those that spill registers, need more shared
memory than the GPU has, or do not compile are left out, so that no time is spent on them on the GPU. To be run anew
when the block-sparse kernel or the static tiles change.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import aot_report
import torch
import typer

from dsattn.kernels import launch
from dsattn.kernels.launch import Specialized, Tiles
from dsattn.kernels.tuning import MOST_CANDIDATES, load_space

FILE = Path(__file__).resolve().parent.parent / "kernels" / "tuning_space.json"
# Bytes of shared memory a program may use.
SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}
HEAD_DIMS = (64, 128)
# Families of plans, the block sizes methods use with them, and the variant that is compiled for each.
FAMILIES = {"fixed": ((128, 128), (128, 64), (64, 64)), "clusters": ((64, 64),), "all": ((64, 64),)}
# The kernel with tensor descriptors takes equal blocks only, and is where these GPUs run them.
TMA_TARGETS = ("sm_90", "sm_100")
TMA_BLOCKS = FAMILIES["fixed"]


def candidates(block_q: int, block_k: int, head_dim: int, arch: int) -> list[Tiles]:
    """At most ``MOST_CANDIDATES`` shapes within the blocks, the static one first, then the larger ones."""
    static = launch.pick_tiles(block_q, block_k, head_dim, torch.bfloat16, arch)
    grid = [
        Tiles(block_m, block_n, warps, stages)
        for block_m in (128, 64)
        if block_m <= block_q
        for block_n in (128, 64, 32)
        if block_n <= block_k
        for warps in ((4, 8) if block_m == 128 or block_q == 64 else (4,))
        for stages in (2, 3, 4)
        # Small tiles hide latency with more stages, large ones have no room for them.
        if stages < 4 or block_m * block_n <= 4096
    ]
    return list(dict.fromkeys([static, *grid]))[:MOST_CANDIDATES]


def tma_candidates(block_q: int, block_k: int, head_dim: int, arch: int) -> list[Specialized]:
    """The same for the kernel with tensor descriptors."""
    static = launch.pick_specialized(block_q, block_k, head_dim, torch.bfloat16, arch)
    if static is None:
        return []
    grid = [
        Specialized(Tiles(block_m, block_n, warps, stages), roles)
        # The larger tiles first, within a tile those with roles.
        for block_m in (128, 64)
        if block_m <= block_q
        for block_n in (128, 64)
        if block_n <= block_k
        for roles, warps in ((True, 4), (True, 8), (False, 4), (False, 8))
        if warps == 4 or block_m == 128
        for stages in ((2, 3) if block_n == 128 or not roles else (3, 4))
    ]
    return list(dict.fromkeys([static, *grid]))[:MOST_CANDIDATES]


def work_of(target: str) -> dict[str, list[tuple[tuple[int, ...], aot_report.Variant]]]:
    """By kernel and variant: every candidate as autotuning knows it, and as the report does; the static one first."""
    arch = aot_report.TARGETS[target].arch
    work: dict[str, list[tuple[tuple[int, ...], aot_report.Variant]]] = {}
    for dim in HEAD_DIMS:
        for family, blocks in FAMILIES.items():
            for block_q, block_k in blocks:
                work[f"block_sparse d{dim} {block_q}x{block_k} {family}"] = [
                    (tuple(tiles), aot_report.Variant("bf16", dim, block_q, block_k, family, tiles))
                    for tiles in candidates(block_q, block_k, dim, arch)
                ]
        for block_q, block_k in TMA_BLOCKS if target in TMA_TARGETS else ():
            work[f"block_sparse_tma d{dim} {block_q}x{block_k} fixed"] = [
                ((*how.tiles, int(how.roles)), aot_report.Variant("bf16", dim, block_q, block_k, "tma all", how))
                for how in tma_candidates(block_q, block_k, dim, arch)
            ]
    return work


def survey(target: str, only: str, jobs: int) -> dict[str, list[tuple[int, ...]]]:
    """The candidates of every variant that the compiler can hold in registers."""
    work = {name: listed for name, listed in work_of(target).items() if only in name}
    variants = [variant for listed in work.values() for _, variant in listed]
    found: dict[str, list[tuple[int, ...]]] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        measured = pool.map(aot_report.measure, variants, [target] * len(variants))
        for name, listed in work.items():
            results = [next(measured) for _ in listed]
            kept = [shape for (shape, _), got in zip(listed, results, strict=True) if fits(got, target)]
            if kept:
                found[name] = kept
    return found


def fits(got: aot_report.Measured, target: str) -> bool:
    """Whether a candidate compiles, holds everything in registers, and finds its shared memory on the GPU."""
    return not got.error and not got.spills and got.shared <= SHARED[target]


def render(space: dict[str, dict[str, list[tuple[int, ...]]]]) -> str:
    """The file's text: a variant a line."""
    targets = [
        f"  {json.dumps(target)}: {{\n"
        + ",\n".join(f"    {json.dumps(name)}: {json.dumps(shapes)}" for name, shapes in variants.items())
        + "\n  }"
        for target, variants in space.items()
    ]
    return "{\n" + ",\n".join(targets) + "\n}\n"


def main(
    target: Annotated[
        list[str] | None, typer.Option(help=f"GPU, repeatable: {', '.join(SHARED)}. All by default.")
    ] = None,
    only: Annotated[
        str, typer.Option(help="Only kernels and variants whose name contains this; keeps the others.")
    ] = "",
    out: Annotated[Path, typer.Option(help="File to write.")] = FILE,
    jobs: Annotated[int, typer.Option(help="Processes that compile at once.")] = 2,
) -> None:
    """Compile the candidates and write down those that fit."""
    if unknown := set(target or ()) - set(SHARED):
        raise typer.BadParameter(f"unknown target {', '.join(sorted(unknown))}; known: {', '.join(SHARED)}")
    if launch.why_unavailable(torch.device("cpu")) is None:
        raise typer.BadParameter("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    space = {name: {key: list(shapes) for key, shapes in load_space().get(name, {}).items()} for name in SHARED}
    for name in target or SHARED:
        kept = {key: shapes for key, shapes in space[name].items() if only not in key}
        space[name] = kept | survey(name, only, jobs)
        print(f"{name}: {sum(map(len, space[name].values()))} shapes of {len(space[name])} variants")
        out.write_text(render({key: found for key, found in space.items() if found}), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
