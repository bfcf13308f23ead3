"""What the two kinds of stage that add frames share: `tsr` (F -> kF) and `interp` (F -> (F - 1)k + 1).

Frames 0, k, 2k, ... of the output are the ones that come in, exactly; the network makes the others, and starts from
what `fill` puts between. Where it is blank, other frames may be known instead: a network that was trained so (`known`)
animates a picture and goes on from a clip (Singer et al. 2022, Make-A-Video, sec. 3.3).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.errors import ConfigError
from cascade.settings import StageConfig
from cascade.video import Fill, Shape, Video, spread

KEEPS_KNOWN = True
METRICS = ("fidelity", "known", "motion")


@dataclass(kw_only=True)
class TemporalConfig(StageConfig, ABC):
    """Settings of a stage that adds frames; a kind says how many come out of how many."""

    factor: int  # k
    fill: Fill = Fill.BLEND  # what the network is given for the frames it makes
    known: float = 0.0  # fraction of training clips whose beginning is given, not every k-th frame; fill: blank

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
        if not 0 <= self.known <= 1:
            raise ValueError(f"known is {self.known}, expected 0 to 1")
        if self.known and self.fill is not Fill.BLANK:
            raise ValueError(f"fill is {self.fill.value}, expected blank where known is above 0")
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
    """Every k-th frame, or with probability `known` the first n of up to the first half."""
    low = video.every(cfg.factor)
    if not cfg.known:
        return low
    batch, frames = len(video.frames), video.shape.frames
    number = torch.arange(frames, device=rng.device)
    first, other = torch.rand(2, batch, 1, generator=rng, device=rng.device)
    beginning = number < 1 + (first * (frames // 2)).long()
    return Video(video.frames, video.fps, torch.where(other < cfg.known, beginning, number % cfg.factor == 0))


def condition(low: Video, cfg: TemporalConfig, shape: Shape) -> tuple[Tensor, Tensor]:
    """The incoming frames at 0, k, 2k, ..., what fills the gaps; the mask marks the incoming ones.

    A clip that says which of its frames are known has the output's length already. ConfigError where `fill` is not
    blank: such a network has only ever seen every k-th frame.
    """
    if low.known is None:
        return spread(low.frames, cfg.factor, shape.frames, cfg.fill)
    if cfg.fill is not Fill.BLANK:
        raise ConfigError(
            f"{cfg.name}: frames of the clip itself are given, but fill is {cfg.fill.value}: known can be 0, "
            f"{cfg.factor}, {2 * cfg.factor}, ... alone",
            fix=f"input=VIDEO of {takes(cfg)}, or a stage with fill: blank",
        )
    mask = low.known.to(low.frames.dtype)[:, None, :, None, None]
    return low.frames * mask, mask
