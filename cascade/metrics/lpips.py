"""Perceptual distance to the truth (LPIPS 0.1, Zhang et al. 2018), frame by frame, in AlexNet's features.

`cascade assets` fetches the weights.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade import assets

LEAST = 64  # pixels: the patches it was fitted to; smaller frames are enlarged to it
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of red, green, blue in [-1, 1]


class Lpips(nn.Module):
    """Frames a, b (N, 3, H, W) in [-1, 1] -> distance (N,)."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1))
        self.convs = nn.ModuleList(nn.Conv2d(*size) for size in sizes)  # inputs, outputs, kernel, stride, padding
        self.heads = nn.ParameterList(torch.empty(size[1]) for size in sizes)

    def features(self, x: Tensor) -> list[Tensor]:
        """Five layers of AlexNet, each position's channels of length 1."""
        h = (x - x.new_tensor(SHIFT).view(3, 1, 1)) / x.new_tensor(SCALE).view(3, 1, 1)
        found = []
        for i, conv in enumerate(self.convs):
            h = F.relu(conv(F.max_pool2d(h, 3, 2) if i in (1, 2) else h))
            found.append(h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        total = a.new_zeros(len(a))
        for x, y, head in zip(self.features(a), self.features(b), self.heads, strict=True):
            total = total + ((x - y).square() * head.view(-1, 1, 1)).sum(1).mean((1, 2))
        return total


@cache
def fetched(folder: Path) -> tuple[Lpips, str]:
    """The real network and the hash of its weights. Raises InputError."""
    with torch.device("meta"):
        net = Lpips()
    return net, assets.load(net, "lpips", folder / "lpips")


def absent() -> str:
    return assets.absent("lpips")


@torch.no_grad()
def distance(frames: Tensor, truth: Tensor, net: Lpips | None = None) -> Tensor:
    """(B, F) between clips (B, 3, F, H, W)."""
    net = net or fetched(assets.folder())[0]
    height, width = frames.shape[3:]
    rows = []
    for pair in zip(frames, truth, strict=True):
        a, b = (clip.transpose(0, 1).float().cpu() for clip in pair)
        if min(height, width) < LEAST:
            grow = LEAST / min(height, width)
            size = (round(height * grow), round(width * grow))
            a, b = (F.interpolate(x, size, mode="bilinear", align_corners=False) for x in (a, b))
        rows.append(net(a, b))
    return torch.stack(rows)


def judge(frames: Tensor, truth: Tensor, known: Tensor) -> dict[str, Tensor]:
    """Mean over the frames that were not given (`known` (B, F) marks those): (B,); NaN where there is no other."""
    new = ~known
    apart = distance(frames, truth)
    return {"lpips": (apart * new).sum(1) / new.sum(1)}  # 0 / 0 is NaN


def about() -> dict[str, Any]:
    """What the number depends on beside the clips."""
    return {
        "features": f"AlexNet, LPIPS 0.1, sha256 of its manifest {fetched(assets.folder())[1]}",
        "input": f"frames as they are; those with a side below {LEAST} enlarged to it, bilinear",
    }
