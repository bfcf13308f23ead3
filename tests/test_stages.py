"""Laws of the four kinds of stage, and every shipped stage: it composes, parses, fits its neighbours and its budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from cascade.compose import compose
from cascade.cond import Cond
from cascade.config import package_root, parse, plain, plugin
from cascade.errors import ConfigError
from cascade.nets.unet import VideoUNet
from cascade.noise import Noise, generator
from cascade.settings import StageConfig
from cascade.stage import Stage
from cascade.text import Text
from cascade.video import Fill, Shape, Video
from cascade.windows import Join, Windows

KINDS = ("base", "tsr", "ssr", "interp")
SHIPPED = sorted(
    str(path.relative_to(package_root() / "conf/stage").with_suffix(""))
    for path in (package_root() / "conf/stage").rglob("*.yaml")
)
BUDGET = {"tiny/base": 6, "tiny/tsr": 6, "tiny/ssr1": 15, "tiny/interp": 13, "tiny/ssr2": 34}  # GFLOP an evaluation
TASK = {"task", "prompt", "prompts", "negative_prompt", "input", "out", "seed", "samples", "text"}
TASK |= {"mask", "image", "last", "extend", "seconds", "config_dir"}
TASK |= {"command", "device", "dtype", "micro_batch", "attention", "memory", "data", "evaluate", "distill", "tune"}
Make = Callable[..., Any]


def video(shape: Shape, batch: int = 1, fps: float = 8.0) -> Video:
    x = torch.rand(batch, 3, shape.frames, shape.height, shape.width, generator=generator("stages"))
    return Video(x * 2 - 1, fps)


def shipped(name: str) -> tuple[Any, Any]:
    tree = compose("stage", [f"stage={name}"])
    rule = plugin(tree["kind"])
    return parse({key: value for key, value in tree.items() if key not in TASK}, rule.Config), rule


# rules ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_stage_takes_gives_its_shape(kind: str, stage_config: Make) -> None:
    cfg, rule = stage_config(kind), plugin(kind)
    assert rule.output(rule.takes(cfg), cfg) == cfg.shape
    assert cfg.shape.frames in (
        rule.takes(cfg).frames * rule.rate(cfg),
        (rule.takes(cfg).frames - 1) * rule.rate(cfg) + 1,
    )


@pytest.mark.parametrize("kind", ["tsr", "ssr", "interp"])
def test_a_degraded_video_is_what_the_stage_takes(kind: str, stage_config: Make) -> None:
    cfg, rule = stage_config(kind), plugin(kind)
    whole = video(cfg.shape, 2)
    low = rule.degrade(whole, cfg, generator())
    assert low.shape == rule.takes(cfg) and low.fps * rule.rate(cfg) == whole.fps
    concat, mask = rule.condition(low, cfg, cfg.shape)
    assert concat.shape == whole.frames.shape and mask.shape == (2, 1, cfg.shape.frames, 1, 1)
    if rule.KEEPS_KNOWN:
        assert torch.equal(torch.where(mask > 0, concat, 0), torch.where(mask > 0, whole.frames, 0))
        assert mask[0, 0, :: rule.rate(cfg)].all() and mask.sum() == 2 * low.shape.frames
    else:
        assert mask.all() and torch.equal(concat, low.resize(8, 8).frames)


@pytest.mark.parametrize("kind", ["tsr", "ssr", "interp"])
def test_longer_videos_are_taken_and_wrong_sizes_refused(kind: str, stage_config: Make) -> None:
    cfg, rule = stage_config(kind), plugin(kind)
    takes = rule.takes(cfg)
    out = rule.output(Shape(frames=11, height=takes.height, width=takes.width), cfg)
    assert out.frames == {"tsr": 22, "ssr": 11, "interp": 21}[kind] and out.height == cfg.shape.height
    with pytest.raises(ConfigError, match="the input is 6x"):
        rule.output(Shape(frames=takes.frames, height=6, width=takes.width), cfg)
    with pytest.raises(ConfigError, match=f"{kind} needs a video"):
        rule.output(None, cfg)


def test_a_base_stage_takes_nothing_or_its_own_size_or_more_frames_in_windows(stage_config: Make) -> None:
    cfg, rule = stage_config("base"), plugin("base")
    assert rule.output(None, cfg) == cfg.shape
    with pytest.raises(ConfigError, match="known frames come as 4x8x6, expected 4x8x8"):
        rule.output(Shape(frames=4, height=8, width=6), cfg)
    for frames in (3, 5):
        with pytest.raises(ConfigError, match=f"{frames} frames.* the 4 "):
            rule.output(Shape(frames=frames, height=8, width=8), cfg)
    longer = Shape(frames=5, height=8, width=8)
    assert rule.output(longer, stage_config("base", windows=Windows(frames=4, overlap=2))) == longer
    with pytest.raises(AssertionError, match="without saying which are known"):
        rule.condition(video(cfg.shape), cfg, cfg.shape)


def test_a_base_stage_trains_with_some_known_frames(stage_config: Make) -> None:
    cfg, rule = stage_config("base", known=0.3), plugin("base")
    lows = [rule.degrade(video(cfg.shape), cfg, generator("base", i)) for i in range(300)]
    given = [low for low in lows if low is not None]
    assert 0.2 < len(given) / 300 < 0.4
    counts = [int(low.known.sum()) for low in given]
    assert {1, 2} <= set(counts) and all(torch.equal(low.frames, video(cfg.shape).frames) for low in given)
    assert sum(bool(low.known[0, 0]) for low in given) > 0.65 * len(given)
    assert rule.degrade(video(Shape(frames=1, height=8, width=8)), stage_config("base", known=1.0), generator()) is None


@pytest.mark.parametrize("kind", ["tsr", "interp"])
def test_blank_gaps_are_frames_that_are_not_known(kind: str, stage_config: Make) -> None:
    """Interpolation is one choice of known frames; others are animating a picture and going on from a clip."""
    cfg, rule = stage_config(kind, fill=Fill.BLANK), plugin(kind)
    whole = video(cfg.shape, 2)
    every = (torch.arange(cfg.shape.frames) % 2 == 0).expand(2, -1)
    told = rule.condition(rule.degrade(whole, cfg, generator()), cfg, cfg.shape)
    same = rule.condition(Video(whole.frames, whole.fps, every), cfg, cfg.shape)
    assert torch.equal(told[0], same[0]) and torch.equal(told[1], same[1])
    with pytest.raises(ConfigError, match="but fill is blend: known can be 0, 2, 4, "):
        rule.condition(Video(whole.frames, whole.fps, every), stage_config(kind), cfg.shape)


def test_an_interpolator_also_trains_to_go_on(stage_config: Make) -> None:
    cfg = stage_config("interp", fill=Fill.BLANK, known=0.5, shape=Shape(frames=9, height=8, width=8))
    rule = plugin("interp")
    low = rule.degrade(video(cfg.shape, 400), cfg, generator("known"))
    every = torch.arange(9) % 2 == 0
    interpolates = (low.known == every).all(1)
    assert 0.4 < interpolates.float().mean() < 0.6
    beginnings = low.known[~interpolates]
    counts = beginnings.sum(1)
    assert counts.unique().tolist() == [1, 2, 3, 4]
    assert torch.equal(beginnings, torch.arange(9) < counts[:, None])


@pytest.mark.parametrize("given", [1, 3])
def test_an_interpolator_animates_a_picture_and_goes_on_from_a_clip(given: int, make_stage: Make, encode: Make) -> None:
    stage = make_stage("interp", 0.2, fill=Fill.BLANK)
    low = video(stage.cfg.shape, fps=6.0)
    low.known = torch.arange(5)[None] < given
    made = stage.sample(low, encode(["a"]), None, Noise(0, "interp", ("a",)))
    assert made.fps == 6.0 and made.shape == stage.cfg.shape
    assert torch.equal(made.frames[:, :, :given], low.frames[:, :, :given])
    assert (made.frames - low.frames)[:, :, given:].abs().amax((0, 1, 3, 4)).min() > 0.01


@pytest.mark.parametrize("rule", [Join.CHAINED, Join.OVERWRITE])
def test_windows_in_turn_know_what_is_known_of_the_clip_itself(rule: Join, make_stage: Make, encode: Make) -> None:
    windows = Windows(frames=5, overlap=1, rule=rule)
    stage = make_stage("interp", 0.2, fill=Fill.BLANK, shape=Shape(frames=9, height=8, width=8), windows=windows)
    low = video(stage.cfg.shape, fps=6.0)
    low.known = torch.isin(torch.arange(9), torch.tensor([0, 1, 5]))[None]
    noise = Noise(0, "interp", ("a",))
    made = stage.sample(low, encode(["a"]), None, noise)
    assert made.fps == 6.0 and made.shape == low.shape
    assert torch.equal(made.frames[:, :, low.known[0]], low.frames[:, :, low.known[0]])
    second = Video(low.frames[:, :, 4:].clone(), 6.0, low.known[:, 4:].clone())
    alone = Stage(replace(stage.cfg, shape=second.shape, windows=Windows()), stage.rule, stage.net)
    if rule is Join.CHAINED:
        second.frames[:, :, 0], second.known[:, 0] = made.frames[:, :, 4], True  # type: ignore[index]
    again = alone.sample(second, encode(["a"]), None, noise.window(4)).frames
    assert torch.equal(again, made.frames[:, :, 4:])


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("interp", {"known": 0.5}, "fill is blend, expected blank where known is above 0"),
        ("tsr", {"known": -0.5}, "known is -0.5, expected 0 to 1"),
        ("base", {"known": 1.5}, "known is 1.5, expected 0 to 1"),
        ("tsr", {"factor": 1}, "factor is 1, expected at least 2"),
        ("tsr", {"factor": 3}, "shape.frames is 4, but factor 3 makes 3 frames of 1 and 6 of 2"),
        ("interp", {"factor": 3}, "shape.frames is 5, but factor 3 makes 4 frames of 2 and 7 of 3"),
        ("interp", {"factor": 0}, "factor is 0"),
        ("ssr", {"scale": 3}, r"scale is 3, .* of 8 and 8 \(shape\)"),
        ("ssr", {"scale": 1}, "scale is 1"),
    ],
)
def test_impossible_rules_are_refused(kind: str, changes: dict[str, Any], words: str, stage_config: Make) -> None:
    with pytest.raises(ValueError, match=words):
        stage_config(kind, **changes)


@pytest.mark.parametrize(
    ("kind", "crop", "words"),
    [
        ("tsr", (3, 8, 8), "train.crop.frames is 3, but factor 2 makes 2 frames of 1 and 4 of 2"),
        ("interp", (4, 8, 8), "train.crop.frames is 4, but factor 2 makes 3 frames of 2 and 5 of 3"),
        ("ssr", (4, 5, 8), r"scale is 2, .* of 5 and 8 \(train.crop\)"),
    ],
)
def test_crops_that_do_not_fit_the_rule_are_refused(
    kind: str, crop: tuple[int, int, int], words: str, stage_config: Make, train_config: Make
) -> None:
    frames, height, width = crop
    train = train_config(crop=Shape(frames=frames, height=height, width=width))
    with pytest.raises(ValueError, match=words):
        stage_config(kind, train=train)


@pytest.mark.parametrize("kind", ["tsr", "interp"])
def test_images_cannot_teach_what_stands_between_frames(kind: str, stage_config: Make, train_config: Make) -> None:
    with pytest.raises(ValueError, match=r"train\.images is 0\.1, expected 0"):
        stage_config(kind, train=train_config(images=0.1))


# shipped stages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_stage_parses_and_fits_its_rule(name: str) -> None:
    cfg, rule = shipped(name)
    assert isinstance(cfg, StageConfig) and cfg.name == name.split("/")[-1] and cfg.train is not None
    assert parse(plain(cfg), rule.Config) == cfg
    assert rule.__name__ == f"stages.{cfg.kind}" and set(rule.METRICS)
    assert rule.output(rule.takes(cfg), cfg) == cfg.shape
    if cfg.windows.frames:
        assert cfg.windows.starts(10 * cfg.shape.frames, rule.rate(cfg))
    if cfg.train.crop is not None and cfg.net.fully_convolutional:
        assert not cfg.net.frame_position  # a crop begins anywhere in the clip


def test_the_tiny_chain_fits_together() -> None:
    before = None
    for name in BUDGET:
        cfg, rule = shipped(name)
        if before is not None:
            assert rule.takes(cfg) == before.shape and before.fps * rule.rate(cfg) == cfg.fps
        before = cfg
    assert before is not None and str(before.shape) == "31x128x128"


@pytest.mark.parametrize("name", BUDGET)
def test_an_evaluation_stays_within_the_budget(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    cfg, _ = shipped(name)
    f, h, w = cfg.shape.frames, cfg.shape.height, cfg.shape.width
    with torch.device("meta"):
        net = VideoUNet(cfg.net)
        text = Text(torch.zeros(1, 48, cfg.net.text), torch.ones(1, 48, dtype=torch.bool))
        cond = Cond(torch.zeros(1, 3, f, h, w), torch.zeros(1, 1, f, 1, 1), torch.zeros(1), torch.ones(1), text)
        with FlopCounterMode(display=False) as counter:
            out = net(torch.zeros(1, 3, f, h, w), torch.zeros(1), cond)
    assert out.shape == (1, 3, f, h, w)
    assert 0.1 < counter.get_total_flops() / 1e9 / BUDGET[name] <= 1


def test_every_kind_of_known_frames_is_what_its_name_says() -> None:
    masks = plugin("base").kinds(torch.rand(200, 8, generator=generator("kinds")))
    assert set(masks) == set(plugin("base").KINDS)
    assert masks["first"].sum(1).unique().tolist() == [1] and masks["ends"][:, [0, 7]].all()
    assert masks["half"][:, :4].all() and not masks["half"][:, 4:].any()
    pair = masks["pair"]
    assert pair.sum(1).unique().tolist() == [2] and (pair[:, 1:] & pair[:, :-1]).any(1).all()
    assert pair.any(0).all()  # every frame is sometimes one of them
