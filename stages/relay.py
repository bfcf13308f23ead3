"""Spatial detail for a video that already has its size, going on from a first frame that is finished (Show-1).

The first frame comes from an image model, the others come in merely enlarged. In windows one after the other
(`windows.rule: chained`) each window goes on from the last frame of the one before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.errors import ConfigError
from cascade.settings import StageConfig
from cascade.video import Filter, Shape, Video

KEEPS_KNOWN = True
METRICS = ("fidelity", "known")


@dataclass(kw_only=True)
class Config(StageConfig):
    scale: int  # how much smaller the video was before it was enlarged
    filter: Filter = Filter.BICUBIC  # that enlarged it

    def __post_init__(self) -> None:
        super().__post_init__()
        for setting, shape in self.shapes().items():
            if self.scale < 2 or shape.height % self.scale or shape.width % self.scale:
                raise ValueError(
                    f"scale is {self.scale}, expected a divisor above 1 of {shape.height} and {shape.width} ({setting})"
                )


def takes(cfg: Config) -> Shape:
    return cfg.shape


def output(low: Shape | None, cfg: Config) -> Shape:
    """As much as comes in, of the configured height and width."""
    if low is None:
        raise ConfigError(f"{cfg.name} needs a video whose first frame is finished", fix="input=FILE")
    if (low.height, low.width) != (cfg.shape.height, cfg.shape.width):
        raise ConfigError(
            f"{cfg.name}: the input is {low.height}x{low.width} pixels, expected {cfg.shape.height}x{cfg.shape.width}",
            fix=f"{cfg.name}.shape.height={low.height} {cfg.name}.shape.width={low.width}",
        )
    return low


def rate(cfg: Config) -> int:
    return 1


def degrade(video: Video, cfg: Config, rng: torch.Generator) -> Video | None:
    """The clip made smaller and large again, but for its first frame."""
    size = (video.shape.height, video.shape.width)
    blurred = video.resize(size[0] // cfg.scale, size[1] // cfg.scale).resize(*size, cfg.filter)
    return Video(torch.cat([video.frames[:, :, :1], blurred.frames[:, :, 1:]], 2), video.fps)


def condition(low: Video, cfg: Config, shape: Shape) -> tuple[Tensor, Tensor]:
    """The incoming video; the mask marks its first frame."""
    first = torch.zeros_like(low.frames[:, :1, :, :1, :1])
    first[:, :, 0] = 1
    return low.frames, first


if __name__ == "__main__":
    from cascade.cli import stage_main

    stage_main("relay")
