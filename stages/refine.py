"""Video to video: enlarged to any size, noised part of the way and denoised from there (SDEdit, Meng et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.errors import ConfigError
from cascade.settings import StageConfig
from cascade.video import Filter, Shape, Video

KEEPS_KNOWN = False
METRICS = ("fidelity", "consistency")


@dataclass(kw_only=True)
class Config(StageConfig):
    from_height: int  # of the input, in pixels
    from_width: int
    filter: Filter = Filter.BICUBIC  # that brings the input to the output's size

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler.strength == 1:
            raise ValueError("sampler.strength is 1, expected less: nothing of the incoming video would be left")
        if self.from_height < 1 or self.from_width < 1:
            raise ValueError(f"from_height and from_width are {self.from_height} and {self.from_width}, expected more")


def takes(cfg: Config) -> Shape:
    return Shape(frames=cfg.shape.frames, height=cfg.from_height, width=cfg.from_width)


def output(low: Shape | None, cfg: Config) -> Shape:
    """As many frames as come in, at the configured height and width."""
    if low is None:
        raise ConfigError(f"{cfg.name} needs a video to start from", fix="input=FILE")
    if (low.height, low.width) != (cfg.from_height, cfg.from_width):
        raise ConfigError(
            f"{cfg.name}: the input is {low.height}x{low.width} pixels, expected {cfg.from_height}x{cfg.from_width}",
            fix=f"{cfg.name}.from_height={low.height} {cfg.name}.from_width={low.width}",
        )
    return Shape(frames=low.frames, height=cfg.shape.height, width=cfg.shape.width)


def rate(cfg: Config) -> int:
    return 1


def degrade(video: Video, cfg: Config, rng: torch.Generator) -> Video | None:
    """The clip at the size of the input, a part of it in proportion."""
    height, width = video.shape.height * cfg.from_height, video.shape.width * cfg.from_width
    return video.resize(max(1, round(height / cfg.shape.height)), max(1, round(width / cfg.shape.width)))


def condition(low: Video, cfg: Config, shape: Shape) -> tuple[Tensor, Tensor]:
    """The incoming video at output size; the mask says that all of it counts."""
    concat = low.resize(shape.height, shape.width, cfg.filter).frames
    return concat, torch.ones_like(concat[:, :1, :, :1, :1])


if __name__ == "__main__":
    from cascade.cli import stage_main

    stage_main("refine")
