"""Spatial super-resolution: the same frames, larger."""

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
    scale: int  # output height / input height
    filter: Filter = Filter.BICUBIC  # that brings the input to the output's size

    def __post_init__(self) -> None:
        super().__post_init__()
        for setting, shape in self.shapes().items():
            if self.scale < 2 or shape.height % self.scale or shape.width % self.scale:
                raise ValueError(
                    f"scale is {self.scale}, expected a divisor above 1 of {shape.height} and {shape.width} ({setting})"
                )


def takes(cfg: Config) -> Shape:
    return Shape(frames=cfg.shape.frames, height=cfg.shape.height // cfg.scale, width=cfg.shape.width // cfg.scale)


def output(low: Shape | None, cfg: Config) -> Shape:
    """As many frames as come in, at the configured height and width."""
    if low is None:
        raise ConfigError(f"{cfg.name} needs a video to enlarge", fix="input=FILE")
    given, wanted = (low.height, low.width), (cfg.shape.height // cfg.scale, cfg.shape.width // cfg.scale)
    if given != wanted:
        raise ConfigError(
            f"{cfg.name}: the input is {given[0]}x{given[1]} pixels, expected {wanted[0]}x{wanted[1]}",
            fix=f"{cfg.name}.shape.height={given[0] * cfg.scale} {cfg.name}.shape.width={given[1] * cfg.scale}",
        )
    return Shape(frames=low.frames, height=cfg.shape.height, width=cfg.shape.width)


def rate(cfg: Config) -> int:
    return 1


def degrade(video: Video, cfg: Config, rng: torch.Generator) -> Video | None:
    """The clip, `scale` times smaller."""
    return video.resize(video.shape.height // cfg.scale, video.shape.width // cfg.scale)


def condition(low: Video, cfg: Config, shape: Shape) -> tuple[Tensor, Tensor]:
    """The incoming video at output size; the mask says that all of it counts."""
    concat = low.resize(shape.height, shape.width, cfg.filter).frames
    return concat, torch.ones_like(concat[:, :1, :, :1, :1])


if __name__ == "__main__":
    from cascade.cli import stage_main

    stage_main("ssr")
