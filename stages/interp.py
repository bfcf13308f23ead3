"""Frame interpolation: k - 1 new frames between each two, F -> (F - 1)k + 1 (Make-A-Video, sec. 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.errors import ConfigError
from cascade.stage import StageConfig
from cascade.video import Shape, Video, spread

KEEPS_KNOWN = True
METRICS = ("fidelity", "known", "motion")


@dataclass(kw_only=True)
class Config(StageConfig):
    factor: int  # k, intervals that each interval is cut into

    def __post_init__(self) -> None:
        super().__post_init__()
        for setting, shape in self.shapes().items():
            if self.factor < 2 or (shape.frames - 1) % self.factor:
                raise ValueError(
                    f"factor is {self.factor}, expected a divisor above 1 of {shape.frames} - 1 ({setting}.frames)"
                )
        if self.train is not None and self.train.images > 0:
            raise ValueError(f"train.images is {self.train.images}, expected 0: an image has no frames to add between")


def takes(cfg: Config) -> Shape:
    return Shape(frames=(cfg.shape.frames - 1) // cfg.factor + 1, height=cfg.shape.height, width=cfg.shape.width)


def output(low: Shape | None, cfg: Config) -> Shape:
    """(F - 1)k + 1 frames for F."""
    if low is None:
        raise ConfigError(f"{cfg.name} needs a video to interpolate", fix="input=FILE")
    if (low.height, low.width) != (cfg.shape.height, cfg.shape.width):
        raise ConfigError(
            f"{cfg.name}: the input is {low.height}x{low.width} pixels, expected {cfg.shape.height}x{cfg.shape.width}",
            fix=f"{cfg.name}.shape.height={low.height} {cfg.name}.shape.width={low.width}",
        )
    return Shape(frames=(low.frames - 1) * cfg.factor + 1, height=low.height, width=low.width)


def rate(cfg: Config) -> int:
    return cfg.factor


def degrade(video: Video, cfg: Config, rng: torch.Generator) -> Video | None:
    """Every k-th frame."""
    return video.every(cfg.factor)


def condition(low: Video, cfg: Config, shape: Shape) -> tuple[Tensor, Tensor]:
    """The incoming frames at 0, k, 2k, ..., their blend between them; the mask marks the incoming ones."""
    return spread(low.frames, cfg.factor, shape.frames)


if __name__ == "__main__":
    from cascade.cli import stage_main

    stage_main("interp")
