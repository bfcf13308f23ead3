"""Base: text -> a short, small video. Parts that are known (an image, the end of another clip) may be given."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cascade.errors import ConfigError
from cascade.settings import StageConfig
from cascade.video import Shape, Video

KEEPS_KNOWN = True
METRICS = ("attributes", "outline", "fvd")
KINDS = ("first", "ends", "half", "some", "pair")  # kinds of known frames
HOLE = "hole"  # all is known but a box, the same in every frame
SIDES = (0.25, 0.75)  # shortest and longest of its sides, of the picture's


@dataclass(kw_only=True)
class Config(StageConfig):
    known: float = 0.0  # fraction of training clips a part of which is given
    known_kinds: list[str] = field(default_factory=lambda: list(KINDS))  # which part, each kind as often
    parts: bool = False  # the network is told of known parts of frames, for it was trained with holes

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.known <= 1:
            raise ValueError(f"known is {self.known}, expected 0 to 1")
        if not self.known_kinds or not set(self.known_kinds) <= {*KINDS, HOLE}:
            raise ValueError(f"known_kinds is {self.known_kinds}, expected some of {', '.join((*KINDS, HOLE))}")


def takes(cfg: Config) -> Shape:
    return cfg.shape


def output(low: Shape | None, cfg: Config) -> Shape:
    """The configured size, with windows of any length; what is known must already have it."""
    if low is None or low == cfg.shape:
        return cfg.shape
    if (low.height, low.width) != (cfg.shape.height, cfg.shape.width):
        raise ConfigError(f"{cfg.name}: known frames come as {low}, expected {cfg.shape}", fix="image=FILE")
    window = cfg.windows.frames
    least = min(cfg.shape.frames, window or cfg.shape.frames)
    if low.frames < least:
        raise ConfigError(
            f"{cfg.name}: {low.frames} frames at {cfg.fps:g} a second, expected the {least} it makes at once, or more",
            fix=f"{least / cfg.fps:g} seconds or more",
        )
    if not window:
        raise ConfigError(
            f"{cfg.name}: {low.frames} frames, expected the {least} that it makes at once",
            fix=" ".join(
                f"{cfg.name}.windows.{key}" for key in (f"frames={least}", f"overlap={least // 2}", "rule=extend")
            ),
        )
    return low


def rate(cfg: Config) -> int:
    return 1


def degrade(video: Video, cfg: Config, rng: torch.Generator) -> Video | None:
    """With probability `known` one of `known_kinds` of parts is given."""
    batch, _, frames, height, width = video.frames.shape
    if cfg.known == 0 or frames == 1:
        return None
    given, kind = torch.rand(2, batch, generator=rng, device=rng.device)
    masks = kinds(torch.rand(batch, frames, generator=rng, device=rng.device))
    if HOLE in cfg.known_kinds:
        masks = {name: mask[..., None, None].expand(-1, -1, height, width) for name, mask in masks.items()}
        around = around_box(torch.rand(batch, 4, generator=rng, device=rng.device), height, width)
        masks[HOLE] = around[:, None].expand(-1, frames, -1, -1)
    choices = torch.stack([masks[name] for name in cfg.known_kinds])
    number = (len(choices) * kind).long().clamp(max=len(choices) - 1)
    known = choices[number, torch.arange(batch, device=rng.device)]
    known = known & (given < cfg.known).view(-1, *[1] * (known.ndim - 1))
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


def around_box(u: Tensor, height: int, width: int) -> Tensor:
    """Pixels (B, H, W) known, all but a box drawn by u (B, 4) in [0, 1): its height, width, upper and left edge."""
    size = torch.tensor([height, width], device=u.device)
    sides = ((SIDES[0] + (SIDES[1] - SIDES[0]) * u[:, :2]) * size).round().clamp(min=1)
    start = (u[:, 2:] * (size - sides + 1)).floor()
    y, x = (torch.arange(n, device=u.device)[None] for n in (height, width))
    within = [(p >= a[:, None]) & (p < (a + n)[:, None]) for p, a, n in zip((y, x), start.T, sides.T, strict=True)]
    box: Tensor = within[0][:, :, None] & within[1][:, None, :]
    return ~box


def condition(low: Video, cfg: Config, shape: Shape) -> tuple[Tensor, Tensor]:
    """What is known, blank elsewhere. Without `parts` parts of frames are known to the sampler alone."""
    assert low.known is not None, "base: frames were given without saying which are known"
    mask = low.mask if cfg.parts else low.mask.amin((3, 4), keepdim=True)
    return low.frames * mask, mask


if __name__ == "__main__":
    from cascade.cli import stage_main

    stage_main("base")
