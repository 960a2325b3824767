"""Error of quantised block-sparse attention at equal plan, emulated on any machine.

    python scripts/quantization_error.py --out benchmarks/results/cpu

Every row is one call on seeded inputs: relative L2 distance of the output to the same plan in float64, for bfloat16
inputs in full precision and with each quantisation. What leaving blocks out costs against dense attention stands beside
it. The speed of the same options is measured on a GPU by the kernel benchmark; nothing here is a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import dsattn
from dsattn.config import QUANTIZATIONS
from dsattn.report import environment

# Latent video of 9 x 16 x 16 tokens, of which smooth content makes neighbours alike.
GRID = dsattn.VideoGrid(9, 16, 16)
HEADS = 2
# name: (size of the offset that channels of K share over all tokens, share of such channels, peaks of single tokens).
INPUTS = {"normal": (0.0, 0.0, 1.0), "K channels": (20.0, 0.06, 1.0), "K channels and tokens": (20.0, 0.06, 6.0)}


def make_inputs(kind: str, dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q, k, v ``[1, S, H, D]`` in bfloat16: smooth content plus noise, and outliers in k as video models show them.

    Source of the outliers' form: SageAttention (arXiv 2410.02367), a large channel-wise bias common to all tokens.
    """
    offset, share, peak = INPUTS[kind]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    frames, height, width = GRID.frames, GRID.height, GRID.width
    coarse = normal(3 * HEADS * dim, 1, 3, 4, 4)
    content = torch.nn.functional.interpolate(coarse, size=(frames, height, width), mode="trilinear")
    noise = normal(3, 1, GRID.tokens, HEADS, dim)
    q, k, v = content.view(3, HEADS, dim, -1).permute(0, 3, 1, 2)[:, None] * 2 + noise * 0.6
    tokens = torch.rand(1, GRID.tokens, 1, 1, generator=generator) < 0.01
    k = torch.where(tokens, k * peak, k)
    channels = torch.rand(1, 1, HEADS, dim, generator=generator) < share
    k = k + offset * normal(1, 1, HEADS, dim) * channels
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def relative(got: Tensor, want: Tensor) -> float:
    """Relative L2 distance."""
    return float((got.double() - want).norm() / want.norm())


def measure(kind: str, dim: int, plan_name: str, seed: int) -> list[dict[str, Any]]:
    """Rows of one input and plan, one per quantisation."""
    q, k, v = make_inputs(kind, dim, seed)
    exact = tuple(x.double() for x in (q, k, v))
    tokens = GRID.tokens
    dense = dsattn.BlockPlan.dense(1, HEADS, tokens, tokens, block_q=128, block_k=64)
    plan = dense
    if plan_name != "dense":
        method, options = plan_name.split(" ", 1)
        values = dict(pair.split("=") for pair in options.split(" "))
        plan = dsattn.plan(
            q, k, v, dsattn.Call(0, 0, GRID), method, **{name: json.loads(x) for name, x in values.items()}
        )
    reference, lse = dsattn.attend(*exact, plan, impl="torch", return_lse=True)
    sparse = relative(reference, dsattn.attend(*exact, dense, impl="torch"))
    rows = []
    for quantization in (None, *QUANTIZATIONS):
        out, got_lse = dsattn.attend(q, k, v, plan, impl="torch", return_lse=True, quantization=quantization)
        rows.append({
            "input": kind, "head_dim": dim, "plan": plan_name, "density": float(plan.density.mean()),
            "quantization": quantization, "error": relative(out, reference), "error_of_plan": sparse,
            "lse_error": float((got_lse.double() - lse).abs().max()), "seed": seed,
        })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per input, head_dim and plan."""
    kinds = (None, *QUANTIZATIONS)
    names = ["input", "head_dim", "plan", "density", "plan vs dense", *("bfloat16" if x is None else x for x in kinds)]
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for first in range(0, len(rows), len(kinds)):
        group = rows[first : first + len(kinds)]
        row = group[0]
        cells = [
            row["input"],
            str(row["head_dim"]),
            row["plan"],
            f"{row['density']:.2f}",
            f"{row['error_of_plan']:.4f}",
        ]
        cells += [f"{measured['error']:.4f}" for measured in group]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    out: Annotated[Path, typer.Option(help="Folder for quantization_error.json and .md.")],
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
    head_dim: Annotated[list[int] | None, typer.Option(help="Repeatable; 64 and 128 by default.")] = None,
) -> None:
    """Measure and write the table."""
    plans = ("dense", "topk density=0.25", 'semantic density=0.25 tail="pooled"')
    rows = []
    for kind in INPUTS:
        for dim in head_dim or (64, 128):
            for plan in plans:
                rows += measure(kind, dim, plan, seed)
    out.mkdir(parents=True, exist_ok=True)
    result = {"env": environment(), "tokens": GRID.tokens, "heads": HEADS, "rows": rows}
    (out / "quantization_error.json").write_text(json.dumps(result, indent=1) + "\n")
    text = table(rows)
    head = (
        "Relative L2 error at equal plan (`scripts/quantization_error.py`), emulated; speed: not measured on a GPU yet."
    )
    (out / "quantization_error.md").write_text(f"{head}\n\n{text}\n")
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
