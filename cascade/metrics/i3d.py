"""Fréchet video distance as the papers have it (Unterthiner et al. 2018), in the features of the real I3D network.

Inflated 3D Inception (Carreira & Zisserman 2017) trained on Kinetics-400; the features are its 400 logits, averaged
over time. `cascade assets` fetches the weights. With 400 dimensions the distance of two sets of a few hundred clips is
mostly bias, so it is told beside the floor (the condition `real`) and beside the unbiased kernel distance.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade import assets
from cascade.metrics.features import evenly
from cascade.metrics.fvd import frechet, kernel
from cascade.video import Shape

INPUT = Shape(frames=16, height=224, width=224)
FILTER = "bilinear, anti-aliased when it shrinks"
Triple = tuple[int, int, int]
# Channels of a block: 1x1x1; 1x1x1 and 3x3x3; 1x1x1 and 3x3x3; 1x1x1 after pooling.
BLOCKS = {
    "mixed_3b": (64, 96, 128, 16, 32, 32),
    "mixed_3c": (128, 128, 192, 32, 96, 64),
    "pool_4a": (3, 2),  # kernel and stride
    "mixed_4b": (192, 96, 208, 16, 48, 64),
    "mixed_4c": (160, 112, 224, 24, 64, 64),
    "mixed_4d": (128, 128, 256, 24, 64, 64),
    "mixed_4e": (112, 144, 288, 32, 64, 64),
    "mixed_4f": (256, 160, 320, 32, 128, 128),
    "pool_5a": (2, 2),
    "mixed_5b": (256, 160, 320, 32, 128, 128),
    "mixed_5c": (384, 192, 384, 48, 128, 128),
}


def same(x: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    """TensorFlow's SAME padding of (B, C, T, H, W): ceil(size / stride) outputs, the odd zero at the end."""
    sides: list[int] = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max(0, (-(-size // s) - 1) * s + k - size)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides)


class Unit(nn.Conv3d):
    """Convolution (its normalisation folded in) and ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int, step: int = 1) -> None:
        super().__init__(inputs, outputs, size, step)
        self.window: tuple[Triple, Triple] = ((size,) * 3, (step,) * 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(same(x, *self.window)))


class Pool(nn.Module):
    """Maximum over a window. Zeros do for padding: it follows a ReLU."""

    def __init__(self, size: Triple, step: Triple) -> None:
        super().__init__()
        self.size, self.step = size, step

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(same(x, self.size, self.step), self.size, self.step)


class Mixed(nn.ModuleList):
    """Four branches side by side."""

    def __init__(self, inputs: int, widths: tuple[int, ...]) -> None:
        one, a, three, b, other, pooled = widths
        super().__init__(
            [
                nn.Sequential(Unit(inputs, one, 1)),
                nn.Sequential(Unit(inputs, a, 1), Unit(a, three, 3)),
                nn.Sequential(Unit(inputs, b, 1), Unit(b, other, 3)),
                nn.Sequential(Pool((3, 3, 3), (1, 1, 1)), Unit(inputs, pooled, 1)),
            ]
        )
        self.outputs = one + three + other + pooled

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], 1)


class I3D(nn.Sequential):
    """(B, 3, T, 224, 224) in [-1, 1], T > 8 -> logits (B, 400), averaged over time."""

    def __init__(self) -> None:
        layers: dict[str, nn.Module] = {
            "conv3d_1a_7x7": Unit(3, 64, 7, 2),
            "pool_2a": Pool((1, 3, 3), (1, 2, 2)),
            "conv3d_2b_1x1": Unit(64, 64, 1),
            "conv3d_2c_3x3": Unit(64, 192, 3),
            "pool_3a": Pool((1, 3, 3), (1, 2, 2)),
        }
        width = 192
        for name, sizes in BLOCKS.items():
            if len(sizes) == 2:
                layers[name] = Pool((sizes[0],) * 3, (sizes[1],) * 3)
            else:
                layers[name] = block = Mixed(width, sizes)
                width = block.outputs
        layers["pool_6a"] = nn.AvgPool3d((2, 7, 7), 1)
        layers["logits"] = nn.Conv3d(width, 400, 1)
        super().__init__(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return logits.mean((2, 3, 4))


def prepare(frames: Tensor) -> Tensor:
    """(B, 3, F, H, W) of any size -> (B, 3, 16, 224, 224): evenly spaced frames, resized by FILTER."""
    clip = evenly(frames, INPUT.frames).float().cpu()
    shrink = clip.shape[3] > INPUT.height or clip.shape[4] > INPUT.width
    flat = clip.transpose(1, 2).flatten(0, 1)
    flat = F.interpolate(flat, (INPUT.height, INPUT.width), mode="bilinear", align_corners=False, antialias=shrink)
    return torch.unflatten(flat, 0, (len(frames), INPUT.frames)).transpose(1, 2)


@torch.no_grad()
def extract(frames: Tensor, net: I3D | None = None) -> Tensor:
    """Features (B, 400) of clips (B, 3, F, H, W) in [-1, 1], one clip at a time: half a GB is enough."""
    net = net or fetched(assets.folder())[0]
    return torch.cat([net(prepare(clip[None])) for clip in frames])


@cache
def fetched(folder: Path) -> tuple[I3D, str]:
    """The real network and the hash of its weights. Raises InputError."""
    with torch.device("meta"):
        net = I3D()
    return net, assets.load(net, "i3d", folder / "i3d")


def absent() -> str:
    return assets.absent("i3d")


def judge(frames: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Features (B, 400) of the clips and of as many real ones; they need not be paired."""
    return {"made": extract(frames), "real": extract(truth)}


def total(values: dict[str, Tensor]) -> dict[str, float]:
    """FVD and the kernel distance (KVD) of all clips and all real ones. Without two clips of each there is none."""
    if len(values["made"]) < 2:
        return {}
    return {"fvd": frechet(values["made"], values["real"]), "kvd": kernel(values["made"], values["real"])}


def about() -> dict[str, Any]:
    """What the numbers depend on beside the clips."""
    return {
        "features": f"I3D, Kinetics-400, sha256 of its manifest {fetched(assets.folder())[1]}",
        "dimensions": 400,
        "input": f"{INPUT} (frames x height x width), frames evenly spaced, of fewer some repeated",
        "filter": FILTER,
        "covariance": "unbiased, float64",
    }
