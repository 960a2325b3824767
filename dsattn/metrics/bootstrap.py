"""Paired differences with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 9999
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval.

    Args:
        mean: over prompts.
        low, high: ends of the interval; None from one prompt, which has no spread.
        prompts: how many prompts it is of.

    """

    mean: float
    low: float | None
    high: float | None
    prompts: int


def mean_interval(by_prompt: Mapping[str, list[float]]) -> Interval | None:
    """Mean over prompts and its 95 % percentile bootstrap interval, with prompts drawn anew 9999 times.

    Clips of one prompt are not independent: their mean is taken first, and prompts are drawn, not clips. The seed is
    fixed, so that a report can be made again.

    Args:
        by_prompt: values of each prompt's clips; None comes back if there are no prompts.

    """
    values = np.array([np.mean(clips) for clips in by_prompt.values() if clips], dtype=np.float64)
    if not len(values):
        return None
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, None, None, 1)
    from scipy.stats import bootstrap  # type: ignore[import-untyped]

    interval = bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=1024,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return Interval(mean, float(interval.low), float(interval.high), len(values))


def paired_interval(
    reference: Mapping[tuple[str, int], float], other: Mapping[tuple[str, int], float]
) -> Interval | None:
    """Mean of ``other - reference`` over the prompts both have, and its interval as in :func:`mean_interval`.

    Args:
        reference, other: values by (prompt, index); only keys in both count, None comes back if there is none.

    """
    differences: dict[str, list[float]] = {}
    for key in sorted(reference.keys() & other.keys()):
        differences.setdefault(key[0], []).append(other[key] - reference[key])
    return mean_interval(differences)
