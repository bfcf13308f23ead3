"""Long videos in windows.

By default there is one sampler loop over the whole video, and the denoiser works window by window. Every step the
windows' x_hat are averaged where they overlap (MultiDiffusion, Bar-Tal et al. 2023; Lumiere sec. 3.3), with weights
that fall towards a window's ends; the noise of a frame is the same in every window that sees it, because it belongs to
the whole video. Memory grows with the window, not with the video.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from cascade.errors import ConfigError
from cascade.unet import Cond


class Join(Enum):
    """How windows become one video. All but the first way sample every window by itself, one after the other."""

    BLEND = "blend"
    OVERWRITE = "overwrite"  # where windows overlap the later one counts
    CHAINED = "chained"  # the same, and a window's first frame is known: it is the finished one before it (Show-1)
    FIRST = "first"  # only the first window is sampled, the other frames stay as they come in


@dataclass(kw_only=True)
class Windows:
    """`frames` at once (0: all of them), neighbours sharing at least `overlap`.

    Windows sampled by themselves have to fill the clip exactly. With `same_noise` each of them starts from the noise of
    the first one's frames, and the noise no longer belongs to the frame.
    """

    frames: int = 0
    overlap: int = 0
    rule: Join = Join.BLEND
    same_noise: bool = False

    def __post_init__(self) -> None:
        if self.frames < 0 or not 0 <= self.overlap <= max(0, self.frames - 1):
            raise ValueError(f"frames is {self.frames} and overlap {self.overlap}, expected 0 <= overlap < frames")
        if self.rule is Join.BLEND and self.same_noise:
            raise ValueError("same_noise is true, expected false where rule is blend")
        if self.rule is not Join.BLEND and not self.frames:
            raise ValueError(f"frames is 0, expected at least 1 where rule is {self.rule.value}")
        if self.rule is Join.CHAINED and self.overlap != 1:
            raise ValueError(f"overlap is {self.overlap}, expected 1 where rule is chained: the frame that is known")

    @property
    def in_turn(self) -> bool:
        """Whether every window is a run of the sampler."""
        return self.rule is not Join.BLEND

    def spans(self, total: int, rate: int = 1) -> list[tuple[int, int]]:
        """First frame and end of every window that is sampled by itself; ConfigError if they do not fill the clip."""
        if self.rule is Join.BLEND:
            return [(0, total)]
        if self.rule is Join.FIRST:
            return [(0, min(self.frames, total))]
        hop = max(rate, (self.frames - self.overlap) // rate * rate)
        if total < self.frames or (total - self.frames) % hop:
            fits = max(0, (total - self.frames) // hop) * hop + self.frames
            raise ConfigError(
                f"windows of {self.frames} frames, {hop} on from one to the next, do not fill {total} frames",
                fix=f"shape.frames={fits} or {fits + hop}",
            )
        return [(start, start + self.frames) for start in range(0, total - self.frames + 1, hop)]

    def starts(self, total: int, rate: int = 1) -> list[int]:
        """First frames of the windows over `total` frames; all but the last start at a multiple of `rate`.

        The last window ends with the video; with `rate` > 1 it starts at a known frame (a multiple of `rate`), so it
        may be up to rate - 1 frames longer than the others. Where `overlap` leaves less than `rate` frames to move on
        by, neighbours share fewer. Raises ConfigError for windows shorter than `rate`.
        """
        if self.frames == 0 or total <= self.frames:
            return [0]
        if self.frames < rate:
            raise ConfigError(
                f"windows.frames is {self.frames}, less than the {rate} frames from one known frame to the next",
                fix=f"windows.frames={2 * rate + 1} windows.overlap={rate}",
            )
        hop = max(rate, (self.frames - self.overlap) // rate * rate)
        last = (total - self.frames) // rate * rate
        return [*range(0, last, hop), last]

    def borders(self, total: int, rate: int = 1) -> list[int]:
        """The frames with which a window begins, or before which one ends, but for the video's own ends."""
        if self.in_turn:
            return sorted({frame for span in self.spans(total, rate) for frame in span} - {0, total})
        starts = self.starts(total, rate)
        return sorted({*starts[1:], *(start + self.frames for start in starts[:-1])})


def ramp(frames: int, overlap: int, first: bool, last: bool) -> Tensor:
    """Weights (frames,) of a window: 1 inside, falling linearly over the overlap, but not at the video's own ends."""
    weight = torch.ones(frames)
    slope = (torch.arange(overlap) + 1) / (overlap + 1)
    if not first and overlap:
        weight[:overlap] = torch.minimum(weight[:overlap], slope)
    if not last and overlap:
        weight[-overlap:] = torch.minimum(weight[-overlap:], slope.flip(0))
    return weight


def windowed(
    denoise: Callable[[Tensor, Cond], Tensor], z: Tensor, cond: Cond, windows: Windows, rate: int = 1
) -> Tensor:
    """x_hat of z (B, C, F, H, W) by `denoise` on windows of frames; one window is exactly one call.

    `denoise` may say more than x_hat on the channels: all of it is averaged.
    """
    total = z.shape[2]
    starts = [0] if windows.in_turn else windows.starts(total, rate)
    if len(starts) == 1:
        return denoise(z, cond)
    out, weights = torch.zeros(()), torch.zeros(total, dtype=z.dtype, device=z.device)
    for start in starts:
        stop = total if start == starts[-1] else start + windows.frames
        weight = ramp(stop - start, windows.overlap, start == 0, stop == total).to(z)
        part = denoise(z[:, :, start:stop], cond.frames(start, stop))
        if start == 0:
            out = z.new_zeros(*part.shape[:2], *z.shape[2:])
        out[:, :, start:stop] += part * weight.view(1, 1, -1, 1, 1)
        weights[start:stop] += weight
    return out / weights.view(1, 1, -1, 1, 1)
