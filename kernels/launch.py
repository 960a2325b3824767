"""How Triton kernels are compiled here: tile shapes by architecture, precision of products, and what can run at all."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton

from dsattn.errors import ImplUnavailableError
from dsattn.kernels import compile_time

LOG2E = math.log2(math.e)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Read once, when the kernels beside this are decorated.
_INTERPRETED: bool = triton.knobs.runtime.interpret
compile_time.listen()


class Tiles(NamedTuple):
    """Compile-time shape of one program: tile of queries, tile of keys, warps, software pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# Largest tiles that compile without spills, by kind of matrix unit and padded head_dim; scripts/aot_report.py
# shows registers, spills and shared memory of every entry. "mma": Ampere, Ada, consumer Blackwell; "wgmma": Hopper
# and datacenter Blackwell; "mfma": AMD CDNA; "interpreter": no such limits, and few large steps are fastest.
_HALF = {
    "mma": {64: Tiles(128, 32, 4, 2), 128: Tiles(128, 32, 8, 2), 256: Tiles(64, 32, 8, 2)},
    "wgmma": {64: Tiles(128, 64, 8, 2), 128: Tiles(128, 64, 8, 3), 256: Tiles(64, 32, 8, 3)},
    "mfma": {64: Tiles(128, 64, 4, 2), 128: Tiles(128, 64, 4, 2), 256: Tiles(64, 32, 4, 2)},
}
# Where lists of keys without gaps meet a pooled tail, another stage saves the registers that would spill.
_HALF_PACKED_TAIL = {("mma", 128): Tiles(128, 32, 8, 3)}
# Float32 is for exactness, not speed: each product is three (CUDA) or runs at a quarter of the rate (AMD).
_SINGLE = {64: Tiles(32, 32, 4, 2), 128: Tiles(16, 32, 4, 2), 256: Tiles(16, 16, 8, 2)}
_INTERPRETER = Tiles(64, 64, 1, 1)


class Specialized(NamedTuple):
    """How ``block_sparse_tma`` is compiled: tiles, and whether warps get roles of their own."""

    tiles: Tiles
    roles: bool


# The same for ``block_sparse_tma``, by compute capability and padded head_dim; the first entry whose tiles divide the
# blocks is taken. With roles, Triton adds the producer's warps, and on Hopper those of a second consumer, which takes
# half of the rows: 64 rows are too few for two, and are left to two programs that share a multiprocessor.
_TMA = {
    90: {
        64: (
            Specialized(Tiles(128, 128, 4, 3), True),
            Specialized(Tiles(128, 64, 4, 4), True),
            Specialized(Tiles(64, 64, 4, 4), False),
        ),
        128: (
            Specialized(Tiles(128, 128, 4, 2), True),
            Specialized(Tiles(128, 64, 4, 3), True),
            Specialized(Tiles(64, 64, 4, 3), False),
        ),
        256: (Specialized(Tiles(128, 64, 8, 2), False), Specialized(Tiles(64, 64, 4, 2), False)),
    },
    100: {
        64: (Specialized(Tiles(128, 64, 4, 3), True), Specialized(Tiles(64, 64, 4, 4), True)),
        128: (Specialized(Tiles(128, 64, 8, 3), True), Specialized(Tiles(64, 64, 4, 3), True)),
        256: (Specialized(Tiles(64, 64, 8, 2), True),),
    },
}


def pick_specialized(
    block_q: int, block_k: int, head_dim: int, dtype: torch.dtype, arch: int | str, *, tail: bool = False
) -> Specialized | None:
    """How ``block_sparse_tma`` should be compiled, or None where `pick_tiles` is all there is; arguments as there.

    With a pooled ``tail``, tiles of 128 keys do not compile (Triton 3.6 to 3.9, sm_90).
    """
    if not isinstance(arch, int) or dtype == torch.float32 or head_dim > 256:
        return None
    entries = _TMA.get(100 if 100 <= arch < 110 else arch, {}).get(max(64, triton.next_power_of_2(head_dim)), ())
    for entry in entries:
        block_m, block_n = entry.tiles[:2]
        if block_q % block_m == 0 and block_k % block_n == 0 and not (tail and block_n > 64):
            return entry
    return None


def pick_tiles(
    block_q: int, block_k: int, head_dim: int, dtype: torch.dtype, arch: int | str, *, packed_tail: bool = False
) -> Tiles:
    """Tile shape for a plan's block sizes.

    Args:
        block_q, block_k: the plan's block sizes, in positions; a tile never spans two blocks.
        head_dim: the larger of D and Dv, at most 256.
        dtype: of q, k, v.
        arch: compute capability (80, 90, …), an AMD architecture (``"gfx942"``), or ``"interpreter"``.
        packed_tail: keys are listed without gaps between blocks, and there is a pooled tail.

    Raises:
        ImplUnavailableError: head_dim above 256.

    """
    if head_dim > 256:
        raise ImplUnavailableError(
            f"impl='triton' takes head_dim up to 256, got {head_dim}; pass impl='torch' or 'reference'"
        )
    padded = max(64, triton.next_power_of_2(head_dim))
    if arch == "interpreter":
        largest = _INTERPRETER
    elif dtype == torch.float32:
        largest = _SINGLE[padded]
    else:
        unit = matrix_unit(arch)
        largest = _HALF[unit][padded]
        if packed_tail:
            largest = _HALF_PACKED_TAIL.get((unit, padded), largest)
    block_m = min(largest.block_m, max(16, triton.next_power_of_2(block_q)))
    block_n = min(largest.block_n, max(16, triton.next_power_of_2(block_k)))
    # Smaller tiles need fewer warps to hold them.
    warps = largest.warps if block_m == largest.block_m else min(largest.warps, 4)
    return Tiles(block_m, block_n, warps, largest.stages)


def matrix_unit(arch: int | str) -> str:
    """``"mma"``, ``"wgmma"`` or ``"mfma"``."""
    if isinstance(arch, str):
        return "mfma"
    return "wgmma" if 90 <= arch < 120 else "mma"


def precision(dtype: torch.dtype, backend: str) -> str:
    """How the kernel multiplies: on CUDA, fp32 becomes three TF32 products, close to IEEE at tensor-core speed."""
    return "tf32x3" if backend == "cuda" and dtype == torch.float32 else "ieee"


def backend() -> str:
    """``"cuda"``, ``"hip"`` or ``"interpreter"``."""
    if _INTERPRETED:
        return "interpreter"
    return "hip" if torch.version.hip else "cuda"


def why_unavailable(device: torch.device) -> str | None:
    """Reason why the kernel cannot run on tensors of a device, or None."""
    if device.type == "cuda" or backend() == "interpreter":
        return None
    return f"it needs CUDA tensors, got {device.type}; pass impl='flex', 'torch' or 'reference'"


def architecture(device: torch.device) -> int | str:
    """Compute capability (80, 90, …), AMD architecture, or ``"interpreter"``."""
    kind = backend()
    if kind == "interpreter":
        return kind
    if kind == "hip":
        return torch.cuda.get_device_properties(device).gcnArchName
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
