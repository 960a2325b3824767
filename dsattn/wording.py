"""Numbers in words, alike in every table, page and message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median


def counts(values: Mapping[str, int]) -> str:
    """``flex 216, pipeline 24``."""
    return ", ".join(f"{name} {number:,}" for name, number in values.items()) or "none"


def seconds(value: float | None) -> str:
    """``0.03 s``, ``12.3 s`` or ``31m35s``; ``n/a`` of nothing."""
    if value is None:
        return "n/a"
    if value >= 600:
        return f"{int(value) // 60}m{int(value) % 60:02d}s"
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 0.1 else f"{value * 1000:.1f} ms"


def middle(values: Sequence[float | None]) -> float | None:
    """Median of what is known; None of nothing."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def times(ratio: float | None) -> str:
    """``1.62x``."""
    return "n/a" if ratio is None else f"{ratio:.2f}x"


def percent(share: float | None) -> str:
    """``12.3%``; ``n/a`` of nothing."""
    return "n/a" if share is None else f"{share:.1%}"


def gibibytes(size: int) -> str:
    """``1.25 GiB``."""
    return f"{size / 2**30:.2f} GiB"
