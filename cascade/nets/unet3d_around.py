"""What mixes frames in LaVie's super-resolution, beside the attention over them that its other stages have too.

Its code also knows cross-frame attention, warps by flow or deformable convolutions, and a scale beside the shift. The
published configuration has none of them, so no weights are theirs. Norms take their statistics over a whole clip.
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from cascade.nets.layers import Norm, from_video, zero
from cascade.nets.unet3d_attention import TRANSFORMER_EPS, SpatialTransformer, TextBlock
from cascade.nets.unet3d_blocks import FrameConv, Resnet, Told, frames_first
from cascade.nets.unet3d_config import UNet3DConfig


class FrameResnet(nn.Module):
    """h + conv2(silu(norm2(conv1(silu(norm1(h))) + embedding))), along time: over `frames` of them, then over 3.

    The embedding is left out where the block is not `told` it.
    """

    def __init__(self, c: int, cfg: UNet3DConfig, frames: int, told: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (Norm(c, cfg.groups, TRANSFORMER_EPS) for _ in range(2))
        self.conv1, self.conv2 = FrameConv(c, frames), FrameConv(c)
        self.time_emb_proj = nn.Linear(cfg.embedding, c) if told else None

    def forward(self, h: Tensor, told: Told) -> Tensor:
        x = self.conv1(self.norm1(frames_first(h, told), silu=True))
        if self.time_emb_proj is not None:
            embedding = told.embedding[:: told.frames]  # of a clip: all of its frames hear the same
            x = x + self.time_emb_proj(F.silu(embedding))[..., None, None]
        x = self.conv2(self.norm2(x, silu=True))
        return h + from_video(x.permute(0, 2, 3, 1), *h.shape[2:])


class Shift(nn.Module):
    """h plus what a residual block along time and one within frames make of it; nothing at the start."""

    def __init__(self, c: int, cfg: UNet3DConfig) -> None:
        super().__init__()
        self.resblocks_3d_t = FrameResnet(c, cfg, 5, told=True)
        self.resblocks_3d_s = Resnet(c, c, replace(cfg, eps=TRANSFORMER_EPS), 1.0)
        self.shift_conv = zero(nn.Conv2d(c, c, 1))

    def forward(self, h: Tensor, told: Told) -> Tensor:
        out: Tensor = h + self.shift_conv(self.resblocks_3d_s(self.resblocks_3d_t(h, told), told))
        return out


class TemporalTextBlock(TextBlock):
    """The same under other names."""

    TIME = "temporal"


class FramesThenSpace(SpatialTransformer):
    """A residual block along time in front of a spatial transformer; nothing at the start (theirs begins at random)."""

    BLOCK = TemporalTextBlock

    def __init__(self, c: int, cfg: UNet3DConfig, own: bool = True) -> None:
        super().__init__(c, cfg, own)
        self.resblock_temporal = FrameResnet(c, cfg, 3, told=False)
        zero(self.resblock_temporal.conv2)

    def forward(self, h: Tensor, told: Told) -> Tensor:
        return super().forward(self.resblock_temporal(h, told), told)
