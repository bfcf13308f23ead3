"""Fréchet inception distance (Heusel et al. 2017) of single frames, in the features of the real Inception-v3.

The network is TensorFlow's of 2015, which FID is defined by and which differs from the later ones in its pooling; the
features are the 2,048 before its classes. `cascade assets` fetches the weights. Of a few hundred frames the distance
is mostly bias, so it is told beside the floor (the condition `real`) and beside the unbiased kernel distance.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade import assets
from cascade.metrics.features import evenly
from cascade.metrics.fvd import frechet, kernel

SIDE = 299  # pixels
FRAMES = 4  # of a clip: neighbours are nearly the same picture
FILTER = "bilinear, anti-aliased when it shrinks"

highest = partial(nn.MaxPool2d, 3)
mean = partial(nn.AvgPool2d, 3, stride=1, padding=1, count_include_pad=False)


class Unit(nn.Conv2d):
    """Convolution (its normalisation folded in) and ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def wide(inputs: int, outputs: int, size: int) -> Unit:
    return Unit(inputs, outputs, (1, size), padding=(0, size // 2))


def high(inputs: int, outputs: int, size: int) -> Unit:
    return Unit(inputs, outputs, (size, 1), padding=(size // 2, 0))


class Fork(nn.ModuleDict):
    """Branches side by side."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.values()], 1)


def line(*units: Unit, pool: nn.Module | None = None, mixed: Fork | None = None) -> nn.Sequential:
    """One after another: the pool, the units, the fork."""
    named = {"pool": pool, **{f"conv_{i}" if i else "conv": unit for i, unit in enumerate(units)}, "mixed": mixed}
    return nn.Sequential(OrderedDict({name: part for name, part in named.items() if part is not None}))


def block_35(inputs: int, pooled: int) -> Fork:
    """At 35 x 35."""
    return Fork({
        "conv": Unit(inputs, 64, 1),
        "tower": line(Unit(inputs, 48, 1), Unit(48, 64, 5, padding=2)),
        "tower_1": line(Unit(inputs, 64, 1), Unit(64, 96, 3, padding=1), Unit(96, 96, 3, padding=1)),
        "tower_2": line(Unit(inputs, pooled, 1), pool=mean()),
    })  # fmt: skip


def to_17() -> Fork:
    return Fork({
        "conv": Unit(288, 384, 3, stride=2),
        "tower": line(Unit(288, 64, 1), Unit(64, 96, 3, padding=1), Unit(96, 96, 3, stride=2)),
        "pool": highest(stride=2),
    })  # fmt: skip


def block_17(c: int) -> Fork:
    """At 17 x 17, with 7 x 7 as 1 x 7 and 7 x 1."""
    return Fork({
        "conv": Unit(768, 192, 1),
        "tower": line(Unit(768, c, 1), wide(c, c, 7), high(c, 192, 7)),
        "tower_1": line(Unit(768, c, 1), high(c, c, 7), wide(c, c, 7), high(c, c, 7), wide(c, 192, 7)),
        "tower_2": line(Unit(768, 192, 1), pool=mean()),
    })  # fmt: skip


def to_8() -> Fork:
    seven = (wide(192, 192, 7), high(192, 192, 7))
    return Fork({
        "tower": line(Unit(768, 192, 1), Unit(192, 320, 3, stride=2)),
        "tower_1": line(Unit(768, 192, 1), *seven, Unit(192, 192, 3, stride=2)),
        "pool": highest(stride=2),
    })  # fmt: skip


def block_8(inputs: int, pool: nn.Module) -> Fork:
    """At 8 x 8; the last one takes maxima where the others take means: what sets FID's network apart."""
    three, four = (Fork({"conv": wide(384, 384, 3), "conv_1": high(384, 384, 3)}) for _ in range(2))
    return Fork({
        "conv": Unit(inputs, 320, 1),
        "tower": line(Unit(inputs, 384, 1), mixed=three),
        "tower_1": line(Unit(inputs, 448, 1), Unit(448, 384, 3, padding=1), mixed=four),
        "tower_2": line(Unit(inputs, 192, 1), pool=pool),
    })  # fmt: skip


class Inception(nn.Sequential):
    """(B, 3, 299, 299) in [-1, 1] -> features (B, 2048)."""

    def __init__(self) -> None:
        blocks = [
            *(block_35(*sizes) for sizes in ((192, 32), (256, 64), (288, 64))),
            to_17(),
            *(block_17(c) for c in (128, 160, 160, 192)),
            to_8(),
            block_8(1280, mean()),
            block_8(2048, highest(stride=1, padding=1)),
        ]
        layers: dict[str, nn.Module] = {
            "conv": Unit(3, 32, 3, stride=2),
            "conv_1": Unit(32, 32, 3),
            "conv_2": Unit(32, 64, 3, padding=1),
            "pool0": highest(stride=2),
            "conv_3": Unit(64, 80, 1),
            "conv_4": Unit(80, 192, 3),
            "pool1": highest(stride=2),
            **{f"mixed_{i}" if i else "mixed": block for i, block in enumerate(blocks)},
            "pool2": nn.AvgPool2d(8),
            "flat": nn.Flatten(),
        }
        super().__init__(OrderedDict(layers))


@torch.no_grad()
def extract(frames: Tensor, net: Inception | None = None) -> Tensor:
    """Features (B, FRAMES, 2048) of evenly spaced frames of clips (B, 3, F, H, W) in [-1, 1]."""
    net = net or fetched(assets.folder())[0]
    found = []
    for clip in evenly(frames, FRAMES).float().cpu():
        shrink = max(clip.shape[2:]) > SIDE
        pictures = F.interpolate(
            clip.transpose(0, 1), (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=shrink
        )
        found.append(net(pictures))
    return torch.stack(found)


@cache
def fetched(folder: Path) -> tuple[Inception, str]:
    """The real network and the hash of its weights. Raises InputError."""
    with torch.device("meta"):
        net = Inception()
    return net, assets.load(net, "inception", folder / "inception")


def absent() -> str:
    return assets.absent("inception")


def judge(frames: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Features (B, FRAMES, 2048) of the clips' frames and of real ones; they need not be paired."""
    return {"made": extract(frames), "real": extract(truth)}


def total(values: dict[str, Tensor]) -> dict[str, float]:
    """FID and the kernel distance (KID) of all frames. Without two clips of each there is none."""
    if len(values["made"]) < 2:
        return {}
    made, real = values["made"], values["real"]
    return {"fid": frechet(made.flatten(0, 1), real.flatten(0, 1)), "kid": kernel(made, real)}


def about() -> dict[str, Any]:
    """What the numbers depend on beside the clips."""
    return {
        "features": f"Inception-v3 of FID, sha256 of its manifest {fetched(assets.folder())[1]}",
        "dimensions": 2048,
        "input": f"{FRAMES} frames of a clip, evenly spaced, at {SIDE}x{SIDE}",
        "filter": FILTER,
        "covariance": "unbiased, float64",
    }
