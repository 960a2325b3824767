"""Schedule: dense steps as count or fraction, dense layers, refresh and reuse."""

import pytest

from dsattn.config import Config
from dsattn.grid import Call, VideoGrid
from dsattn.schedule import decide, dense_step_count

GRID = VideoGrid(2, 2, 2)


def action(config: Config, layer: int, step: int, planned_at: int | None = None, **known) -> str:
    return decide(config, Call(layer, step, GRID, **known), planned_at).action


@pytest.mark.parametrize(
    ("dense_steps", "num_steps", "expected"),
    [(0, None, 0), (3, None, 3), (0.0, None, 0), (0.2, 50, 10), (0.2, 4, 0), (0.1, 30, 3), (0.3, None, None)],
)
def test_dense_step_count(dense_steps, num_steps, expected):
    assert dense_step_count(dense_steps, num_steps) == expected


def test_dense_steps_and_layers():
    config = Config(dense_steps=2, dense_layers="0,-1")
    actions = [[action(config, layer, step, num_layers=4) for layer in range(4)] for step in (1, 2)]
    assert actions == [["dense"] * 4, ["dense", "refresh", "refresh", "dense"]]


def test_a_fraction_needs_the_number_of_steps():
    decision = decide(Config(dense_steps=0.2), Call(0, 9, GRID), None)
    assert (decision.action, "number of steps is unknown" in decision.reason) == ("dense", True)


def test_refresh_every_n_steps():
    config = Config(refresh=3)
    planned, actions = None, []
    for step in range(7):
        actions.append(action(config, 0, step, planned))
        planned = step if actions[-1] == "refresh" else planned
    assert actions == ["refresh", "reuse", "reuse", "refresh", "reuse", "reuse", "refresh"]
