"""The evaluation of the small model: what it measures on clips whose truth is known."""

from __future__ import annotations

import numpy as np

from dsattn.pipelines.tiny.render import render, render_background
from tests.test_tiny import script


def test_measured_colour_and_direction_match_the_caption() -> None:
    evaluation = script("eval_tiny")
    scenes = evaluation.held_out_scenes(24)
    found = [evaluation.measure(render(s, 17, 96, 128)) for s in scenes]
    assert evaluation.score(scenes, found) == {"colour": 1.0, "moves": 1.0, "direction": 1.0}


def test_measurement_rejects_wrong_clips() -> None:
    evaluation = script("eval_tiny")
    scenes = evaluation.held_out_scenes(24)
    backwards = [evaluation.measure(render(s, 17, 96, 96)[::-1]) for s in scenes]
    assert evaluation.score(scenes, backwards)["direction"] == 0.0
    frozen = [evaluation.measure(np.repeat(render(s, 1, 96, 96), 17, axis=0)) for s in scenes]
    assert evaluation.score(scenes, frozen) == {"colour": 1.0, "moves": 0.0, "direction": 0.0}
    empty = render_background("cloudy", 0, 96, 96)[None].repeat(17, axis=0)
    assert evaluation.measure(empty).colour == "none"
