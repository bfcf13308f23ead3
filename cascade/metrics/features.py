"""A small network that knows the procedural world; the Fréchet video distance is measured in its features.

It is a (2+1)D convolutional classifier (spatial and temporal convolutions in turn, Tran et al. 2018) of what a caption
says, and its features are the layer before the classes. Inception's and I3D's features are for photographs; these are
for shapes, and of few dimensions, so that a distance between a few hundred clips is not all bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade import checkpoint
from cascade.config import package_root
from cascade.data.captions import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES
from cascade.data.shapes import ShapesConfig, sample
from cascade.errors import InputError
from cascade.noise import generator
from cascade.video import Shape, resize

INPUT = Shape(frames=8, height=32, width=32)
FPS = 4.0  # of the training clips: 8 frames show a whole scene
WIDTHS = (32, 64, 96)  # channels at 16x16, 8x8 and 4x4
DIMENSIONS = 32
ORDERS = ("in order", "shuffled")  # of the frames (Misra et al. 2016): what makes the features see disorder in time
CLASSES = {
    "shape": SHAPES, "colour": COLOURS, "motion": MOTIONS, "size": SIZES, "background": BACKGROUNDS, "order": ORDERS,
}  # fmt: skip
SHUFFLED = 0.25  # of the training clips
NONE = -100  # the motion of a shuffled clip: cross-entropy leaves it out
FILTER = "bicubic, anti-aliased when it shrinks"
WEIGHTS = Path("checkpoints/tiny/features")
CONFIG = {"kind": "features", "widths": list(WIDTHS), "dimensions": DIMENSIONS, "input": str(INPUT)}


class Features(nn.Module):
    """(B, 3, 8, 32, 32) in [-1, 1] -> features (B, DIMENSIONS), of zero mean and unit variance over real clips."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c = WIDTHS
        self.space = nn.ModuleList(  # 16: colour and contrast of 2x2 pixels
            nn.Conv2d(i, o, 3, stride=s, padding=1, bias=False) for i, o, s in ((16, a, 1), (a, b, 2), (b, c, 2))
        )
        self.time = nn.ModuleList(nn.Conv2d(o, o, (3, 1), padding=(1, 0), bias=False) for o in (b, c))
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for o in (a, b, c, b, c))
        self.narrow = nn.Conv2d(c, 16, 1)
        places = INPUT.frames * (INPUT.height // 8) * (INPUT.width // 8)
        self.path = nn.Linear(16 * places, 64)  # every place and frame by itself: motion is a path
        self.look = nn.Linear(2 * (b + c), 64)  # wherever it is: a shape is one everywhere
        self.features = nn.Linear(128, DIMENSIONS)
        self.norm = nn.BatchNorm1d(DIMENSIONS, affine=False)
        self.heads = nn.ModuleDict({name: nn.Linear(DIMENSIONS, len(values)) for name, values in CLASSES.items()})

    def forward(self, clips: Tensor) -> Tensor:
        batch, _, frames = clips.shape[:3]
        seen = torch.cat([clips, contrast(clips)], 1).transpose(1, 2).flatten(0, 1)
        h = F.pixel_unshuffle(seen, 2).contiguous(memory_format=torch.channels_last)
        h = F.relu(self.norms[0](self.space[0](h)))
        pooled = []
        for i in (1, 2):
            h = F.relu(self.norms[i](self.space[i](h)))
            largest = h.amax((2, 3)).view(batch, frames, -1)
            pooled += [largest.mean(1), largest.amax(1)]
            height, width = h.shape[2:]
            # (B*F, C, H, W) channels-last seen as (B, C, F, H*W), without a copy
            line = h.permute(0, 2, 3, 1).reshape(batch, frames, height * width, -1).permute(0, 3, 1, 2)
            line = F.relu(self.norms[i + 2](self.time[i - 1](line)))
            h = line.permute(0, 2, 3, 1).reshape(batch * frames, height, width, -1).permute(0, 3, 1, 2)
        path = self.path(F.relu(self.narrow(h)).reshape(batch, -1))
        both = torch.cat([path, self.look(torch.cat(pooled, 1))], 1)
        out: Tensor = self.norm(self.features(F.relu(both)))
        return out

    def classify(self, features: Tensor) -> dict[str, Tensor]:
        """Logits for each of CLASSES from features (B, DIMENSIONS)."""
        return {name: head(features) for name, head in self.heads.items()}


def contrast(clips: Tensor) -> Tensor:
    """(B, 1, F, H, W) in [0, 1]: how far each pixel is from the median colour of the border, over the farthest.

    A shape is one in every colour; shown to the network, that need not be learnt for each.
    """
    square = (clips - backdrop(clips)).square().sum(1, keepdim=True)
    there = square > 0  # at 0 the root has no gradient
    apart = torch.where(there, square, 1).sqrt() * there
    return apart / apart.amax((1, 2, 3, 4), keepdim=True).clamp(min=0.1)


def backdrop(clips: Tensor) -> Tensor:
    """The median colour of the border of clips (B, C, F, H, W), (B, C, 1, 1, 1)."""
    edges = torch.cat([clips[..., 0, :], clips[..., -1, :], clips[..., :, 0], clips[..., :, -1]], 3).flatten(2)
    return edges.median(2).values[:, :, None, None, None]


def prepare(frames: Tensor) -> Tensor:
    """(B, 3, F, H, W) of any size -> (B, 3, 8, 32, 32): evenly spaced frames from the first on, resized by FILTER.

    31 frames at 16 fps and 16 at 8 fps give those of 8 at 4 fps. Of fewer than 8 frames some are repeated.
    """
    return resize(evenly(frames, INPUT.frames), INPUT.height, INPUT.width)


def evenly(frames: Tensor, count: int) -> Tensor:
    """`count` > 1 evenly spaced frames of (B, C, F, H, W) from the first on; of fewer some are repeated."""
    given = frames.shape[2]
    step = (given - 1) // (count - 1)
    return frames[:, :, torch.arange(count) * step if step else torch.arange(count) * given // count]


@torch.no_grad()
def extract(frames: Tensor, net: Features | None = None, batch: int = 32) -> Tensor:
    """Features (B, DIMENSIONS) of clips (B, 3, F, H, W) in [-1, 1]; without `net`, those of the shipped network.

    Clips may be on any device; the network works where it is, and the features are on the CPU.
    """
    net = net or shipped()[0]
    place = net.narrow.weight.device
    parts = range(0, len(frames), batch)
    return torch.cat([net(prepare(frames[first : first + batch].to(place).float())).cpu() for first in parts])


@cache
def shipped() -> tuple[Features, str]:
    """The network in checkpoints/tiny/features and the hash of its weights."""
    return load(package_root() / WEIGHTS)


def load(path: Path) -> tuple[Features, str]:
    """The network in the directory `path`, ready to use, and the hash of its weights."""
    weights = checkpoint.load(path)
    if weights.config != CONFIG:
        raise InputError(f"weights {path}: are not those of this feature network", fix="cascade.metrics.features.fit")
    with torch.device("meta"):  # drawing weights to replace them would advance the global generator
        net = Features()
    checkpoint.apply(net, weights.state, str(path))
    return net.eval().requires_grad_(False), weights.hash


# Training


def examples(seed: int, purpose: str) -> Iterator[tuple[Tensor, dict[str, int]]]:
    """Endless clips (3, 8, 32, 32) of single things of all compositions, some with shuffled frames; their classes."""
    world = ShapesConfig(two=0.0, split="all")
    for index in count():
        clip, _, scene = sample(world, INPUT, FPS, "features", seed, purpose, index)
        rng = generator("features", seed, purpose, index)
        words = {**vars(scene.spec.things[0]), "background": scene.spec.background, "order": ORDERS[0]}
        classes = {name: values.index(words[name]) for name, values in CLASSES.items()}
        if torch.rand((), generator=rng) < SHUFFLED:
            shuffled = clip[:, torch.randperm(INPUT.frames, generator=rng)]
            if not torch.equal(shuffled, clip):
                clip, classes = shuffled, {**classes, "order": 1, "motion": NONE}
        yield clip, classes


def batch_of(source: Iterator[tuple[Tensor, dict[str, int]]], size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The next `size` examples: clips (B, 3, 8, 32, 32) and classes (B,)."""
    drawn = [next(source) for _ in range(size)]
    classes = {name: torch.tensor([known[name] for _, known in drawn]) for name in CLASSES}
    return torch.stack([clip for clip, _ in drawn]), classes


def fit(out: Path, steps: int = 1100, seed: int = 0, size: int = 32, validate: int = 1000) -> dict[str, float]:
    """Trains the network and writes its weights (float16) to `out`; returns its accuracy on `validate` unseen clips.

    The loss is the sum of the classes' cross-entropies, `size` new clips a step; see `learn`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Features().train()
    source = examples(seed, "train")

    def loss() -> Tensor:
        clips, classes = batch_of(source, size)
        logits = net.classify(net(clips))
        return torch.stack([F.cross_entropy(logits[name], known) for name, known in classes.items()]).sum()

    learn(net, steps, loss)
    calibrate(net, seed)
    card = (
        f"# features\n\nA classifier of the procedural world ({', '.join(CLASSES)}), "
        f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters: {DIMENSIONS} features for Fréchet "
        "distances.\n\n"
        f"Made by `cascade.metrics.features.fit(out, steps={steps}, seed={seed}, size={size})`.\n\n"
        "Licence: Apache-2.0.\n"
    )
    checkpoint.save(out, net.state_dict(), CONFIG, card=card, dtype=torch.float16)
    return accuracy(load(out)[0], seed, validate)


def learn(net: nn.Module, steps: int, loss: Callable[[], Tensor], clip: float = math.inf) -> None:
    """AdamW, 3e-3 with 5 % linear warm-up and linear decay; `clip` is the greatest norm of a gradient."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.02)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(loss())
        nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def calibrate(net: Features, seed: int) -> None:
    """Makes the features' mean 0 and variance 1 over real clips in order; the classes stay as they are."""
    clips, classes = batch_of(examples(seed, "calibrate"), 1000)
    found = extract(clips[classes["order"] == 0], net.eval())
    mean, std = found.mean(0), found.std(0)
    for head in net.heads.values():
        assert isinstance(head, nn.Linear)
        head.bias.add_(head.weight @ mean)
        head.weight.mul_(std)
    past, variance, eps = net.norm.running_mean, net.norm.running_var, net.norm.eps
    assert past is not None and variance is not None
    past.add_(mean * (variance + eps).sqrt())
    variance.copy_((variance + eps) * std.square() - eps)


@torch.no_grad()
def accuracy(net: Features, seed: int, count: int) -> dict[str, float]:
    """The share of `count` clips that were not trained on whose class is found, for each of CLASSES."""
    return found(net, *batch_of(examples(seed, "validate"), count))


@torch.no_grad()
def found(net: Features, clips: Tensor, classes: dict[str, Tensor]) -> dict[str, float]:
    """The share of clips (B, 3, F, H, W) whose class is found, of those that have one."""
    logits = net.classify(extract(clips, net))
    right = {name: (logits[name].argmax(1) == known)[known != NONE] for name, known in classes.items()}
    return {name: float(each.float().mean()) for name, each in right.items()}
