"""A discriminator that learns beside a student to tell what it makes from real clips (Goodfellow et al. 2014).

A judge says what a clip shows; whether it could be a real one, outline by outline, is what a discriminator says. In
adversarial diffusion distillation (Sauer et al. 2023) it reads the features of another network; here it sees the pixels
or latents themselves, place by place, so nothing else must have been trained on such clips.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from cascade.nets.layers import Clip, along_time, as_video, channels_last, from_video
from cascade.text import Text

WIDTHS = (32, 64, 128)  # channels: at full size, at a half, at a quarter
SLOPE = 0.2  # of what is below zero
SIGMA, STEADY = 0.1, 10.0  # noise by which real clips are moved, and what the square of its effect counts


class Level(nn.Module):
    """Convolutions over places, then over frames as a residual; `half`: of every second place."""

    def __init__(self, cin: int, channels: int, half: bool) -> None:
        super().__init__()
        self.space = nn.Conv2d(cin, channels, 4, 2, 1) if half else nn.Conv2d(cin, channels, 3, padding=1)
        self.time = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0))

    def forward(self, h: Tensor, clip: Clip) -> Tensor:
        h = F.leaky_relu(self.space(h), SLOPE)
        return h + F.leaky_relu(from_video(along_time(self.time, as_video(h, clip), clip), *h.shape[2:]), SLOPE)


class Discriminator(nn.Module):
    """How real a clip is at each place, as a logit: (B, C, F, H, W) and its text -> (B, F, H / 4, W / 4).

    A place sees its own 4 x 4 pixels and 8 around them, 3 frames before and after, and compares all that with the mean
    of the text's tokens (projection discriminator, Miyato & Koyama 2018); `text` is their width, 0: it reads none. It
    begins the same whenever it is made, and works in its own precision under autocast too.
    """

    pace = 10.0  # times the student's learning rate: that one knows nearly all already, this one nothing

    def __init__(self, channels: int, text: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self._build(channels, text)
        channels_last(self)

    def _build(self, channels: int, text: int) -> None:
        sizes = zip((channels, *WIDTHS), WIDTHS, strict=False)
        self.levels = nn.ModuleList(Level(cin, c, half=n > 0) for n, (cin, c) in enumerate(sizes))
        self.out = nn.Conv2d(WIDTHS[-1], 1, 3, padding=1)
        self.text = nn.Linear(text, WIDTHS[-1]) if text else None

    def forward(self, x: Tensor, text: Text) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self._logits(x.to(self.out.weight.dtype), text)

    def _logits(self, x: Tensor, text: Text) -> Tensor:
        clip = Clip(batch=len(x), frames=x.shape[2], embedding=x.new_empty(0), segments=None)
        h = x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        for level in self.levels:
            h = level(h, clip)
        out = torch.unflatten(self.out(h)[:, 0], 0, (clip.batch, clip.frames))
        if self.text is not None:
            told = self.text(text.pooled().to(h.dtype)) / WIDTHS[-1] ** 0.5
            out = out + torch.einsum("bfchw,bc->bfhw", torch.unflatten(h, 0, (clip.batch, clip.frames)), told)
        return out


def student_loss(net: Discriminator, made: Tensor, text: Text) -> Tensor:
    """-log of how likely the student's clips (B, C, F, H, W) are real, (B,), without a gradient for `net`."""
    fixed = {name: value.detach() for name, value in net.named_parameters()}
    logits: Tensor = functional_call(net, fixed, (made, text))
    lost: Tensor = F.softplus(-logits)
    return lost.mean((1, 2, 3))


def own_loss(net: Discriminator, real: Tensor, made: Tensor, text: Text, noise: Tensor) -> Tensor:
    """What the discriminator learns from real clips and the student's, (B,), without a gradient for the student.

    To tell them apart (cross-entropy), and not to change its mind for a little noise: R1 (Mescheder et al. 2018) to
    first order, without a derivative of derivatives (Lin et al. 2025, APT).
    """
    on_real, on_moved, on_made = (net(x, text) for x in (real, real + SIGMA * noise, made.detach()))
    lost: Tensor = F.softplus(-on_real) + F.softplus(on_made) + STEADY * (on_real - on_moved).square()
    return lost.mean((1, 2, 3))
