from __future__ import annotations

import colorsys
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch

from cascade.config import parse as parse_settings
from cascade.data.captions import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    SIZES,
    TRAINED,
    UNSEEN,
    Spec,
    Thing,
    captions,
    held_out,
    parse,
    plain,
    say,
    vocabulary,
)
from cascade.data.clips import ClipsConfig
from cascade.data.outlines import distance
from cascade.data.scenes import DIAMETERS, HUES, Focus, Scene, draw_scene, draw_spec, numpy_generator
from cascade.data.shapes import ShapesConfig, render, sample, truth
from cascade.data.source import DataConfig, open_source
from cascade.errors import ConfigError
from cascade.video import Shape


def scenes(count: int, two: float = 0.3) -> list[Scene]:
    out = []
    for i in range(count):
        rng = numpy_generator("test", i)
        out.append(draw_scene(draw_spec(rng, two, "all"), rng))
    return out


def test_the_plain_captions_are_those_of_the_task() -> None:
    one = Spec((Thing("circle", "red", "large", "moves left"),), "black")
    assert plain(one) == "a large red circle moves left on a black background"
    two = Spec((Thing("square", "blue", "small", "moves up"), Thing("ring", "white", "large", "stands still")), "gray")
    assert plain(two) == "a small blue square moves up and a large white ring stands still on a gray background"
    assert not held_out(one) and not held_out(two)


def test_parse_reads_every_plain_caption() -> None:
    things = [Thing(*values) for values in product(SHAPES, COLOURS, SIZES, MOTIONS)]
    for thing, background in product(things, BACKGROUNDS):
        spec = Spec((thing,), background)
        assert parse(plain(spec)) == spec
    rng = numpy_generator("parse")
    for _ in range(500):
        spec = draw_spec(rng, 1.0, "all")
        assert parse(plain(spec)) == spec


@pytest.mark.parametrize("text", ["", "a red circle", "a large red circle moves left on a pink background"])
def test_parse_refuses_other_text(text: str) -> None:
    with pytest.raises(ConfigError, match="plain form"):
        parse(text)


def test_held_out_compositions_leave_every_pair_in_training() -> None:
    compositions = list(product(SHAPES, COLOURS, MOTIONS))
    kept = [c for c in compositions if not held_out(Spec((Thing(c[0], c[1], "small", c[2]),), "black"))]
    assert 0.08 <= 1 - len(kept) / len(compositions) <= 0.12
    for i, j in combinations(range(3), 2):
        assert {(c[i], c[j]) for c in kept} == {(c[i], c[j]) for c in compositions}


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_draws_keep_to_their_split_and_differ_in_colour_and_shape(split: str) -> None:
    rng = numpy_generator("split")
    for _ in range(300):
        spec = draw_spec(rng, 0.5, split)
        assert held_out(spec) == (split == "held_out")
        assert len({t.colour for t in spec.things}) == len({t.shape for t in spec.things}) == len(spec.things)


def test_every_value_is_drawn_about_equally_often() -> None:
    rng = numpy_generator("uniform")
    specs = [draw_spec(rng, 0.0, "all") for _ in range(4000)]
    for values, names in (
        ([s.things[0].shape for s in specs], SHAPES),
        ([s.things[0].colour for s in specs], COLOURS),
        ([s.things[0].motion for s in specs], MOTIONS),
        ([s.background for s in specs], BACKGROUNDS),
    ):
        share = 4000 / len(names)
        assert all(abs(values.count(name) - share) < 5 * share**0.5 for name in names)


def test_unseen_wordings_are_never_said_in_training_and_use_no_new_word() -> None:
    rng, known = numpy_generator("say"), set(vocabulary())
    assert len(known) <= 120 and all(len(TRAINED[n]) >= 12 and not set(TRAINED[n]) & set(UNSEEN[n]) for n in (1, 2))
    for i in range(40):
        spec = draw_spec(rng, 0.05 if i else 1.0)
        seen, unseen = set(captions(spec)), set(captions(spec, unseen=True))
        assert not seen & unseen and plain(spec) in seen
        drawn = [say(spec, rng) for _ in range(40)]
        assert set(drawn) <= seen and 8 <= drawn.count(plain(spec)) <= 34
        assert {say(spec, rng, unseen=True) for _ in range(20)} <= unseen
        assert all(set(c.replace(",", "").replace(".", "").split()) <= known for c in (*drawn, *sorted(unseen)[:50]))


def test_every_second_frame_is_the_clip_at_half_the_rate() -> None:
    for scene in scenes(30):
        fine = render(scene, 31, 48, 48, 16)
        half = render(scene, 16, 48, 48, 8)
        assert np.array_equal(fine[::2], half)
        assert np.array_equal(half[::2], render(scene, 8, 48, 48, 4))


def test_a_scene_is_the_same_at_every_size() -> None:
    for scene in scenes(30):
        fine = render(scene, 4, 128, 128, 2).reshape(4, 32, 4, 32, 4, 3).mean(axis=(2, 4))
        error = np.abs(fine - render(scene, 4, 32, 32, 2))
        assert error.mean() < 0.004 and np.quantile(error, 0.999) < 0.5


def test_a_wide_picture_holds_the_square_world_in_its_middle() -> None:
    for scene in scenes(10):
        wide = render(scene, 4, 32, 48, 4)
        assert np.allclose(wide[:, :, 8:40], render(scene, 4, 32, 32, 4), atol=1e-4)
        assert np.array_equal(wide[:, :, :7], np.broadcast_to(wide[:, :1, :1], (4, 32, 7, 3)))


def test_things_stay_inside_and_do_what_they_are_said_to() -> None:
    for scene in scenes(500):
        whole = truth(scene, 65, 8, 8, 32)
        assert (whole.centres - whole.diameters[..., None] / 2 > 0.01).all()
        assert (whole.centres + whole.diameters[..., None] / 2 < 0.99).all()
        seen = truth(scene, 8, 8, 8, 4)
        for n, (thing, body) in enumerate(zip(scene.spec.things, scene.bodies, strict=True)):
            low, high = DIAMETERS[thing.size]
            assert low <= body.diameter <= high
            path, size = seen.centres[:, n], seen.diameters[:, n]
            step, ratio = path[-1] - path[0], size[-1] / size[0]
            if thing.motion.startswith("moves"):
                direction = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[thing.motion.split()[1]]
                assert step @ np.array(direction) >= 0.3
                assert np.allclose(np.diff(path, axis=0), step / 7)
            elif thing.motion.startswith("circles"):
                assert body.orbit >= 0.12 and np.allclose(np.hypot(*(path - body.centre).T), body.orbit)
                angle = np.unwrap(np.arctan2(*(path - body.centre).T[::-1]))
                assert (angle[-1] - angle[0]) / (2 * np.pi) * (1 if thing.motion == "circles clockwise" else -1) >= 0.75
            else:
                assert np.allclose(step, 0)
                assert {"grows": ratio >= 1.5, "shrinks": ratio <= 1 / 1.5, "stands still": ratio == 1}[thing.motion]


def test_colours_lie_in_their_ranges() -> None:
    for scene in scenes(300):
        for thing, body in zip(scene.spec.things, scene.bodies, strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*body.rgb)
            assert value > 0.85
            if thing.colour == "white":
                assert saturation == 0
            else:
                low, high = HUES[thing.colour]
                assert saturation > 0.6 and low - 1e-6 <= hue * 360 <= high + 1e-6
            assert np.linalg.norm(np.subtract(body.rgb, scene.background)) > 0.45


def test_two_things_hide_at_most_a_third_of_each_other_at_the_start() -> None:
    for scene in scenes(150, two=1.0):
        back = Scene(Spec(scene.spec.things[:1], "black"), scene.bodies[:1], (0.0, 0.0, 0.0))
        alone = truth(back, 1, 64, 64, 4).masks.sum()
        assert truth(scene, 1, 64, 64, 4).masks[0, 0].sum() >= alone * 2 / 3


@pytest.mark.parametrize("shape", SHAPES)
def test_distance_is_that_to_the_outline(shape: str) -> None:
    grid = (np.arange(256) + 0.5) / 128 - 1
    x, y = np.meshgrid(grid, grid)
    d = distance(shape, x, y, 1.0, 0.44)
    inside = np.argwhere(d < 0)
    assert np.abs(grid[inside]).max() <= 0.5
    gradient = np.hypot(*np.gradient(d, grid[1] - grid[0]))
    assert np.quantile(gradient, 0.97) < 1.01 and np.quantile(gradient, 0.1) > 0.97  # but at creases


def test_triangle_and_star_stand_upright() -> None:
    x = np.linspace(-0.5, 0.5, 201)
    for shape in ("triangle", "star"):
        rows = [(distance(shape, x, np.full_like(x, y), 1.0) < 0).mean() for y in (-0.4, 0.3)]
        assert 0 < rows[0] < rows[1]
        d = distance(shape, *np.meshgrid(x, x), 1.0)
        assert np.allclose(d, d[:, ::-1])


def test_a_key_is_the_same_film_at_every_size_and_rate() -> None:
    cfg = ShapesConfig(two=0.5)
    small, caption, scene = sample(cfg, Shape(frames=8, height=32, width=32), 4, "train", 7)
    large, same, again = sample(cfg, Shape(frames=16, height=64, width=64), 8, "train", 7)
    assert (caption, scene) == (same, again)
    assert small.shape == (3, 8, 32, 32) and small.dtype == torch.float32 and small.abs().max() <= 1
    assert (torch.nn.functional.avg_pool2d(large[:, ::2], 2) - small).abs().mean() < 0.01
    assert sample(cfg, Shape(frames=8, height=32, width=32), 4, "train", 8)[2] != scene
    assert sample(cfg, Shape(frames=1, height=32, width=32), 4, "train", 7)[0].shape == (3, 1, 32, 32)


def test_refusals_name_the_setting() -> None:
    for wrong, why in (
        ({"split": "valid"}, r"split is 'valid'.*Fix: set data\.shapes\.split to one of train, held_out, all"),
        ({"two": 2.0}, r"two is 2\.0.*Fix: set data\.shapes\.two to 0 to 1"),
        ({"seconds": 0.0}, r"seconds is 0\.0.*Fix: set data\.shapes\.seconds to a positive number"),
    ):
        with pytest.raises(ConfigError, match=why):
            parse_settings(wrong, ShapesConfig, "data.shapes")
    with pytest.raises(ConfigError, match=r"data\.shapes\.seconds is 2, but 16 frames.*Fix: data\.shapes\.seconds=4"):
        render(scenes(1)[0], 16, 8, 8, 4)


def test_what_is_too_long_for_the_data_is_refused_before_anything_is_drawn_or_read(tmp_path: Path) -> None:
    shape = Shape(frames=32, height=8, width=8)
    with pytest.raises(ConfigError, match=r"data\.shapes\.seconds is 2, but 32 frames at 4 fps end at 7\.75 s"):
        open_source(DataConfig(), shape, 4.0, tmp_path)
    clips = ClipsConfig(path="absent", max_seconds=5.0)
    with pytest.raises(ConfigError, match=r"data\.clips\.max_seconds is 5, .*Fix: data\.clips\.max_seconds=8, or"):
        open_source(DataConfig(clips=clips), shape, 4.0, tmp_path)


# focus ---------------------------------------------------------------------------------------------------------------


def test_focus_makes_words_as_frequent_as_asked_and_keeps_compositions_out() -> None:
    focus = [Focus(share=0.5, motions=["grows"]), Focus(share=0.3, shapes=["star"], sizes=["small"])]
    specs = [draw_spec(numpy_generator("focus", i), 0.3, "train", focus) for i in range(1500)]
    grows = sum(spec.things[0].motion == "grows" for spec in specs) / 1500
    stars = sum((spec.things[0].shape, spec.things[0].size) == ("star", "small") for spec in specs) / 1500
    assert 0.5 < grows < 0.62 and 0.3 < stars < 0.42  # the share, and what comes by itself
    assert not any(held_out(spec) for spec in specs)
    assert all(len({thing.shape for thing in spec.things}) == len(spec.things) for spec in specs)


def test_a_focus_that_leaves_nothing_to_draw_is_refused() -> None:
    """All focuses of every shape and motion, each split: one that is accepted can be drawn from."""
    seen = set()
    for shape, motion in product(SHAPES, MOTIONS):
        focus = [Focus(share=1, shapes=[shape]), Focus(share=1, motions=[motion])]
        possible = any(held_out(Spec((Thing(shape, colour, "small", motion),), "black")) for colour in COLOURS)
        seen.add(possible)
        if possible:
            cfg = ShapesConfig(split="held_out", focus=focus)
            spec = draw_spec(numpy_generator(shape, motion), 0.0, cfg.split, cfg.focus)
            assert (spec.things[0].shape, spec.things[0].motion) == (shape, motion)
        else:
            with pytest.raises(ValueError, match="split is held_out, of which focus leaves nothing"):
                ShapesConfig(split="held_out", focus=focus)
        for legal in ({}, {"two": 1.0, "split": "held_out"}, {"split": "all"}):
            ShapesConfig(focus=focus, **legal)  # type: ignore[arg-type]
    assert seen == {True, False}


def test_a_focus_on_unknown_words_is_refused() -> None:
    with pytest.raises(ValueError, match="motions is"):
        Focus(share=0.5, motions=["jumps"])
