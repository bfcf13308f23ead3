"""The network that judges students: what does a clip show of one thing at a time?

It knows single things, as the feature network does (cascade/metrics/features.py), and where each colour is. Of a clip
with two things it is shown each by itself, the other one painted over with the background: so it can say which is
which, and still sees the whole clip, in which nothing else may be. It learns from noisy clips, so that grain cannot
please it. A network of features alone can judge single things. Neither is ever what measures.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count as numbers
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade import checkpoint
from cascade.data.captions import COLOURS
from cascade.data.shapes import ShapesConfig, sample, truth
from cascade.errors import InputError
from cascade.metrics import features
from cascade.metrics.features import CLASSES, FPS, INPUT, NONE, ORDERS, SHUFFLED, Features, backdrop, learn
from cascade.noise import generator

PLACES = 48  # channels of what finds colours
MASKS = 50.0  # what the cross-entropy of where each colour is counts beside the classes'
NOISE = 0.15  # greatest standard deviation of the noise on training clips
SEEN = 0.1  # the share of a place from which on a colour is there
LEAST = 0.008  # of all places: a smaller colour is no thing
CONFIG = {"kind": "judge", "places": PLACES, "input": str(INPUT)}


class Judge(Features):
    """(B, 3, 8, 32, 32) in [-1, 1] -> features, and `classify`, of single things; `where` each colour is."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((12, PLACES, 3), (PLACES, PLACES, 3), (PLACES, len(COLOURS), 1))
        self.eyes = nn.ModuleList(nn.Conv2d(i, o, k, padding=k // 2) for i, o, k in sizes)

    def where(self, clips: Tensor) -> Tensor:
        """Logits of the share of each 2x2 pixels that each colour has, (B, F, colours, 16, 16)."""
        h = F.pixel_unshuffle(clips.transpose(1, 2).flatten(0, 1), 2).contiguous(memory_format=torch.channels_last)
        for conv in self.eyes[:-1]:
            h = F.relu(conv(h))
        out: Tensor = self.eyes[-1](h)
        return out.view(len(clips), -1, *out.shape[1:])

    def things(self, real: Tensor, made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each thing of the real clips by itself, in them and in the clips made of the same captions.

        (B, 3, 8, 32, 32) twice -> (things, 3, 8, 32, 32) twice, and which clip each is of, (things,).
        """
        with torch.no_grad():
            there, found = (self.where(clips).sigmoid() for clips in (real, made))
            present = (there > SEEN).float().mean((1, 3, 4)) > LEAST  # (B, colours)
        clip, own = present.nonzero(as_tuple=True)
        others = present[clip] & (torch.arange(len(COLOURS), device=own.device) != own[:, None])
        alone = [
            without(clips[clip], (places[clip] * others[:, None, :, None, None]).amax(2), places[clip, :, own])
            for clips, places in ((real, there), (made, found))
        ]
        return alone[0], alone[1], clip


class Whole(Features):
    """A feature network as the judge of clips of single things."""

    def things(self, real: Tensor, made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All of each clip; see `Judge.things`."""
        return real, made, torch.arange(len(real), device=real.device)


def without(clips: Tensor, other: Tensor, own: Tensor) -> Tensor:
    """Clips (B, 3, F, H, W) with the background where more of `other` is than of `own`, shares (B, F, H/2, W/2)."""
    around = F.max_pool2d(other, 3, 1, 1)
    hidden = (around > SEEN) & (around > own)
    mask = hidden.repeat_interleave(2, -1).repeat_interleave(2, -2)[:, None]
    return torch.where(mask, backdrop(clips), clips)


def load(path: Path) -> tuple[Judge | Whole, str]:
    """The judge in the directory `path`, ready to use, and the hash of its weights.

    A feature network judges clips of single things. Raises InputError for one that measures, and for what is neither.
    """
    weights = checkpoint.load(path)
    with torch.device("meta"):
        net: Judge | Whole = Whole() if weights.config == features.CONFIG else Judge()
    if weights.config not in (CONFIG, features.CONFIG):
        raise InputError(f"weights {path}: are no judge", fix="distill.judge=checkpoints/tiny/judge")
    if weights.hash == features.shipped()[1]:
        raise InputError(f"weights {path}: measure, and must not judge", fix="distill.judge=checkpoints/tiny/judge")
    checkpoint.apply(net, weights.state, str(path))
    return net.eval().requires_grad_(False), weights.hash


# Training

Example = tuple[Tensor, Tensor, Tensor, dict[str, int]]  # clip, shares of each colour, clip of one thing, its classes


def examples(seed: int, purpose: str) -> Iterator[Example]:
    """Endless clips (3, 8, 32, 32) of one and two things of all compositions; one by itself, some of them shuffled."""
    world = ShapesConfig(two=0.5, split="all")
    for index in numbers():
        clip, _, scene = sample(world, INPUT, FPS, "judge", seed, purpose, index)
        rng = generator("judge", seed, purpose, index)
        things = scene.spec.things
        shown = torch.from_numpy(truth(scene, INPUT.frames, INPUT.height, INPUT.width, FPS).masks)
        shares = torch.zeros(INPUT.frames, len(COLOURS), INPUT.height // 2, INPUT.width // 2)
        shares[:, [COLOURS.index(thing.colour) for thing in things]] = F.avg_pool2d(shown, 2)
        thing = things[int(torch.randint(len(things), (), generator=rng))]
        own = shares[:, COLOURS.index(thing.colour)]
        alone = without(clip[None], (shares.amax(1) * (own < shares.amax(1)))[None], own[None])[0]
        words = {**vars(thing), "background": scene.spec.background, "order": ORDERS[0]}
        classes = {name: values.index(words[name]) for name, values in CLASSES.items()}
        if torch.rand((), generator=rng) < SHUFFLED:
            shuffled = alone[:, torch.randperm(INPUT.frames, generator=rng)]
            if not torch.equal(shuffled, alone):
                alone, classes = shuffled, {**classes, "order": 1, "motion": NONE}
        yield clip, shares, alone, classes


def batch_of(source: Iterator[Example], size: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """The next `size` examples."""
    clips, shares, alone, classes = zip(*[next(source) for _ in range(size)], strict=True)
    known = {name: torch.tensor([each[name] for each in classes]) for name in CLASSES}
    return torch.stack(clips), torch.stack(shares), torch.stack(alone), known


def fit(out: Path, steps: int = 2000, seed: int = 1, size: int = 32, validate: int = 1000) -> dict[str, float]:
    """Trains the network and writes its weights (float16) to `out`; returns its accuracy on `validate` unseen clips.

    The loss is the sum of the classes' cross-entropies and MASKS times that of where colours are; see `learn`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Judge().train()
    source, rng = examples(seed, "train"), generator("judge", seed, "noise")

    def noisy(clips: Tensor) -> Tensor:
        level = NOISE * torch.rand(size, 1, 1, 1, 1, generator=rng)
        return clips + level * torch.randn(clips.shape, generator=rng)

    def loss() -> Tensor:
        clips, shares, alone, classes = batch_of(source, size)
        logits = net.classify(net(noisy(alone)))
        parts = [F.cross_entropy(logits[name], known) for name, known in classes.items()]
        return torch.stack(parts).sum() + MASKS * F.binary_cross_entropy_with_logits(net.where(noisy(clips)), shares)

    learn(net, steps, loss)
    card = (
        f"# judge\n\nSays of a thing in a clip of the procedural world which {', '.join(CLASSES)} it has, and finds "
        f"each thing by its colour, {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters. "
        "It judges students (`distill.method=reward`) and measures nothing.\n\n"
        f"Made by `cascade.judge.fit(out, steps={steps}, seed={seed}, size={size})`.\n\n"
        "Licence: Apache-2.0.\n"
    )
    checkpoint.save(out, net.state_dict(), CONFIG, card=card, dtype=torch.float16)
    return accuracy(load(out)[0], seed, validate)


def accuracy(net: Features, seed: int, count: int) -> dict[str, float]:
    """The share of `count` clips that were not trained on in which a thing's class is found, of each of CLASSES."""
    _, _, alone, classes = batch_of(examples(seed, "validate"), count)
    return features.found(net, alone, classes)
