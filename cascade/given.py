"""What a command gives its first stage: a whole video, parts of one that are known, or nothing.

A picture at either end, a clip that goes on, a clip with a hole: each is a `Video` at the stage's size and rate whose
`known` says what of it counts, and nothing but that. The stage, its sampler and the stages after it make no difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade import media
from cascade.codec import COLOURS
from cascade.errors import ConfigError, InputError
from cascade.pipeline import read_clip
from cascade.request import Given
from cascade.settings import Rule, StageConfig, from_text
from cascade.video import Video

if TYPE_CHECKING:
    from collections.abc import Sequence

CLIP = ".safetensors"


def given(run: Given, cfg: StageConfig, rule: Rule) -> Video | None:
    """What the stage is given. Raises ConfigError for what it cannot take, InputError for a file that is not right."""
    if run.input is not None and run.mask is None:
        if from_text(cfg, rule):
            raise ConfigError(
                f"{cfg.name} starts from text: input is a whole video, nothing is left to make",
                fix="mask=FILE, or image=, last= or extend= instead of input=",
            )
        takes = rule.takes(cfg)
        video: Video | None = read_input(run.input, (takes.height, takes.width), cfg.colours)
    else:
        video = with_hole(run, cfg) if run.mask is not None else with_ends(run, cfg)
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


def known_first(image: Tensor, cfg: StageConfig) -> Video:
    """An image (C, H, W) in [-1, 1] of any size as the known first frame of a clip."""
    video = Video.unknown(1, len(image), cfg.shape, cfg.fps)
    assert video.known is not None
    video.frames[0, :, :1] = media.fit(image[None], cfg.shape.height, cfg.shape.width).transpose(0, 1)
    video.known[:, 0] = True
    return video


def with_ends(run: Given, cfg: StageConfig) -> Video | None:
    """A video that begins with `image` or goes on after `extend`, ends with `last` and is `seconds` long.

    Without `seconds` it is as long as the stage makes it at once; after `extend`, as one more window makes it.
    """
    size = cfg.shape.height, cfg.shape.width
    head, tail = torch.empty(3, 0, *size), torch.empty(3, 0, *size)
    if run.image is not None:
        head = picture(run.image, "image", size)
    if run.extend is not None:
        head = clip(run.extend, "extend", cfg.fps, size)
    if run.last is not None:
        tail = picture(run.last, "last", size)
    there = head.shape[1] + tail.shape[1]
    if not there and run.seconds is None:
        return None
    new = cfg.windows.frames - cfg.windows.overlap or cfg.shape.frames // 2
    total = max(cfg.shape.frames, head.shape[1] + new)
    if run.seconds is not None:
        total = round(run.seconds * cfg.fps)
    if total <= there:
        length = "seconds is not set" if run.seconds is None else f"seconds is {run.seconds:g}"
        raise ConfigError(
            f"{length}, which is {total} frames of {cfg.name}, and {there} are given",
            fix=f"seconds={max(there + max(new, 1), cfg.shape.frames) / cfg.fps:g}",
        )
    video = Video.unknown(1, 3, replace(cfg.shape, frames=total), cfg.fps)
    assert video.known is not None
    for part, place in ((head, slice(0, head.shape[1])), (tail, slice(total - tail.shape[1], total))):
        video.frames[0, :, place] = part
        video.known[:, place] = True
    return video


def with_hole(run: Given, cfg: StageConfig) -> Video:
    """The clip `input`, known where `mask`, a video as long or one picture for all frames, is not white."""
    assert run.input is not None and run.mask is not None
    size = cfg.shape.height, cfg.shape.width
    frames = clip(run.input, "input", cfg.fps, size)
    with _reading(run.mask, "mask"):
        hole = covered(media.decode(run.mask, fps=cfg.fps).frames, *size)
    count = frames.shape[1]
    if len(hole) not in (1, count):
        raise InputError(
            f"mask {run.mask}: {len(hole)} frames at {cfg.fps:g} a second, but the clip has {count}",
            fix="a mask as long as the clip, or one picture",
        )
    if not hole.any():
        raise InputError(f"mask {run.mask}: nothing of it is white", fix="white where the video is to be made")
    known = ~hole.expand(count, -1, -1)
    return Video((frames * known)[None], cfg.fps, known[None])


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
    times: Sequence[float] = [frame / video.fps for frame in range(video.shape.frames)]
    nearest = [frame for _, frame in media.resampled(zip(times, range(len(times)), strict=True), fps)]
    return media.fit(video.frames[0][:, nearest].transpose(0, 1), *size).transpose(0, 1)


def covered(mask: Tensor, height: int, width: int) -> Tensor:
    """Pixels (F, height, width) of which any part is white in `mask` (F, H, W, 3) uint8, placed as `media.fit` does."""
    white = (mask.float().mean(-1) > 127.5).float()
    tall, wide = media.covering(white.shape[1], white.shape[2], height, width)
    out = F.adaptive_max_pool2d(white, (tall, wide))
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
