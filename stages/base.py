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
    if cfg.known == 0 or frames == 1:
        return None
    given, kind = torch.rand(2, batch, generator=rng, device=rng.device)
    first = torch.zeros(batch, frames, dtype=torch.bool, device=rng.device)
    first[:, 0] = True
    both, half = first.clone(), first.clone()
    both[:, -1] = True
    half[:, : frames // 2] = True
    some = torch.rand(batch, frames, generator=rng, device=rng.device) < 0.5
    chosen = torch.stack([first, both, half, some])[(4 * kind).long(), torch.arange(batch, device=rng.device)]
    known = chosen & (given < cfg.known)[:, None]
    return Video(video.frames, video.fps, known) if known.any() else None


def condition(low: Video, cfg: Config, shape: Shape) -> tuple[Tensor, Tensor]:
    """The known frames, blank elsewhere."""
    assert low.known is not None, "base: frames were given without saying which are known"
    mask = low.known.to(low.frames.dtype)[:, None, :, None, None]
    return low.frames * mask, mask


if __name__ == "__main__":
    from cascade.cli import stage_main

    stage_main("base")
