"""Tile shapes of the block-sparse kernel: what was measured on this GPU, else the static table's."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from dsattn.block_plan import BlockPlan
from dsattn.kernels import tuning
from dsattn.kernels.launch import Tiles, architecture, pick_tiles
from dsattn.verdict import VerdictRule

# The problem on which shapes are compared: large enough to fill any GPU several times, small enough for milliseconds.
LENGTH, HEADS, DENSITY = 16384, 16, 0.25
_SOURCES = ("block_sparse.py", "block_sparse_kernel.py")


def block_sparse(q: Tensor, dim_v: int, plan: BlockPlan, rule: VerdictRule | None) -> Tiles:
    """Tile shape for a call; q ``[B, S, H, D]``, values of ``dim_v``."""
    static = pick_tiles(plan.block_q, plan.block_k, max(q.shape[-1], dim_v), q.dtype, architecture(q.device))
    family = family_of(plan, rule)
    if family is None or dim_v != q.shape[-1] or q.dtype == torch.float32:
        return static
    block_q, block_k = (triton.next_power_of_2(n) for n in (plan.block_q, plan.block_k))
    dim = max(64, triton.next_power_of_2(dim_v))
    request = tuning.Request(
        kernel="block_sparse",
        variant=f"d{dim} {block_q}x{block_k} {family}",
        static=(static.block_m, static.block_n, static.warps, static.stages),
        source=_source(),
        problem=lambda: problem(family, dim, block_q, block_k, q.dtype, q.device),
    )
    return Tiles(*tuning.pick(request, q.device))


def family_of(plan: BlockPlan, rule: VerdictRule | None) -> str | None:
    """What the kernel is compiled for, as far as it is tuned: ``fixed``, ``clusters``, ``all`` (clusters with a pooled
    tail or key lengths), or None.
    """
    if rule is not None or plan.tail == "pooled_block":
        return None
    more = plan.tail == "pooled" or plan.key_lengths is not None
    parts = [x is not None for x in (plan.q_order, plan.k_order, plan.q_starts, plan.k_starts)]
    if all(parts):
        return "all" if more else "clusters"
    return None if any(parts) or more else "fixed"


def problem(
    family: str, dim: int, block_q: int, block_k: int, dtype: torch.dtype, device: torch.device,
    length: int = LENGTH, heads: int = HEADS,
) -> Callable[[tuple[int, int, int, int]], Any]:  # fmt: skip
    """Function that runs a random plan of a family with a tile shape."""
    from dsattn.kernels.block_sparse import block_sparse_attention

    generator = torch.Generator(device).manual_seed(0)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, device=device)

    q, k, v = ((uniform(1, length, heads, dim) * 2 - 1).to(dtype) for _ in range(3))
    lead, blocks = (1, heads), (-(-length // block_q), -(-length // block_k))
    layout: dict[str, Any] = {}
    if family != "fixed":
        for side, count in zip("qk", blocks, strict=True):
            cuts = (uniform(*lead, count - 1) * (length + 1)).long().sort(-1).values
            starts = torch.nn.functional.pad(cuts, (1, 1))
            starts[..., -1] = length
            layout[f"{side}_starts"], layout[f"{side}_order"] = starts.int(), uniform(*lead, length).argsort(-1)
    draw = uniform(*lead, *blocks)
    if family != "fixed":  # an empty block must not be all that a row keeps
        draw = draw.masked_fill((layout["k_starts"].diff(dim=-1) == 0)[:, :, None], 1.0)
    mask = (draw < DENSITY).scatter_(-1, draw.argmin(-1, keepdim=True), True)
    plan = BlockPlan.from_mask(
        mask, length, length, batch=1, heads=heads, block_q=block_q, block_k=block_k,
        tail="pooled" if family == "all" else "none", **layout,
    )  # fmt: skip

    def run(shape: tuple[int, int, int, int]) -> Any:
        return block_sparse_attention(q, k, v, plan, scale=dim**-0.5, tiles=Tiles(*shape))

    return run


@lru_cache(maxsize=1)
def _source() -> str:
    folder = Path(__file__).parent
    return tuning.fingerprint(*(folder / name for name in _SOURCES))
