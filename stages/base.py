"""Base: text -> a short, small video. Frames that are known (an image, the end of another clip) may be given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.errors import ConfigError
from cascade.stage import StageConfig
from cascade.video import Shape, Video

KEEPS_KNOWN = True
METRICS = ("attributes", "fvd")


@dataclass(kw_only=True)
class Config(StageConfig):
    known: float = 0.0  # fraction of training clips some of whose frames are given

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.known <= 1:
            raise ValueError(f"known is {self.known}, expected 0 to 1")


def takes(cfg: Config) -> Shape:
    return cfg.shape


def output(low: Shape | None, cfg: Config) -> Shape:
    """The configured size; known frames must already have it."""
    if low is not None and low != cfg.shape:
        raise ConfigError(f"{cfg.name}: known frames come as {low}, expected {cfg.shape}", fix="image=FILE")
    return cfg.shape


def rate(cfg: Config) -> int:
    return 1


def degrade(video: Video, cfg: Config, rng: torch.Generator) -> Video | None:
    """With probability `known`: the first frame, the first and the last, the first half, or a random set is known."""
    batch, _, frames = video.frames.shape[:3]
    if torch.rand((), generator=rng) >= cfg.known or frames == 1:
        return None
    known = torch.zeros(batch, frames, dtype=torch.bool)
    known[:, 0] = True
    kind = int(torch.randint(4, (), generator=rng))
    if kind == 1:
        known[:, -1] = True
    elif kind == 2:
        known[:, : max(1, frames // 2)] = True
    elif kind == 3:
        known = torch.rand(batch, frames, generator=rng) < 0.5
    return Video(video.frames, video.fps, known)


def condition(low: Video, cfg: Config, shape: Shape) -> tuple[Tensor, Tensor]:
    """The known frames, blank elsewhere."""
    assert low.known is not None, "base: frames were given without saying which are known"
    mask = low.known.to(low.frames.dtype)[:, None, :, None, None]
    return low.frames * mask, mask


if __name__ == "__main__":
    from cascade.cli import stage_main

    stage_main("base")
