"""What the two kinds of stage that add frames share: `tsr` (F -> kF) and `interp` (F -> (F - 1)k + 1).

Frames 0, k, 2k, ... of the output are the ones that come in, exactly; the network makes the others, and starts from
their linear blend.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.errors import ConfigError
from cascade.stage import StageConfig
from cascade.video import Fill, Shape, Video, spread

KEEPS_KNOWN = True
METRICS = ("fidelity", "known", "motion")


@dataclass(kw_only=True)
class TemporalConfig(StageConfig, ABC):
    """Settings of a stage that adds frames; a kind says how many come out of how many."""

    factor: int  # k
    fill: Fill = Fill.BLEND  # what the network is given for the frames it makes

    @abstractmethod
    def made(self, given: int) -> int:
        """Frames that come out for `given` frames."""

    @abstractmethod
    def given(self, made: int) -> int:
        """Frames that come in for `made` frames, rounded down."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor < 2:
            raise ValueError(f"factor is {self.factor}, expected at least 2")
        for setting, shape in self.shapes().items():
            if self.made(given := self.given(shape.frames)) != shape.frames:
                raise ValueError(
                    f"{setting}.frames is {shape.frames}, but factor {self.factor} makes {self.made(given)} frames "
                    f"of {given} and {self.made(given + 1)} of {given + 1}"
                )
        if self.train is not None and self.train.images > 0:
            raise ValueError(f"train.images is {self.train.images}, expected 0: an image has no frames to add between")


def takes(cfg: TemporalConfig) -> Shape:
    return Shape(frames=cfg.given(cfg.shape.frames), height=cfg.shape.height, width=cfg.shape.width)


def output(low: Shape | None, cfg: TemporalConfig) -> Shape:
    """More frames of the same size."""
    if low is None:
        raise ConfigError(f"{cfg.name} needs a video to add frames to", fix="input=FILE")
    if (low.height, low.width) != (cfg.shape.height, cfg.shape.width):
        raise ConfigError(
            f"{cfg.name}: the input is {low.height}x{low.width} pixels, expected {cfg.shape.height}x{cfg.shape.width}",
            fix=f"{cfg.name}.shape.height={low.height} {cfg.name}.shape.width={low.width}",
        )
    return Shape(frames=cfg.made(low.frames), height=low.height, width=low.width)


def rate(cfg: TemporalConfig) -> int:
    return cfg.factor


def degrade(video: Video, cfg: TemporalConfig, rng: torch.Generator) -> Video | None:
    """Every k-th frame."""
    return video.every(cfg.factor)


def condition(low: Video, cfg: TemporalConfig, shape: Shape) -> tuple[Tensor, Tensor]:
    """The incoming frames at 0, k, 2k, ..., their blend between them; the mask marks the incoming ones."""
    return spread(low.frames, cfg.factor, shape.frames, cfg.fill)
