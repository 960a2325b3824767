"""What papers report of attention in large video models, and whether a study shows the same: rules, not opinions.

Every claim states what was reported, by whom and of which model, and a rule that turns figures of a study into a
sentence and a verdict, so that the comparison follows the checkpoint.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from attention_figures import Study, mean, number, percent
from attention_statistics import rank_correlation

ALIKE, PARTLY, DIFFERS, UNKNOWN = "resembles", "resembles in part", "differs", "not measured"
# A share within this factor of a reported one is alike.
FACTOR = 2.0


@dataclass(frozen=True)
class Claim:
    """One reported fact.

    Args:
        judge: from a study, what it shows and the verdict.

    """

    reported: str
    source: str
    judge: Callable[[Study], tuple[str, str]]


def compare(value: float, reported: float) -> str:
    """Whether a share is of the size of a reported one."""
    return ALIKE if reported / FACTOR <= value <= reported * FACTOR else DIFFERS


def of_heads(study: Study, figure: str) -> str:
    """Mean and range over heads."""
    values = study.by_head(figure)
    return f"{percent(mean(values))}, heads from {percent(min(values))} to {percent(max(values))}"


def few_keys(study: Study) -> tuple[str, str]:
    """Density that 95 % of the mass needs."""
    value = mean(study.by_head("keys_for@0.95"))
    verdict = compare(value, 0.13)
    how = "" if verdict == ALIKE else f": attention is {'more' if value < 0.13 else 'less'} concentrated"
    return f"{of_heads(study, 'keys_for@0.95')} of the keys", verdict + how


def skewed_weights(study: Study) -> tuple[str, str]:
    """Shares of weights above the mean, and below a hundredth of it."""
    above, tiny = (mean(study.by_head(name)) for name in ("above_mean", "tiny"))
    verdicts = {compare(above, 0.081), compare(tiny, 0.45)}
    text = f"{percent(above)} lie above the mean, {percent(tiny)} below a hundredth of it"
    return text, PARTLY if len(verdicts) > 1 else verdicts.pop()


def local_box(study: Study) -> tuple[str, str]:
    """Mass of a box around the query."""
    value, share = mean(study.by_head("window")), study.result["window_share"]
    box = " × ".join(str(n) for n in study.result["window"])
    text = f"a box of {box} tokens ({percent(share)}) holds {of_heads(study, 'window')}"
    if abs(value - 0.7) <= 0.1:
        return text, ALIKE
    return text, f"{DIFFERS}: attention is {'more' if value > 0.7 else 'less'} local"


def same_over_prompts(study: Study) -> tuple[str, str]:
    """Spread of the box's mass over prompts against that over heads."""
    inside, between = study.spread_over("prompt", "window"), statistics.pstdev(study.by_head("window"))
    if inside is None:
        return "one prompt only", UNKNOWN
    text = f"standard deviation {percent(inside)} over prompts, {percent(between)} over heads"
    return text, ALIKE if inside <= between / 4 else PARTLY if inside <= between / 2 else DIFFERS


def two_kinds(study: Study) -> tuple[str, str]:
    """Shares of spatial and temporal heads."""
    kinds = [study.kind(**head) for head in study.heads]
    spatial, temporal, unclear = (kinds.count(kind) / len(kinds) for kind in ("spatial", "temporal", "unclear"))
    text = f"{percent(spatial)} spatial, {percent(temporal)} temporal, {percent(unclear)} unclear"
    if min(spatial, temporal) < 0.1:
        return text, f"{DIFFERS}: {'no' if min(spatial, temporal) == 0 else 'hardly any'} heads of one kind"
    most = "temporal" if temporal > spatial else "spatial"
    return text, ALIKE if most == "temporal" else f"{PARTLY}: both kinds, but most are {most}"


def decay(study: Study) -> tuple[str, str]:
    """Weight per key by distance in frames, and in the picture."""
    curves = []
    for prefix in ("frames", "away"):
        names = [name for name in study.names(prefix) if study.values(name)]
        curves.append([statistics.median(study.by_head(name)) for name in names])
    falls = [(rank_correlation(list(map(float, range(len(curve)))), curve) or 0.0) <= -0.8 for curve in curves]
    texts = [f"{number(curve[0])} to {number(curve[-1])} × even" for curve in curves]
    text = f"median head, nearest to farthest: {texts[0]} over frames, {texts[1]} over the picture"
    where = "time" if falls[0] else "the picture"
    return text, ALIKE if all(falls) else f"{PARTLY}: it falls over {where} alone" if any(falls) else DIFFERS


def scattered(study: Study) -> tuple[str, str]:
    """Mass of the best tenth: keys against blocks."""
    keys, *blocks = (mean(study.by_head(f"{kind}@0.1")) for kind in ("keys", "tile", "raster"))
    if not all(map(math.isfinite, blocks)):
        return "too few tokens for blocks", UNKNOWN
    text = (
        f"the best 10 % hold {percent(keys)} as keys, {percent(blocks[0])} as tiles of 8 × 8, "
        f"{percent(blocks[1])} as runs of 64"
    )
    return text, ALIKE if keys - max(blocks) >= 0.1 else f"{DIFFERS}: blocks hold nearly as much"


def steady(study: Study) -> tuple[str, str]:
    """What the best keys hold at the next captured step, and for another prompt."""
    gaps = [gap for kind, gap in study.relations() if kind == "step"]
    if not gaps:
        return "one step only", UNKNOWN
    later, last = (study.carried("step", "keys", "relative", gap) or 0.0 for gap in (gaps[0], gaps[-1]))
    prompt = study.carried("prompt", "keys", "relative")
    text = (
        f"the best 5 % of the keys hold {percent(later)} of the best mass {gaps[0]} step{'s' * (gaps[0] > 1)} later, "
        f"{percent(last)} after {gaps[-1]}, {percent(prompt)} for another prompt"
    )
    if prompt is not None and prompt >= later:
        return text, f"{DIFFERS}: another prompt changes no more"
    if later < 0.8 or last < 0.8:
        return text, f"{PARTLY}: it wears off over the steps"
    return text, ALIKE


def property_of_layers(study: Study) -> tuple[str, str]:
    """Ranks of heads by concentration over prompts."""
    value = study.agreement("prompt", "keys@0.05")
    inside, between = study.spread_over("prompt", "keys_for@0.9"), statistics.pstdev(study.by_head("keys_for@0.9"))
    if value is None or inside is None:
        return "one prompt only", UNKNOWN
    text = (
        f"heads ranked by concentration agree over prompts ({number(value)}); density for 90 % varies by "
        f"{percent(inside)} over prompts, {percent(between)} over heads"
    )
    return text, ALIKE if value >= 0.9 else PARTLY if value >= 0.7 else DIFFERS


def sinks(study: Study) -> tuple[str, str]:
    """Heads whose queries share their keys, and heads that favour the first frame."""
    even = study.result["even"]["first_frame"]
    common = [head for head, value in zip(study.heads, study.by_head("common"), strict=True) if value > 0.1]
    first = [value for value in study.by_head("first_frame") if value > 2 * even]
    where = f" (layers {', '.join(map(str, sorted({head['layer'] for head in common})))})" if common else ""
    text = (
        f"{len(common)} of {len(study.heads)} heads{where} put more than a tenth of their weight on 1 % of the keys, "
        f"the same for most queries; {len(first)} give the first frame twice its share"
    )
    return text, ALIKE if common else DIFFERS


CLAIMS = (
    Claim(
        "13 % of the keys, chosen per query, hold 95 % of the mass (Wan 2.1 I2V 14B)",
        "SVG2, arXiv 2505.18875",
        few_keys,
    ),
    Claim(
        "8.1 % of the weights lie above the mean, 45 % below a hundredth of it (Wan 2.1)",
        "SLA, arXiv 2509.24006",
        skewed_weights,
    ),
    Claim("a local box of 15.5 % of the video holds 70 % (HunyuanVideo)", "STA, arXiv 2502.04507", local_box),
    Claim(
        "how local a head is hardly depends on the prompt (HunyuanVideo)", "STA, arXiv 2502.04507", same_over_prompts
    ),
    Claim(
        "29.2 % of the heads are spatial, 66.7 % temporal, 4.1 % unclear (HunyuanVideo)",
        "SVG, arXiv 2502.01776",
        two_kinds,
    ),
    Claim(
        "weights decay with distance in time and in the picture (HunyuanVideo, Wan 2.1)",
        "Radial Attention, arXiv 2506.19852",
        decay,
    ),
    Claim(
        "keys that matter are scattered among others, so that blocks by position waste reads (HunyuanVideo, Wan 2.1)",
        "SVG2, arXiv 2505.18875",
        scattered,
    ),
    Claim(
        "which keys matter changes with the input, and hardly over the denoising steps (HunyuanVideo; Wan 2.1)",
        "AdaSpa, arXiv 2502.21079; LiteAttention, arXiv 2511.11062",
        steady,
    ),
    Claim(
        "how sparse a layer is, is its own property and hardly depends on the input (Wan, HunyuanVideo)",
        "SVOO, arXiv 2603.18636",
        property_of_layers,
    ),
    Claim(
        "some late layers have attention sinks, keys that most queries attend to (several video models)",
        "Wen et al., arXiv 2504.10317",
        sinks,
    ),
)
