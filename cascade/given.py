"""What a command, or a call in Python, gives its first stage: a whole video, parts of one that are known, or nothing.

A picture at either end, a clip that goes on, a clip with a hole: each is a `Video` at the stage's size and rate whose
`known` says what of it counts, and nothing but that. The stage, its sampler and the stages after it make no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade import media
from cascade.clipfiles import read_clip
from cascade.codec import COLOURS
from cascade.errors import ConfigError, InputError
from cascade.request import Given
from cascade.settings import Rule, StageConfig, from_text
from cascade.video import Video

if TYPE_CHECKING:
    from collections.abc import Sequence

CLIP = ".safetensors"


def given(run: Given, cfg: StageConfig, rule: Rule) -> Video | None:
    """What the stage is given. Raises ConfigError for what it cannot take, InputError for a file that is not right."""
    size = cfg.shape.height, cfg.shape.width
    if run.input is not None and run.mask is not None:
        frames = clip(run.input, "input", cfg.fps, size)
        return heard(with_hole(frames, white_of(run.mask, cfg.fps), f"mask {run.mask}", cfg), cfg, rule)
    if run.input is not None:
        if from_text(cfg, rule):
            raise ConfigError(
                f"{cfg.name} starts from text: input is a whole video, nothing is left to make",
                fix="mask=FILE, or image=, last= or extend= instead of input=",
            )
        takes = rule.takes(cfg)
        video = read_input(run.input, (takes.height, takes.width), cfg.colours)
        rule.output(video.shape, cfg)
        return video
    head = None if run.image is None else picture(run.image, "image", size)
    if run.extend is not None:
        head = clip(run.extend, "extend", cfg.fps, size)
    tail = None if run.last is None else picture(run.last, "last", size)
    total = None if run.seconds is None else round(run.seconds * cfg.fps)
    return heard(with_ends(head, tail, total, cfg, lambda frames: f"seconds={frames / cfg.fps:g}"), cfg, rule)


def heard(video: Video | None, cfg: StageConfig, rule: Rule) -> Video | None:
    """A video of which parts are known, or none, as it came. ConfigError where the stage cannot be told of it."""
    if video is not None and rule.rate(cfg) > 1:
        rule.condition(video, cfg, video.shape)  # one that adds frames says whether it can be told of any
        return video
    rule.output(None, cfg)  # one that needs a whole video says so
    rule.output(None if video is None else video.shape, cfg)
    return video


def read_input(path: Path, size: tuple[int, int], colours: int) -> Video:
    """The user's own clip, lossless or any video file, at the height and width that a stage takes."""
    with _reading(path, "input"):
        if path.suffix == CLIP:
            return read_clip(path.read_bytes(), f"input {path}", colours).resize(*size)
        return media.read_video(path, size=size)


def with_ends(
    head: Tensor | None, tail: Tensor | None, total: int | None, cfg: StageConfig, asked: Callable[[int], str]
) -> Video | None:
    """A video of `total` frames that begins with those of `head` and ends with those of `tail` (3, F, H, W).

    Without `total` it is as long as the stage makes it at once; after a clip, as one more window makes it. ConfigError
    where nothing is left to make: `asked` says how a longer one is asked for.
    """
    if head is None and tail is None and total is None:
        return None
    nothing = torch.empty(3, 0, cfg.shape.height, cfg.shape.width)
    head, tail = nothing if head is None else head, nothing if tail is None else tail
    there = head.shape[1] + tail.shape[1]
    new = cfg.windows.frames - cfg.windows.overlap or cfg.shape.frames // 2 or 1
    if total is None:
        total = max(cfg.shape.frames, head.shape[1] + new, there + 1)
    if total <= there:
        raise ConfigError(
            f"{cfg.name}: {total} frames at {cfg.fps:g} a second, and {there} are given",
            fix=asked(max(there + new, cfg.shape.frames)),
        )
    video = Video.unknown(1, 3, replace(cfg.shape, frames=total), cfg.fps)
    assert video.known is not None
    for part, place in ((head, slice(0, head.shape[1])), (tail, slice(total - tail.shape[1], total))):
        video.frames[0, :, place] = part
        video.known[:, place] = True
    return video


def with_hole(frames: Tensor, white: Tensor, mask: str, cfg: StageConfig) -> Video:
    """The clip `frames` (3, F, H, W), known where `white`, (F, H, W) or (1, H, W) of any size, is not; `mask` names it.

    InputError for a mask that does not fit the clip.
    """
    count = frames.shape[1]
    if len(white) not in (1, count):
        raise InputError(
            f"{mask}: {len(white)} frames at {cfg.fps:g} a second, but the clip has {count}",
            fix="a mask as long as the clip, or one picture",
        )
    hole = covered(white, *frames.shape[2:])
    if not hole.any():
        raise InputError(f"{mask}: nothing of it is white", fix="white where the video is to be made")
    known = ~hole.expand(count, -1, -1)
    return Video((frames * known)[None], cfg.fps, known[None])


def white_of(path: Path, fps: float) -> Tensor:
    """Where a mask, a video or a picture, is white: (F, H, W), at that rate."""
    with _reading(path, "mask"):
        return media.decode(path, fps=fps).frames.float().mean(-1) > 127.5


def picture(path: Path, setting: str, size: tuple[int, int]) -> Tensor:
    """An image as one frame (3, 1, H, W) of that size."""
    with _reading(path, setting):
        return media.fit(media.read_image(path)[None], *size).transpose(0, 1)


def clip(path: Path, setting: str, fps: float, size: tuple[int, int]) -> Tensor:
    """A video, lossless or any video file, as frames (3, F, H, W) at that rate and size."""
    with _reading(path, setting):
        if path.suffix != CLIP:
            return media.read_video(path, fps=fps, size=size).frames[0]
        video = read_clip(path.read_bytes(), f"{setting} {path}", COLOURS)
    return at_rate(video, fps, size)[0]


def at_rate(video: Video, fps: float, size: tuple[int, int]) -> Tensor:
    """The frames (B, 3, F, H, W) of a video at that rate and size."""
    times: Sequence[float] = [frame / video.fps for frame in range(video.shape.frames)]
    nearest = [frame for _, frame in media.resampled(zip(times, range(len(times)), strict=True), fps)]
    clips = [media.fit(clip[:, nearest].transpose(0, 1), *size).transpose(0, 1) for clip in video.frames]
    return torch.stack(clips)


def covered(white: Tensor, height: int, width: int) -> Tensor:
    """Pixels (F, height, width) of which any part is `white` (F, H, W), placed as `media.fit` does."""
    tall, wide = media.covering(white.shape[1], white.shape[2], height, width)
    out = F.adaptive_max_pool2d(white.float(), (tall, wide))
    top, left = round((tall - height) / 2), round((wide - width) / 2)
    return out[:, top : top + height, left : left + width] > 0


@contextmanager
def _reading(path: Path, setting: str) -> Iterator[None]:
    """Raises InputError, which names the setting, where there is no file, or none that can be read."""
    try:
        if not path.is_file():
            raise InputError(f"{setting} {path}: {'not a' if path.exists() else 'no such'} file", fix=f"{setting}=FILE")
        yield
    except media.Unreadable as error:
        raise InputError(f"{setting} {path}: {error.reason}", fix=error.fix) from error
    except OSError as error:
        raise InputError(f"{setting} {path}: {error.strerror}", fix=f"{setting}=FILE that can be read") from error
