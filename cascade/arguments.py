"""What a call of `Cascade` asks for, in diffusers' words, as a chain has it; ValueError for anything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from cascade import media
from cascade.chain import Chain
from cascade.errors import ConfigError
from cascade.frames import of_clips, of_images
from cascade.given import known_first, read_input
from cascade.request import Job, jobs_of
from cascade.text import check_negative, check_prompt
from cascade.video import Video

Number = TypeVar("Number", int, float)


def by_stage(
    what: str, value: Number | Mapping[str, Number] | None, kind: type[Number], every: list[str], legal: list[str]
) -> dict[str, Number]:
    """The value of each stage that is named, or of `every` stage where one value is given."""
    if value is None:
        return {}
    values = dict(value) if isinstance(value, Mapping) else dict.fromkeys(every, value)
    for name, number in values.items():
        if name not in legal:
            raise ValueError(f"{what} names {name!r}, expected {', '.join(legal)}")
        if type(number) not in (int, kind) or not number >= 1:
            raise ValueError(f"{what} of {name} is {number!r}, expected a number of at least 1")
    return values


def jobs_for(prompt: str | Sequence[str], copies: int) -> list[Job]:
    """What to make, in order."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not prompts or not isinstance(prompts, Sequence) or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"prompt is {prompt!r}, expected a text or a list of texts")
    if copies < 1:
        raise ValueError(f"num_videos_per_prompt is {copies}, expected at least 1")
    return jobs_of([check_prompt(text) for text in prompts], copies, Path())


def seed_of(generator: torch.Generator | None) -> int:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator is a {type(generator).__name__}, expected one torch.Generator")
    return 0 if generator is None else generator.initial_seed()


def negative_of(negative_prompt: str | None) -> str | None:
    if negative_prompt is not None and not isinstance(negative_prompt, str):
        raise ValueError(f"negative_prompt is a {type(negative_prompt).__name__}, expected one text for all prompts")
    return None if negative_prompt is None else check_negative(negative_prompt)


def clips_for(chain: Chain, jobs: int, copies: int, image: Any, video: Any) -> list[Video | None]:
    """The clip that the first stage gets, for each of `jobs` videos, `copies` of them to a prompt."""
    cfg, rule = chain.stages[0], chain.rules[0]
    takes = rule.takes(cfg)
    if image is not None and (video is not None or takes != cfg.shape):
        raise ValueError(f"image is given, but {'video too' if video is not None else f'{cfg.name} takes a video'}")
    if image is not None:
        picture = media.read_image(Path(image)) if isinstance(image, str | Path) else of_images(image, "image")[0]
        return [known_first(picture, cfg)] * jobs
    if isinstance(video, str | Path):
        video = read_input(Path(video), (takes.height, takes.width), cfg.colours)
    elif video is not None and not isinstance(video, Video):
        video = Video(of_clips(video), cfg.fps / rule.rate(cfg))
    try:
        rule.output(None if video is None else video.shape, cfg)
    except ConfigError as error:
        raise ConfigError(error.message, fix=f"video={takes} (frames x height x width)") from error
    if video is None:
        return [None] * jobs
    count = len(video.frames)
    if count not in (1, jobs // copies):
        raise ValueError(f"video holds {count} clips for {jobs // copies} prompts, expected one clip or as many")
    parts = [
        Video(video.frames[i : i + 1], video.fps, None if video.known is None else video.known[i : i + 1])
        for i in range(count)
    ]
    return [parts[number // copies % count] for number in range(jobs)]
