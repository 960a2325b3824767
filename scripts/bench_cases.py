"""Inputs of the kernel benchmarks: shapes, q, k, v, plans, and the check against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import dsattn
from dsattn.block_plan import BlockPlan
from dsattn.grid import Call, VideoGrid
from dsattn.methods import METHODS
from dsattn.methods.base import Memory, keep_exact_segments
from dsattn.methods.ranked import Ranked
from dsattn.methods.semantic import SemanticConfig


@dataclass(frozen=True)
class Shape:
    """One attention call of a model."""

    name: str
    grid: VideoGrid
    heads: int
    dim: int

    @property
    def flops(self) -> float:
        """Of dense attention."""
        return 4.0 * self.grid.tokens**2 * self.heads * self.dim

    @property
    def call(self) -> Call:
        return Call(0, 0, self.grid, num_layers=1, num_steps=50)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", VideoGrid(13, 8, 10, text=12), 2, 64),
        Shape("wan-480p", VideoGrid(21, 30, 52), 12, 128),
        Shape("wan-720p", VideoGrid(21, 45, 80), 40, 128),
        Shape("hunyuan-720p", VideoGrid(33, 45, 80, text=256), 24, 128),
        Shape("ltx", VideoGrid(16, 32, 56), 32, 128),
    )
}


def make_qkv(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v ``[1, S, H, D]``: queries and keys of patches of the picture resemble each other, as a model's do."""
    generator = torch.Generator(device).manual_seed(seed)
    grid, size = shape.grid, (1, shape.grid.tokens, shape.heads, shape.dim)
    rows, columns = -(-grid.height // 4), -(-grid.width // 4)
    place = torch.arange(grid.tokens, device=device).sub_(grid.video_start).clamp_(0, grid.video_tokens - 1)
    y, x = place % grid.frame_tokens // grid.width // 4, place % grid.width // 4
    centers = torch.randn(rows * columns, shape.heads, shape.dim, generator=generator, device=device)
    shared = centers[y * columns + x][None]

    def draw(share: float) -> Tensor:
        noise = torch.randn(size, generator=generator, device=device)
        return noise.add_(shared, alpha=share).to(dtype)

    return draw(0.8), draw(0.8), draw(0.0)


def tiles(shape: Shape, density: float, block_q: int, block_k: int, device: torch.device) -> BlockPlan:
    """Structured plan of equal blocks: even heads look around in space, odd ones at the same place in time.

    The blocks nearest by the head's measure are kept, first frame and text always; rows differ in length.
    """
    grid = shape.grid
    q_at, k_at = (_places(grid, block, device) for block in (block_q, block_k))
    gap = (q_at[:, None] - k_at[None]).abs()
    inside = gap[..., 1].hypot(gap[..., 2])
    looks = torch.stack([inside + 4 * gap[..., 0], 4 * inside + gap[..., 0]])
    # A little less where frames are far apart, as in masks that thin out with time.
    looks = looks * (1 + gap[..., 0] / grid.frames)
    looks[..., k_at[:, 0] < 0.5] = -1.0
    keep_exact = torch.zeros(looks.shape[1:], dtype=torch.bool, device=device)
    looks.masked_fill_(keep_exact_segments(keep_exact, grid, block_q, block_k), -1.0)
    count = max(1, round(density * looks[0].numel()))
    limit = looks.flatten(1).kthvalue(count, -1).values[:, None, None]
    nearest = torch.zeros_like(looks, dtype=torch.bool).scatter_(-1, looks.argmin(-1, keepdim=True), True)
    mask = ((looks <= limit) | nearest)[torch.arange(shape.heads, device=device) % 2][None]
    return _plan(shape, mask, block_q, block_k)


def _places(grid: VideoGrid, block: int, device: torch.device) -> Tensor:
    """``[N, 3]`` frame, row and column of the middle of every block."""
    middle = torch.arange(0, grid.tokens, block, device=device) + block // 2
    middle = middle.sub(grid.video_start).clamp(0, grid.video_tokens - 1)
    within = middle % grid.frame_tokens
    return torch.stack([middle // grid.frame_tokens, within // grid.width, within % grid.width], -1).float()


def random(shape: Shape, density: float, block_q: int, block_k: int, device: torch.device, seed: int = 1) -> BlockPlan:
    """Every pair of blocks is kept with probability ``density``, and one of every row."""
    lead = (1, shape.heads, -(-shape.grid.tokens // block_q), -(-shape.grid.tokens // block_k))
    draw = torch.rand(lead, generator=torch.Generator(device).manual_seed(seed), device=device)
    mask = (draw < density).scatter_(-1, draw.argmin(-1, keepdim=True), True)
    return _plan(shape, mask, block_q, block_k)


def dense(shape: Shape, block_q: int, block_k: int, device: torch.device) -> BlockPlan:
    """Everything is kept."""
    tokens = shape.grid.tokens
    return BlockPlan.dense(1, shape.heads, tokens, tokens, block_q=block_q, block_k=block_k, device=device)


def clusters(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Ranked:
    """Semantic plans of q and k for every density, without a tail."""
    config = SemanticConfig(tail="none", metric="euclidean", routing="mass")
    rank = METHODS["semantic"].rank
    if rank is None:
        raise RuntimeError("the method 'semantic' ranks no blocks")
    return rank(q, k, v, shape.call, config, Memory())


def _plan(shape: Shape, mask: Tensor, block_q: int, block_k: int) -> BlockPlan:
    tokens = shape.grid.tokens
    return BlockPlan.from_mask(mask, tokens, tokens, batch=1, heads=shape.heads, block_q=block_q, block_k=block_k)


def allowed_error(dtype: torch.dtype) -> float:
    """Largest relative L2 error of sampled rows: results and softmax weights are rounded once each."""
    return max(2 * torch.finfo(dtype).eps, 1e-5)


def checker(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, rows: int = 24, heads: int = 2, seed: int = 0
) -> Callable[[Tensor], tuple[float, float]]:
    """Function that compares a result ``[1, S, H, D]`` on sampled rows and heads with attention in float64.

    Returns:
        Relative L2 error and the largest one allowed. ``plan`` None stands for dense attention; its tail is none or
        pooled.

    """
    generator = torch.Generator().manual_seed(seed)
    length = q.shape[1]
    drawn = torch.randint(length, (rows,), generator=generator)
    drawn[0], drawn[-1] = 0, length - 1
    drawn = drawn.to(q.device)
    chosen = sorted({0, q.shape[2] - 1} | set(torch.randperm(q.shape[2], generator=generator)[:heads].tolist()))
    wanted = _exact_rows(q, k, v, plan, drawn, chosen)

    def check(out: Tensor) -> tuple[float, float]:
        got = out[0, drawn][:, chosen].double()
        return float((got - wanted).norm() / wanted.norm()), allowed_error(q.dtype)

    return check


def _exact_rows(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None, rows: Tensor, heads: list[int]) -> Tensor:
    """``[R, len(heads), D]`` float64."""
    scale = q.shape[-1] ** -0.5
    pairs = None if plan is None else plan.rows_to_dense(rows)[0]
    found = []
    for head in heads:
        qh, kh, vh = q[0, rows, head].double(), k[0, :, head].double(), v[0, :, head].double()
        logits = qh @ kh.T * scale
        if pairs is not None and plan is not None:
            logits = logits.masked_fill(~pairs[head], -torch.inf)
            if plan.tail == "pooled":
                owner = plan.k_block_of_token.expand(1, plan.heads, -1)[0, head]
                size = owner.bincount(minlength=plan.num_k_blocks).double()
                means, values = (
                    x.new_zeros(len(size), x.shape[1]).index_add_(0, owner, x) / size.clamp(min=1)[:, None]
                    for x in (kh, vh)
                )
                tail = (qh @ means.T * scale + size.log()).masked_fill(plan.kept_blocks(rows)[0, head], -torch.inf)
                logits, vh = torch.cat([logits, tail], -1), torch.cat([vh, values])
        found.append(logits.softmax(-1) @ vh)
    return torch.stack(found, 1)


def gradient_checker(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, grad: Tensor, impl: str, count: int = 8, seed: int = 0
) -> Callable[[Sequence[Tensor]], tuple[float, float]]:
    """Function that compares gradients of q, k, v for ``grad`` on sampled rows, columns and heads with float64.

    Results and log-sum-exps of all rows, which sums over columns need, come from the forward pass of ``impl``, whose
    check is `checker`. The plan has equal blocks, no order and no tail.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(q.shape[1], (count,), generator=generator).to(q.device)
    heads = sorted({0, q.shape[2] - 1})
    with torch.no_grad():
        out, lse = dsattn.attend(q, k, v, plan, impl=impl, return_lse=True)
    wanted = [_exact_gradients(q, k, v, out, lse, plan, grad, tokens, head) for head in heads]

    def check(got: Sequence[Tensor]) -> tuple[float, float]:
        errors = []
        for head, exact in zip(heads, wanted, strict=True):
            for mine, want in zip(got, exact, strict=True):
                errors.append(float((mine[0, tokens, head].double() - want).norm() / want.norm()))
        worst = max(errors) if all(error == error for error in errors) else float("nan")
        return worst, 2 * allowed_error(q.dtype)

    return check


def _exact_gradients(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: BlockPlan, grad: Tensor, tokens: Tensor, head: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``tokens`` of the gradients of q, k and v of one head, ``[T, D]`` float64."""
    scale = q.shape[-1] ** -0.5
    qh, kh, vh, oh, gh = (x[0, :, head].double() for x in (q, k, v, out, grad))
    kept = plan.block_mask.expand(1, plan.heads, -1, -1)[0, head]
    q_block, k_block = (
        torch.arange(x.shape[1], device=q.device) // size for x, size in ((q, plan.block_q), (k, plan.block_k))
    )
    delta, norm = (gh * oh).sum(-1), lse[0, head].double()

    def weights(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax weights and gradients of logits, ``[rows, columns]``."""
        used = kept[q_block[rows]][:, k_block[columns]]
        p = (qh[rows] @ kh[columns].T * scale - norm[rows, None]).exp().masked_fill(~used, 0)
        return p, p * (gh[rows] @ vh[columns].T - delta[rows, None]) * scale

    everything = torch.arange(q.shape[1], device=q.device)
    _, by_row = weights(tokens, everything)
    p, by_column = weights(everything, tokens)
    return by_row @ kh, by_column.T @ qh, p.T @ gh
