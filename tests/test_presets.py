"""Presets: what they set, what goes before them, and whom they belong to."""

from __future__ import annotations

import pytest

import dsattn
from dsattn.errors import UsageError
from dsattn.pipelines.registry import FAMILIES, preset_family
from dsattn.pipelines.tiny.loader import load_tiny
from dsattn.presets import _SCHEDULES, PRESETS, SHIPPED, over_preset, preset

from . import tiny_pipelines as tiny


@pytest.mark.parametrize("family", [*_SCHEDULES, "something else", None])
def test_every_preset_is_a_valid_config_and_they_are_in_order(family: str | None) -> None:
    found = [preset(name, family) for name in PRESETS]
    engines = [dsattn.Engine(dsattn.Config.from_dict(values)) for values in found]
    assert all(engine.method.name == "auto" for engine in engines)
    for lower, higher in zip(found[1:], found[:-1], strict=True):
        assert lower["target_error"] > higher["target_error"] and lower["refresh"] > higher["refresh"]
        assert lower["dense_steps"] < higher["dense_steps"], "less error: more dense steps"
    assert found[1]["target_error"] == 0.06


def test_families_are_those_that_exist() -> None:
    assert set(_SCHEDULES) - {SHIPPED} <= {family.name for family in FAMILIES.values()}
    assert preset_family(load_tiny()) == SHIPPED
    assert preset_family(tiny.wan()[0]) == "Wan" and preset_family(tiny.mochi()[0].transformer) == "Mochi"
    assert preset("balanced", "CogVideoX")["dense_layers"] == [0, 1]
    assert preset("balanced", SHIPPED)["dense_layers"] == []


def test_unknown_presets_name_the_known_ones() -> None:
    with pytest.raises(UsageError, match="preset must be one of safe, balanced, fast; got 'quick'"):
        preset("quick")


def test_what_is_given_goes_before_the_preset() -> None:
    values = over_preset(preset("fast"), {"refresh": 1, "impl": "torch"})
    assert values["refresh"] == 1 and values["impl"] == "torch" and values["target_error"] == 0.1
    assert "target_error" not in over_preset(preset("fast"), {"cost": 0.2})


def test_enable_takes_a_preset() -> None:
    pipe, args = tiny.wan()
    with dsattn.enabled(pipe, preset="safe", refresh=1, impl="torch") as handle:
        config = handle.engine.config
        assert (config.method, config.refresh, config.dense_layers) == ("auto", 1, (0,))
        assert config.dense_steps == preset("safe", "Wan")["dense_steps"]
        assert handle.engine.method_config.target_error == 0.04
        tiny.run(pipe, args)
        assert handle.summary()["calls"]["refresh"] > 0
    with dsattn.enabled(pipe, "auto", preset="fast", cost=0.3) as handle:
        assert handle.engine.method_config.cost == 0.3 and handle.engine.method_config.target_error is None
    with pytest.raises(UsageError, match="preset must be one of"):
        dsattn.enable(pipe, preset="slow")
    with pytest.raises(UsageError, match="error budget of the method 'auto', got 'topk'"):
        dsattn.enable(pipe, "topk", preset="fast")
    assert repr(dsattn.SparseAttnProcessor(preset="fast")) == "SparseAttnProcessor(preset='fast')"
    pipe.set_attn_processor(dsattn.SparseAttnProcessor(preset="fast"))
    assert dsattn.summary(pipe)["config"]["target_error"] == 0.1
