"""A small network that knows the procedural world; the Fréchet video distance is measured in its features.

It is a (2+1)D convolutional classifier (spatial and temporal convolutions in turn, Tran et al. 2018) of what a caption
says, and its features are the layer before the classes. Inception's and I3D's features are for photographs; these are
for shapes, and of few dimensions, so that a distance between a few hundred clips is not all bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade import checkpoint
from cascade.config import package_root
from cascade.data.shapes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, ShapesConfig, sample
from cascade.errors import InputError
from cascade.video import Shape, resize

INPUT = Shape(frames=8, height=32, width=32)
FPS = 4.0  # of the training clips: 8 frames show a whole scene
WIDTHS = (32, 48, 64)  # channels at 16x16, 8x8 and 4x4
DIMENSIONS = 32
CLASSES = {"shape": SHAPES, "colour": COLOURS, "motion": MOTIONS, "size": SIZES, "background": BACKGROUNDS}
FILTER = "bicubic, anti-aliased when it shrinks"
WEIGHTS = Path("checkpoints/tiny/features")
CONFIG = {"kind": "features", "widths": list(WIDTHS), "dimensions": DIMENSIONS, "input": str(INPUT)}


class Features(nn.Module):
    """(B, 3, 8, 32, 32) in [-1, 1] -> features (B, DIMENSIONS), of zero mean and unit variance over real clips."""

    def __init__(self) -> None:
        super().__init__()
        outer = (12, *WIDTHS)  # 12: the colours of 2x2 pixels
        pairs = list(zip(outer, WIDTHS, strict=False))
        self.space = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=1 if i == 0 else 2, padding=1, bias=False) for i, (a, b) in enumerate(pairs)
        )
        self.time = nn.ModuleList(nn.Conv2d(b, b, (3, 1), padding=(1, 0), bias=False) for b in WIDTHS)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in WIDTHS for _ in range(2))
        self.narrow = nn.Conv2d(WIDTHS[-1], 16, 1)
        places = INPUT.frames * (INPUT.height // 8) * (INPUT.width // 8)
        self.hidden = nn.Linear(16 * places, 96)  # positions and frames apart: motion is a path
        self.features = nn.Linear(96, DIMENSIONS)
        self.norm = nn.BatchNorm1d(DIMENSIONS, affine=False)
        self.heads = nn.ModuleDict({name: nn.Linear(DIMENSIONS, len(values)) for name, values in CLASSES.items()})

    def forward(self, clips: Tensor) -> Tensor:
        batch, _, frames = clips.shape[:3]
        h = F.pixel_unshuffle(clips.transpose(1, 2).flatten(0, 1), 2).contiguous(memory_format=torch.channels_last)
        for i, (space, time) in enumerate(zip(self.space, self.time, strict=True)):
            h = F.relu(self.norms[2 * i](space(h)))
            height, width = h.shape[2:]
            # (B*F, C, H, W) channels-last seen as (B, C, F, H*W), without a copy
            line = h.permute(0, 2, 3, 1).reshape(batch, frames, height * width, -1).permute(0, 3, 1, 2)
            line = F.relu(self.norms[2 * i + 1](time(line)))
            h = line.permute(0, 2, 3, 1).reshape(batch * frames, height, width, -1).permute(0, 3, 1, 2)
        h = F.relu(self.narrow(h)).reshape(batch, -1)
        out: Tensor = self.norm(self.features(F.relu(self.hidden(h))))
        return out

    def classify(self, features: Tensor) -> dict[str, Tensor]:
        """Logits for each of CLASSES from features (B, DIMENSIONS)."""
        return {name: head(features) for name, head in self.heads.items()}


def prepare(frames: Tensor) -> Tensor:
    """(B, 3, F, H, W) of any size -> (B, 3, 8, 32, 32): evenly spaced frames from the first on, resized by FILTER.

    31 frames at 16 fps and 16 at 8 fps give those of 8 at 4 fps. Of fewer than 8 frames some are repeated.
    """
    given, wanted = frames.shape[2], INPUT.frames
    step = (given - 1) // (wanted - 1)
    index = torch.arange(wanted) * step if step else torch.arange(wanted) * given // wanted
    return resize(frames[:, :, index], INPUT.height, INPUT.width)


@torch.no_grad()
def extract(frames: Tensor, net: Features | None = None, batch: int = 32) -> Tensor:
    """Features (B, DIMENSIONS) of clips (B, 3, F, H, W) in [-1, 1]; without `net`, those of the shipped network."""
    net = net or shipped()[0]
    parts = range(0, len(frames), batch)
    return torch.cat([net(prepare(frames[first : first + batch].float().cpu())) for first in parts])


@cache
def shipped() -> tuple[Features, str]:
    """The network in checkpoints/tiny/features and the hash of its weights."""
    return load(package_root() / WEIGHTS)


def load(path: Path) -> tuple[Features, str]:
    """The network in the directory `path`, ready to use, and the hash of its weights."""
    weights = checkpoint.load(path)
    if weights.config != CONFIG:
        raise InputError(f"weights {path}: are not those of this feature network", fix="cascade.metrics.features.fit")
    net = Features()
    checkpoint.apply(net, weights.state, str(path))
    return net.eval().requires_grad_(False), weights.hash


# Training


def examples(seed: int, purpose: str) -> Iterator[tuple[Tensor, dict[str, int]]]:
    """Endless clips (3, 8, 32, 32) of single things of all compositions, and their classes."""
    world = ShapesConfig(two=0.0, split="all")
    index = 0
    while True:
        clip, _, scene = sample(world, INPUT, FPS, "features", seed, purpose, index)
        thing = scene.spec.things[0]
        words = {name: getattr(thing, name) for name in CLASSES if name != "background"}
        words["background"] = scene.spec.background
        yield clip, {name: CLASSES[name].index(word) for name, word in words.items()}
        index += 1


def batch_of(source: Iterator[tuple[Tensor, dict[str, int]]], size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The next `size` examples: clips (B, 3, 8, 32, 32) and classes (B,)."""
    drawn = [next(source) for _ in range(size)]
    classes = {name: torch.tensor([known[name] for _, known in drawn]) for name in CLASSES}
    return torch.stack([clip for clip, _ in drawn]), classes


def fit(out: Path, steps: int = 600, seed: int = 0, size: int = 64, count: int = 1000) -> dict[str, float]:
    """Trains the network and writes its weights (float16) to `out`; returns its accuracy on `count` unseen clips.

    AdamW, 3e-3 with 5 % linear warm-up and linear decay, sum of the classes' cross-entropies, `size` new clips a step.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Features().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.02)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    source = examples(seed, "train")
    for _ in range(steps):
        clips, classes = batch_of(source, size)
        logits = net.classify(net(clips))
        loss = torch.stack([F.cross_entropy(logits[name], known) for name, known in classes.items()]).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    card = (
        "# features\n\nA classifier of the procedural world (shape, colour, motion, size, background), "
        f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters; its {DIMENSIONS} features are what the "
        "Fréchet video distance is measured in.\n\n"
        f"Made by `cascade.metrics.features.fit(out, steps={steps}, seed={seed}, size={size})`.\n\n"
        "Licence: Apache-2.0.\n"
    )
    checkpoint.save(out, net.state_dict(), CONFIG, card=card, dtype=torch.float16)
    return accuracy(load(out)[0], seed, count)


@torch.no_grad()
def accuracy(net: Features, seed: int, count: int) -> dict[str, float]:
    """The share of `count` clips that were not trained on whose class is found, for each of CLASSES."""
    clips, classes = batch_of(examples(seed, "validate"), count)
    logits = net.classify(extract(clips, net))
    return {name: float((logits[name].argmax(1) == known).float().mean()) for name, known in classes.items()}
