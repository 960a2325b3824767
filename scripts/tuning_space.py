"""Writes kernels/tuning_space.py: the tile shapes that autotuning may time, by GPU, from the compiler's report.

    python scripts/tuning_space.py                 # all targets; --target sm_90 does one and keeps the others

Every candidate is compiled ahead of time, as in scripts/aot_report.py. Those that spill registers, need more shared
memory than the GPU has, or do not compile are left out, so that no time is spent on them on the GPU. To be run anew
when the block-sparse kernel or the static tiles change.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import aot_report
import torch
import typer

from dsattn.kernels import launch
from dsattn.kernels.launch import Tiles
from dsattn.kernels.tuning import MOST_CANDIDATES, load_space

FILE = Path(__file__).resolve().parent.parent / "kernels" / "tuning_space.py"
# Bytes of shared memory a program may use.
SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}
HEAD_DIMS = (64, 128)
# Families of plans and the block sizes methods use with them.
FAMILIES = {"fixed": ((128, 128), (128, 64), (64, 64)), "clusters": ((64, 64),), "all": ((64, 64),)}

HEADER = '''"""Tile shapes that autotuning may time, by GPU and variant; the first is the static one.

Written by scripts/tuning_space.py. None of them spills registers. Each is (queries, keys, warps, stages).
"""

from __future__ import annotations

'''


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


def survey(target: str, jobs: int) -> dict[str, list[Tiles]]:
    """The candidates of every variant that the compiler can hold in registers."""
    arch = aot_report.TARGETS[target].arch
    work = [
        (f"block_sparse d{dim} {block_q}x{block_k} {family}",
         aot_report.Variant("bf16", dim, block_q, block_k, family, tiles))
        for dim in HEAD_DIMS
        for family, blocks in FAMILIES.items()
        for block_q, block_k in blocks
        for tiles in candidates(block_q, block_k, dim, arch)
    ]  # fmt: skip
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        measured = pool.map(aot_report.measure, [variant for _, variant in work], [target] * len(work))
        found: dict[str, list[Tiles]] = {}
        for (name, variant), got in zip(work, measured, strict=True):
            kept = found.setdefault(name, [])
            if variant.tiles is not None and not got.error and not got.spills and got.shared <= SHARED[target]:
                kept.append(variant.tiles)
    # With nothing to choose from, or a static shape that spills, the variant is not tuned.
    return {
        name: kept
        for name, kept in found.items()
        if len(kept) > 1 and kept[0] == next(v.tiles for n, v in work if n == name)
    }


def render(space: dict[str, dict[str, list[Tiles]]]) -> str:
    """The module's text."""
    lines = ["SPACE: dict[str, dict[str, tuple[tuple[int, int, int, int], ...]]] = {"]
    for target, variants in space.items():
        lines += [f'    "{target}": {{']
        for name, shapes in variants.items():
            lines += [f'        "{name}": (', *(f"            {tuple(tiles)}," for tiles in shapes), "        ),"]
        lines += ["    },"]
    return HEADER + "\n".join([*lines, "}"]) + "\n"


def main(
    target: Annotated[
        list[str] | None, typer.Option(help=f"GPU, repeatable: {', '.join(SHARED)}. All by default.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes that compile at once.")] = 2,
) -> None:
    """Compile the candidates and write down those that fit."""
    if unknown := set(target or ()) - set(SHARED):
        raise typer.BadParameter(f"unknown target {', '.join(sorted(unknown))}; known: {', '.join(SHARED)}")
    if launch.why_unavailable(torch.device("cpu")) is None:
        raise typer.BadParameter("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    space = {name: {key: list(shapes) for key, shapes in load_space().get(name, {}).items()} for name in SHARED}
    for name in target or SHARED:
        space[name] = survey(name, jobs)
        print(f"{name}: {sum(map(len, space[name].values()))} shapes of {len(space[name])} variants")
        FILE.write_text(render({key: found for key, found in space.items() if found}), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
