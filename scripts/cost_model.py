"""Least time of every kernel beside the forward pass, from formulas and the resource report; no GPU is asked.

    python scripts/aot_report.py --json > resources.json
    python scripts/cost_model.py --resources resources.json --out benchmarks/notes/cost_model.md

Bytes are those that must cross device memory (inputs once, outputs once), operations those of the formulas in the
kernels' docstrings. The least time is the longest of bytes over bandwidth, tensor-core operations over their rate,
other arithmetic over the fp32 rate, and exponentials over their rate: a kernel cannot be faster, and how much slower it
is says what is left. Occupancy follows from registers, shared memory and warps. ``--measured`` takes a JSON file
``{gpu: {kernel: milliseconds}}`` and puts what was measured behind what was predicted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer


class Gpu(NamedTuple):
    """Rates by datasheet, dense: TB/s, 10^12 operations per second; one SM's (CU's) limits for occupancy.

    exp: exponentials per second, 16 per clock and SM (CU). fp8 is with fp32 accumulation.
    """

    target: str
    bandwidth: float
    bf16: float
    tf32: float
    int8: float
    fp8: float | None
    fp32: float
    exp: float
    units: int
    shared: int
    warps: int


# Datasheets of the vendors; boost clocks (GHz) 1.41, 1.83, 1.83, 2.52, 2.41, 2.10.
GPUS = {
    "A100 SXM": Gpu("sm_80", 2.039, 312, 156, 624, None, 19.5, 16 * 108 * 1.41e-3, 108, 164 << 10, 64),
    "H100 SXM": Gpu("sm_90", 3.35, 989, 494, 1979, 1979, 67, 16 * 132 * 1.83e-3, 132, 228 << 10, 64),
    "H200 SXM": Gpu("sm_90", 4.8, 989, 494, 1979, 1979, 67, 16 * 132 * 1.83e-3, 132, 228 << 10, 64),
    "RTX 4090": Gpu("sm_89", 1.008, 165, 82.6, 661, 330, 82.6, 16 * 128 * 2.52e-3, 128, 100 << 10, 48),
    "RTX 5090": Gpu("sm_120", 1.792, 210, 105, 838, 419, 105, 16 * 170 * 2.41e-3, 170, 100 << 10, 48),
    # fp32 products run on the matrix units there, not as TF32.
    "MI300X": Gpu("gfx942", 5.3, 1307, 163, 2615, None, 163, 16 * 304 * 2.1e-3, 304, 64 << 10, 32),
}


class Shape(NamedTuple):
    """One attention call with B = 1 and bf16: tokens, heads, head_dim."""

    tokens: int
    heads: int
    dim: int


SHAPES = {
    "wan-480p": Shape(32_760, 12, 128),
    "wan-720p": Shape(75_600, 40, 128),
    "hunyuan-720p": Shape(119_056, 24, 128),
    "ltx": Shape(28_672, 32, 128),
}
# Block sizes, density and clusters of the calls that are modelled; clusters are the most that `semantic` makes.
BLOCK_Q, BLOCK_K, DENSITY, Q_CLUSTERS, K_CLUSTERS = 128, 64, 0.25, 300, 1000
ELEMENT = 2


@dataclass(frozen=True)
class Cost:
    """What one launch needs at least.

    variant: its row of the resource report; None is not a kernel of this package.
    moved: bytes over device memory. bf16, tf32, int8, fp8: tensor-core operations (multiply and add count as two).
    vector: other fp32 operations. exp: exponentials.
    """

    kernel: str
    variant: str | None
    moved: float
    bf16: float = 0
    tf32: float = 0
    int8: float = 0
    fp8: float = 0
    vector: float = 0
    exp: float = 0
    note: str = ""

    @property
    def operations(self) -> float:
        """All arithmetic but exponentials."""
        return self.bf16 + self.tf32 + self.int8 + self.fp8 + self.vector

    def times(self, gpu: Gpu) -> dict[str, float] | None:
        """Milliseconds by what takes them; None where the GPU has no such products."""
        rates = {"bf16": gpu.bf16, "tf32": gpu.tf32, "int8": gpu.int8, "fp8": gpu.fp8}
        needed = {name: getattr(self, name) for name in rates if getattr(self, name)}
        if any(rates[name] is None for name in needed):
            return None
        tensor = sum(operations / (rates[name] or 1) for name, operations in needed.items())
        ms = {"memory": self.moved / gpu.bandwidth, "tensor cores": tensor, "fp32": self.vector / gpu.fp32}
        return {name: x * 1e-9 for name, x in {**ms, "exponentials": self.exp / gpu.exp}.items()}


def costs(shape: Shape) -> list[Cost]:
    """Every kernel of a call."""
    return [*clustering(shape), *planning(shape), *quantised(shape), *training(shape)]


def clustering(shape: Shape) -> list[Cost]:
    """K-means of queries and keys, and what it feeds."""
    tokens, heads, dim = shape
    rows = tokens * heads
    tensor = rows * dim * ELEMENT
    both = Q_CLUSTERS + K_CLUSTERS
    return [
        *(
            Cost(
                f"k-means: assign q and k, {when}",
                variant,
                2 * tensor + 2 * 4 * rows,
                bf16=products * 2 * rows * both * dim,
                vector=3 * rows * both,
                note=note,
            )
            for when, variant, products, note in (
                ("before the last iteration", "assign coarse bf16 d128", 1, "one product: centroids are rounded"),
                ("last iteration", "assign bf16 d128", 2, "two products: a centroid is held to 16 bits"),
            )
        ),
        Cost(
            "k-means: sort of labels (torch)",
            None,
            2 * rows * 4 * 2 * 12,
            note="radix sort, 4 passes over 4-byte keys and 8-byte positions",
        ),
        Cost(
            "k-means: segment means of q and k",
            "means bf16 d128",
            2 * (tensor + 8 * rows) + 4 * heads * both * dim,
            vector=2 * rows * dim,
        ),
        Cost(
            "cluster errors (output)",
            "errors bf16 d128",
            2 * tensor + 8 * rows + 8 * heads * Q_CLUSTERS * K_CLUSTERS,
            bf16=4 * Q_CLUSTERS * rows * dim,
            vector=8 * Q_CLUSTERS * rows,
            exp=Q_CLUSTERS * rows,
            note="and attention of the centroids before it, as much again",
        ),
    ]


def planning(shape: Shape) -> list[Cost]:
    """What a plan of equal blocks needs beside the forward pass."""
    tokens, heads, dim = shape
    rows, tensor = tokens * heads, tokens * heads * dim * ELEMENT
    q_blocks, k_blocks = -(-tokens // BLOCK_Q), -(-tokens // BLOCK_K)
    pairs = rows * tokens
    return [
        Cost("pooling of k and v", "means bf16 d128", 2 * tensor + 8 * heads * k_blocks * dim, vector=2 * rows * dim),
        Cost(
            "tail per query block",
            "tail bf16 d128",
            heads * (q_blocks + 2 * k_blocks) * dim * ELEMENT + heads * q_blocks * (k_blocks + 4 * dim),
            bf16=4 * heads * q_blocks * k_blocks * dim,
            exp=heads * q_blocks * k_blocks,
        ),
        Cost(
            "permutation as a pass (q, k, v, out)",
            "permute bf16 d128",
            4 * 2 * tensor + 4 * 8 * rows,
            note="for tensor descriptors only: other kernels gather rows of 256 bytes on load and scatter on store",
        ),
        Cost(
            "verdict bits",
            "bf16 d128 128x64 verdict",
            DENSITY * heads * q_blocks * k_blocks / 8,
            vector=DENSITY * 2 * pairs,
            note="part of the forward pass: two comparisons per kept pair, hidden by its products",
        ),
        Cost(
            "block mass given LSE",
            "mass bf16 d128",
            2 * tensor + 4 * rows + 4 * heads * q_blocks * k_blocks,
            bf16=2 * pairs * dim,
            vector=3 * pairs,
            exp=pairs,
        ),
    ]


def quantised(shape: Shape) -> list[Cost]:
    """Quantisation, and the forward pass it is for, beside the same in bf16."""
    tokens, heads, dim = shape
    rows, tensor = tokens * heads, tokens * heads * dim * ELEMENT
    kept = DENSITY * rows * tokens
    half, call = 2 * kept * dim, 4 * tensor + 4 * rows
    softmax = {"vector": 4 * kept, "exp": kept}
    smaller = call - tensor
    return [
        Cost("quantise: statistics of k and v", "statistics bf16 d128", 2 * tensor, vector=2 * rows * dim),
        Cost("quantise: k and v", "quantize bf16 d128", 3 * tensor, vector=10 * rows * dim),
        Cost("attention, bf16 (for comparison)", "bf16 d128 128x64 fixed", call, bf16=2 * half, **softmax),
        Cost("attention, int8_qk", "bf16 d128 128x64 int8_qk", call - tensor / 2, int8=half, bf16=half, **softmax),
        Cost("attention, fp8_pv", "bf16 d128 128x64 fp8_pv", call - tensor / 2, bf16=half, fp8=half, **softmax),
        Cost("attention, int8_qk_fp8_pv", "bf16 d128 128x64 int8_qk_fp8_pv", smaller, int8=half, fp8=half, **softmax),
    ]


def training(shape: Shape) -> list[Cost]:
    """Backward passes and linear attention over all keys."""
    tokens, heads, dim = shape
    rows, tensor = tokens * heads, tokens * heads * dim * ELEMENT
    kept, product = DENSITY * rows * tokens, 2 * rows * dim * dim
    softmax = {"vector": 4 * kept, "exp": kept}
    return [
        Cost("backward: row sums (delta)", "row sums bf16 d128", 2 * tensor + 8 * rows, vector=2 * rows * dim),
        Cost(
            "backward: dQ", "bf16 d128 64x64 backward q", 5 * tensor + 8 * rows, bf16=3 * 2 * kept * dim, **softmax
        ),
        Cost(
            "backward: dK, dV", "bf16 d128 64x64 backward kv", 6 * tensor + 8 * rows, bf16=4 * 2 * kept * dim, **softmax
        ),
        Cost(
            "linear branch: sums over keys", "bf16 d128 64x64 linear keys", 2 * tensor, tf32=product,
            vector=5 * rows * dim, exp=rows * dim,
        ),
        Cost(
            "linear branch: queries", "bf16 d128 64x64 linear queries", 3 * tensor, tf32=product,
            vector=8 * rows * dim, exp=rows * dim,
        ),
        Cost(
            "linear branch: backward (torch)", None, 14 * 2 * tensor, tf32=6 * product, vector=20 * rows * dim,
            exp=2 * rows * dim, note="six products of [S, D] and [D, D] in fp32, whose tensors are what is moved",
        ),
    ]  # fmt: skip


def occupancy(resources: dict[str, Any], gpu: Gpu) -> float:
    """Share of an SM's (CU's) warps that fit at once, by registers, shared memory and warps."""
    warps, registers, shared = resources["warps"], max(1, resources["registers"]), resources["shared"]
    by_shared = gpu.shared // (shared + 1024) if gpu.target != "gfx942" else gpu.shared // max(1, shared)
    if gpu.target == "gfx942":
        # 512 registers of each of four SIMDs' lanes, given out in eights; at most eight waves per SIMD.
        by_registers = 4 * min(8, 512 // (-(-registers // 8) * 8)) // warps
    else:
        by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    blocks = min(by_registers, by_shared, gpu.warps // warps)
    return blocks * warps / gpu.warps


def bound_cell(cost: Cost, gpu: Gpu, measured: float | None) -> str:
    """Least milliseconds, what takes them, and the measured ones."""
    times = cost.times(gpu)
    if times is None:
        return "no such products"
    name = max(times, key=lambda key: times[key])
    behind = "" if measured is None else f", measured {measured:.3g} ({times[name] / measured:.0%})"
    return f"{times[name]:.3g} {name}{behind}"


def render(resources: dict[str, Any], measured: dict[str, dict[str, float]], shape_name: str) -> str:
    """The whole note."""
    shape = SHAPES[shape_name]
    found = {(row["target"], row["variant"]): row for row in resources["results"]}
    listed = costs(shape)
    lines = [
        "# Cost model of the kernels beside the forward pass", "",
        f"Rendered by `scripts/cost_model.py` from formulas and the resource report of Triton {resources['triton']}; "
        + ("measured times where there are any." if measured else "nothing here is measured on a GPU yet."), "",
        f"Shape {shape_name}: {shape.tokens:,} tokens, {shape.heads} heads, head_dim {shape.dim}, batch 1, bfloat16; "
        f"blocks of {BLOCK_Q} x {BLOCK_K}, density {DENSITY}, {Q_CLUSTERS} and {K_CLUSTERS} clusters. GB are bytes "
        "that must cross device memory, intensity is operations per such byte.", "",
        "| kernel | GB | GFLOP | G exp | intensity | note |", "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for cost in listed:
        cells = (cost.moved / 1e9, cost.operations / 1e9, cost.exp / 1e9, cost.operations / max(cost.moved, 1))
        lines.append(f"| {cost.kernel} | {' | '.join(f'{x:.3g}' for x in cells)} | {cost.note} |")
    lines += ["", "Least time in ms and what bounds it:", ""]
    lines += [f"| kernel | {' | '.join(GPUS)} |", f"| --- |{' --- |' * len(GPUS)}"]
    for cost in listed:
        cells = [bound_cell(cost, gpu, measured.get(name, {}).get(cost.kernel)) for name, gpu in GPUS.items()]
        lines.append(f"| {cost.kernel} | {' | '.join(cells)} |")
    lines += ["", "Occupancy (share of resident warps) and registers per thread of the compiled kernels:", ""]
    lines += [f"| kernel | {' | '.join(GPUS)} |", f"| --- |{' --- |' * len(GPUS)}"]
    for cost in listed:
        if cost.variant is None:
            continue
        rows = [(found.get((gpu.target, cost.variant)), gpu) for gpu in GPUS.values()]
        cells = ["-" if row is None else f"{occupancy(row, gpu):.0%} ({row['registers']})" for row, gpu in rows]
        lines.append(f"| {cost.kernel} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(
    resources: Annotated[Path, typer.Option(help="Output of aot_report.py --json.")],
    out: Annotated[Path, typer.Option(help="Markdown file to write.")],
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "wan-720p",
    measured: Annotated[Path | None, typer.Option(help="JSON: {gpu: {kernel: milliseconds}}.")] = None,
) -> None:
    """Render the note."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"shape must be one of {', '.join(SHAPES)}; got {shape!r}")
    times = json.loads(measured.read_text()) if measured else {}
    known = {cost.kernel for cost in costs(SHAPES[shape])}
    for gpu, by_kernel in times.items():
        if gpu not in GPUS or (unknown := set(by_kernel) - known):
            what = f"GPU {gpu!r}" if gpu not in GPUS else f"kernel {', '.join(sorted(unknown))}"
            raise typer.BadParameter(f"{measured} names an unknown {what}")
    out.write_text(render(json.loads(resources.read_text()), times, shape))


if __name__ == "__main__":
    typer.run(main)
