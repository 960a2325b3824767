"""What coarse centroids cost k-means: two warm iterations with rounded centroids in the first, in both, or in none.

    python scripts/kmeans_precision.py --out benchmarks/results/cpu

On a GPU, half-precision tokens meet centroids of one or of two bfloat16 numbers (``kernels.kmeans_triton``). Here the
same is computed in fp32 on the inputs of ``quantization_error.py``: centroids come from a noisier copy of the tokens,
as from an earlier step. The table has the share of tokens with the label that exact centroids give them, and the sum
of squared distances to the final means over that of exact centroids. Nothing here is a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import quantization_error
import torch
import typer
from torch import Tensor

from dsattn.kernels.kmeans import assign, first_centroids, kmeans
from dsattn.kernels.pooling import segment_sums
from dsattn.report import environment

COUNT = 64
# Noise between the step that left the centroids and this one, as a share of the tokens' deviation.
DRIFT = 0.2
# Kinds of inputs, and whose tokens: outliers stand in keys alone.
INPUTS = (("normal", "q"), ("normal", "k"), ("K channels", "k"))
SCHEDULES = {"coarse, exact": (True, False), "coarse, coarse": (True, True)}


def iterate(x: Tensor, centroids: Tensor, coarse: bool) -> tuple[Tensor, Tensor]:
    """Labels ``[B, H, S]`` and new centroids of x ``[B, S, H, D]`` in bfloat16."""
    exact = x.float()
    labels = assign(exact, centroids.bfloat16().float() if coarse else centroids)
    sizes = torch.nn.functional.one_hot(labels, centroids.shape[2]).sum(2)
    means = segment_sums(exact, labels, centroids.shape[2]) / sizes.clamp(min=1)[..., None]
    return labels, torch.where(sizes[..., None] > 0, means, centroids)


def run(x: Tensor, centroids: Tensor, schedule: tuple[bool, ...]) -> tuple[Tensor, float]:
    """Labels of the last iteration, and the sum of squared distances to its means."""
    for coarse in schedule:
        labels, centroids = iterate(x, centroids, coarse)
    own = centroids.gather(2, labels[..., None].expand(-1, -1, -1, x.shape[-1]))
    return labels, float((x.transpose(1, 2).double() - own.double()).square().sum())


def measure(kind: str, side: str, dim: int, seed: int) -> dict[str, Any]:
    """One row: agreement and distances of every schedule against exact centroids."""
    q, k, _ = quantization_error.make_inputs(kind, dim, seed)
    x = q if side == "q" else k
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1)) * x.float().std() * DRIFT
    before = x.float() + noise
    warm = kmeans(before, first_centroids(before, COUNT, seed), 4).centroids
    labels, distance = run(x, warm, (False, False))
    row: dict[str, Any] = {"input": kind, "side": side, "head_dim": dim, "seed": seed}
    for name, schedule in SCHEDULES.items():
        got, reached = run(x, warm, schedule)
        row[name] = {"same_label": float((got == labels).float().mean()), "distance": reached / distance}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per input and side."""
    columns = [f"{name}: {what}" for name in SCHEDULES for what in ("same label", "distance")]
    lines = [f"| input | of | {' | '.join(columns)} |", f"|{' --- |' * (2 + len(columns))}"]
    for row in rows:
        cells = [x for name in SCHEDULES for x in (f"{row[name]['same_label']:.2%}", f"{row[name]['distance']:.5f}")]
        lines.append(f"| {row['input']} | {row['side']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    out: Annotated[Path, typer.Option(help="Folder for kmeans_precision.json and .md.")],
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
    head_dim: Annotated[int, typer.Option(help="Of the inputs.")] = 128,
) -> None:
    """Measure and write the table."""
    kinds = [kind for kind in quantization_error.INPUTS if "tokens" not in kind]
    rows = [
        measure(kind, side, head_dim, seed) for kind in kinds for side in "qk" if (kind, side) != ("K channels", "q")
    ]
    out.mkdir(parents=True, exist_ok=True)
    result = {"env": environment(), "clusters": COUNT, "drift": DRIFT, "rows": rows}
    (out / "kmeans_precision.json").write_text(json.dumps(result, indent=1) + "\n")
    text = table(rows)
    head = "Two warm iterations of k-means against exact centroids (`scripts/kmeans_precision.py`), emulated in fp32."
    (out / "kmeans_precision.md").write_text(f"{head}\n\n{text}\n")
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
