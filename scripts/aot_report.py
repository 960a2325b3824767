"""Compiles the Triton kernels for many GPUs, on a machine without any, and shows what it needs there.

`python scripts/aot_report.py` prints registers, spills, shared memory and the matrix and copy instructions of every
variant. `--check` compares with kernels/resource_budget.json and fails on a spill or a compile error too many.
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
    block_mass_triton,
    block_sparse,
    block_sparse_backward,
    block_tail,
    cluster_errors_triton,
    kmeans_triton,
    linear_attention,
    quantize_triton,
    quantized_attention,
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
# The passes of the backward kernel, which stand where features do; with the tiles each takes of the pair.
BACKWARD = {"backward q": 0, "backward kv": 1}
# The same for the linear branch.
LINEAR = {"linear keys": (linear_attention._sum_keys, 0), "linear queries": (linear_attention._add_queries, 1)}
# The same for quantised attention: keys in INT8, values in FP8, features of the plan.
QUANTIZED: dict[str, tuple[bool, bool, tuple[str, ...]]] = {
    "int8_qk": (True, False, ()),
    "int8_qk all": (True, False, FEATURES["all"]),
    "fp8_pv": (False, True, ()),
    "int8_qk_fp8_pv": (True, True, ()),
    "int8_qk_fp8_pv clusters": (True, True, FEATURES["clusters"]),
    "int8_qk_fp8_pv all": (True, True, FEATURES["all"]),
}


@dataclass(frozen=True)
class Variant:
    """One specialisation of the kernel."""

    dtype: str
    head_dim: int
    block_q: int
    block_k: int
    features: str

    @property
    def name(self) -> str:
        return f"{self.dtype} d{self.head_dim} {self.block_q}x{self.block_k} {self.features}"


@dataclass(frozen=True)
class Helper:
    """One specialisation of a kernel beside attention, all its features on.

    kernel: "assign" (k-means), "errors" (of pooled clusters, in the output), "means" (over runs of positions),
    "tail" (per query block), "mass" (of block pairs, equal blocks), "mass clusters", "statistics" and "quantize" (of
    keys and values) or "row sums" (delta of the backward pass).
    """

    kernel: str
    dtype: str
    head_dim: int

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.dtype} d{self.head_dim}"


VARIANTS: list[Variant | Helper] = [
    *(Variant("bf16", 128, 128, 64, features) for features in FEATURES),
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
    *(Helper("tail", dtype, dim) for dtype, dim in (("bf16", 128), ("bf16", 256), ("fp32", 128))),
    *(Variant("bf16", 128, 128, 64, features) for features in QUANTIZED),
    *(Variant("bf16", dim, 128, 64, features) for dim in (64, 256) for features in ("int8_qk", "int8_qk_fp8_pv")),
    Variant("fp16", 128, 128, 64, "int8_qk_fp8_pv"),
    *(Variant("fp16", 128, 64, 64, kernel) for kernel in BACKWARD),
    *(Helper(kernel, dtype, 128) for kernel in ("mass", "mass clusters") for dtype in ("bf16", "fp32")),
    *(Helper(kernel, "bf16", dim) for kernel in ("statistics", "quantize", "row sums") for dim in (64, 128, 256)),
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
    cp_async: int = 0
    error: str | None = None


def runs_on(variant: Variant | Helper, target_name: str) -> bool:
    """Whether the launcher would run it there: FP8 needs the tensor cores of compute capability 8.9."""
    fp8 = isinstance(variant, Helper) and variant.kernel == "quantize" or "fp8" in variant.name
    return not fp8 or target_name not in ("sm_80", "gfx942")


def tiles_of(variant: Variant | Helper, target: GPUTarget) -> block_sparse.Tiles:
    """Tile shape that the launcher would pick."""
    if isinstance(variant, Helper):
        dim, dtype = variant.head_dim, DTYPES[variant.dtype]
        # Kernels that only stream have tiles of their own, and Triton's default of stages.
        stream = {"means": segments_triton.BLOCK_S, "statistics": quantize_triton.BLOCK_S, "quantize": 64,
                  "row sums": block_sparse_backward.BLOCK_R}  # fmt: skip
        if variant.kernel in stream:
            warps = quantize_triton.warps_for(dim) if variant.kernel in ("statistics", "quantize") else 4
            return block_sparse.Tiles(stream[variant.kernel], dim, warps, 3)
        if variant.kernel in ("assign", "errors"):
            pick = kmeans_triton.pick_tiles if variant.kernel == "assign" else cluster_errors_triton.pick_tiles
            return pick(dim, dtype, target.arch)
        tiles = block_sparse.pick_tiles(*((64, 32) if variant.kernel == "tail" else (128, 64)), dim, dtype, target.arch)
        if variant.kernel.startswith("mass"):
            return block_mass_triton.fit_tiles(tiles, dtype, variant.kernel == "mass")
        return tiles
    if variant.features in QUANTIZED:
        return quantized_attention.pick_tiles(
            variant.block_q, min(64, max(32, variant.block_k)), variant.head_dim, target.arch,
            "tail" in QUANTIZED[variant.features][2],
        )  # fmt: skip
    shape = (variant.block_q, variant.block_k, variant.head_dim, DTYPES[variant.dtype], target.arch)
    if variant.features in BACKWARD:
        return block_sparse_backward.pick_tiles(*shape)[BACKWARD[variant.features]]
    if variant.features in LINEAR:
        return linear_attention.pick_tiles(variant.head_dim, DTYPES[variant.dtype])[LINEAR[variant.features][1]]
    return block_sparse.pick_tiles(*shape)


def source(variant: Variant | Helper, target: GPUTarget) -> ASTSource:
    """The kernel as the launcher would specialise it: contiguous head_dim, 16-byte aligned tensors and rows."""
    if isinstance(variant, Helper):
        return helper_source(variant, target)
    if variant.features in BACKWARD:
        return backward_source(variant, target)
    if variant.features in LINEAR:
        return linear_source(variant, target)
    if variant.features in QUANTIZED:
        return quantized_source(variant, target)
    dtype, dim = DTYPES[variant.dtype], variant.head_dim
    tiles = tiles_of(variant, target)
    known = {feature for features in FEATURES.values() for feature in features}
    has = {feature: feature in FEATURES[variant.features] for feature in known}
    element = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}[variant.dtype]
    padded = max(16, triton.next_power_of_2(dim))
    pointers: dict[str, str | None] = {
        **dict.fromkeys(("Q", "K", "V", "Out"), element),
        **dict.fromkeys(("Lse",), "*fp32"),
        **dict.fromkeys(("Counts", "Indices"), "*i32"),
        **dict.fromkeys(("QOrder", "KOrder"), "*i64" if has["order"] else None),
        **dict.fromkeys(("TileBlock", "TileStart", "QStarts", "KStarts"), "*i32" if has["starts"] else None),
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
        "TILES_Q": triton.cdiv(variant.block_q, tiles.block_m), "TILES_K": triton.cdiv(variant.block_k, tiles.block_n),
        "HAS_Q_ORDER": has["order"], "HAS_K_ORDER": has["order"],
        "HAS_Q_STARTS": has["starts"], "HAS_K_STARTS": has["starts"],
        "HAS_KEY_LENGTHS": has["key_lengths"], "HAS_TAIL": has["tail"], "HAS_BLOCK_TAIL": has["block_tail"],
        "HAS_VERDICT": has["verdict"], "PV_SKIP": has["pv_skip"],
        "PRECISION": block_sparse.precision(dtype, target.backend),
        "stride_qd": 1, "stride_kd": 1, "stride_vd": 1,
    }  # fmt: skip
    return _specialised(block_sparse._forward, pointers, constants)


def backward_source(variant: Variant, target: GPUTarget) -> ASTSource:
    """A pass of the backward kernel, with key lengths."""
    of_keys = variant.features == "backward kv"
    dim, tiles = variant.head_dim, tiles_of(variant, target)
    element = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}[variant.dtype]
    pointers: dict[str, str | None] = {
        **dict.fromkeys(("Q", "K", "V", "GradOut"), element),
        **dict.fromkeys(("GradK", "GradV") if of_keys else ("GradQ",), element),
        **dict.fromkeys(("Lse", "Delta"), "*fp32"),
        **dict.fromkeys(("Counts", "Indices", "KeyLengths"), "*i32"),
    }
    padded = max(16, triton.next_power_of_2(dim))
    constants: dict[str, Any] = {
        "D": dim, "DV": dim, "BLOCK_D": padded, "BLOCK_DV": padded,
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "TILES_Q": triton.cdiv(variant.block_q, tiles.block_m), "TILES_K": triton.cdiv(variant.block_k, tiles.block_n),
        "OF_KEYS": of_keys, "HAS_KEY_LENGTHS": True,
        "PRECISION": block_sparse.precision(DTYPES[variant.dtype], target.backend),
        "stride_qd": 1, "stride_kd": 1, "stride_vd": 1, "stride_od": 1,
    }  # fmt: skip
    return _specialised(block_sparse_backward._backward, pointers, constants)


def quantized_source(variant: Variant, target: GPUTarget) -> ASTSource:
    """Attention with quantised products."""
    dim, tiles = variant.head_dim, tiles_of(variant, target)
    int8_qk, fp8_pv, has = QUANTIZED[variant.features]
    element, padded = f"*{variant.dtype}", max(32, triton.next_power_of_2(variant.head_dim))
    pointers: dict[str, str | None] = {
        **dict.fromkeys(("Q", "Out", *(() if int8_qk else ("K",)), *(() if fp8_pv else ("V",))), element),
        **({"K8": "*i8", "KScale": "*fp32", "Mean": "*fp32"} if int8_qk else {}),
        **({"V8": "*fp8e4nv", "VScale": "*fp32"} if fp8_pv else {}),
        **{"Lse": "*fp32", "Counts": "*i32", "Indices": "*i32", "First": "*i32"},
        **(dict.fromkeys(("QOrder", "KOrder"), "*i64") if "order" in has else {}),
        **(dict.fromkeys(("TileBlock", "TileStart", "QStarts", "KStarts"), "*i32") if "starts" in has else {}),
        **({"KeyLengths": "*i32"} if "key_lengths" in has else {}),
        **({"PooledK": element, "PooledV": element, "LogCount": "*fp32", "Kept": "*u8"} if "tail" in has else {}),
    }
    flags = {"HAS_Q_ORDER": "order", "HAS_K_ORDER": "order", "HAS_Q_STARTS": "starts", "HAS_K_STARTS": "starts",
             "HAS_BLOCK_TAIL": "block_tail", "HAS_KEY_LENGTHS": "key_lengths", "HAS_TAIL": "tail"}  # fmt: skip
    constants: dict[str, Any] = {
        "D": dim, "DV": dim, "BLOCK_D": padded, "BLOCK_DV": padded,
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "TILES_Q": triton.cdiv(variant.block_q, tiles.block_m), "TILES_K": triton.cdiv(variant.block_k, tiles.block_n),
        "BLOCK_T": quantized_attention.BLOCK_T, "INT8_QK": int8_qk, "FP8_PV": fp8_pv, "INTERPRETED": False,
        "PRECISION": "ieee", **{flag: feature in has for flag, feature in flags.items()},
        "stride_qd": 1, "stride_kd": 1, "stride_vd": 1,
    }  # fmt: skip
    return _specialised(quantized_attention._forward, pointers, constants)


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
    layout = {"Lse": "*fp32", "Mass": "*fp32", "QOrder": "*i64", "KOrder": "*i64", "KeyLengths": "*i32"}
    starts = {"QStarts": "*i32", "KStarts": "*i32"}
    flat = block_mass_triton.compiles_flat(target.arch)
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
        "tail": (
            block_tail._block_tail,
            {
                **dict.fromkeys(("MeanQ", "PooledK", "PooledV"), element),
                **dict.fromkeys(("LogCount", "TailValue", "TailWeight"), "*fp32"),
                "Kept": "*u8",
            },
        ),
        "mass": (block_mass_triton._block_mass, {**dict.fromkeys(("Q", "K"), element), **layout}),
        "mass clusters": (block_mass_triton._block_mass, {**dict.fromkeys(("Q", "K"), element), **layout, **starts}),
        "statistics": (
            quantize_triton._statistics,
            {"K": element, "V": element, "Sums": "*fp32", "Peaks": "*fp32", "KOrder": "*i64", "KeyLengths": "*i32"},
        ),
        "quantize": (
            quantize_triton._quantize,
            {
                **{"K": element, "V": element, "K8": "*i8", "V8": "*fp8e4nv", "KOrder": "*i64"},
                **dict.fromkeys(("Mean", "VScale", "KScale"), "*fp32"),
                **dict.fromkeys(("Start", "Stop"), "*i32"),
            },
        ),
        "row sums": (
            block_sparse_backward._row_sums,
            {"Out": element, "GradOut": element, "GradLse": "*fp32", "Delta": "*fp32"},
        ),
    }[variant.kernel]
    padded = max(32 if variant.kernel in ("statistics", "quantize") else 16, triton.next_power_of_2(dim))
    constants: dict[str, Any] = {
        "D": dim, "DV": dim, "BLOCK_D": padded, "BLOCK_DV": padded,
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_S": tiles.block_m, "BLOCK_C": tiles.block_n,
        "BLOCK_R": tiles.block_m, "TILE": tiles.block_m, "CHUNK": quantize_triton.CHUNK, "TILES_K": 1,
        "INT8_QK": True, "FP8_PV": True, "INTERPRETED": False, "FLAT": variant.kernel == "mass" and flat,
        "HAS_LOW": half, "OUTPUT": True,
        **dict.fromkeys(("HAS_ORDER", "HAS_STARTS", "HAS_KEY_LENGTHS", "HAS_EMPTY", "HAS_WEIGHTS"), True),
        **dict.fromkeys(("HAS_Q_ORDER", "HAS_K_ORDER"), True),
        **dict.fromkeys(("HAS_Q_STARTS", "HAS_K_STARTS"), variant.kernel == "mass clusters"),
        "PRECISION": block_sparse.precision(DTYPES[variant.dtype], target.backend),
        **dict.fromkeys((f"stride_{x}d" for x in "xkvqog"), 1),
    }  # fmt: skip
    if variant.kernel == "mass":
        constants["TILES_K"] = triton.cdiv(64, tiles.block_n)
    constants = {name: x for name, x in constants.items() if name in kernel.arg_names}
    return _specialised(kernel, pointers, constants)


def _specialised(kernel: Any, pointers: dict[str, str | None], constants: dict[str, Any]) -> ASTSource:
    """Names in capitals are pointers (None without a kind) or constants, others integers; constants are compiled in."""
    absent = {name: None for name in kernel.arg_names if name[0].isupper() and name not in constants}
    constants = {**constants, **{name: None for name in absent if pointers.get(name) is None}}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        kind = "fp32" if name in ("scale", "pv_skip", "scale_log2", "epsilon") else pointers.get(name) or "i32"
        signature[name] = "constexpr" if name in constants else kind
        aligned = kind.startswith("*") or re.fullmatch(r"stride_[qkvogwx][bsh]", name)
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
    return lines


def _write_budget(results: dict[tuple[str, str], Measured], budget: dict[str, Any]) -> None:
    for (target, name), got in results.items():
        if got.error:
            raise SystemExit(f"{target} {name}: does not compile: {got.error}")
        # Compiler versions differ by a few hundred bytes of scratch: budgets are whole KiB with one to spare.
        shared = (got.shared // 1024 + 2) * 1024
        budget.setdefault(target, {})[name] = {"spills": got.spills, "shared": shared}
    rows = {
        target: "{\n" + ",\n".join(f'    "{name}": {json.dumps(b)}' for name, b in per.items()) + "\n  }"
        for target, per in budget.items()
    }
    BUDGET.write_text("{\n" + ",\n".join(f'  "{target}": {row}' for target, row in rows.items()) + "\n}\n")


def _table(results: dict[tuple[str, str], Measured]) -> Table:
    table = Table(title=f"kernels, Triton {triton.__version__}")
    columns = ("registers", "spills", "shared", "wgmma", "tcgen05", "mma", "tma", "cp_async")
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
    if block_sparse.why_unavailable(torch.device("cpu")) is None:
        raise typer.BadParameter("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    work = [(v, t) for t in target or TARGETS for v in VARIANTS if variant in v.name and runs_on(v, t)]
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
        Console(width=None if Console().is_terminal else 150).print(_table(results))
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
