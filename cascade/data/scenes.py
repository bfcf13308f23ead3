"""What the procedural world can show, drawn at random: what a caption says, and all that it leaves open.

A `Scene` is continuous in space and time. Lengths are in sides (1 = the shorter side of the picture), x to the right
and y downward; the world is the centred unit square.
"""

from __future__ import annotations

import colorsys
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade.data.captions import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, Spec, Thing, held_out
from cascade.noise import Key

Array = npt.NDArray[Any]

RGB = tuple[float, float, float]
SPLITS = ("train", "held_out", "all")
HUES = {  # degrees
    "red": (0, 0), "orange": (20, 37), "yellow": (50, 65), "green": (90, 150), "cyan": (175, 195), "blue": (215, 245),
    "purple": (265, 310),
}  # fmt: skip
DIAMETERS = {"small": (0.2, 0.28), "large": (0.4, 0.55)}
MARGIN = 0.02  # between any thing and the edge of the world
SEEN = 0.875  # the part of a scene between the first and the last of 8 frames: 1.75 s of 2 s at 4 fps
SAME_PLACE = 0.15  # of the smaller bounding box: two boxes that share less hide less than a third of any shape
LITTLE = 0.02  # the same, on average over the scene
PLACES = 48  # tried for two things


@dataclass(frozen=True)
class Body:
    """The continuous parameters of one thing; u in [0, 1] runs over the scene, lengths are in sides.

    Its centre is `centre + travel (u - 1/2) + orbit (cos, sin)(2 pi (phase + turns u))`, turns > 0 clockwise as seen;
    its diameter is `diameter exp(growth (u - 1/2))`: the size a caption names is that of the middle of the scene.
    The diameter is the side of the square, the triangle's base, the span of the cross, else the circumcircle's.
    """

    rgb: RGB
    diameter: float
    inner: float  # of a star: inner over outer radius
    centre: tuple[float, float]
    travel: tuple[float, float] = (0.0, 0.0)
    growth: float = 0.0
    orbit: float = 0.0
    turns: float = 0.0
    phase: float = 0.0


@dataclass(frozen=True)
class Scene:
    """A spec with all it leaves open; `bodies[i]` belongs to `spec.things[i]`, later ones are in front."""

    spec: Spec
    bodies: tuple[Body, ...]
    background: RGB
    seconds: float = 2.0


@dataclass(kw_only=True)
class Focus:
    """Words that the first thing takes in a `share` of all clips: one of each list that is not empty."""

    share: float
    shapes: list[str] = field(default_factory=list)
    sizes: list[str] = field(default_factory=list)
    motions: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}, expected 0 to 1")
        for name, legal in (("shapes", SHAPES), ("sizes", SIZES), ("motions", MOTIONS)):
            if unknown := set(getattr(self, name)) - set(legal):
                raise ValueError(f"{name} is {sorted(unknown)}, expected some of {', '.join(legal)}")

    def apply(self, thing: Thing, rng: np.random.Generator) -> Thing:
        if rng.random() >= self.share:
            return thing
        words = {"shape": self.shapes, "size": self.sizes, "motion": self.motions}
        return replace(thing, **{key: legal[rng.integers(len(legal))] for key, legal in words.items() if legal})


def numpy_generator(*key: Key) -> np.random.Generator:
    """numpy's twin of `cascade.noise.generator`: seeded by the SHA-256 of `key`."""
    digest = hashlib.sha256("|".join(f"{type(part).__name__}:{part}" for part in key).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def draw_spec(rng: np.random.Generator, two: float = 0.2, split: str = "train", focus: Sequence[Focus] = ()) -> Spec:
    """A uniform spec of `split` (SPLITS), with two things, different in colour and shape, in a share `two` of draws.

    Each `focus` in turn may then change the first thing's words.
    """
    count = 2 if rng.random() < two else 1
    while True:
        names = zip(rng.permutation(len(SHAPES))[:count], rng.permutation(len(COLOURS))[:count], strict=True)
        things = tuple(
            Thing(SHAPES[s], COLOURS[c], SIZES[rng.integers(len(SIZES))], MOTIONS[rng.integers(len(MOTIONS))])
            for s, c in names
        )
        background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
        for words in focus:
            things = (words.apply(things[0], rng), *things[1:])
        spec = Spec(things, background)
        if len({thing.shape for thing in things}) < count:
            continue
        if split == "all" or held_out(spec) == (split == "held_out"):
            return spec


def drawable(two: float, split: str, focus: Sequence[Focus]) -> bool:
    """Whether `draw_spec` can end: a thing by itself has a composition of `split`, whatever `focus` always changes."""
    shapes, motions = list(SHAPES), list(MOTIONS)
    for words in focus:
        if words.share == 1:
            shapes, motions = words.shapes or shapes, words.motions or motions
    things = (Thing(shape, colour, SIZES[0], motion) for shape, colour, motion in product(shapes, COLOURS, motions))
    found = {held_out(Spec((thing,), BACKGROUNDS[0])) for thing in things}
    return two == 1 or split == "all" or (split == "held_out") in found


def draw_scene(spec: Spec, rng: np.random.Generator, seconds: float = 2.0) -> Scene:
    """A random scene of `spec`: all things wholly inside at all times, not much of one before another.

    Between the first and the last of 8 frames that span 7/8 of the scene, motions are at least .31 of the side,
    a factor of 1.55 in diameter or .8 turn. Two boxes share at most SAME_PLACE of the smaller at the start; of PLACES
    such pairs the first is taken that hides little over the whole scene, or else the one that hides least.
    """
    background = _background(spec.background, rng)
    while True:
        bodies = [_draw_body(thing, rng) for thing in spec.things]
        places = [_places(body, rng, 1 if len(bodies) == 1 else PLACES) for body in bodies]
        best = _least_hidden(bodies, places) if len(bodies) == 2 else 0
        if best is not None:
            break
    placed = (replace(b, centre=(float(at[best, 0]), float(at[best, 1]))) for b, at in zip(bodies, places, strict=True))
    return Scene(spec, tuple(placed), background, seconds)


def state(body: Body, u: Array) -> tuple[Array, Array, Array]:
    """Centre x, centre y and diameter at the times `u`, float64, each of the shape of `u`."""
    angle = 2 * math.pi * (body.phase + body.turns * u)
    x = body.centre[0] + body.travel[0] * (u - 0.5) + body.orbit * np.cos(angle)
    y = body.centre[1] + body.travel[1] * (u - 0.5) + body.orbit * np.sin(angle)
    return x, y, body.diameter * np.exp(body.growth * (u - 0.5))


def _draw_body(thing: Thing, rng: np.random.Generator) -> Body:
    diameter = float(rng.uniform(*DIAMETERS[thing.size]))
    travel, growth, orbit, turns = (0.0, 0.0), 0.0, 0.0, 0.0
    if thing.motion.startswith("moves"):
        length = float(rng.uniform(0.31 / SEEN, min(0.6, 1 - 2 * MARGIN - diameter)))
        dx, dy = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[thing.motion.split()[1]]
        travel = (dx * length, dy * length)
    elif thing.motion in ("grows", "shrinks"):
        growth = math.log(rng.uniform(1.55, 1.9)) / SEEN * (1 if thing.motion == "grows" else -1)
    elif thing.motion.startswith("circles"):
        orbit = float(rng.uniform(0.12, min(0.25, 0.5 - MARGIN - diameter / 2)))
        turns = float(rng.uniform(0.8, 1.05)) / SEEN * (1 if thing.motion == "circles clockwise" else -1)
    inner, phase = float(rng.uniform(0.38, 0.5)), float(rng.random())
    return Body(_colour(thing.colour, rng), diameter, inner, (0.5, 0.5), travel, growth, orbit, turns, phase)


def _places(body: Body, rng: np.random.Generator, count: int) -> Array:
    """(count, 2): random centres for `body` at which it stays inside at all times."""
    reach = body.diameter / 2 * math.exp(abs(body.growth) / 2) + body.orbit + MARGIN + np.abs(body.travel) / 2
    return reach + (1 - 2 * reach) * rng.random((count, 2))


def _least_hidden(bodies: list[Body], places: list[Array]) -> int | None:
    """The first of the pairs of centres that hides little, or else the least; None if all meet at the start."""
    (ax, ay, ad), (bx, by, bd) = (state(replace(body, centre=(0.0, 0.0)), np.linspace(0, 1, 9)) for body in bodies)
    dx, dy = (places[0] - places[1])[:, :, None].transpose(1, 0, 2)
    half, least = (ad + bd) / 2, np.minimum(ad, bd)
    wide, high = (np.clip(half - np.abs(d), 0, least) for d in (dx + ax - bx, dy + ay - by))
    shared = wide * high / least**2  # (count, 9): of the smaller of the two bounding boxes, what lies in the other
    mean = np.where(shared[:, 0] <= SAME_PLACE, shared.mean(axis=1), np.inf)
    best = int(np.argmin(np.maximum(mean, LITTLE)))
    return best if np.isfinite(mean[best]) else None


def _colour(name: str, rng: np.random.Generator) -> RGB:
    if name == "white":
        return (float(rng.uniform(0.94, 1)),) * 3
    # Blue is paler than the others so that it stands out from navy.
    saturation, value = (0.7, 0.85) if name == "blue" else (0.85, 1.0), (0.9, 1.0)
    return colorsys.hsv_to_rgb(rng.uniform(*HUES[name]) / 360, rng.uniform(*saturation), rng.uniform(*value))


def _background(name: str, rng: np.random.Generator) -> RGB:
    gray = float(rng.uniform(0.4, 0.55))
    return {"black": (0.0,) * 3, "gray": (gray,) * 3, "navy": (0.0, 0.0, 0.5), "brown": (0.4, 0.26, 0.13)}[name]
