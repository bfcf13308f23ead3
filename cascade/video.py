"""`Video`, the one type that passes between stages, and the two conventions of frame counts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.errors import ConfigError


class Filter(Enum):
    """How frames change their size."""

    BICUBIC = "bicubic"  # anti-aliased when it shrinks
    CORNERS = "bilinear_corners"  # bilinear, the centres of the corners in one place (IF, Show-1)
    EIGHT_BIT = "bicubic_8bit"  # bicubic in 256 shades: what passing through image files does (Show-1's last stage)


@dataclass(kw_only=True)
class Shape:
    """Size of a clip in frames and pixels."""

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


class Fill(Enum):
    """What stands between two known frames."""

    BLEND = "blend"  # their linear blend: a better start than the others
    NEAREST = "nearest"  # the nearest one, halfway the one before (LaVie)
    REPEAT = "repeat"  # the one before
    BLANK = "blank"  # nothing, 0


@dataclass
class Video:
    """`frames` (B, C, F, H, W) in [-1, 1] shown at `fps` frames per second; `known` (B, F) names frames that count.

    `known` is None where all of them do. It carries image-to-video: a clip whose first frame alone is known.
    """

    frames: Tensor
    fps: float
    known: Tensor | None = None

    @property
    def shape(self) -> Shape:
        return Shape(frames=self.frames.shape[2], height=self.frames.shape[3], width=self.frames.shape[4])

    def resize(self, height: int, width: int, by: Filter = Filter.BICUBIC) -> Video:
        """Another size by that filter; values stay in [-1, 1]."""
        return Video(resize(self.frames, height, width, by), self.fps, self.known)

    def every(self, k: int) -> Video:
        """Frames 0, k, 2k, ... at fps / k: what a temporal stage of factor `k` is given."""
        return Video(self.frames[:, :, ::k], self.fps / k)

    def to(self, device: torch.device | str) -> Video:
        return Video(self.frames.to(device), self.fps, None if self.known is None else self.known.to(device))


def resize(x: Tensor, height: int, width: int, by: Filter = Filter.BICUBIC) -> Tensor:
    """Resizes the frames of `x` (B, C, F, H, W) one by one."""
    if x.shape[3:] == (height, width):
        return x
    size, flat = (height, width), x.transpose(1, 2).flatten(0, 1)
    if by is Filter.CORNERS:
        out = F.interpolate(flat, size, mode="bilinear", align_corners=True)
    elif by is Filter.EIGHT_BIT:
        shades = ((flat + 1) * 127.5).round().to(torch.uint8)
        out = F.interpolate(shades, size, mode="bicubic", antialias=True).to(x.dtype) / 127.5 - 1
    else:
        shrink = height < x.shape[3] or width < x.shape[4]
        out = F.interpolate(flat, size, mode="bicubic", align_corners=False, antialias=shrink)
    return torch.unflatten(out.clamp(-1, 1), 0, (x.shape[0], x.shape[2])).transpose(1, 2)


def spread(x: Tensor, k: int, frames: int, fill: Fill = Fill.BLEND) -> tuple[Tensor, Tensor]:
    """Puts the frames of `x` (B, C, F, H, W) at 0, k, 2k, ... of a clip of `frames`; returns it and the mask.

    Between them stands what `fill` says (a blend after the last one is its copy); the mask (B, 1, frames, 1, 1) is 1
    where a frame is known. Serves both conventions: kF frames (temporal super-resolution, Imagen Video) and
    (F - 1)k + 1 (interpolation, Make-A-Video).

    Raises ConfigError when `frames` fits neither.
    """
    given = x.shape[2]
    if not (given - 1) * k < frames <= given * k:
        raise ConfigError(
            f"{given} frames spread by {k} fill {(given - 1) * k + 1} to {given * k} frames, not {frames}",
            fix=f"shape.frames={given * k} or {(given - 1) * k + 1}",
        )
    position = torch.arange(frames, device=x.device)
    left = position // k
    right = (left + 1).clamp(max=given - 1)
    mask = (position % k == 0).to(x.dtype).view(1, 1, -1, 1, 1).expand(len(x), -1, -1, -1, -1)
    if fill is Fill.REPEAT or fill is Fill.BLANK:
        repeated = x[:, :, left]
        return (repeated if fill is Fill.REPEAT else repeated * mask), mask
    ahead = (position % k) / k
    weight = (ahead if fill is Fill.BLEND else (ahead > 0.5).float()).to(x.dtype).view(1, 1, -1, 1, 1)
    return torch.lerp(x[:, :, left], x[:, :, right], weight), mask
