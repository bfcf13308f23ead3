"""Long videos in windows, all at once or one after the other.

All at once: one sampler loop over the whole video, the denoiser works window by window. Every step the windows' x_hat
are averaged where they overlap (MultiDiffusion, Bar-Tal et al. 2023; Lumiere sec. 3.3), with weights that fall towards
a window's ends; the noise of a frame is the same in every window that sees it, because it belongs to the whole video.
Memory grows with the window, not with the video.

One after the other (`chained`): each window has a loop of its own and is given the end of the one before as known
frames (Ho et al. 2022, Video Diffusion Models, sec. 3.1: autoregressive extension).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.errors import ConfigError
from cascade.sampler import Draw
from cascade.unet import Cond
from cascade.video import Video


@dataclass(kw_only=True)
class Windows:
    """`frames` at once (0: all of them), neighbours sharing at least `overlap`; `chained`: one after the other.

    Only a stage whose input may be known frames can chain its windows.
    """

    frames: int = 0
    overlap: int = 0
    chained: bool = False

    def __post_init__(self) -> None:
        if self.chained and not self.frames:
            raise ValueError("chained is true, but frames is 0, expected the frames of a window")
        if self.frames < 0 or not 0 <= self.overlap <= max(0, self.frames - 1):
            raise ValueError(f"frames is {self.frames} and overlap {self.overlap}, expected 0 <= overlap < frames")

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

    def chain(self, known: Tensor) -> list[int]:
        """First frames of chained windows over a video whose frames `known` (F,) are there already.

        Each begins `overlap` frames before the first frame that is still to be made; none ends after the video.
        """
        done, starts = known.clone(), []
        while not done.all():
            first = int((~done).nonzero()[0])
            starts.append(max(0, min(first - self.overlap, len(done) - self.frames)))
            done[starts[-1] : starts[-1] + self.frames] = True
        return starts

    def borders(self, total: int, rate: int = 1) -> list[int]:
        """The frames with which a window begins, or before which one ends, but for the video's own ends."""
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
    """x_hat of z (B, C, F, H, W) by `denoise` on windows of frames; one window is exactly one call."""
    total = z.shape[2]
    starts = windows.starts(total, rate)
    if len(starts) == 1:
        return denoise(z, cond)
    out, weights = torch.zeros_like(z), torch.zeros(total, dtype=z.dtype, device=z.device)
    for start in starts:
        stop = total if start == starts[-1] else start + windows.frames
        weight = ramp(stop - start, windows.overlap, start == 0, stop == total).to(z)
        part = denoise(z[:, :, start:stop], cond.frames(start, stop))
        out[:, :, start:stop] += part * weight.view(1, 1, -1, 1, 1)
        weights[start:stop] += weight
    return out / weights.view(1, 1, -1, 1, 1)


def chained(
    make: Callable[[Video, Draw, Callable[[float], None]], Tensor],
    low: Video,
    windows: Windows,
    noise: Draw,
    progress: Callable[[float], None],
) -> Tensor:
    """The frames (B, C, F, H, W) of a long video of which `low` says what is known, window after window.

    `make` gives the frames of a window from what is known of it, from its part of the whole video's noise, and tells
    its progress, a share of 1. What `low` knows stays; what a window has made is known to the next one.
    """
    assert low.known is not None
    frames, known = low.frames.clone(), low.known.clone()
    total = low.shape.frames
    starts = windows.chain(known.flatten(2).all(2).all(0) if known.ndim == 4 else known.all(0))
    for number, start in enumerate(starts):
        part = slice(start, start + windows.frames)

        def draw(shape: Sequence[int], step: int, purpose: str, part: slice = part) -> Tensor:
            return noise((*shape[:2], total, *shape[3:]), step, purpose)[:, :, part]

        def tick(share: float, number: int = number) -> None:
            progress((number + share) / len(starts))

        frames[:, :, part] = make(Video(frames[:, :, part], low.fps, known[:, part]), draw, tick)
        known[:, part] = True
    return frames
