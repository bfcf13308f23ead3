"""The network that judges students: what does a clip show of every colour?

Of each colour it says which shape, size and motion a thing of that colour has, or that there is none, and beside that
what the background is. So it can say of two things which is which. A colour looks where it is by attention of its own
over each frame (slots, Locatello et al. 2020, here with fixed owners); where its weight lies from frame to frame is the
path, and what it collects there is the shape. It learns from noisy clips: grain tells it nothing, so grain cannot
please it. It is never what measures: those features are of another network (cascade/metrics/features.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import count as numbers
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade import checkpoint
from cascade.data.captions import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES
from cascade.data.shapes import ShapesConfig, sample, truth
from cascade.errors import InputError
from cascade.metrics.features import FPS, INPUT, learn
from cascade.noise import generator

WIDTHS = (48, 96)  # channels at 16x16 and 8x8
SLOT = 64
PLACE = 16  # of a slot, what is kept frame by frame for the path
MASKS = 100.0  # what the cross-entropy of where each colour is counts beside the others
NOISE = 0.2  # greatest standard deviation of the noise on training clips
HEADS = {"shape": SHAPES, "size": SIZES, "motion": MOTIONS}  # of every colour; one class more: there is none
Example = tuple[Tensor, dict[str, Tensor], Tensor]  # clips, classes, the share of each pixel that is of each colour
CONFIG = {"kind": "judge", "widths": list(WIDTHS), "slot": SLOT, "input": str(INPUT)}


class Judge(nn.Module):
    """(B, 3, 8, 32, 32) in [-1, 1] -> logits: "background" (B, 4), and each of HEADS (B, classes + 1, colours)."""

    grid: Tensor

    def __init__(self) -> None:
        super().__init__()
        a, b = WIDTHS
        sizes = ((12, a, 1), (a, a, 1), (a, b, 2), (b, b, 1), (b, b, 1))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, stride=s, padding=1, bias=False) for i, o, s in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _ in sizes)
        self.look = nn.Conv2d(a + b, b, 1)
        self.where = nn.Conv2d(a, len(COLOURS), 1)
        self.slot = nn.Linear(b + 6, SLOT)
        self.place = nn.Linear(SLOT + 6, PLACE)
        self.path = nn.Sequential(nn.Linear(PLACE * INPUT.frames, 2 * SLOT), nn.ReLU())
        self.thing = nn.Sequential(nn.Linear(2 * SLOT, 2 * SLOT), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(2 * SLOT, len(values) + 1) for name, values in HEADS.items()})
        self.background = nn.Linear(a, len(BACKGROUNDS))
        y, x = (torch.linspace(-1, 1, side // 2) for side in (INPUT.height, INPUT.width))
        y, x = torch.meshgrid(y, x, indexing="ij")
        self.register_buffer("grid", torch.stack([x, y, x * x, y * y, x * y]).flatten(1), persistent=False)

    def places(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """What is seen (B F, channels, 16, 16) of clips, and logits of where each colour is (B F, colours, 16, 16)."""
        h = F.pixel_unshuffle(clips.transpose(1, 2).flatten(0, 1), 2).contiguous(memory_format=torch.channels_last)
        for i in (0, 1):
            h = F.relu(self.norms[i](self.convs[i](h)))
        return h, self.where(h)

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        return self.answers(len(clips), *self.places(clips))

    def answers(self, batch: int, h: Tensor, there: Tensor) -> dict[str, Tensor]:
        """The logits of `batch` clips from their `places`."""
        wide, there = h, there.flatten(2)
        for i in (2, 3, 4):
            wide = F.relu(self.norms[i](self.convs[i](wide)))
        seen = F.relu(self.look(torch.cat([h, F.interpolate(wide, scale_factor=2, mode="nearest")], 1))).flatten(2)
        grid = self.grid.expand(len(seen), -1, -1)
        found = torch.einsum("nkp,ncp->nkc", there.softmax(2), torch.cat([seen, grid], 1))
        at = torch.cat([found[..., -5:], there.sigmoid().mean(2)[..., None]], 2)  # moments of its places, and its area
        slots = F.relu(self.slot(torch.cat([found[..., :-5], at], 2)))
        place = F.relu(self.place(torch.cat([slots, at], 2)))
        slots, place = (s.view(batch, -1, *s.shape[1:]).transpose(1, 2) for s in (slots, place))  # (B, colours, F, ...)
        thing = self.thing(torch.cat([slots.mean(2), slots.amax(2)], 2))
        path = self.path(place.flatten(2))
        logits = {name: head(path if name == "motion" else thing).transpose(1, 2) for name, head in self.heads.items()}
        logits["background"] = self.background(h.mean((2, 3)).view(batch, -1, h.shape[1]).mean(1))
        return logits


def load(path: Path) -> tuple[Judge, str]:
    """The judge in the directory `path`, ready to use, and the hash of its weights."""
    weights = checkpoint.load(path)
    if weights.config != CONFIG:
        raise InputError(f"weights {path}: are no judge", fix="distill.judge=checkpoints/tiny/judge")
    net = Judge()
    checkpoint.apply(net, weights.state, str(path))
    return net.eval().requires_grad_(False), weights.hash


# Training


def examples(seed: int, purpose: str) -> Iterator[Example]:
    """Endless clips (3, 8, 32, 32) of one and two things of all compositions; their classes, (colours,) or ()."""
    world = ShapesConfig(two=0.6, split="all")
    for index in numbers():
        clip, _, scene = sample(world, INPUT, FPS, "judge", seed, purpose, index)
        classes = {name: torch.full((len(COLOURS),), len(values)) for name, values in HEADS.items()}
        for thing in scene.spec.things:
            for name, values in HEADS.items():
                classes[name][COLOURS.index(thing.colour)] = values.index(getattr(thing, name))
        shown = torch.from_numpy(truth(scene, INPUT.frames, INPUT.height, INPUT.width, FPS).masks)
        masks = torch.zeros(INPUT.frames, len(COLOURS), INPUT.height, INPUT.width)
        masks[:, [COLOURS.index(thing.colour) for thing in scene.spec.things]] = shown
        classes["background"] = torch.tensor(BACKGROUNDS.index(scene.spec.background))
        yield clip, classes, F.avg_pool2d(masks, 2)


def batch_of(source: Iterator[Example], size: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The next `size` examples: clips (B, 3, 8, 32, 32), classes (B, ...) and masks (B F, colours, 16, 16)."""
    clips, classes, masks = zip(*[next(source) for _ in range(size)], strict=True)
    stacked = {name: torch.stack([each[name] for each in classes]) for name in classes[0]}
    return torch.stack(clips), stacked, torch.cat(masks)


def fit(out: Path, steps: int = 1800, seed: int = 0, size: int = 32, validate: int = 1000) -> dict[str, float]:
    """Trains the network and writes its weights (float16) to `out`; returns its accuracy on `validate` unseen clips.

    The loss is the sum of all answers' cross-entropies, and MASKS times that of where each colour is. See `learn`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Judge().train()
    source, rng = examples(seed, "train"), generator("judge", seed, "noise")

    def loss() -> Tensor:
        clips, classes, masks = batch_of(source, size)
        level = NOISE * torch.rand(size, 1, 1, 1, 1, generator=rng)
        h, there = net.places(clips + level * torch.randn(clips.shape, generator=rng))
        logits = net.answers(size, h, there)
        parts = [F.cross_entropy(logits[name], known, reduction="sum") / size for name, known in classes.items()]
        return torch.stack(parts).sum() + MASKS * F.binary_cross_entropy_with_logits(there, masks)

    learn(net, steps, loss, clip=5.0)
    card = (
        f"# judge\n\nSays of every colour which {', '.join(HEADS)} a thing of it has in a clip of the procedural "
        f"world, or that there is none, {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters. "
        "It judges students (`distill.method=reward`) and measures nothing.\n\n"
        f"Made by `cascade.judge.fit(out, steps={steps}, seed={seed}, size={size})`.\n\n"
        "Licence: Apache-2.0.\n"
    )
    checkpoint.save(out, net.state_dict(), CONFIG, card=card, dtype=torch.float16)
    return accuracy(load(out)[0], seed, validate)


@torch.no_grad()
def accuracy(net: Judge, seed: int, count: int) -> dict[str, float]:
    """The share of `count` clips that were not trained on whose classes are found, those of all colours at once."""
    clips, classes, _ = batch_of(examples(seed, "validate"), count)
    logits = [net(clips[first : first + 32]) for first in range(0, count, 32)]
    right = {name: torch.cat([each[name] for each in logits]).argmax(1) == known for name, known in classes.items()}
    return {name: float(found.reshape(count, -1).all(1).float().mean()) for name, found in right.items()}


if __name__ == "__main__":
    fit(Path(sys.argv[1]), seed=int((sys.argv[2:] or ["0"])[0]))
