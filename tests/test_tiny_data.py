"""Scenes of the small model's clips: drawing, captions, paths and pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dsattn.pipelines.tiny import data
from dsattn.pipelines.tiny.render import render, render_background


def test_generator_is_a_function_of_its_seed() -> None:
    def first(seed: int) -> list[data.Scene]:
        stream = data.clips(seed)
        return [next(stream) for _ in range(40)]

    assert first(3) == first(3)
    assert first(3) != first(4)
    for scene in first(3)[:12]:
        one, two = render(scene, 5, 40, 56), render(scene, 5, 40, 56)
        assert one.shape == (5, 40, 56, 3) and one.dtype == np.float32
        assert np.array_equal(one, two)
        assert one.min() >= 0 and one.max() <= 1


@pytest.mark.parametrize("motion", data.MOVING)
def test_a_still_shows_where_a_path_begins(motion: str) -> None:
    still, clip = (data.path(motion, 0.4, 0.7, frames) for frames in (1, 9))
    np.testing.assert_array_equal(still[0], clip[0])


def test_motions_are_drawn_as_often_as_documented() -> None:
    rng = np.random.default_rng(1)
    drawn = [data._draw_motion(rng, simple=False) for _ in range(4000)]
    assert sorted(m for kind in data.MOTION_SHARES for m in kind) == sorted(data.MOTIONS)
    for kind, share in data.MOTION_SHARES.items():
        for motion in kind:  # five standard errors
            each = share / len(kind)
            assert abs(drawn.count(motion) / 4000 - each) < 5 * (each * (1 - each) / 4000) ** 0.5
    assert "still" not in {data._draw_motion(rng, simple=True) for _ in range(400)}


def test_held_out_combinations_never_appear_in_training() -> None:
    held_out = set(data.held_out_combinations())
    assert 40 <= len(held_out) <= 80  # about one in eight of 8 x 5 x 12
    assert {c for c, _, _ in held_out} == set(data.COLOURS)
    assert {s for _, s, _ in held_out} == set(data.SHAPES)
    assert {m for _, _, m in held_out} == set(data.MOVING)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(3000):
        scene = data.sample_scene(rng)
        seen |= {shape.combination for shape in (*scene.shapes, *data.other_motion(scene, rng).shapes)}
    assert not seen & held_out
    assert len(seen) > 0.95 * (8 * 5 * 13 - len(held_out))
    evaluation = data.clips(0, held_out=True)
    assert {next(evaluation).shapes[0].combination for _ in range(600)} == held_out


PHRASES = {
    "clockwise": ("clockwise",),
    "anticlockwise": ("anticlockwise", "counterclockwise"),
    "still": data.STILL_PHRASES,
    **data.BOUNCE_PHRASES,
    **data.STRAIGHT_PHRASES,
}


def test_captions_name_what_is_shown() -> None:
    stream = data.clips(5)
    for _ in range(400):
        scene = next(stream)
        words = scene.caption.split()
        for shape in scene.shapes:
            assert any(f"{shape.colour} {word}" in scene.caption for word in data.SHAPE_WORDS[shape.shape])
            if shape.motion in PHRASES:
                assert any(phrase in scene.caption for phrase in PHRASES[shape.motion])
            else:
                vertical, horizontal = shape.motion.split("-")
                assert horizontal in words
                assert set(words) & {vertical, f"{vertical}wards", "upper" if vertical == "up" else "lower"}
        assert scene.background in words and scene.shadow == ("shadow" in words)
        assert set(words) <= set(data.vocabulary()) and len(words) <= data.MAX_WORDS


def test_scenes_are_as_rich_as_documented() -> None:
    stream = data.clips(6)
    scenes = [next(stream) for _ in range(600)]
    assert {len(s.shapes) for s in scenes} == {1, 2, 3}
    assert {s.background for s in scenes} == set(data.BACKGROUNDS)
    assert {m.motion for s in scenes for m in s.shapes} == set(data.MOTIONS)
    assert {s.pan for s in scenes} == {"", "left", "right"}
    assert {s.pillar for s in scenes} == {s.shadow for s in scenes} == {True, False}
    assert all(len({m.colour for m in s.shapes}) == len(s.shapes) for s in scenes)


@pytest.mark.parametrize("motion", data.MOTIONS)
def test_paths_are_what_their_names_say_and_stay_inside(motion: str) -> None:
    rng = np.random.default_rng(data.MOTIONS.index(motion))
    for _ in range(50):
        spec = data._draw_shape(rng, "red", "circle", motion)
        centres = data.shape_centres(spec, 33)
        assert centres.shape == (33, 2)
        assert centres.min() >= spec.radius and centres.max() <= 1 - spec.radius
        steps = np.diff(centres, axis=0)
        if motion in data.DIRECTIONS:
            whole = centres[-1] - centres[0]
            assert np.allclose(
                whole / spec.travel, np.asarray(data.DIRECTIONS[motion]) / np.hypot(*data.DIRECTIONS[motion]), atol=1e-5
            )
        elif motion in data.TURNS:
            # The y axis points down, so a positive cross product of successive steps is a clockwise turn.
            cross = steps[:-1, 0] * steps[1:, 1] - steps[:-1, 1] * steps[1:, 0]
            assert np.all(np.sign(cross) == data.TURNS[motion])
        elif motion == "still":
            assert np.all(steps == 0)
        else:
            axis = 1 if motion == "bounce-vertical" else 0
            assert np.all(steps[:, 1 - axis] == 0)
            assert 2 <= np.sum(np.diff(np.sign(steps[:, axis])) != 0) <= 5  # it turns round several times
            assert np.ptp(centres[:, axis]) > 0.85 * spec.travel  # frames miss the turning points by up to a tenth


def test_a_pair_differs_in_motion_alone() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        one = data.sample_scene(rng)
        other = data.other_motion(one, rng)
        for a, b in zip(one.shapes, other.shapes, strict=True):
            assert (a.colour, a.shape, a.size, a.radius, a.angle) == (b.colour, b.shape, b.size, b.radius, b.angle)
            assert a.motion != b.motion
        assert (one.background, one.texture_seed, one.pillar, one.pan, one.shadow) == (
            other.background,
            other.texture_seed,
            other.pillar,
            other.pan,
            other.shadow,
        )


def test_a_pair_may_differ_in_shape_alone() -> None:
    rng = np.random.default_rng(4)
    held_out, changed = set(data.held_out_combinations()), 0
    for _ in range(300):
        one = data.sample_scene(rng)
        other = data.other_shape(one, rng)
        for a, b in zip(one.shapes, other.shapes, strict=True):
            assert replace(b, shape=a.shape) == a and b.combination not in held_out
            changed += a.shape != b.shape
        assert replace(other, shapes=one.shapes, caption=one.caption) == one
    assert changed >= 300


def test_shadows_darken_the_background_beside_the_shape_only() -> None:
    stream = data.clips(8, simple=True)
    for _ in range(5):
        scene = next(stream)
        plain, cast = (render(replace(scene, shadow=s), 5, 96, 96) for s in (False, True))
        changed = np.abs(plain - cast).max(axis=-1) > 1e-6
        assert 0.002 < changed.mean() < 0.2
        assert np.all(cast <= plain + 1e-6)
        assert np.all((cast / plain)[changed] >= 0.49)


def test_later_shapes_occlude_earlier_ones() -> None:
    rng = np.random.default_rng(0)
    low, high = (data._draw_shape(rng, colour, "square", "still") for colour in ("red", "blue"))
    shapes = tuple(replace(s, centre=(0.5, 0.5)) for s in (low, high))
    frame = render(data.Scene(shapes, "gradient", 0, False, "", False, ""), 1, 64, 64)[0]
    assert frame[32, 32, 2] > 0.8 and frame[32, 32, 0] < 0.2


def test_unknown_attributes_are_named() -> None:
    with pytest.raises(ValueError, match="background must be one of .*'lunar'"):
        render_background("lunar", 0, 16, 16)
