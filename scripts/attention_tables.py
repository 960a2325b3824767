"""Tables of an attention study: what `attention_study.py` writes as Markdown, and what the documentation shows."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from attention_claims import CLAIMS
from attention_figures import KINDS, Study, mean, number, percent

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


def table(header: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1) -> str:
    """Markdown table; columns from ``left`` on are aligned to the right."""
    header, lines = list(header), [list(row) for row in rows]
    align = ["---" if at < left else "---:" for at in range(len(header))]
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
                values = study.by_head(name) if study.values(name) else []
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
    # Where the files lay is not part of what was measured.
    command = re.sub(r" --(?:captures|out|name) \S+| --debug", "", found["command"])
    threads = f"{env['threads']} thread{'s' * (env['threads'] > 1)}"
    moments = ", ".join(str(step) for step in study.distinct("step"))
    return (
        f"Measured on {study.model}: {len(prompts)} prompts, {len(seeds)} seeds, steps {moments} of "
        f"{found['steps'][0]} (from 0), {grid['frames']} × {grid['height']} × {grid['width']} tokens, "
        f"{found['rows']} query rows and {found['query_blocks']} query blocks of {found['block']} rows per head, dense "
        f"attention, captured in {' and '.join(found['stored'])}; {env['cpu']}, {threads}, torch "
        f"{env['torch']}, commit `{(env['git'] or 'unknown')[:9]}`, {found['seconds']} s. Tables show the guidance "
        f"branch `{study.branch}`. Made by `{command}`."
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


def compared(study: Study) -> str:
    """What papers report, and what is here."""
    rows = []
    for claim in CLAIMS:
        here, verdict = claim.judge(study)
        rows.append([claim.reported, claim.source, here, verdict])
    return table(("reported of large models", "by", "here", "so it"), rows, left=4)


SECTIONS: dict[str, Callable[[Study], str]] = {
    "concentration": concentration,
    "layers": layers,
    "heads": heads,
    "steps": steps,
    "distances": distances,
    "stability": stability,
    "compared": compared,
    "source": source,
}
