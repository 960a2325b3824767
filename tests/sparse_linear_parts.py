"""What the tests of sparse_linear share: inputs, projections and weights files, and the float64 oracle."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import dsattn
from dsattn.block_plan import BlockPlan
from dsattn.grid import Call, VideoGrid

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCOPES = ("global", "complement", "marginal")
MAPS = ("softmax", "elu", "relu", "hedgehog")
GRID = VideoGrid(5, 9, 11, text=19)  # 514 tokens: nine blocks of 64, the last of 2
CALL = Call(0, 0, GRID)


def projection(dim: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Weight and bias with rows of sum about one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(dim, dim, generator=generator) / dim, torch.randn(dim, generator=generator) / 4


def write_weights(folder: Path, dim: int = 32, layers: dict[str, Tensor] | None = None) -> str:
    """Write a weights file for layers 0 and 1, or the given tensors; returns its path."""
    if layers is None:
        layers = {}
        for i in range(2):
            layers[f"layers.{i}.weight"], layers[f"layers.{i}.bias"] = projection(dim, seed=1 + i)
    save_file(layers, folder / "sla.safetensors")
    return str(folder / "sla.safetensors")


def plan(qkv, call: Call = CALL, **options) -> BlockPlan:
    return dsattn.plan(*qkv, call, method="sparse_linear", **options).validate()


# -- the oracle ---------------------------------------------------------------------------------------------


def phi(x: Tensor, name: str) -> Tensor:
    exponentials = x.exp()
    return {
        "softmax": lambda: exponentials / exponentials.sum(-1, keepdim=True),
        "elu": lambda: torch.where(x > 0, x + 1, exponentials),
        "relu": lambda: x * (x > 0),
        "hedgehog": lambda: (
            torch.cat([exponentials, 1 / exponentials], -1) / (exponentials + 1 / exponentials).sum(-1, keepdim=True)
        ),
    }[name]()


def oracle(q: Tensor, k: Tensor, v: Tensor, exact: Tensor, linear: Tensor, weight, bias, name: str) -> Tensor:
    """Softmax over the pairs ``exact``, feature products over ``linear``, both ``[.., S, S]``."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    logits = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~exact, -torch.inf)
    products = (phi(q, name) @ phi(k, name).mT).masked_fill(~linear, 0)
    branch = products @ v / (products.sum(-1, keepdim=True) + 1e-5)
    return (logits.softmax(-1) @ v + branch @ weight.double().T + bias.double()).transpose(1, 2)


def classes(q: Tensor, k: Tensor, grid: VideoGrid, critical: float, negligible: float, block_q: int, block_k: int):
    """Critical and marginal pairs of tokens, ``[B, H, S, S]``, by a loop over rows of blocks in float64."""
    batch, length, heads, _ = q.shape
    keep, rest = (torch.zeros(batch, heads, length, length, dtype=torch.bool) for _ in range(2))
    q_runs = [range(i, min(i + block_q, length)) for i in range(0, length, block_q)]
    k_runs = [range(i, min(i + block_k, length)) for i in range(0, length, block_k)]
    special = {t for start, stop in grid.exact_segments for t in range(start, stop)}
    for b in range(batch):
        for h in range(heads):
            qh, kh = q[b, :, h].double(), k[b, :, h].double()
            for rows in q_runs:
                scores = [float(qh[list(rows)].mean(0) @ (kh[list(c)].mean(0) - kh.mean(0))) for c in k_runs]
                ranked = sorted(range(len(k_runs)), key=lambda j: -scores[j])
                best = set(ranked[: max(1, int(critical * len(k_runs)))])
                worst = set(ranked[len(k_runs) - int(negligible * len(k_runs)) :])
                for j, columns in enumerate(k_runs):
                    is_critical = j in best or not special.isdisjoint(rows) or not special.isdisjoint(columns)
                    keep[b, h, rows.start : rows.stop, columns.start : columns.stop] = is_critical
                    marginal = not is_critical and j not in worst
                    rest[b, h, rows.start : rows.stop, columns.start : columns.stop] = marginal
    return keep, rest


def linear_pairs(scope: str, critical: Tensor, marginal: Tensor) -> Tensor:
    return {"global": torch.ones_like(critical), "complement": ~critical, "marginal": marginal}[scope]


def check(out: Tensor, want: Tensor, v: Tensor) -> None:
    """Rounded are the softmax's weights and result and the sum; TF32 on a GPU holds as many digits as half precision.

    Softmax and linear attention are means of values, rows of the projection sum to about one: 4 max |v| bounds all.
    """
    unit = torch.finfo(out.dtype).eps / 2 + 64 * 2.0**-24
    allowed = unit * (4 * float(v.abs().max()) + float(want.abs().max()))
    error = float((out.cpu().double() - want).abs().max())
    assert out.dtype == v.dtype and error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"
