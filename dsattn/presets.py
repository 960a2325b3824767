"""Presets ``safe``, ``balanced`` and ``fast``: one word for error budget and schedule of the method ``auto``."""

from __future__ import annotations

from typing import Any

from dsattn.config import require_choice

# Relative L2 error of a layer's attention output that `auto` may make, and the steps a plan serves.
_BUDGETS: dict[str, dict[str, Any]] = {
    "safe": {"target_error": 0.04, "refresh": 2},
    "balanced": {"target_error": 0.06, "refresh": 4},
    "fast": {"target_error": 0.10, "refresh": 6},
}
PRESETS = tuple(_BUDGETS)

SHIPPED = "shipped"
SHIPPED_MODELS = ("tiny", "tiny-joint")
"""Names of the models inside the package, for ``--model``; the first is the one without it."""
# By model family: first steps that stay dense (share of the run) in `safe`, `balanced` and `fast`, and first layers
# that stay dense. Measured on the shipped model alone, and there `balanced` alone (one prompt, 256 x 256, 33 frames, 20
# steps, against dense: benchmarks/results/cpu/compare_auto_balanced_gradient_20_steps.json). The other families'
# figures are not measured here: `balanced` is what the field's published runs of that model used, `safe` and `fast`
# stand around it: Wan 20 to 30 % and one layer, HunyuanVideo 10 % and one, CogVideoX 20 % and two (SVG 2502.01776, SVG2
# 2505.18875), Mochi 12 of 50 steps (Radial 2506.19852); the rest are guesses by likeness.
_SCHEDULES: dict[str, tuple[tuple[float, float, float], int]] = {
    SHIPPED: ((0.25, 0.17, 0.1), 0),
    "Wan": ((0.3, 0.2, 0.12), 1),
    "Wan Animate": ((0.35, 0.3, 0.2), 1),
    "HunyuanVideo": ((0.2, 0.1, 0.06), 1),
    "HunyuanVideo1.5": ((0.2, 0.1, 0.06), 1),
    "Framepack": ((0.2, 0.1, 0.06), 1),
    "CogVideoX": ((0.3, 0.2, 0.12), 2),
    "Mochi": ((0.3, 0.24, 0.16), 1),
    "LTX-Video": ((0.25, 0.15, 0.1), 1),
    "LTX-2": ((0.25, 0.15, 0.1), 1),
}
# Families without published figures.
_OTHER = ((0.3, 0.2, 0.12), 1)


def preset(name: str, family: str | None = None) -> dict[str, Any]:
    """Options of a preset, by flat name, for ``Config.from_dict``.

    Args:
        name: ``safe``, ``balanced`` or ``fast``.
        family: name of the model's family, ``"shipped"`` for the model inside the package; others get a common one.

    Raises:
        UsageError: there is no such preset.

    """
    require_choice("preset", name, PRESETS)
    dense_steps, layers = _SCHEDULES.get(family or "", _OTHER)
    return {
        "method": "auto",
        "dense_steps": dense_steps[PRESETS.index(name)],
        "dense_layers": list(range(layers)),
        **_BUDGETS[name],
    }


def over_preset(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Options of a preset with the user's own over them; another budget takes the place of the preset's."""
    if given.get("cost") is not None:
        values = {name: value for name, value in values.items() if name != "target_error"}
    return {**values, **given}
