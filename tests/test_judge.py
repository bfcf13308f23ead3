"""Laws of the network that judges: of two things it says which is which, and grain does not please it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cascade import checkpoint, judge
from cascade.config import package_root
from cascade.data.captions import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, Spec, Thing
from cascade.data.scenes import draw_scene, numpy_generator
from cascade.data.shapes import render
from cascade.metrics.features import FPS, INPUT
from cascade.noise import generator


@pytest.fixture(scope="module")
def shipped() -> judge.Judge:
    return judge.load(package_root() / "checkpoints/tiny/judge")[0]


def film(*things: Thing, background: str = "black") -> Tensor:
    scene = draw_scene(Spec(things, background), numpy_generator("judge", *map(str, things)))
    return torch.from_numpy(render(scene, INPUT.frames, INPUT.height, INPUT.width, FPS)).permute(3, 0, 1, 2)[None]


def said(net: judge.Judge, clips: Tensor, colour: str) -> list[str]:
    """Shape, size and motion of the thing of that colour, "none" where there is none."""
    with torch.no_grad():
        found = net(clips)
    return [
        [*words, "none"][int(found[name][0, :, COLOURS.index(colour)].argmax())] for name, words in judge.HEADS.items()
    ]


def test_of_two_things_it_says_which_is_which(shipped: judge.Judge) -> None:
    one, two = Thing("star", "red", "small", "moves left"), Thing("square", "cyan", "large", "stands still")
    clips = film(one, two)
    assert said(shipped, clips, "red") == ["star", "small", "moves left"]
    assert said(shipped, clips, "cyan") == ["square", "large", "stands still"]
    swapped = film(Thing("star", "cyan", "small", "moves left"), Thing("square", "red", "large", "stands still"))
    assert said(shipped, swapped, "cyan") == ["star", "small", "moves left"]
    assert said(shipped, clips, "green") == ["none"] * 3
    with torch.no_grad():
        assert int(shipped(clips)["background"].argmax()) == BACKGROUNDS.index("black")


def test_it_is_right_about_unseen_clips_and_through_the_noise(shipped: judge.Judge) -> None:
    clips, classes, _ = judge.batch_of(judge.examples(7, "test"), 200)
    for level in (0.0, 0.1):
        with torch.no_grad():
            found = shipped(clips + level * torch.randn(clips.shape, generator=generator("level", 7)))
        for name, known in classes.items():
            right = (found[name].argmax(1) == known).reshape(200, -1).all(1).double().mean()
            assert right > 0.9, (name, level, right)


def test_each_answer_is_of_its_colour(shipped: judge.Judge) -> None:
    assert {name: tuple(value.shape[1:]) for name, value in shipped(torch.zeros(2, 3, 8, 32, 32)).items()} == {
        "shape": (len(SHAPES) + 1, len(COLOURS)), "size": (len(SIZES) + 1, len(COLOURS)),
        "motion": (len(MOTIONS) + 1, len(COLOURS)), "background": (len(BACKGROUNDS),),
    }  # fmt: skip


def test_where_a_colour_is_adds_up_to_what_a_scene_shows() -> None:
    clips, classes, masks = judge.batch_of(judge.examples(0, "test"), 8)
    assert clips.shape == (8, 3, 8, 32, 32) and masks.shape == (64, len(COLOURS), 16, 16)
    there = (classes["shape"] < len(SHAPES)).repeat_interleave(8, 0)
    assert torch.equal(masks.amax((2, 3)) > 0, there) and float(masks.sum(1).max()) <= 1 + 1e-6


def test_training_is_repeatable(tmp_path: Path, one_thread: None) -> None:
    for name in ("a", "b"):
        judge.fit(tmp_path / name, steps=2, size=4, validate=8)
    assert judge.load(tmp_path / "a")[1] == judge.load(tmp_path / "b")[1]
    assert checkpoint.load(tmp_path / "a").config == judge.CONFIG
