"""What a call of `Cascade` asks for, in diffusers' words, as a chain has it; ValueError for anything else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from cascade import media
from cascade.chain import Chain
from cascade.errors import ConfigError
from cascade.frames import of_clips, of_images
from cascade.given import at_rate, clip, heard, picture, read_input, white_of, with_ends, with_hole
from cascade.request import Job, jobs_of
from cascade.settings import Rule, StageConfig, from_text
from cascade.text import check_negative, check_prompt
from cascade.video import Video

Number = TypeVar("Number", int, float)
Part = TypeVar("Part", Tensor, Video)


def by_stage(
    what: str,
    value: Number | Mapping[str, Number] | None,
    kind: type[Number],
    least: int,
    every: list[str],
    legal: list[str],
) -> dict[str, Number]:
    """The value of each stage that is named, or of `every` stage where one value is given."""
    if value is None:
        return {}
    values = dict(value) if isinstance(value, Mapping) else dict.fromkeys(every, value)
    for name, number in values.items():
        if name not in legal:
            raise ValueError(f"{what} names {name!r}, expected {', '.join(legal)}")
        if type(number) not in (int, kind) or not least <= number < math.inf:
            raise ValueError(f"{what} of {name} is {number!r}, expected a number of at least {least}")
    return values


def jobs_for(prompt: str | Sequence[str], copies: int) -> list[Job]:
    """What to make, in order."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not prompts or not isinstance(prompts, Sequence) or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"prompt is {prompt!r}, expected a text or a list of texts")
    if copies < 1:
        raise ValueError(f"num_videos_per_prompt is {copies}, expected at least 1")
    return jobs_of([check_prompt(text) for text in prompts], copies, Path())


def seeded(jobs: Sequence[Job], generator: torch.Generator | Sequence[torch.Generator] | None) -> list[Job]:
    """The jobs with the seed of the generator that all share, 0 without one; or each with that of its own.

    Of several each makes what it makes alone, so that every video is the first one of its prompt.
    """
    if generator is None:
        return [replace(job, seed=0) for job in jobs]
    given = [generator] if isinstance(generator, torch.Generator) else generator
    if not isinstance(given, list | tuple) or not all(isinstance(one, torch.Generator) for one in given):
        raise ValueError(f"generator is a {type(generator).__name__}, expected a torch.Generator or a list of them")
    seeds = [one.initial_seed() for one in given]
    if given is not generator:
        return [replace(job, seed=seeds[0]) for job in jobs]
    if len(seeds) != len(jobs):
        raise ValueError(f"generator holds {len(seeds)} for {len(jobs)} videos, expected one, or as many")
    return [replace(job, copy=0, seed=seed) for job, seed in zip(jobs, seeds, strict=True)]


def negative_of(negative_prompt: str | None) -> str | None:
    if negative_prompt is not None and not isinstance(negative_prompt, str):
        raise ValueError(f"negative_prompt is a {type(negative_prompt).__name__}, expected one text for all prompts")
    return None if negative_prompt is None else check_negative(negative_prompt)


@dataclass(frozen=True)
class Known:
    """What a call gives of its videos, in diffusers' forms; see `Cascade.__call__`."""

    image: Any = None
    last_image: Any = None
    video: Any = None
    mask: Any = None
    num_frames: int | None = None

    @property
    def beside_video(self) -> list[str]:
        return [name for name, value in vars(self).items() if value is not None and name != "video"]


def clips_for(chain: Chain, jobs: int, copies: int, known: Known) -> list[Video | None]:
    """The clip that the first stage gets, for each of `jobs` videos, `copies` of them to a prompt."""
    cfg, rule = chain.stages[0], chain.rules[0]
    parts = isinstance(known.video, Video) and known.video.known is not None  # and says itself which
    if parts or not from_text(cfg, rule):
        if known.beside_video:
            why = "video says what is known" if parts else f"{cfg.name} takes a video"
            raise ValueError(f"{known.beside_video[0]} is given, but {why}")
        return each("video", whole(known.video, cfg, rule), jobs, copies)
    if known.mask is not None:
        if known.video is None:
            raise ValueError("mask is given, but no video, which it is for")
        if also := [name for name in known.beside_video if name != "mask"]:
            raise ValueError(f"mask is given, but {also[0]} too")
        white, name = white_in(known.mask, cfg)
        holed = [heard(with_hole(frames, white, name, cfg), cfg, rule) for frames in clips(known.video, cfg)]
        return each("video", holed, jobs, copies)
    if known.image is not None and known.video is not None:
        raise ValueError("image is given, but video too: each says how the video begins")
    heads = each("image", pictures(known.image, "image", cfg), jobs, copies)
    if known.video is not None:
        heads = each("video", clips(known.video, cfg), jobs, copies)
    tails = each("last_image", pictures(known.last_image, "last_image", cfg), jobs, copies)
    total = None if known.num_frames is None else first_frames(chain, known.num_frames)

    def asked(frames: int) -> str:
        return f"num_frames={last_frames(chain, frames)}"

    ends = zip(heads, tails, strict=True)
    return [heard(with_ends(head, tail, total, cfg, asked), cfg, rule) for head, tail in ends]


def last_frames(chain: Chain, first: int) -> int:
    """Frames that the last stage makes where the first one makes `first`."""
    shape = replace(chain.stages[0].shape, frames=first)
    for cfg, rule in zip(chain.stages[1:], chain.rules[1:], strict=True):
        shape = rule.output(shape, cfg)
    return shape.frames


def first_frames(chain: Chain, num_frames: int) -> int:
    """The inverse of `last_frames`. ValueError for frames that the chain does not make."""
    if type(num_frames) is not int or num_frames < 1:
        raise ValueError(f"num_frames is {num_frames!r}, expected a whole number of at least 1")
    rate = math.prod(rule.rate(cfg) for cfg, rule in zip(chain.stages[1:], chain.rules[1:], strict=True))
    first = -(-num_frames // rate)
    if (made := last_frames(chain, first)) != num_frames:
        raise ValueError(f"num_frames is {num_frames}, expected {made}, made of {first} of {chain.stages[0].name}")
    return first


def each(what: str, parts: Sequence[Part | None], jobs: int, copies: int) -> list[Part | None]:
    """The part of each of `jobs` videos: the same for all, or one for each prompt."""
    prompts = jobs // copies
    if len(parts) not in (1, prompts):
        raise ValueError(f"{what} holds {len(parts)} for {prompts} prompts, expected one, or as many")
    return [parts[number // copies % len(parts)] for number in range(jobs)]


def pictures(value: Any, what: str, cfg: StageConfig) -> Sequence[Tensor | None]:
    """Pictures, or their files, as single frames (3, 1, H, W)."""
    size = cfg.shape.height, cfg.shape.width
    if value is None:
        return [None]
    if isinstance(value, str | Path):
        return [picture(Path(value), what, size)]
    if isinstance(value, list | tuple):
        return [one for item in value for one in pictures(item, what, cfg)]
    return [media.fit(one[None], *size).transpose(0, 1) for one in of_images(value, what)]


def clips(value: Any, cfg: StageConfig) -> list[Tensor]:
    """Clips, or the file of one, as frames (3, F, H, W) at the stage's rate, which frames without one have."""
    size = cfg.shape.height, cfg.shape.width
    if isinstance(value, str | Path):
        return [clip(Path(value), "video", cfg.fps, size)]
    return [*at_rate(value if isinstance(value, Video) else Video(of_clips(value), cfg.fps), cfg.fps, size)]


def white_in(value: Any, cfg: StageConfig) -> tuple[Tensor, str]:
    """Where a mask is white, (F, H, W), and its name."""
    if isinstance(value, str | Path):
        return white_of(Path(value), cfg.fps), f"mask {value}"
    return of_images(value, "mask", grey=True).mean(1) > 0, "mask"


def whole(value: Any, cfg: StageConfig, rule: Rule) -> Sequence[Video | None]:
    """Clips that the stage takes as they are. ConfigError for those that it does not."""
    takes = rule.takes(cfg)
    if isinstance(value, str | Path):
        value = read_input(Path(value), (takes.height, takes.width), cfg.colours)
    elif value is not None and not isinstance(value, Video):
        value = Video(of_clips(value), cfg.fps / rule.rate(cfg))
    try:
        rule.output(None if value is None else value.shape, cfg)
    except ConfigError as error:
        raise ConfigError(error.message, fix=f"video={takes} (frames x height x width)") from error
    if value is None:
        return [None]
    told = [None] * len(value.frames) if value.known is None else value.known.split(1)
    return [Video(frames, value.fps, part) for frames, part in zip(value.frames.split(1), told, strict=True)]
