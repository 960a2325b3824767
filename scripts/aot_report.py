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
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsattn.kernels import (
    block_sparse_backward,
    block_sparse_kernel,
    block_sparse_tma,
    block_tail,
    cluster_errors_triton,
    kmeans_triton,
    launch,
    linear_attention,
    permute,
    segments_triton,
)

BUDGET = Path(__file__).resolve().parent.parent / "kernels" / "resource_budget.json"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What a plan may ask of the kernel, by the flags it sets. Clusters are variable-size blocks in an order.
FEATURES = {
    "fixed": (),
    "order": ("order",),
    "clusters": ("order", "starts"),
    "tail": ("tail",),
    "block tail": ("block_tail",),
    "verdict": ("verdict",),
    "verdict clusters": ("verdict", "order", "starts"),
    "verdict skip": ("verdict", "order", "pv_skip"),
    "verdict all": ("verdict", "order", "starts", "tail", "key_lengths"),
    "all": ("order", "starts", "tail", "key_lengths"),
}
# The kernel with tensor descriptors, which only some targets have, with everything it takes or with nothing.
TMA = {"tma": (), "tma all": ("key_lengths", "block_tail"), "tma tail": ("key_lengths", "tail")}
# Instructions whose loss is a failure.
INSTRUCTIONS = ("wgmma", "tcgen05", "mma", "tma", "setmaxnreg", "cp_async", "ldmatrix")
# The kernels of the backward pass, which stand where features do; with the tiles each takes of the pair.
BACKWARD = {
    "backward q": (block_sparse_backward._backward_q, 0),
    "backward kv": (block_sparse_backward._backward_kv, 1),
}
# The same for the linear branch.
LINEAR = {"linear keys": (linear_attention._sum_keys, 0), "linear queries": (linear_attention._add_queries, 1)}


@dataclass(frozen=True)
class Variant:
    """One specialisation of the kernel; ``tiles`` None stands for what the launcher would pick."""

    dtype: str
    head_dim: int
    block_q: int
    block_k: int
    features: str
    tiles: launch.Tiles | launch.Specialized | None = None

    @property
    def name(self) -> str:
        return f"{self.dtype} d{self.head_dim} {self.block_q}x{self.block_k} {self.features}"

    @property
    def special(self) -> bool:
        return self.features in TMA


@dataclass(frozen=True)
class Helper:
    """One specialisation of a kernel that makes or completes plans, all its features on.

    kernel: "assign" (k-means), "errors" (of pooled clusters, in the output), "means" (over runs of positions),
    "permute" or "tail" (per query block).
    """

    kernel: str
    dtype: str
    head_dim: int

    special = False

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.dtype} d{self.head_dim}"


VARIANTS: list[Variant | Helper] = [
    *(Variant("bf16", 128, 128, 64, features) for features in FEATURES),
    *(
        Variant("bf16", dim, *blocks, "tma all")
        for dim in (64, 128, 256)
        for blocks in ((128, 128), (128, 64), (64, 64))
        if (dim, *blocks) != (256, 128, 128)
    ),
    *(Variant("bf16", dim, *blocks, "tma tail") for dim in (64, 128, 256) for blocks in ((128, 64), (64, 64))),
    Variant("bf16", 128, 128, 128, "tma"),
    Variant("fp16", 128, 128, 64, "tma"),
    Variant("bf16", 96, 128, 64, "tma"),
    Variant("bf16", 128, 64, 64, "fixed"),
    Variant("bf16", 64, 128, 64, "all"),
    Variant("bf16", 256, 64, 64, "fixed"),
    Variant("fp16", 128, 128, 64, "fixed"),
    Variant("fp32", 64, 64, 64, "all"),
    Variant("fp32", 128, 64, 64, "fixed"),
    *(
        Variant(dtype, head_dim, 64, 64, kernel)
        for dtype, head_dim in (("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 64), ("fp32", 128))
        for kernel in (*BACKWARD, *LINEAR)
    ),
    *(Helper("assign", dtype, dim) for dtype in ("bf16", "fp32") for dim in (64, 128, 256)),
    Helper("assign", "fp16", 128),
    *(Helper("errors", dtype, dim) for dtype in ("bf16", "fp32") for dim in (64, 128)),
    Helper("errors", "bf16", 256),
    *(Helper("means", dtype, dim) for dtype in ("bf16", "fp32") for dim in (64, 128)),
    Helper("permute", "bf16", 128),
    *(Helper("tail", dtype, dim) for dtype, dim in (("bf16", 128), ("bf16", 256), ("fp32", 128))),
]


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


def variants_of(target_name: str) -> list[Variant | Helper]:
    """What there is to compile for a target."""
    special = TARGETS[target_name].arch in (90, 100)
    return [variant for variant in VARIANTS if special or not variant.special]


def how_of(variant: Variant, target: GPUTarget) -> launch.Specialized:
    """How the launcher would compile the kernel with tensor descriptors."""
    if isinstance(variant.tiles, launch.Specialized):
        return variant.tiles
    shape = (variant.block_q, variant.block_k, variant.head_dim, DTYPES[variant.dtype], target.arch)
    how = launch.pick_specialized(*shape, tail="tail" in TMA[variant.features])
    if how is None:
        raise ValueError(f"no kernel with tensor descriptors for {variant.name} on {target}")
    return how


def tiles_of(variant: Variant | Helper, target: GPUTarget) -> launch.Tiles:
    """Tile shape that the launcher would pick."""
    if isinstance(variant, Helper):
        if variant.kernel == "tail":
            return launch.pick_tiles(64, 32, variant.head_dim, DTYPES[variant.dtype], target.arch)
        # "means" has tiles of its own, and Triton's default of stages.
        means = launch.Tiles(segments_triton.BLOCK_S, variant.head_dim, segments_triton.WARPS, 3)
        if variant.kernel == "permute":
            return launch.Tiles(permute.ROWS, variant.head_dim, permute.WARPS, 3)
        pick = {"assign": kmeans_triton.pick_tiles, "errors": cluster_errors_triton.pick_tiles}.get(variant.kernel)
        return pick(variant.head_dim, DTYPES[variant.dtype], target.arch) if pick else means
    if variant.special:
        return how_of(variant, target).tiles
    if isinstance(variant.tiles, launch.Tiles):
        return variant.tiles
    shape = (variant.block_q, variant.block_k, variant.head_dim, DTYPES[variant.dtype], target.arch)
    if variant.features in BACKWARD:
        return block_sparse_backward.pick_tiles(*shape)[BACKWARD[variant.features][1]]
    if variant.features in LINEAR:
        return linear_attention.pick_tiles(variant.head_dim, DTYPES[variant.dtype])[LINEAR[variant.features][1]]
    has = FEATURES[variant.features]
    return launch.pick_tiles(*shape, packed_tail="starts" in has and "tail" in has and "verdict" not in has)


def source(variant: Variant | Helper, target: GPUTarget) -> ASTSource:
    """The kernel as the launcher would specialise it: contiguous head_dim, 16-byte aligned tensors and rows."""
    if isinstance(variant, Helper):
        return helper_source(variant, target)
    if variant.special:
        return tma_source(variant, target)
    if variant.features in BACKWARD:
        return backward_source(variant, target)
    if variant.features in LINEAR:
        return linear_source(variant, target)
    dtype, dim = DTYPES[variant.dtype], variant.head_dim
    tiles = tiles_of(variant, target)
    known = {feature for features in FEATURES.values() for feature in features}
    has = {feature: feature in FEATURES[variant.features] for feature in known}
    packed = has["starts"] and not has["verdict"]
    has["key_lengths"] &= not packed
    element = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}[variant.dtype]
    padded = max(16, triton.next_power_of_2(dim))
    pointers: dict[str, str | None] = {
        **dict.fromkeys(("Q", "K", "V", "Out"), element),
        **dict.fromkeys(("Lse",), "*fp32"),
        **dict.fromkeys(("Counts", "ProgramOrder"), "*i32"),
        "Indices": "*i16",
        **dict.fromkeys(("QOrder", "KOrder"), "*i64" if has["order"] else None),
        **dict.fromkeys(("TileBlock", "TileStart", "QStarts", "KStarts"), "*i32" if has["starts"] else None),
        "KeyEnds": "*i32" if packed else None,
        "KeyLengths": "*i32" if has["key_lengths"] else None,
        **dict.fromkeys(("PooledK", "PooledV"), element if has["tail"] else None),
        "LogCount": "*fp32" if has["tail"] else None,
        "Kept": "*u8" if has["tail"] else None,
        **dict.fromkeys(("TailValue", "TailWeight"), "*fp32" if has["block_tail"] else None),
        "Threshold": "*fp32" if has["verdict"] else None,
        "Needed": "*i32" if has["verdict"] else None,
    }
    constants: dict[str, Any] = {
        "D": dim, "DV": dim, "BLOCK_D": padded, "BLOCK_DV": padded,
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "TILES_Q": 1 if has["starts"] else triton.cdiv(variant.block_q, tiles.block_m),
        "TILES_K": triton.cdiv(variant.block_k, tiles.block_n),
        "HAS_Q_ORDER": has["order"], "HAS_K_ORDER": has["order"],
        "HAS_Q_STARTS": has["starts"], "HAS_K_STARTS": has["starts"],
        "SEARCH": 10 if packed else 0,
        "HAS_KEY_LENGTHS": has["key_lengths"], "HAS_TAIL": has["tail"], "HAS_BLOCK_TAIL": has["block_tail"],
        "HAS_VERDICT": has["verdict"], "PV_SKIP": has["pv_skip"],
        "PRECISION": launch.precision(dtype, target.backend),
        "stride_qd": 1, "stride_kd": 1, "stride_vd": 1,
    }  # fmt: skip
    constants.update({name: None for name, kind in pointers.items() if kind is None})
    return _specialised(block_sparse_kernel._forward, pointers, constants)


def tma_source(variant: Variant, target: GPUTarget) -> ASTSource:
    """The kernel with tensor descriptors."""
    dim, how, has = variant.head_dim, how_of(variant, target), TMA[variant.features]
    element = {"bf16": "*bf16", "fp16": "*fp16"}[variant.dtype]
    pointers: dict[str, str | None] = {
        **dict.fromkeys(("Q", "K", "V", "Out"), element),
        **dict.fromkeys(("Counts", "ProgramOrder"), "*i32"),
        "Indices": "*i16",
        "Lse": "*fp32",
        "KeyLengths": "*i32" if "key_lengths" in has else None,
        **dict.fromkeys(("TailValue", "TailWeight"), "*fp32" if "block_tail" in has else None),
        "LogCount": "*fp32" if "tail" in has else None,
        "Kept": "*u8" if "tail" in has else None,
    }
    padded = max(16, triton.next_power_of_2(dim))
    constants: dict[str, Any] = {
        "D": dim, "DV": dim, "BLOCK_D": padded, "BLOCK_DV": padded,
        "BLOCK_M": how.tiles.block_m, "BLOCK_N": how.tiles.block_n,
        "TILES_Q": variant.block_q // how.tiles.block_m, "TILES_K": variant.block_k // how.tiles.block_n,
        "HAS_KEY_LENGTHS": "key_lengths" in has, "HAS_BLOCK_TAIL": "block_tail" in has,
        "HAS_TAIL": "tail" in has, "SPECIALIZE": how.roles,
        **{name: None for name, kind in pointers.items() if kind is None},
    }  # fmt: skip
    return _specialised(block_sparse_tma._forward_tma, pointers, constants)


def backward_source(variant: Variant, target: GPUTarget) -> ASTSource:
    """A kernel of the backward pass, with key lengths."""
    dim, tiles = variant.head_dim, tiles_of(variant, target)
    element = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}[variant.dtype]
    pointers: dict[str, str | None] = {
        **dict.fromkeys(("Q", "K", "V", "GradOut", "GradQ", "GradK", "GradV"), element),
        **dict.fromkeys(("Lse", "Delta"), "*fp32"),
        **dict.fromkeys(("Counts", "KeyLengths"), "*i32"),
        "Indices": "*i16",
    }
    padded = max(16, triton.next_power_of_2(dim))
    constants: dict[str, Any] = {
        "D": dim, "DV": dim, "BLOCK_D": padded, "BLOCK_DV": padded,
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "TILES_Q": triton.cdiv(variant.block_q, tiles.block_m), "TILES_K": triton.cdiv(variant.block_k, tiles.block_n),
        "HAS_KEY_LENGTHS": True, "PRECISION": launch.precision(DTYPES[variant.dtype], target.backend),
        "stride_qd": 1, "stride_kd": 1, "stride_vd": 1, "stride_od": 1,
    }  # fmt: skip
    return _specialised(BACKWARD[variant.features][0], pointers, constants)


def linear_source(variant: Variant, target: GPUTarget) -> ASTSource:
    """A kernel of the linear branch, with key lengths and the softmax feature map."""
    dtype, dim, tiles = DTYPES[variant.dtype], variant.head_dim, tiles_of(variant, target)
    kernel, index = LINEAR[variant.features]
    element = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}[variant.dtype]
    pointers: dict[str, str | None] = {
        **dict.fromkeys(("Q", "K", "V", "Out"), element),
        **dict.fromkeys(("State", "Norm", "Bias"), "*fp32"),
        "KeyLengths": "*i32",
    }
    constants: dict[str, Any] = {
        "D": dim, "DV": dim, "BLOCK_D": max(16, triton.next_power_of_2(dim)), "FEATURE_MAP": "softmax",
        "PRECISION": linear_attention.precision(dtype, target.backend), "stride_qd": 1, "stride_kd": 1, "stride_vd": 1,
        **({"BLOCK_M": tiles.block_m, "BLOCK_C": tiles.block_n} if index else
           {"BLOCK_C": tiles.block_m, "BLOCK_N": tiles.block_n, "HAS_KEY_LENGTHS": True}),
    }  # fmt: skip
    return _specialised(kernel, pointers, {name: x for name, x in constants.items() if name in kernel.arg_names})


def helper_source(variant: Helper, target: GPUTarget) -> ASTSource:
    """A kernel that makes or completes plans."""
    dim, tiles, element = variant.head_dim, tiles_of(variant, target), f"*{variant.dtype}"
    half = variant.dtype != "fp32"
    kernel, pointers = {
        "assign": (
            kmeans_triton._assign,
            {"X": element, "High": element, "Low": element if half else None, "Offset": "*fp32", "Labels": "*i32"},
        ),
        "errors": (
            cluster_errors_triton._cluster_errors,
            {
                **dict.fromkeys(("Queries", "K", "V", "Out"), element),
                **{"Order": "*i64", "Starts": "*i32"},
                **dict.fromkeys(("Means", "Lse", "Mass", "Error"), "*fp32"),
            },
        ),
        "means": (
            segments_triton._segment_means,
            {
                **{"X": element, "Order": "*i64", "Starts": "*i32", "KeyLengths": "*i32"},
                **dict.fromkeys(("Empty", "Weights", "Means", "Totals"), "*fp32"),
            },
        ),
        "permute": (permute._permute, {"X": element, "Order": "*i64", "Y": element}),
        "tail": (
            block_tail._block_tail,
            {
                **dict.fromkeys(("MeanQ", "PooledK", "PooledV"), element),
                **dict.fromkeys(("LogCount", "TailValue", "TailWeight"), "*fp32"),
                "Kept": "*u8",
            },
        ),
    }[variant.kernel]
    padded = max(16, triton.next_power_of_2(dim))
    constants: dict[str, Any] = {
        "D": dim, "DV": dim, "BLOCK_D": padded, "BLOCK_DV": padded,
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_S": tiles.block_m, "BLOCK_C": tiles.block_n,
        "HAS_LOW": half, "OUTPUT": True, "ROWS": permute.ROWS, "BACK": False,
        **dict.fromkeys(("HAS_ORDER", "HAS_STARTS", "HAS_KEY_LENGTHS", "HAS_EMPTY", "HAS_WEIGHTS"), True),
        "PRECISION": launch.precision(DTYPES[variant.dtype], target.backend),
        "stride_xd": 1, "stride_kd": 1, "stride_vd": 1,
    }  # fmt: skip
    constants = {name: x for name, x in constants.items() if name in kernel.arg_names}
    return _specialised(kernel, pointers, {**constants, **{name: None for name, x in pointers.items() if x is None}})


def _specialised(kernel: Any, pointers: dict[str, str | None], constants: dict[str, Any]) -> ASTSource:
    """Arguments without a kind are integers; pointers of kind None and constants are compiled in."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        kind = "fp32" if name in ("scale", "pv_skip", "scale_log2", "epsilon") else pointers.get(name) or "i32"
        signature[name] = "constexpr" if name in constants else kind
        aligned = kind.startswith("*") or re.fullmatch(r"stride_[qkvogwxy][bsh]", name)
        if name not in constants and aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


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
        listed = [{"target": t, "variant": name, **asdict(m)} for (t, name), m in results.items()]
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
