"""How much of a kernel's tiles clusters fill: every cluster on tiles of its own, or keys listed without gaps.

`python scripts/tile_utilization.py` draws cluster sizes with a given spread and prints the share of the computed
pairs that are wanted. It computes, it does not measure.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor


def draw_sizes(tokens: int, clusters: int, spread: float, generator: torch.Generator) -> Tensor:
    """``[clusters]`` int64 sizes that sum up to ``tokens``; ``spread`` is their standard deviation over the mean."""
    if spread == 0:
        edges = torch.arange(clusters + 1) * tokens // clusters
        return edges.diff()
    # A Gamma draw has this spread at a shape of 1 / spread squared.
    shape = torch.full((clusters,), 1 / spread**2, dtype=torch.float64)
    weights = torch._standard_gamma(shape, generator=generator)
    edges = (weights.cumsum(0) / weights.sum() * tokens).round().long()
    return torch.cat([edges.new_zeros(1), edges]).diff()


def apart(kept: Tensor, sizes: Tensor, tile: int) -> float:
    """Share of wanted keys in the tiles of rows that keep ``[rows, clusters]``, if every cluster has its own tiles."""
    tiles = (sizes + tile - 1) // tile
    return float((kept * sizes).sum() / ((kept * tiles).sum() * tile))


def packed(kept: Tensor, sizes: Tensor, tile: int) -> float:
    """The same, if the keys of a row follow each other without gaps."""
    keys = (kept * sizes).sum(-1)
    return float(keys.sum() / (((keys + tile - 1) // tile).sum() * tile))


def main(
    tokens: Annotated[int, typer.Option(help="Keys of one head.")] = 75_600,
    clusters: Annotated[int, typer.Option(help="Key clusters.")] = 1000,
    rows: Annotated[int, typer.Option(help="Query clusters.")] = 300,
    density: Annotated[float, typer.Option(help="Share of the clusters that a row keeps.")] = 0.25,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Print the utilization of tiles for some spreads of cluster sizes."""
    generator = torch.Generator().manual_seed(seed)
    table = Table(title=f"{tokens} keys, {clusters} clusters, {rows} rows of density {density}")
    for name in ("spread of sizes", "tile", "tiles per cluster", "without gaps", "work saved"):
        table.add_column(name, justify="right")
    for spread in (0.0, 0.5, 1.0, 2.0):
        sizes = draw_sizes(tokens, clusters, spread, generator)
        kept = torch.rand(rows, clusters, generator=generator) < density
        kept[:, 0] = True
        for tile in (32, 64, 128):
            one, two = apart(kept, sizes, tile), packed(kept, sizes, tile)
            table.add_row(str(spread), str(tile), f"{one:.1%}", f"{two:.1%}", f"{1 - one / two:.0%}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
