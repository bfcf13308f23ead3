"""Laws of what is given of a video: it stands where it belongs, comes out exactly, and nothing else is known."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cascade import media, store
from cascade.chain import Chain
from cascade.clipfiles import read_clip, video_bytes
from cascade.cond import Cond
from cascade.config import parse, plugin
from cascade.errors import CascadeError, ConfigError, InputError
from cascade.given import covered, given
from cascade.noise import Noise, generator, sample_id
from cascade.request import Given
from cascade.sampling.sampler import Sampler
from cascade.stage import Stage
from cascade.text import TextConfig
from cascade.video import Shape, Video
from cascade.windows import Join, Windows

Make = Callable[..., Any]
EXTEND = Windows(frames=4, overlap=2, rule=Join.EXTEND)
PROMPT = "a red circle"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with pictures and a clip of 12 frames at 16 a second, twice the tiny base's rate."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("dark", -0.6), ("light", 0.6)):
        Path(f"{name}.png").write_bytes(media.png(torch.full((3, 20, 30), value)))
    Path("clip.safetensors").write_bytes(video_bytes(Video(ramp(12), 16.0)))
    Path("clip.mp4").write_bytes(media.encoded(ramp(12)[0], 16.0, ".mp4"))
    hole = torch.full((3, 8, 8), -1.0)
    hole[:, 2:5, 3:7] = 1
    Path("hole.png").write_bytes(media.png(hole))
    return tmp_path


def ramp(frames: int) -> Tensor:
    """Frame f is even and of brightness f / 16 - 0.8, (1, 3, F, 8, 8)."""
    return (torch.arange(frames) / 16 - 0.8).view(1, 1, -1, 1, 1).expand(1, 3, -1, 8, 8).contiguous()


def asked(cfg: Any, **words: Any) -> Video | None:
    return given(parse({"prompt": "x", **words}, Given), cfg, plugin(cfg.kind))  # type: ignore[arg-type]


def known(video: Video | None) -> list[int]:
    """Frames that are known; all others are blank."""
    assert video is not None and video.known is not None
    assert not (video.frames * (1 - video.mask)).any()
    return [f for f, there in enumerate(video.known[0].tolist()) if there]


# what files become ---------------------------------------------------------------------------------------------------


def test_pictures_stand_at_the_ends_and_nothing_else_is_known(here: Path, stage_config: Make) -> None:
    cfg = stage_config("base", windows=EXTEND)  # 4 frames of 8 x 8 at 8 fps
    assert asked(cfg) is None
    assert known(asked(cfg, image="dark.png")) == [0]
    both = asked(cfg, image="dark.png", last="light.png", seconds=1.0)
    assert known(both) == [0, 7] and both is not None and both.fps == 8
    assert (both.frames[:, :, 0] < -0.5).all() and (both.frames[:, :, 7] > 0.5).all()
    assert known(asked(cfg, last="light.png")) == [3]
    assert known(asked(cfg, seconds=2.0)) == []


@pytest.mark.parametrize("name", ["clip.safetensors", "clip.mp4"])
def test_a_clip_goes_on_at_the_rate_of_the_stage(here: Path, name: str, stage_config: Make) -> None:
    cfg = stage_config("base", windows=EXTEND)
    longer = asked(cfg, extend=name)  # every second one of 12 frames, and one more window
    assert longer is not None and longer.shape.frames == 8 and known(longer) == [0, 1, 2, 3, 4, 5]
    assert (longer.frames[:, :, :6] - ramp(12)[:, :, ::2]).abs().max() < (0.05 if name.endswith("mp4") else 1e-6)
    assert known(asked(cfg, extend=name, last="light.png", seconds=2.0)) == [0, 1, 2, 3, 4, 5, 15]


def test_something_is_left_to_make_whatever_is_given(here: Path, stage_config: Make) -> None:
    one_on = stage_config("base", windows=replace(EXTEND, overlap=3))  # the next window makes one frame
    assert known(asked(one_on, extend="clip.mp4")) == [0, 1, 2, 3, 4, 5]
    assert known(asked(one_on, extend="clip.mp4", last="dark.png")) == [0, 1, 2, 3, 4, 5, 7]
    picture = stage_config("base", shape=Shape(frames=1, height=8, width=8))
    with pytest.raises(ConfigError, match="2 frames, expected the 1 that it makes at once"):
        asked(picture, image="dark.png")


def test_a_hole_is_where_the_mask_is_white(here: Path, stage_config: Make) -> None:
    cfg = stage_config("base", windows=EXTEND)
    video = asked(cfg, input="clip.safetensors", mask="hole.png")
    assert video is not None and video.known is not None and video.known.shape == (1, 6, 8, 8)
    assert not video.known[:, :, 2:5, 3:7].any() and video.known.sum() == 6 * (64 - 12)
    assert torch.equal(video.frames, ramp(12)[:, :, ::2] * video.mask)


@pytest.mark.parametrize("size", [(64, 64), (40, 90), (90, 40), (5, 9)])
def test_a_mask_covers_what_the_picture_under_it_shows(size: tuple[int, int]) -> None:
    """The same place in `covered` as in `fit`: bright pixels are never outside of the hole."""
    for i in range(20):
        y, x = (int(torch.randint(n, (), generator=generator("spot", i, n))) for n in size)
        spot = torch.zeros(1, *size, 3, dtype=torch.uint8)
        spot[0, y, x] = 255
        hole = covered(spot[..., 0] > 0, 8, 8)[0]
        shown = media.fit(media.to_float(spot).transpose(0, 1), 8, 8)[0].mean(0)
        shown = shown - shown.min()
        if shown.max() > 0.01:
            assert hole.flatten()[shown.argmax()], (size, y, x)


FAULTS: list[tuple[dict[str, Any], int, str]] = [
    ({"mask": "hole.png"}, 2, "mask is set"),
    ({"image": "dark.png", "extend": "clip.mp4"}, 2, "image and extend"),
    ({"input": "clip.mp4", "mask": "hole.png", "last": "dark.png"}, 2, "input and last"),
    ({"input": "clip.mp4"}, 2, "starts from text"),
    ({"seconds": -1.0}, 2, "seconds is -1"),
    ({"seconds": 0.25}, 2, "the 4 it makes at once"),
    ({"extend": "clip.mp4", "seconds": 0.75}, 2, "6 are given"),
    ({"image": "none.png"}, 3, "image none.png: no such file"),
    ({"last": "none.png"}, 3, "last none.png: no such file"),
    ({"extend": "none.mp4"}, 3, "extend none.mp4: no such file"),
    ({"input": "none.mp4", "mask": "hole.png"}, 3, "input none.mp4: no such file"),
    ({"input": "clip.mp4", "mask": "none.png"}, 3, "mask none.png: no such file"),
    ({"image": "clip.mp4"}, 3, "clip.mp4: not a png"),
    ({"input": "clip.mp4", "mask": "dark.png"}, 3, "nothing of it is white"),
    ({"input": "clip.mp4", "mask": "short.mp4"}, 3, "2 frames at 8 a second, but the clip has 6"),
]


@pytest.mark.parametrize(("words", "code", "named"), FAULTS, ids=[named for _, _, named in FAULTS])
def test_what_cannot_be_given_is_refused(
    here: Path, words: dict[str, Any], code: int, named: str, stage_config: Make
) -> None:
    Path("short.mp4").write_bytes(media.encoded(torch.ones(3, 4, 8, 8), 16.0, ".mp4"))
    with pytest.raises(CascadeError) as error:
        asked(stage_config("base", windows=EXTEND), **words)
    assert error.value.code == code and named in error.value.message and error.value.fix, error.value


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
@pytest.mark.parametrize("setting", ["image", "last", "extend", "input", "mask"])
def test_a_file_that_cannot_be_read_is_named_with_its_setting(
    here: Path, setting: str, number: int, stage_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions do not say so for root, hence a failing call."""
    Path("lost.safetensors").write_bytes(b"x")
    files = ["lost.safetensors"] if setting in ("extend", "input") else []
    Path("lost.mp4").write_bytes(b"x")
    real = io.open

    def failing(file: Any, *words: Any, **more: Any) -> Any:
        if "lost" in str(file):
            raise OSError(number, os.strerror(number), str(file))
        return real(file, *words, **more)

    monkeypatch.setattr(io, "open", failing)
    for file in (*files, "lost.mp4"):
        words = {"input": "clip.mp4", "mask": "hole.png"} if setting in ("input", "mask") else {}
        with pytest.raises(InputError) as error:
            asked(stage_config("base", windows=EXTEND), **(words | {setting: file}))
        assert f"{setting} {file}: " in error.value.message and os.strerror(number) in error.value.message
        assert "disk" not in error.value.fix


GOOD = torch.zeros(3, 4, 8, 8)
CLIPS: dict[str, tuple[Tensor, str, str]] = (
    {  # a tensor, its fps, what is said of them
        "flat": (GOOD[0], "4", "is not a clip"),
        "batch": (GOOD[None], "4", "is not a clip"),
        "no frames": (GOOD[:, :0], "4", "is not a clip"),
        "no height": (GOOD[:, :, :0], "4", "is not a clip"),
        "integers": (GOOD.to(torch.uint8), "4", "is not a clip"),
        "truths": (GOOD > 0, "4", "is not a clip"),
        "complex": (GOOD.to(torch.complex64), "4", "is not a clip"),
        "eight bits": (GOOD.to(torch.float8_e4m3fn), "4", "is not a clip"),
        "grey": (GOOD[:1], "4", "has 1 colours, expected 3"),
        "wide": (GOOD + 2, "4", "has values from 2 to 2"),
        "endless": (GOOD / 0, "4", "has values from nan"),
    }
    | {f"at {fps}": (GOOD, fps, f"its fps is {fps!r}") for fps in ("", "x", "0", "-4", "nan", "inf", "1e-300", "1e300")}
)


@pytest.mark.parametrize("name", CLIPS)
def test_a_lossless_clip_is_whole_or_refused(tmp_path: Path, name: str, stage_config: Make) -> None:
    frames, fps, said = CLIPS[name]
    path = tmp_path / "clip.safetensors"
    path.write_bytes(store.tensors_to_bytes({"video": frames}, metadata=("fps", fps)))
    for cfg, setting in ((stage_config("base", windows=EXTEND), "extend"), (stage_config("ssr"), "input")):
        with pytest.raises(InputError) as error:
            asked(cfg, **{setting: str(path)})
        assert f"{setting} {path}: {said}" in error.value.message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_lossless_clip_may_have_any_usual_precision(dtype: torch.dtype) -> None:
    data = store.tensors_to_bytes({"video": torch.ones(3, 4, 8, 8, dtype=dtype)}, metadata=("fps", "4"))
    video = read_clip(data, "clip")
    assert video.frames.dtype is torch.float32 and (video.frames == 1).all() and video.fps == 4


@pytest.mark.parametrize("kind", ["tsr", "ssr", "interp"])
def test_a_stage_that_needs_a_video_takes_no_part_of_one(here: Path, kind: str, stage_config: Make) -> None:
    for words in ({"image": "dark.png"}, {"input": "clip.mp4", "mask": "hole.png"}, {"seconds": 2.0}, {}):
        with pytest.raises(ConfigError, match=f"{kind} needs a video|{kind}: frames of the clip itself are given"):
            asked(stage_config(kind), **words)
    chain = Chain([stage_config(kind, windows=replace(EXTEND, frames=5))], [plugin(kind)], TextConfig())  # type: ignore[list-item]
    with pytest.raises(ConfigError, match=r"windows\.rule is extend"):
        chain.check()


def test_too_few_seconds_name_as_many_as_are_enough(here: Path, stage_config: Make) -> None:
    cfg = stage_config("base", windows=EXTEND)
    for words in ({}, {"image": "dark.png"}, {"extend": "clip.mp4"}):
        with pytest.raises(ConfigError, match="are given") as error:
            asked(cfg, seconds=0.001, **words)
        asked(cfg, seconds=float(error.value.fix.removeprefix("seconds=")), **words)


def test_a_long_video_needs_windows(here: Path, stage_config: Make) -> None:
    with pytest.raises(ConfigError, match=r"windows\.rule=extend") as error:
        asked(stage_config("base"), seconds=1.0)
    assert "8 frames, expected the 4" in error.value.message
    with pytest.raises(ValueError, match="frames is 0, expected at least 1 where rule is extend"):
        Windows(rule=Join.EXTEND)


# what the stage makes of them ----------------------------------------------------------------------------------------


def noise(*prompts: str) -> Noise:
    return Noise(1, "base", tuple(sample_id(prompt) for prompt in prompts or (PROMPT,)))


def part_of(stage: Stage, frames: int, mask: Tensor, batch: int = 1) -> Video:
    """A random video of which `mask` (F,) or (F, H, W) is known."""
    shape = (batch, 3, frames, stage.cfg.shape.height, stage.cfg.shape.width)
    x = torch.rand(shape, generator=generator("part", frames)) * 2 - 1
    return Video(x, stage.cfg.fps, mask.expand(batch, *mask.shape))


def some(frames: int, share: float, *size: int) -> Tensor:
    return torch.rand(frames, *size, generator=generator("some", frames)) < share


@pytest.mark.parametrize("rule", [Join.EXTEND, Join.BLEND])
@pytest.mark.parametrize("size", [(), (8, 8)])
@pytest.mark.parametrize("frames", [4, 9])
def test_what_is_known_comes_out_exactly(
    frames: int, size: tuple[int, ...], rule: Join, make_stage: Make, encode: Make
) -> None:
    windows = replace(EXTEND, rule=rule)
    sampler = Sampler(steps=3, guidance=2.0, reconstruction=1.0)
    stage = make_stage("base", 0.2, windows=windows, sampler=sampler)
    low = part_of(stage, frames, some(frames, 0.5, *size), 2)
    steps: list[int] = []
    out = stage.sample(low, encode([PROMPT, "x"]), None, noise(PROMPT, "x"), steps.append)
    there = low.mask.expand_as(low.frames) > 0
    assert torch.equal(out.frames[there], low.frames[there]) and out.shape == low.shape
    assert (out.frames[~there] != low.frames[~there]).float().mean() > 0.99
    assert steps == sorted(steps) and steps[-1] == 3


def test_windows_that_extend_are_clips_that_know_the_end_of_the_one_before(make_stage: Make, encode: Make) -> None:
    stage = make_stage("base", 0.2, windows=EXTEND, sampler=Sampler(steps=2))
    text = encode([PROMPT])
    nothing = Video.unknown(1, 3, Shape(frames=8, height=8, width=8), 8.0)
    whole = stage.sample(nothing, text, None, noise()).frames
    assert torch.equal(whole[:, :, :4], stage.sample(None, text, None, noise()).frames)
    longer = Stage(replace(stage.cfg, shape=nothing.shape), stage.rule, stage.net)
    assert torch.equal(whole, longer.sample(None, text, None, noise()).frames)
    for start in (2, 4):
        low = Video(whole[:, :, start : start + 4], 8.0, torch.tensor([[True, True, False, False]]))
        again = stage.sample(low, text, None, noise().window(start)).frames
        assert torch.equal(again, whole[:, :, start : start + 4])


def test_a_network_trained_on_frames_is_told_of_whole_frames_alone(stage_config: Make) -> None:
    rule, mask = plugin("base"), some(4, 0.5, 8, 8)
    mask[1] = True
    for parts, told in ((False, [1]), (True, [0, 1, 2, 3])):
        cfg = stage_config("base", parts=parts)
        low = Video(torch.ones(1, 3, 4, 8, 8), 8.0, mask[None])
        concat, seen = rule.condition(low, cfg, cfg.shape)
        assert seen[0, 0].flatten(1).any(1).nonzero()[:, 0].tolist() == told
        assert torch.equal(concat, seen.expand(1, 3, 4, 8, 8))
    assert torch.equal(seen[0, 0] > 0, mask)


class Leaning(torch.nn.Module):
    """x_hat = alpha z: a denoiser that only the gradient of reconstruction tells what is known elsewhere."""

    def forward(self, z: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
        return z.mean(4, keepdim=True).expand_as(z)


def test_reconstruction_carries_what_is_known_into_the_hole(make_stage: Make, encode: Make) -> None:
    """A network whose rows are even: the more weight, the nearer the hole comes to the bright rest of its row."""
    from cascade.diffusion import Diffusion, Prediction

    mask = torch.ones(4, 8, 8, dtype=torch.bool)
    mask[:, :, 6:] = False
    means = []
    for weight in (0.0, 0.3):
        cfg = make_stage("base").cfg
        sampler = Sampler(steps=4, reconstruction=weight)
        stage = Stage(
            replace(cfg, diffusion=Diffusion(prediction=Prediction.X), sampler=sampler), plugin("base"), Leaning()
        )  # type: ignore[arg-type]
        low = Video(0.5 * torch.ones(1, 3, 4, 8, 8) * mask, 8.0, mask[None])
        means.append(float((stage.sample(low, encode([PROMPT]), None, noise()).frames[..., 6:] - 0.5).abs().mean()))
    assert means[1] < 0.8 * means[0]


def test_reconstruction_leaves_alone_what_the_network_is_told(make_stage: Make, encode: Make) -> None:
    frames = some(4, 0.5)
    made = []
    for weight in (0.0, 5.0):
        stage = make_stage("base", 0.2, sampler=Sampler(steps=2, reconstruction=weight))
        made.append(stage.sample(part_of(stage, 4, frames), encode([PROMPT]), None, noise()).frames)
    assert torch.equal(*made)


def test_a_training_hole_is_a_box_within_the_picture() -> None:
    rule = plugin("base")
    around = rule.around_box(torch.rand(500, 4, generator=generator("hole")), 8, 12)  # type: ignore[attr-defined]
    heights, widths = (~around).any(2).sum(1), (~around).any(1).sum(1)
    assert torch.equal((~around).sum((1, 2)), heights * widths)
    assert (heights.min(), heights.max(), widths.min(), widths.max()) == (2, 6, 3, 9)
    assert (~around).any(0).all() and not around.all((1, 2)).any()
