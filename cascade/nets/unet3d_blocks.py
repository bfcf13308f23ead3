"""Convolutional blocks of the U-Nets of DeepFloyd IF and Stable Diffusion and of the video models inflated from them.

Names of modules are those of the published state dicts. Activations are (B*F, C, H, W) in channels-last memory, as in
`cascade.nets.layers`; what mixes frames sees them as (B, F, H*W, C) or (B, C, F, H*W), views both. Norms inside
temporal branches take their statistics over all frames of a clip: that is how these models were trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch.nn.functional as F
from torch import Tensor, nn

from cascade.nets.layers import Clip, Norm, as_video, from_video, zero
from cascade.nets.unet3d_config import Act, UNet3DConfig


@dataclass
class Told(Clip):
    """A clip with the embedded text that attention reads, once for all of its frames."""

    context: Tensor  # (B, N, D)


def frames_first(h: Tensor, clip: Clip) -> Tensor:
    """(B*F, C, H, W) channels-last -> (B, C, F, H*W) channels-last, a view."""
    return as_video(h, clip).permute(0, 3, 1, 2)


def activated(cfg: UNet3DConfig, norm: Norm, h: Tensor, film: Tensor | None = None) -> Tensor:
    """act(norm(h) (1 + scale) + shift)."""
    if cfg.activation is Act.SILU:
        return norm(h, film, silu=True)  # type: ignore[no-any-return]
    return cfg.activation(norm(h, film))


def normed(cfg: UNet3DConfig, norm: Norm, h: Tensor, told: Told) -> Tensor:
    """act(norm(h)), with the statistics of each frame or of the whole clip."""
    if not cfg.shared_norm:
        return activated(cfg, norm, h)
    return from_video(activated(cfg, norm, frames_first(h, told)).permute(0, 2, 3, 1), *h.shape[2:])


class Resample(Enum):
    """What a residual block does to height and width."""

    NONE = 0
    HALVE = 1
    DOUBLE = 2

    def __call__(self, h: Tensor) -> Tensor:
        if self is Resample.HALVE:
            return F.avg_pool2d(h, 2)
        return F.interpolate(h, scale_factor=2, mode="nearest") if self is Resample.DOUBLE else h


class Resnet(nn.Module):
    """(skip(h) + conv2(act(norm2(conv1(act(norm1(h))), told))) / scale, frame by frame."""

    def __init__(self, cin: int, c: int, cfg: UNet3DConfig, scale: float, resample: Resample = Resample.NONE) -> None:
        super().__init__()
        self.cfg, self.scale, self.resample = cfg, scale, resample
        self.norm1 = Norm(cin, cfg.groups, cfg.eps)
        self.conv1 = nn.Conv2d(cin, c, 3, padding=1)
        self.time_emb_proj = nn.Linear(cfg.embedding, 2 * c if cfg.scale_shift else c)
        self.norm2 = Norm(c, cfg.groups, cfg.eps)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(cin, c, 1) if cin != c else None

    def forward(self, h: Tensor, told: Told) -> Tensor:
        out = self.conv1(self.resample(normed(self.cfg, self.norm1, h, told)))
        h = self.resample(h)
        told_here = told.embedding if self.cfg.skip_time_act else self.cfg.activation(told.embedding)
        film = self.time_emb_proj(told_here)
        if self.cfg.scale_shift:
            out = activated(self.cfg, self.norm2, out, film)
        else:
            out = normed(self.cfg, self.norm2, out + film[:, :, None, None], told)
        out = self.conv2(out)
        h = (h if self.conv_shortcut is None else self.conv_shortcut(h)) + out
        return h if self.scale == 1 else h / self.scale


class Halve(nn.Module):
    """A convolution with stride 2."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, h: Tensor, told: Told) -> Tensor:
        out: Tensor = self.conv(h)
        return out


class Double(nn.Module):
    """Every pixel twice in both directions, then a convolution."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, h: Tensor, told: Told) -> Tensor:
        out: Tensor = self.conv(Resample.DOUBLE(h))
        return out


class FrameConv(nn.Conv3d):
    """A convolution over so many frames. Its weight (C, C, 3, 1, 1) runs as that of a Conv2d on (B, C, F, H*W)."""

    def __init__(self, c: int, frames: int = 3) -> None:
        super().__init__(c, c, (frames, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[..., 0], self.bias, padding=(self.kernel_size[0] // 2, 0))


class TemporalConvs(nn.Module):
    """h plus four times norm, SiLU and a convolution along time; the last one starts at zero (ModelScope)."""

    def __init__(self, c: int, cfg: UNet3DConfig) -> None:
        super().__init__()
        # The published lists also hold the SiLU, which is part of the norm here, and from the second on a dropout.
        self.conv1 = nn.Sequential(Norm(c, cfg.groups), nn.Identity(), FrameConv(c))
        self.conv2, self.conv3, self.conv4 = (
            nn.Sequential(Norm(c, cfg.groups), nn.Identity(), nn.Identity(), FrameConv(c)) for _ in range(3)
        )
        zero(self.conv4[-1])  # type: ignore[type-var]

    def forward(self, h: Tensor, told: Told) -> Tensor:
        x = frames_first(h, told)
        for part in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = part[-1](part[0](x, silu=True))
        return h + from_video(x.permute(0, 2, 3, 1), *h.shape[2:])
