"""Long videos piece by piece.

By default there is one sampler loop over the whole video, and the denoiser works window by window. Every step the
windows' x_hat are averaged where they overlap (MultiDiffusion, Bar-Tal et al. 2023; Lumiere sec. 3.3), with weights
that fall towards a window's ends; the noise of a frame is the same in every window that sees it, because it belongs to
the whole video. What frames far apart tell each other is lost.

A stage that may be given parts of its own output goes on by itself (`rule: extend`): each window is told what the one
before has made (Ho et al. 2022, Video Diffusion Models, sec. 3.1: autoregressive extension).

`in_parts` is for networks in which a frame depends on the nearest ones alone, such as convolutions along time: parts
that see those as well add up to the very answer for the whole video.

What the network holds grows with what is seen at once, not with the video. Beside it a loop over the whole video holds
all frames of z, x_hat and what comes in, on the device; where every window is a run of the sampler, it holds those of a
window, and the whole video alone in the host's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from cascade.cond import Cond
from cascade.errors import ConfigError
from cascade.noise import Draw
from cascade.video import Video


class Join(Enum):
    """How windows become one video. All but the first way sample every window by itself, one after the other."""

    BLEND = "blend"
    OVERWRITE = "overwrite"  # where windows overlap the later one counts
    CHAINED = "chained"  # the same, and a window's first frame is known: it is the finished one before it (Show-1)
    EXTEND = "extend"  # the frames of the one before are known where they overlap, beside what is given of the video
    APART = "apart"  # side by side, the last one as short as the clip leaves it (LaVie)
    FIRST = "first"  # only the first window is sampled, the other frames stay as they come in


@dataclass(kw_only=True)
class Windows:
    """`frames` at once (0: all of them), neighbours sharing at least `overlap`.

    Windows sampled by themselves have to fill the clip exactly, but for those of `extend` and `apart`. With
    `same_noise` each of them starts from the noise of the first one's frames, and the noise no longer belongs to the
    frame.
    """

    frames: int = 0
    overlap: int = 0
    rule: Join = Join.BLEND
    same_noise: bool = False

    def __post_init__(self) -> None:
        if self.frames < 0 or not 0 <= self.overlap <= max(0, self.frames - 1):
            raise ValueError(f"frames is {self.frames} and overlap {self.overlap}, expected 0 <= overlap < frames")
        if self.rule in (Join.BLEND, Join.EXTEND) and self.same_noise:
            raise ValueError(f"same_noise is true, expected false where rule is {self.rule.value}")
        if self.rule is not Join.BLEND and not self.frames:
            raise ValueError(f"frames is 0, expected at least 1 where rule is {self.rule.value}")
        if self.rule is Join.CHAINED and self.overlap != 1:
            raise ValueError(f"overlap is {self.overlap}, expected 1 where rule is chained: the frame that is known")
        if self.rule is Join.APART and self.overlap:
            raise ValueError(f"overlap is {self.overlap}, expected 0 where rule is apart")

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
        if self.rule is Join.EXTEND:
            return [(start, min(start + self.frames, total)) for start in self.starts(total, rate)]
        if self.rule is Join.APART:
            if self.frames % rate:
                raise ConfigError(
                    f"windows of {self.frames} frames side by side part the {rate} frames that are made of one",
                    fix="windows.rule=overwrite",
                )
            return [(start, min(start + self.frames, total)) for start in range(0, total, self.frames)]
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

    def unmade(self, known: Tensor) -> list[int]:
        """First frames of the windows of `extend` over a video whose frames `known` (F,) are there already.

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
        if self.in_turn:
            return sorted({frame for span in self.spans(total, rate) for frame in span} - {0, total})
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
        weight = ramp(stop - start, windows.overlap, start == 0, stop == total, z.device).to(z.dtype)
        part = denoise(z[:, :, start:stop], cond.frames(start, stop))
        if start == 0:
            out = z.new_zeros(*part.shape[:2], *z.shape[2:])
        out[:, :, start:stop] += part * weight.view(1, 1, -1, 1, 1)
        weights[start:stop] += weight
    return out.div_(weights.view(1, 1, -1, 1, 1))


def extended(
    make: Callable[[slice, Video, Draw, Callable[[float], None]], Tensor],
    low: Video,
    windows: Windows,
    noise: Draw,
    progress: Callable[[float], None],
) -> Tensor:
    """The frames (B, C, F, H, W) of a long video of which `low` says what is known, window after window.

    `make` gives a window's frames from its place, from what is known of it and from its part of the whole video's
    noise, and tells its progress, a share of 1. What `low` knows stays; what a window has made the next one knows.
    """
    assert low.known is not None
    frames, known = low.frames.clone(), low.known.clone()
    starts = windows.unmade(known.flatten(2).all(2).all(0) if known.ndim == 4 else known.all(0))
    for number, start in enumerate(starts):
        part = slice(start, start + windows.frames)

        def tick(share: float, number: int = number) -> None:
            progress((number + share) / len(starts))

        frames[:, :, part] = make(part, Video(frames[:, :, part], low.fps, known[:, part]), noise.window(start), tick)
        known[:, part] = True
    return frames


def in_parts(denoise: Callable[[Tensor, Cond], Tensor], z: Tensor, cond: Cond, frames: int, reach: int) -> Tensor:
    """denoise(z, cond), z (B, C, F, H, W), from calls that see at most `frames` frames; equal up to rounding.

    No frame may depend on another that is more than `reach` frames away. Of a part those frames are kept that are as
    far from its ends, or at the video's own. Needs frames > 2 reach.
    """
    total = z.shape[2]
    if total <= frames:
        return denoise(z, cond)
    assert frames > 2 * reach, f"parts of {frames} frames, of which none is {reach} frames from both ends"
    out, done = torch.empty(()), 0
    for start in (*range(0, total - frames, frames - 2 * reach), total - frames):
        stop = start + frames
        kept = total if stop == total else stop - reach
        part = denoise(z[:, :, start:stop], cond.frames(start, stop))
        if start == 0:
            out = part.new_empty(*part.shape[:2], *z.shape[2:])
        out[:, :, done:kept] = part[:, :, done - start : kept - start]
        done = kept
    return out
