"""Tile shapes of the block-sparse kernels: what was measured on this GPU, else the static table's."""

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
from dsattn.kernels.launch import Specialized, Tiles
from dsattn.verdict import VerdictRule

# The problem on which shapes are compared: large enough to fill any GPU several times, small enough for milliseconds.
LENGTH, HEADS, DENSITY = 16384, 16, 0.25
_SOURCES = ("block_sparse.py", "block_sparse_kernel.py", "block_sparse_tma.py")


def block_sparse(q: Tensor, dim_v: int, plan: BlockPlan, rule: VerdictRule | None, static: Tiles) -> Tiles:
    """How the general kernel is compiled for a call; static: what ``launch.pick_tiles`` says."""
    family = family_of(plan, rule)
    if family is None or dim_v != q.shape[-1] or q.dtype == torch.float32:
        return static
    static_shape = (static.block_m, static.block_n, static.warps, static.stages)
    return Tiles(*_pick("block_sparse", family, static_shape, q, dim_v, plan))


def tma(q: Tensor, dim_v: int, plan: BlockPlan, static: Specialized) -> Specialized:
    """How ``block_sparse_tma`` is compiled for a call that it takes; static: what ``pick_specialized`` says."""
    tiles, roles = static
    if plan.tail == "pooled" or dim_v != q.shape[-1] or (plan.block_q, plan.block_k) != _rounded(plan):
        return static
    static_shape = (tiles.block_m, tiles.block_n, tiles.warps, tiles.stages, int(roles))
    return specialized(_pick("block_sparse_tma", "fixed", static_shape, q, dim_v, plan))


def specialized(shape: tuning.Shape) -> Specialized:
    """Of ``(queries, keys, warps, stages, roles)``."""
    return Specialized(Tiles(*shape[:4]), bool(shape[4]))


def _pick(
    kernel: str, family: str, static: tuning.Shape, q: Tensor, dim: int, plan: BlockPlan
) -> tuning.Shape:  # fmt: skip
    (block_q, block_k), dim = _rounded(plan), max(64, triton.next_power_of_2(dim))
    request = tuning.Request(
        kernel=kernel,
        variant=f"d{dim} {block_q}x{block_k} {family}",
        static=static,
        source=_source(),
        problem=lambda: problem(family, dim, block_q, block_k, q.dtype, q.device),
        agree=agree,
    )
    return tuning.pick(request, q.device)


def agree(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> bool:
    """Whether two results (out, lse) differ by rounding only."""
    out, exact = got[0].float(), wanted[0].float()
    return float((out - exact).norm() / exact.norm()) <= 2 * torch.finfo(wanted[0].dtype).eps


def _rounded(plan: BlockPlan) -> tuple[int, int]:
    return triton.next_power_of_2(plan.block_q), triton.next_power_of_2(plan.block_k)


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
) -> Callable[[tuning.Shape], Any]:  # fmt: skip
    """Function that runs a random plan of a family with a tile shape: of five numbers, on ``block_sparse_tma``."""
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

    def run(shape: tuning.Shape) -> Any:
        tiles = Tiles(*shape) if len(shape) == 4 else specialized(shape)
        return block_sparse_attention(q, k, v, plan, scale=dim**-0.5, tiles=tiles)

    return run


@lru_cache(maxsize=1)
def _source() -> str:
    folder = Path(__file__).parent
    return tuning.fingerprint(*(folder / name for name in _SOURCES))
