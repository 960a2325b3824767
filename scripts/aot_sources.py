"""The kernels of `scripts/aot_report.py` as their launchers would specialise them."""

from __future__ import annotations

import re
from typing import Any

import triton
from aot_variants import (
    BACKWARD,
    DTYPES,
    FEATURES,
    LINEAR,
    QUANTIZED,
    TMA,
    Helper,
    Variant,
    how_of,
    tiles_of,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsattn.kernels import (
    block_mass_triton,
    block_sparse_backward,
    block_sparse_kernel,
    block_sparse_tma,
    block_tail,
    cluster_errors_triton,
    kmeans_triton,
    launch,
    linear_attention,
    permute,
    quantize_triton,
    quantized_attention,
    segments_triton,
)


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
    if variant.features in QUANTIZED:
        return quantized_source(variant, target)
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
    }  # fmt: skip
    return _specialised(block_sparse_tma._forward_tma, pointers, constants)


def backward_source(variant: Variant, target: GPUTarget) -> ASTSource:
    """A pass of the backward kernel, with key lengths."""
    of_keys = variant.features == "backward kv"
    dim, tiles = variant.head_dim, tiles_of(variant, target)
    element = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}[variant.dtype]
    pointers: dict[str, str | None] = {
        **dict.fromkeys(("Q", "K", "V", "GradOut"), element),
        **dict.fromkeys(("GradK", "GradV") if of_keys else ("GradQ",), element),
        **dict.fromkeys(("Lse", "Delta"), "*fp32"),
        **{"Counts": "*i32", "Indices": "*i16", "KeyLengths": "*i32"},
    }
    padded = max(16, triton.next_power_of_2(dim))
    constants: dict[str, Any] = {
        "D": dim, "DV": dim, "BLOCK_D": padded, "BLOCK_DV": padded,
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "TILES_Q": triton.cdiv(variant.block_q, tiles.block_m), "TILES_K": triton.cdiv(variant.block_k, tiles.block_n),
        "OF_KEYS": of_keys, "HAS_KEY_LENGTHS": True,
        "PRECISION": launch.precision(DTYPES[variant.dtype], target.backend),
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
        **{"Lse": "*fp32", "Counts": "*i32", "Indices": "*i16", "First": "*i32"},
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
    nearest = {"X": element, "High": element, "Offset": "*fp32", "Labels": "*i32"}
    kernel, pointers = {
        "assign": (kmeans_triton._assign, nearest | {"Low": element if half else None}),
        "assign coarse": (kmeans_triton._assign, nearest),
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
        "HAS_LOW": half and variant.kernel != "assign coarse", "OUTPUT": True, "ROWS": permute.ROWS, "BACK": False,
        **dict.fromkeys(("HAS_ORDER", "HAS_STARTS", "HAS_KEY_LENGTHS", "HAS_EMPTY", "HAS_WEIGHTS"), True),
        **dict.fromkeys(("HAS_Q_ORDER", "HAS_K_ORDER"), True),
        **dict.fromkeys(("HAS_Q_STARTS", "HAS_K_STARTS"), variant.kernel == "mass clusters"),
        "PRECISION": launch.precision(DTYPES[variant.dtype], target.backend),
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
        aligned = kind.startswith("*") or re.fullmatch(r"stride_[qkvogwxy][bsh]", name)
        if name not in constants and aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
