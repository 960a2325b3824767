"""What `scripts/aot_report.py` compiles: GPUs, specialisations of the kernels, and the tiles of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton.backends.compiler import GPUTarget

from dsattn.kernels import (
    block_mass_triton,
    block_sparse_backward,
    cluster_errors_triton,
    kmeans_triton,
    launch,
    linear_attention,
    permute,
    quantize_triton,
    quantized_attention,
    segments_triton,
)

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
    """One specialisation of a kernel beside attention, all its features on.

    kernel: "assign" (k-means), "assign coarse" (to rounded centroids), "errors" (of pooled clusters, in the output),
    "means" (over runs of positions), "permute", "tail" (per query block), "mass" (of block pairs, equal blocks), "mass
    clusters", "statistics" and "quantize" (of keys and values) or "row sums" (delta of the backward pass).
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
    Helper("assign coarse", "bf16", 128),
    *(Helper("errors", dtype, dim) for dtype in ("bf16", "fp32") for dim in (64, 128)),
    Helper("errors", "bf16", 256),
    *(Helper("means", dtype, dim) for dtype in ("bf16", "fp32") for dim in (64, 128)),
    Helper("permute", "bf16", 128),
    *(Helper("tail", dtype, dim) for dtype, dim in (("bf16", 128), ("bf16", 256), ("fp32", 128))),
    *(Variant("bf16", 128, 128, 64, features) for features in QUANTIZED),
    *(Variant("bf16", dim, 128, 64, features) for dim in (64, 256) for features in ("int8_qk", "int8_qk_fp8_pv")),
    Variant("fp16", 128, 128, 64, "int8_qk_fp8_pv"),
    *(Variant("fp16", 128, 64, 64, kernel) for kernel in BACKWARD),
    *(Helper(kernel, dtype, 128) for kernel in ("mass", "mass clusters") for dtype in ("bf16", "fp32")),
    *(Helper(kernel, "bf16", dim) for kernel in ("statistics", "quantize", "row sums") for dim in (64, 128, 256)),
]


def variants_of(target_name: str) -> list[Variant | Helper]:
    """What there is to compile for a target: what the launcher would run there."""
    return [variant for variant in VARIANTS if runs_on(variant, target_name)]


def runs_on(variant: Variant | Helper, target_name: str) -> bool:
    """Tensor descriptors are for Hopper and datacenter Blackwell; FP8 needs tensor cores of capability 8.9."""
    if variant.special:
        return TARGETS[target_name].arch in (90, 100)
    fp8 = isinstance(variant, Helper) and variant.kernel == "quantize" or "fp8" in variant.name
    return not fp8 or target_name not in ("sm_80", "gfx942")


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
        return helper_tiles(variant, target)
    if variant.special:
        return how_of(variant, target).tiles
    if isinstance(variant.tiles, launch.Tiles):
        return variant.tiles
    shape = (variant.block_q, variant.block_k, variant.head_dim, DTYPES[variant.dtype], target.arch)
    if variant.features in QUANTIZED:
        key_tile, has = min(64, max(32, variant.block_k)), QUANTIZED[variant.features][2]
        return quantized_attention.pick_tiles(variant.block_q, key_tile, variant.head_dim, target.arch, "tail" in has)
    if variant.features in BACKWARD:
        return block_sparse_backward.pick_tiles(*shape)[BACKWARD[variant.features]]
    if variant.features in LINEAR:
        return linear_attention.pick_tiles(variant.head_dim, DTYPES[variant.dtype])[LINEAR[variant.features][1]]
    has = FEATURES[variant.features]
    return launch.pick_tiles(*shape, packed_tail="starts" in has and "tail" in has and "verdict" not in has)


def helper_tiles(variant: Helper, target: GPUTarget) -> launch.Tiles:
    """The same for the kernels beside attention."""
    dim, dtype = variant.head_dim, DTYPES[variant.dtype]
    # Kernels that only stream have tiles of their own, and Triton's default of stages.
    quantizing = quantize_triton.warps_for(dim)
    stream = {
        "means": (segments_triton.BLOCK_S, segments_triton.WARPS),
        "permute": (permute.ROWS, permute.WARPS),
        "statistics": (quantize_triton.BLOCK_S, quantizing),
        "quantize": (64, quantizing),
        "row sums": (block_sparse_backward.BLOCK_R, block_sparse_backward.WARPS),
    }
    if variant.kernel in stream:
        rows, warps = stream[variant.kernel]
        return launch.Tiles(rows, dim, warps, 3)
    if variant.kernel in ("assign", "assign coarse", "errors"):
        pick = cluster_errors_triton.pick_tiles if variant.kernel == "errors" else kmeans_triton.pick_tiles
        return pick(dim, dtype, target.arch)
    tiles = launch.pick_tiles(*((64, 32) if variant.kernel == "tail" else (128, 64)), dim, dtype, target.arch)
    if variant.kernel.startswith("mass"):
        return block_mass_triton.fit_tiles(tiles, dtype, variant.kernel == "mass")
    return tiles
