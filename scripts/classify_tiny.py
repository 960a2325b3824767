"""Does a small model tell a clip's own caption from another one? A measure that moves long before samples obey.

    python scripts/classify_tiny.py pipelines/tiny/weights RUN/export --json words.json

Held-out clips get noise, and the model predicts the velocity twice: with the clip's caption, and with that of the same
clip in another shape, or with another motion. The caption with the smaller squared error is the model's guess, so that
50 % is chance. A diffusion classifier (https://arxiv.org/abs/2303.16203); differs in: two captions a clip, and one draw
of the noise at each of a few levels. Weights are compared on the same clips and noise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from dsattn.pipelines.tiny import data
from dsattn.pipelines.tiny.batches import Batch, Clips, Grid, pick_positions
from dsattn.pipelines.tiny.loader import load_codec, stored_kind
from dsattn.pipelines.tiny.objective import squared_error, velocity_error
from dsattn.pipelines.tiny.trainable import TrainableJoint, TrainableTiny, build_trainable
from dsattn.report import environment

GRID = (5, 12, 12)
LEVELS = (0.8, 0.92)
OTHERS = {"shape": data.other_shape, "motion": data.other_motion}


class Question(NamedTuple):
    """The same noisy clips twice, with their own captions and with others that differ in one word."""

    word: str
    level: float
    own: Batch
    other: Batch


def questions(clips: Clips, count: int, grid: Grid, levels: tuple[float, ...] = LEVELS) -> Iterator[Question]:
    """`count` held-out clips of one moving shape for every word and noise level; the seed is that of `clips`."""
    everything = pick_positions(np.random.default_rng(0), grid, int(np.prod(grid)))
    for index, (word, differ) in enumerate(OTHERS.items()):
        rng = np.random.default_rng((clips.seed, index))
        scenes = [data.sample_scene(rng, held_out=True, simple=True) for _ in range(count)]
        wrong = [differ(scene, rng).caption for scene in scenes]
        for level in levels:
            generator = torch.Generator().manual_seed(clips.seed)
            noise = torch.randn(count, clips.codec.config.z_dim, len(everything), generator=generator)
            same = (grid, everything, torch.full((count,), level), noise)
            own = clips.encode(scenes, [scene.caption for scene in scenes], *same)
            yield Question(word, level, own, clips.encode(scenes, wrong, *same))


@torch.no_grad()
def answer(model: TrainableTiny | TrainableJoint, question: Question) -> dict[str, Any]:
    """Share of clips that their own caption explains better, and by how much in squared error."""
    own, other = (squared_error(velocity_error(model, batch)) for batch in (question.own, question.other))
    gap = other - own
    return {
        "word": question.word,
        "level": question.level,
        "clips": len(gap),
        "right": round(float((gap > 0).float().mean()), 4),
        "gap": round(float(gap.mean()), 5),
        "gap_standard_error": round(float(gap.std() / len(gap) ** 0.5), 5),
    }


def table(rows: dict[str, list[dict[str, Any]]]) -> Table:
    """One line for each folder of weights, one column for each word and level."""
    first = next(iter(rows.values()))
    out = Table("weights", *(f"{row['word']} at {row['level']:g}" for row in first), title="own caption preferred")
    for name, answers in rows.items():
        out.add_row(name, *(f"{row['right']:.1%}" for row in answers))
    return out


def main(
    weights: list[Path] = typer.Argument(..., help="Folders of weights to compare, of either model."),
    count: int = typer.Option(64, "--clips", min=2, help="Held-out clips for each word."),
    seed: int = typer.Option(0),
    threads: int = typer.Option(2),
    json_file: Path | None = typer.Option(None, "--json", help="Where to write the figures."),
) -> None:
    """Compare weights by how well they tell captions apart."""
    torch.set_num_threads(threads)
    clips = Clips(load_codec(weights[0]), seed, tokens_per_step=1)
    asked = list(questions(clips, count, GRID))
    rows = {}
    for folder in weights:
        model = build_trainable(stored_kind(folder), clips.codec.config.z_dim, 0, folder).eval()
        model.use_training_attention()
        rows[str(folder)] = [answer(model, question) for question in asked]
    Console().print(table(rows))
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        folders = " ".join(rows)
        found = {
            "command": f"python scripts/classify_tiny.py {folders} --clips {count} --seed {seed}",
            "env": environment(),
            "grid": GRID,
            "weights": rows,
        }
        json_file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
