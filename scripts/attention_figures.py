"""The figures of an attention study by name, layer, head and step, and how they are written.

Figures are means over prompts and seeds, of the conditional branch where there is one. "Heads" are heads of layers: six
layers of three heads make eighteen.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from dsattn.presets import SHIPPED

KINDS = {
    "step": "a later step",
    "seed": "another seed",
    "prompt": "another prompt",
    "prompt and seed": "another prompt and seed",
    "branch": "the other guidance branch",
}
# Bands must differ by so much mass for a head to count as spatial or temporal.
CLEAR = 0.05


class Study:
    """Figures of a study by name, layer, head and step."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.result = result
        self.at = {name: i for i, name in enumerate(result["columns"])}
        branches = [run["branch"] for run in result["runs"]]
        self.branch = "cond" if "cond" in branches else branches[0]
        self.main = [row for row in result["heads"] if branches[row[self.at["run"]]] == self.branch]

    @property
    def model(self) -> str:
        """The model in words."""
        name = self.result["model"][0]
        return "the shipped model" if name == SHIPPED else f"the model {name}"

    def names(self, prefix: str) -> list[str]:
        """Columns ``prefix@...`` in their order."""
        return [name for name in self.at if name.startswith(f"{prefix}@")]

    def mean(self, figure: str, **where: int) -> float:
        """Mean of the main branch over everything that is not given; not a number where nothing was measured."""
        return mean(self.values(figure, **where))

    def values(self, figure: str, **where: int) -> list[float]:
        """Measured values of the main branch; none of a figure that was not measured."""
        if figure not in self.at:
            return []
        rows = (row for row in self.main if all(row[self.at[name]] == value for name, value in where.items()))
        return [row[self.at[figure]] for row in rows if row[self.at[figure]] is not None]

    def distinct(self, name: str) -> list[int]:
        """Layers, heads, steps or runs, in order."""
        return sorted({row[self.at[name]] for row in self.main})

    @property
    def heads(self) -> list[dict[str, int]]:
        """Layer and head of every head."""
        found = sorted({(row[self.at["layer"]], row[self.at["head"]]) for row in self.main})
        return [{"layer": layer, "head": head} for layer, head in found]

    def by_head(self, figure: str) -> list[float]:
        """One mean per head."""
        return [self.mean(figure, **head) for head in self.heads]

    def spread_over(self, facts: str, figure: str) -> float | None:
        """Standard deviation of a figure over runs that differ in one fact, mean over heads and steps."""
        others = [name for name in ("prompt", "seed", "branch") if name != facts]
        groups: dict[tuple[Any, ...], list[float]] = {}
        for row in self.main:
            run = self.result["runs"][row[self.at["run"]]]
            key = (*(run[name] for name in others), *(row[self.at[name]] for name in ("layer", "head", "step")))
            groups.setdefault(key, []).append(row[self.at[figure]])
        found = [statistics.pstdev(values) for values in groups.values() if len(values) > 1]
        return mean(found) if found else None

    def kind(self, **head: int) -> str:
        """Which band of Sparse VideoGen holds more of a head: ``spatial``, ``temporal`` or ``unclear``."""
        difference = self.mean("spatial", **head) - self.mean("temporal", **head)
        return "unclear" if abs(difference) < CLEAR else "spatial" if difference > 0 else "temporal"

    def carried(self, relation: str, of: str, figure: str, gap: int = 0) -> float | None:
        """Mean over heads of what a choice holds elsewhere; None where no captures are so related."""
        found = [
            entry[figure]
            for entry in self.result["carried_over"]
            if (entry["relation"], entry["of"], entry["gap"]) == (relation, of, gap)
        ]
        return mean(found) if found else None

    def agreement(self, relation: str, figure: str, gap: int = 0) -> float | None:
        """Rank correlation of a figure over heads between related captures."""
        for entry in self.result["agreement"]:
            if (entry["relation"], entry["figure"], entry["gap"]) == (relation, figure, gap):
                return float(entry["correlation"])
        return None

    def relations(self) -> list[tuple[str, int]]:
        """Relations that were measured, steps by their gap first."""
        found = {(entry["relation"], entry["gap"]) for entry in self.result["carried_over"]}
        return sorted(found, key=lambda item: (list(KINDS).index(item[0]), item[1]))


def mean(values: Iterable[float]) -> float:
    """Mean; not a number of nothing."""
    found = list(values)
    return sum(found) / len(found) if found else float("nan")


def percent(value: float | None) -> str:
    """In per cent, a decimal below ten; a dash for None and what is no number."""
    if value is None or value != value:
        return "–"
    return f"{100 * value:.0f} %" if 100 * value >= 9.95 else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    """Two decimals; a dash for None and what is no number."""
    return "–" if value is None or value != value else f"{value:.2f}"
