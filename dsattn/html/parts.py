"""What pages of comparisons and profiles have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from dsattn.wording import seconds

KINDS = (
    ("D", "dense, by schedule"),
    ("R", "refresh: a plan is made"),
    ("U", "reuse of the plan"),
    ("F", "fallback to dense"),
)
_WORDS = {"D": "dense", "R": "refresh", "U": "reuse", "F": "fallback"}


def facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values in words."""
    return [(name.replace("_", " "), _word(value)) for name, value in values.items()]


def _word(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_word(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_word, value)) or "none"
    return str(value)


def sparse_share(density: float | None) -> str:
    """Density of the sparse calls, in words."""
    return "no sparse call" if density is None else f"{100 * density:.0f} % in sparse calls"


def maps(found: dict[str, Any] | None, embed: Callable[[str | None], str | None], missing: str) -> dict[str, Any]:
    """What the template needs for the explorer."""
    thumbnails = None if found is None else found["thumbnails"]
    return {
        "maps": found is not None,
        "maps_missing": missing,
        "panels": [] if found is None else panel_names(found),
        "thumbnails": None if thumbnails is None else embed(thumbnails["file"]),
        "bins": 1 if thumbnails is None else thumbnails["bins"],
    }


def panel_names(found: dict[str, Any]) -> list[str]:
    """``cond``, or ``transformer_2 cond`` where there are several models."""
    several = len({panel["model"] for panel in found["panels"]}) > 1
    names = [f"{p['model']} {p['branch']}" if several else p["branch"] for p in found["panels"]]
    return [name or "all" for name in names]


def script_data(found: dict[str, Any] | None) -> dict[str, Any]:
    """What the explorer's script needs."""
    if found is None:
        return {"panels": [], "bins": 1}
    return {"panels": found["panels"], "bins": found["thumbnails"]["bins"]}


def timeline(found: dict[str, Any] | None, times: dict[str, Any] | None) -> list[dict[str, Any]] | None:
    """One entry per step of the sparse run: the main kind of its calls, in words and as bars."""
    if found is None:
        return None
    calls: dict[int, Counter[str]] = {}
    for panel in found["panels"]:
        for row in panel["kinds"]:
            for step, letter in zip(panel["steps"], row, strict=True):
                calls.setdefault(step, Counter())[letter] += 1
    top = max([*times["dense_step_s"], *times["sparse_step_s"]], default=0) if times else 0
    steps = []
    for step, kinds in sorted(calls.items()):
        del kinds["."]
        letter = next((x for x in "FRUD" if kinds[x]), "D")
        text = ", ".join(f"{_WORDS[x]} {n} calls" for x, n in kinds.most_common())
        bars = None
        if times and top and step < min(len(times["dense_step_s"]), len(times["sparse_step_s"])):
            pair = times["dense_step_s"][step], times["sparse_step_s"][step]
            text += f"; dense run {seconds(pair[0])}, sparse run {seconds(pair[1])}"
            bars = [round(100 * value / top, 1) for value in pair]
        steps.append({"index": step, "letter": letter, "text": text, "bars": bars})
    return steps
