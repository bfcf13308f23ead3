"""Long videos in windows: one sampler loop over the whole video, the denoiser works window by window.

Every step the windows' x_hat are averaged where they overlap (MultiDiffusion, Bar-Tal et al. 2023; Lumiere sec. 3.3),
with weights that fall towards a window's ends; the noise of a frame is the same in every window that sees it, because
it belongs to the whole video. Memory grows with the window, not with the video.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.errors import ConfigError
from cascade.unet import Cond


@dataclass(kw_only=True)
class Windows:
    """`frames` at once (0: all of them), neighbours sharing at least `overlap`."""

    frames: int = 0
    overlap: int = 0

    def __post_init__(self) -> None:
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

    def borders(self, total: int, rate: int = 1) -> list[int]:
        """The frames with which a window begins, or before which one ends, but for the video's own ends."""
        starts = self.starts(total, rate)
        return sorted({*starts[1:], *(start + self.frames for start in starts[:-1])})


def ramp(frames: int, overlap: int, first: bool, last: bool, device: torch.device | str = "cpu") -> Tensor:
    """Weights (frames,) of a window: 1 inside, falling linearly over the overlap, but not at the video's own ends."""
    weight = torch.ones(frames, device=device)
    slope = (torch.arange(overlap, device=device) + 1) / (overlap + 1)
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
        weight = ramp(stop - start, windows.overlap, start == 0, stop == total, z.device).to(z.dtype)
        part = denoise(z[:, :, start:stop], cond.frames(start, stop))
        out[:, :, start:stop] += part * weight.view(1, 1, -1, 1, 1)
        weights[start:stop] += weight
    return out.div_(weights.view(1, 1, -1, 1, 1))
