"""Laws of the network that judges: of two things it is shown each by itself, and says which is which."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cascade import checkpoint, judge
from cascade.config import package_root
from cascade.data.captions import BACKGROUNDS, COLOURS, Spec, Thing
from cascade.data.scenes import draw_scene, numpy_generator
from cascade.data.shapes import render
from cascade.errors import InputError
from cascade.metrics import features
from cascade.metrics.features import FPS, INPUT
from cascade.noise import generator

ONE = Thing("star", "red", "small", "moves left")
TWO = Thing("square", "cyan", "large", "stands still")


@pytest.fixture(scope="module")
def shipped() -> judge.Judge:
    net = judge.load(package_root() / "checkpoints/tiny/judge")[0]
    assert isinstance(net, judge.Judge)
    return net


def film(*things: Thing, background: str = "black", key: int = 0) -> Tensor:
    scene = draw_scene(Spec(things, background), numpy_generator("judge", key))
    return torch.from_numpy(render(scene, INPUT.frames, INPUT.height, INPUT.width, FPS)).permute(3, 0, 1, 2)[None]


def said(net: judge.Judge, alone: Tensor) -> list[list[str]]:
    """Colour, shape, size and motion of the things of which these clips are."""
    with torch.no_grad():
        logits = net.classify(net(alone))
    words = [[judge.CLASSES[name][i] for i in logits[name].argmax(1)] for name in ("colour", "shape", "size", "motion")]
    return [list(each) for each in zip(*words, strict=True)]


def test_of_two_things_it_says_which_is_which(shipped: judge.Judge) -> None:
    clips = torch.cat([film(ONE, TWO), film(ONE), film(TWO)])
    real, made, clip = shipped.things(clips, clips)
    assert torch.equal(real, made) and clip.tolist() == [0, 0, 1, 2]
    one, two = ([thing.colour, thing.shape, thing.size, thing.motion] for thing in (ONE, TWO))
    assert said(shipped, real) == [one, two, one, two]  # in the order of COLOURS
    assert torch.equal(real[2:], clips[1:])  # of one thing nothing is hidden


def test_what_is_made_is_asked_for_the_things_of_the_real_clip(shipped: judge.Judge) -> None:
    """Each by itself too; what else it shows stays in sight, and nothing is asked of it."""
    real, made = film(ONE, TWO), film(ONE, Thing("ring", "green", "large", "grows"))
    alone = shipped.things(real, made)[1]
    assert len(alone) == 2
    assert torch.equal(alone[0], made[0])  # there is no cyan to hide
    assert bool((alone[1] != made[0]).any())  # red is hidden


def test_what_was_hidden_is_background() -> None:
    clips = film(TWO, background="navy")
    there = (clips != clips[..., :1, :1]).any(1).float()
    share = torch.nn.functional.avg_pool2d(there, 2)
    empty = judge.without(clips, share, torch.zeros_like(share))
    assert torch.equal(empty, clips[..., :1, :1].expand_as(clips))
    assert torch.equal(judge.without(clips, share, torch.ones_like(share)), clips)  # what is in front stays


def test_a_gradient_reaches_what_is_in_sight_alone(shipped: judge.Judge) -> None:
    clips = film(ONE, TWO).requires_grad_()
    alone = shipped.things(clips.detach(), clips)[1]
    shipped.classify(shipped(alone[:1]))["shape"][:, 0].sum().backward()
    assert clips.grad is not None
    hidden = (alone[0] != clips[0]).any(0).detach()
    assert bool(hidden.any()) and not bool(clips.grad[0][:, hidden].any()) and bool(clips.grad.any())


def test_it_is_right_about_unseen_clips_and_through_the_noise(shipped: judge.Judge) -> None:
    clips, shares, alone, classes = judge.batch_of(judge.examples(7, "test"), 200)
    for level in (0.0, 0.1):
        with torch.no_grad():
            logits = shipped.classify(shipped(alone + level * torch.randn(alone.shape, generator=generator("level"))))
        for name, known in classes.items():
            right = (logits[name].argmax(1) == known)[known != judge.NONE].double().mean()
            assert right > 0.95, (name, level, right)
    with torch.no_grad():
        found = shipped.where(clips).sigmoid()
    assert float((found - shares).abs().sum() / shares.sum()) < 0.25


def test_examples_are_whole() -> None:
    clips, shares, alone, classes = judge.batch_of(judge.examples(0, "test"), 16)
    assert clips.shape == alone.shape == (16, 3, 8, 32, 32) and shares.shape == (16, 8, len(COLOURS), 16, 16)
    assert float(shares.sum(2).max()) <= 1 + 1e-6
    two = (shares.amax((1, 3, 4)) > 0).sum(1) == 2
    assert 0 < int(two.sum()) < 16
    still = classes["order"] == 0
    assert torch.equal(alone[~two & still], clips[~two & still])
    assert all(bool((alone[i] != clips[i]).any()) for i in two.nonzero()[:, 0])
    assert set(classes["background"].tolist()) <= set(range(len(BACKGROUNDS)))


def test_a_feature_network_judges_clips_as_a_whole_unless_it_measures(tmp_path: Path) -> None:
    state = checkpoint.load(package_root() / features.WEIGHTS).state
    with pytest.raises(InputError, match="measure, and must not judge"):
        judge.load(package_root() / features.WEIGHTS)
    checkpoint.save(tmp_path, {**state, "path.bias": state["path.bias"] + 1}, features.CONFIG)
    net, _ = judge.load(tmp_path)
    real, made = torch.rand(2, 2, 3, 8, 32, 32, generator=generator("whole"))
    alone = net.things(real, made)
    assert torch.equal(alone[0], real) and torch.equal(alone[1], made) and alone[2].tolist() == [0, 1]


def test_training_is_repeatable(tmp_path: Path, one_thread: None) -> None:
    for name in ("a", "b"):
        judge.fit(tmp_path / name, steps=2, size=4, validate=8)
    assert judge.load(tmp_path / "a")[1] == judge.load(tmp_path / "b")[1]
    assert checkpoint.load(tmp_path / "a").config == judge.CONFIG
