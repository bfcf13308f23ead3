"""Base: text -> a short, small video. Frames that are known (an image, the end of another clip) may be given."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cascade.errors import ConfigError
from cascade.stage import StageConfig
from cascade.video import Shape, Video

KEEPS_KNOWN = True
METRICS = ("attributes", "fvd")
KINDS = ("first", "ends", "half", "some", "pair")


@dataclass(kw_only=True)
class Config(StageConfig):
    known: float = 0.0  # fraction of training clips some of whose frames are given
    known_kinds: list[str] = field(default_factory=lambda: list(KINDS))  # which frames, each kind as often

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.known <= 1:
            raise ValueError(f"known is {self.known}, expected 0 to 1")
        if not self.known_kinds or not set(self.known_kinds) <= set(KINDS):
            raise ValueError(f"known_kinds is {self.known_kinds}, expected some of {', '.join(KINDS)}")


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
    """With probability `known` one of `known_kinds` of frames is given."""
    batch, _, frames = video.frames.shape[:3]
    if cfg.known == 0 or frames == 1:
        return None
    given, kind = torch.rand(2, batch, generator=rng, device=rng.device)
    masks = kinds(torch.rand(batch, frames, generator=rng, device=rng.device))
    choices = torch.stack([masks[name] for name in cfg.known_kinds])
    number = (len(choices) * kind).long().clamp(max=len(choices) - 1)
    known = choices[number, torch.arange(batch, device=rng.device)] & (given < cfg.known)[:, None]
    return Video(video.frames, video.fps, known) if known.any() else None


def kinds(u: Tensor) -> dict[str, Tensor]:
    """Known frames (B, F) of each of KINDS, drawn by u (B, F) in [0, 1): the first one, the first and the last, the
    first half, each with probability 1/2, two neighbours."""
    frames = u.shape[1]
    number = torch.arange(frames, device=u.device).expand_as(u)
    first, last = number == 0, number == frames - 1
    start = (u[:, :1] * (frames - 1)).long()
    return {
        "first": first,
        "ends": first | last,
        "half": number < max(1, frames // 2),
        "some": u < 0.5,
        "pair": (number == start) | (number == start + 1),
    }


def condition(low: Video, cfg: Config, shape: Shape) -> tuple[Tensor, Tensor]:
    """The known frames, blank elsewhere."""
    assert low.known is not None, "base: frames were given without saying which are known"
    mask = low.known.to(low.frames.dtype)[:, None, :, None, None]
    return low.frames * mask, mask


if __name__ == "__main__":
    from cascade.cli import stage_main

    stage_main("base")
