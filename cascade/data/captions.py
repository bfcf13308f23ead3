"""The language of the procedural world: what a caption says (`Spec`) and the many ways of saying it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np

from cascade.errors import ConfigError

SHAPES = ("circle", "square", "triangle", "ring", "cross", "star")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
SIZES = ("small", "large")
BACKGROUNDS = ("black", "gray", "navy", "brown")

# The first wording of each list is the plain one.
MOTION_WORDS = {
    "moves left": ("moves left", "goes to the left", "slides left", "drifts to the left"),
    "moves right": ("moves right", "goes to the right", "slides right", "drifts to the right"),
    "moves up": ("moves up", "goes upward", "slides up", "drifts upward", "rises"),
    "moves down": ("moves down", "goes downward", "slides down", "drifts downward", "sinks"),
    "grows": ("grows", "gets bigger", "becomes larger"),
    "shrinks": ("shrinks", "gets smaller", "becomes smaller"),
    "circles clockwise": ("circles clockwise", "goes around clockwise", "moves in a clockwise circle"),
    "circles counterclockwise": (
        "circles counterclockwise",
        "goes around counterclockwise",
        "moves in a counterclockwise circle",
    ),
    "stands still": ("stands still", "stays where it is", "does not move", "rests"),
}
MOTIONS = tuple(MOTION_WORDS)
SIZE_WORDS = {"small": ("small", "tiny", "little"), "large": ("large", "big")}
BACKGROUND_WORDS = {"black": ("black",), "gray": ("gray", "grey"), "navy": ("navy",), "brown": ("brown",)}

# {0} the things (`a small red ring`), {1} what they do, {b} the background. The first pattern is the plain one.
ONE = (
    "a {0} {1} on a {b} background",
    "on a {b} background a {0} {1}",
    "a {0} {1} in front of a {b} background",
    "a {0} that {1} on a {b} background",
    "a {b} background and a {0} that {1}",
    "there is a {0} on a {b} background and it {1}",
    "a video of a {0} that {1} on {b}",
    "we see a {0}, it {1}, the background is {b}",
    "{b} background, a {0} {1}",
    "a {0} {1} on {b}",
    "a {0} {1}. the background is {b}",
    "a {0} {1} against a {b} background",
    "the {0} {1} on the {b} background",
)
TWO = (
    "a {0} {1} and a {2} {3} on a {b} background",
    "on a {b} background a {0} {1} and a {2} {3}",
    "a {0} {1} while a {2} {3} in front of a {b} background",
    "a {0} that {1} and a {2} that {3} on a {b} background",
    "a {b} background, a {0} {1} and a {2} {3}",
    "there is a {0} that {1} and a {2} that {3} on {b}",
    "a video of a {0} that {1} and a {2} that {3} on {b}",
    "we see a {0}, it {1}, and a {2}, it {3}, the background is {b}",
    "{b} background, a {0} {1} while a {2} {3}",
    "a {0} {1} and a {2} {3} on {b}",
    "a {0} {1} and a {2} {3}. the background is {b}",
    "a {0} {1} and a {2} {3} against a {b} background",
    "the {0} {1} and the {2} {3} on the {b} background",
)
UNSEEN_ONE = (
    "on {b} we see the {0} that {1}",
    "the background is {b} and the {0} {1}",
    "a {b} background, in front of it a {0} that {1}",
    "a video of the {b} background while a {0} {1}",
)
UNSEEN_TWO = (
    "on {b} we see the {0} that {1} and the {2} that {3}",
    "the background is {b} and the {0} {1} while the {2} {3}",
    "a {b} background, in front of it a {0} that {1} and a {2} that {3}",
    "a video of the {b} background while a {0} {1} and a {2} {3}",
)
TRAINED = {1: ONE, 2: TWO}
UNSEEN = {1: UNSEEN_ONE, 2: UNSEEN_TWO}


@dataclass(frozen=True)
class Thing:
    """One object, in the plain words of SHAPES, COLOURS, SIZES and MOTIONS."""

    shape: str
    colour: str
    size: str
    motion: str


@dataclass(frozen=True)
class Spec:
    """All that a caption says: one or two things, and one of BACKGROUNDS."""

    things: tuple[Thing, ...]
    background: str


def plain(spec: Spec) -> str:
    """The plain caption, e.g. `a large red circle moves left on a black background`."""
    clauses = [part for t in spec.things for part in (f"{t.size} {t.colour} {t.shape}", t.motion)]
    return TRAINED[len(spec.things)][0].format(*clauses, b=spec.background)


def captions(spec: Spec, unseen: bool = False) -> list[str]:
    """Every wording of `spec`, the plain one first; with `unseen`, every wording that `say` never uses otherwise."""
    patterns = (UNSEEN if unseen else TRAINED)[len(spec.things)]
    out = []
    for order in permutations(spec.things):
        words = [(_names(thing), MOTION_WORDS[thing.motion]) for thing in order]
        for pattern, background in product(patterns, BACKGROUND_WORDS[spec.background]):
            clauses = product(*(part for pair in words for part in pair))
            out += [pattern.format(*clause, b=background) for clause in clauses]
    return out


def say(spec: Spec, rng: np.random.Generator, unseen: bool = False) -> str:
    """A random wording of `spec`: one of `captions(spec, unseen)`; half of the draws are the plain one if not `unseen`.

    The patterns of `unseen` are never used in training, though all of their words are: they ask whether a model has
    learnt the words or the sentences.
    """
    if not unseen and rng.random() < 0.5:
        return plain(spec)
    order = [spec.things[i] for i in rng.permutation(len(spec.things))]
    clauses = [_pick(words, rng) for t in order for words in (_names(t), MOTION_WORDS[t.motion])]
    pattern = _pick((UNSEEN if unseen else TRAINED)[len(order)], rng)
    return pattern.format(*clauses, b=_pick(BACKGROUND_WORDS[spec.background], rng))


def parse(caption: str) -> Spec:
    """The spec of a plain caption, so that `parse(plain(spec)) == spec`. Raises ConfigError for any other text."""
    thing = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) ({'|'.join(MOTIONS)})"
    match = re.fullmatch(rf"{thing}(?: and {thing})? on a ({'|'.join(BACKGROUNDS)}) background", caption)
    if match is None:
        raise ConfigError(
            f"caption {caption!r} is not in the plain form",
            fix="write `a large red circle moves left on a black background`",
        )
    groups = match.groups()
    words = [groups[i : i + 4] for i in (0, 4) if groups[i] is not None]
    things = tuple(Thing(shape, colour, size, motion) for size, colour, shape, motion in words)
    return Spec(things, groups[8])


def vocabulary() -> list[str]:
    """Every word of every training caption, sorted: what a tokenizer for this world has to know."""
    lists = (SHAPES, COLOURS, *MOTION_WORDS.values(), *SIZE_WORDS.values(), *BACKGROUND_WORDS.values(), ONE, TWO)
    return sorted({word for texts in lists for text in texts for word in re.findall(r"[a-z]+(?![^{]*})", text)})


def held_out(spec: Spec) -> bool:
    """Whether any thing has one of the 43 of 432 (shape, colour, motion) compositions that are kept out of training.

    A Latin-square rule: the coefficients are coprime to 10, so a pair of attributes loses at most one value of the
    third, and every pair still occurs in training.
    """
    return any(
        (SHAPES.index(t.shape) + 3 * COLOURS.index(t.colour) + 7 * MOTIONS.index(t.motion)) % 10 == 5
        for t in spec.things
    )


def _names(thing: Thing) -> list[str]:
    return [f"{size} {thing.colour} {thing.shape}" for size in SIZE_WORDS[thing.size]]


def _pick(words: Sequence[str], rng: np.random.Generator) -> str:
    return words[int(rng.integers(len(words)))]
