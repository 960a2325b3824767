"""Tables of an attention study: what `attention_study.py` writes as Markdown, and what the documentation shows.

Figures are means over prompts and seeds, of the conditional branch where there is one. "Heads" are heads of layers: six
layers of three heads make eighteen.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

KINDS = {
    "step": "a later step",
    "seed": "another seed",
    "prompt": "another prompt",
    "prompt and seed": "another prompt and seed",
    "branch": "the other guidance branch",
}
# Figures of the tables by layer, head and step, and how their columns are called.
SHOWN = {
    "entropy": "entropy",
    "keys_for@0.9": "keys for 90 %",
    "own_frame": "own frame",
    "same_place": "same place",
    "first_frame": "first frame",
    "window": "local box",
    "distance": "distance",
    "common": "common keys",
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

    def names(self, prefix: str) -> list[str]:
        """Columns ``prefix@...`` in their order."""
        return [name for name in self.at if name.startswith(f"{prefix}@")]

    def mean(self, figure: str, **where: int) -> float:
        """Mean of the main branch over everything that is not given; not a number where nothing was measured."""
        return mean(self.values(figure, **where))

    def values(self, figure: str, **where: int) -> list[float]:
        """Measured values of the main branch."""
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


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown table, columns behind the first to the right."""
    header, lines = list(header), [list(row) for row in rows]
    align = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, align, *lines))


def concentration(study: Study) -> str:
    """Mass kept by the best choice at a density, and density that a mass needs; median head, and range of heads."""
    parts = []
    for prefix, suffix, title in (("keys", "", "share read"), ("keys_for", "_for", "mass to keep")):
        points = [name.partition("@")[2] for name in study.names(prefix)]
        rows = []
        for label, kind in (("single keys", "keys"), ("tiles of 8 × 8", "tile"), ("runs of 64", "raster")):
            cells = []
            for point in points:
                name = f"{kind}{suffix}@{point}"
                values = study.by_head(name) if name in study.at else []
                span = f"{percent(min(values))} to {percent(max(values))}" if values else ""
                cells.append(f"{percent(statistics.median(values))} ({span})" if values else "–")
            rows.append([label, *cells])
        parts.append(table([title, *(percent(float(point)) for point in points)], rows))
    return "\n\n".join(parts)


def _cells(study: Study, **where: int) -> list[str]:
    return [show(name, study.mean(name, **where)) for name in SHOWN]


def show(figure: str, value: float | None) -> str:
    """A figure as its column writes it: ratios as numbers, shares in per cent."""
    return number(value) if figure in ("entropy", "distance") else percent(value)


def _even(study: Study) -> list[str]:
    return ["even weights", *(show(name, study.result["even"][name]) for name in SHOWN)]


def layers(study: Study) -> str:
    """Mean of every layer, and what even weights would have."""
    rows = [[f"layer {i}", *_cells(study, layer=i)] for i in study.distinct("layer")]
    return table(["", *SHOWN.values()], [*rows, _even(study)])


def heads(study: Study) -> str:
    """Every head: the columns of the layers, and which band holds it."""
    rows = []
    for head in study.heads:
        bands = [percent(study.mean(band, **head)) for band in ("spatial", "temporal")]
        label = f"layer {head['layer']}, head {head['head']}"
        rows.append([label, *_cells(study, **head), *bands, study.kind(**head)])
    bands = [percent(study.result["even"][band]) for band in ("spatial", "temporal")]
    return table(["", *SHOWN.values(), "spatial band", "temporal band", "kind"], [*rows, [*_even(study), *bands, "–"]])


def steps(study: Study) -> str:
    """Mean of every captured step."""
    total = study.result["steps"][0]
    rows = [[f"step {i} of {total}", *_cells(study, step=i)] for i in study.distinct("step")]
    return table(["", *SHOWN.values()], [*rows, _even(study)])


def distances(study: Study) -> str:
    """Weight per key over that of even weights, by distance in frames and in the picture, median head."""
    parts = []
    for prefix, title in (("frames", "frames away"), ("away", "rows or columns away, from")):
        names = [name for name in study.names(prefix) if study.values(name)]
        header = [title, *(name.partition("@")[2] for name in names)]
        rows = [["weight per key, median head", *(number(statistics.median(study.by_head(n))) for n in names)]]
        for kind in ("spatial", "temporal"):
            of_kind = [head for head in study.heads if study.kind(**head) == kind]
            if of_kind:
                cells = [number(mean(study.mean(n, **head) for head in of_kind)) for n in names]
                rows.append([f"mean of the {len(of_kind)} {kind} heads", *cells])
        parts.append(table(header, rows))
    return "\n\n".join(parts)


def stability(study: Study) -> str:
    """What the best 5 % hold elsewhere, and whether heads keep their rank."""
    ranked = list(dict.fromkeys(entry["figure"] for entry in study.result["agreement"]))
    rows = []
    for kind, gap in study.relations():
        label = f"{gap} step{'s' * (gap > 1)} later" if kind == "step" else KINDS[kind]
        cells = [percent(study.carried(kind, of, f, gap)) for of in ("keys", "blocks") for f in ("mass", "relative")]
        rows.append([label, *cells, *(number(study.agreement(kind, name, gap)) for name in ranked)])
    header = ["carried to", "keys: mass", "of the best", "tiles: mass", "of the best"]
    return table([*header, *(f"rank: {SHOWN.get(name, name)}" for name in ranked)], rows)


def source(study: Study) -> str:
    """What was measured, where and how."""
    found, env, grid = study.result, study.result["env"], study.result["grid"]
    prompts, seeds = ({run[name] for run in found["runs"]} for name in ("prompt", "seed"))
    moments = ", ".join(str(step) for step in study.distinct("step"))
    return (
        f"Measured on the model `{found['model'][0]}`: {len(prompts)} prompts, {len(seeds)} seeds, steps {moments} of "
        f"{found['steps'][0]} (from 0), {grid['frames']} × {grid['height']} × {grid['width']} tokens, "
        f"{found['rows']} query rows and {found['query_blocks']} query blocks of {found['block']} rows per head, dense "
        f"attention, captured in {' and '.join(found['stored'])}; {env['cpu']}, {env['threads']} threads, torch "
        f"{env['torch']}, commit `{(env['git'] or 'unknown')[:9]}`, {found['seconds']} s. Tables show the guidance "
        f"branch `{study.branch}`. Made by `{found['command']}`."
    )


def report(result: dict[str, Any]) -> str:
    """All tables."""
    study = Study(result)
    parts = ["# Attention study", source(study)]
    for name in SECTIONS:
        if name != "source":
            parts += [f"## {name.capitalize()}", section(result, name)]
    return "\n\n".join(parts) + "\n"


def section(result: dict[str, Any], name: str) -> str:
    """One table.

    Raises:
        KeyError: there is no such table.

    """
    if name not in SECTIONS:
        raise KeyError(f"an attention study has no table {name!r}; there are {', '.join(SECTIONS)}")
    return SECTIONS[name](Study(result))


def _compared(study: Study) -> str:
    from attention_claims import CLAIMS

    rows = []
    for claim in CLAIMS:
        here, verdict = claim.judge(study)
        rows.append([claim.reported, claim.source, here, verdict])
    header = ("reported of large models", "by", "here", "so it")
    align = ["---"] * len(header)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, align, *rows))


SECTIONS: dict[str, Callable[[Study], str]] = {
    "concentration": concentration,
    "layers": layers,
    "heads": heads,
    "steps": steps,
    "distances": distances,
    "stability": stability,
    "compared": _compared,
    "source": source,
}
