"""A procedural captioned world: flat shapes that move, rendered exactly at any size, frame rate and frame count.

A `Scene` is continuous in space and time. Lengths are in sides (1 = the shorter side of the picture), x to the right
and y downward; the world is the centred unit square. Time is in seconds: frame f of a clip stands at start + f / fps,
so 8 frames at 4 fps are every second one of 16 at 8 fps and every fourth one of 31 at 16 fps.
"""

from __future__ import annotations

import colorsys
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cascade.data.captions import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    SIZES,
    Spec,
    Thing,
    captions,
    held_out,
    parse,
    plain,
    say,
)
from cascade.errors import ConfigError
from cascade.noise import Key
from cascade.video import Shape

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "DIAMETERS",
    "HUES",
    "MOTIONS",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "Body",
    "Focus",
    "Scene",
    "ShapesConfig",
    "Spec",
    "Thing",
    "Truth",
    "captions",
    "distance",
    "draw_scene",
    "draw_spec",
    "held_out",
    "numpy_generator",
    "parse",
    "plain",
    "render",
    "sample",
    "say",
    "truth",
]  # fmt: skip

Array = npt.NDArray[Any]
RGB = tuple[float, float, float]
SPLITS = ("train", "held_out", "all")
HUES = {  # degrees
    "red": (0, 0), "orange": (20, 37), "yellow": (50, 65), "green": (90, 150), "cyan": (175, 195), "blue": (215, 245),
    "purple": (265, 310),
}  # fmt: skip
DIAMETERS = {"small": (0.2, 0.28), "large": (0.4, 0.55)}
RING_INNER = 0.5  # of the outer radius
CROSS_ARM = 1 / 3  # width of an arm over its length
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


@dataclass(frozen=True)
class Truth:
    """What a rendered clip shows: `centres` (F, N, 2) and `diameters` (F, N) in sides, `masks` (F, N, H, W) in [0, 1].

    Centres are (x, y) in the unit square, of the bounding box; a mask is the visible share of each pixel.
    """

    centres: Array
    diameters: Array
    masks: Array


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


@dataclass(kw_only=True)
class ShapesConfig:
    """`two`: the share of clips with two things; `split`: one of SPLITS; `seconds`: how long a scene lasts.

    `focus` makes what is hard to learn more frequent than the uniform draw does.
    """

    two: float = 0.2
    split: str = "train"
    seconds: float = 2.0
    focus: list[Focus] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 <= self.two <= 1:
            raise ConfigError(f"two={self.two}: expected a share in [0, 1]")
        if self.split not in SPLITS:
            raise ConfigError(f"split={self.split!r}: expected one of {', '.join(SPLITS)}")
        if not 0 < self.seconds < math.inf:
            raise ConfigError(f"seconds={self.seconds}: expected a positive number")


def numpy_generator(*key: Key) -> np.random.Generator:
    """numpy's twin of `cascade.noise.generator`: seeded by the SHA-256 of `key`."""
    digest = hashlib.sha256("|".join(f"{type(part).__name__}:{part}" for part in key).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def sample(cfg: ShapesConfig, shape: Shape, fps: float, *key: Key) -> tuple[Tensor, str, Scene]:
    """The clip of `key` (3, F, H, W) in [-1, 1], its caption and its scene; a single frame is of a random time.

    Scene and caption depend on `cfg` and `key` alone: the same key at another shape and fps is the same film.
    """
    rng = numpy_generator(*key)
    spec = draw_spec(rng, cfg.two, cfg.split, cfg.focus)
    caption = say(spec, rng)
    scene = draw_scene(spec, rng, cfg.seconds)
    start = float(rng.uniform(0, cfg.seconds)) if shape.frames == 1 else 0.0
    clip = render(scene, shape.frames, shape.height, shape.width, fps, start)
    return torch.from_numpy(np.ascontiguousarray(clip.transpose(3, 0, 1, 2))), caption, scene


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


def render(
    scene: Scene, frames: int, height: int, width: int, fps: float, start: float = 0.0
) -> npt.NDArray[np.float32]:
    """The clip (F, H, W, 3), float32 in [-1, 1], of frames at start + f / fps seconds. Raises ConfigError if longer.

    Anti-aliased: a pixel's coverage is clip(1/2 - signed distance in pixels).
    """
    u = _times(scene, frames, fps, start)
    out = np.empty((frames, height, width, 3), np.float32)
    out[:] = np.asarray(scene.background, np.float32) * 2 - 1
    for thing, body in zip(scene.spec.things, scene.bodies, strict=True):
        rgb = np.asarray(body.rgb, np.float32) * 2 - 1
        window = _window(body, u, height, width)
        part = out[:, window[0], window[1]]
        part += _coverage(thing.shape, body, u, height, width, window)[..., None] * (rgb - part)
    return out


def truth(scene: Scene, frames: int, height: int, width: int, fps: float, start: float = 0.0) -> Truth:
    """Where everything is in the clip that `render` makes with the same arguments."""
    u = _times(scene, frames, fps, start)
    states = [_state(body, u) for body in scene.bodies]
    masks: list[Array] = []
    for thing, body in zip(scene.spec.things, scene.bodies, strict=True):
        cover = _coverage(thing.shape, body, u, height, width, (slice(0, height), slice(0, width)))
        masks = [*(mask * (1 - cover) for mask in masks), cover]
    centres = np.stack([np.stack(state[:2], axis=-1) for state in states], axis=1)
    return Truth(centres, np.stack([state[2] for state in states], axis=1), np.stack(masks, axis=1))


def distance(shape: str, x: Any, y: Any, diameter: Any, inner: Any = 0.44) -> Any:
    """Signed distance, negative inside, of (x, y) (y downward) to the outline of `shape` around the origin.

    numpy arrays or torch tensors, any device. Closed forms by symmetry (I. Quilez, "2D distance functions"); exact but
    inside the cross, near its inner corners.
    """
    xp: Any = torch if isinstance(x, Tensor) else np
    if shape == "triangle":
        return _triangle(xp, x, -y, diameter / 2)
    if shape == "star":
        return _star(xp, x, -y, diameter / 2, inner)
    if shape in ("circle", "ring"):
        out = xp.sqrt(x * x + y * y) - diameter / 2
        return xp.maximum(out, -out - diameter * ((1 - RING_INNER) / 2)) if shape == "ring" else out
    x, y = xp.abs(x), xp.abs(y)
    if shape == "square":
        return _box(xp, x, y, diameter / 2, diameter / 2)
    assert shape == "cross", shape
    x, y = xp.maximum(x, y), xp.minimum(x, y)
    return _box(xp, x, y, diameter / 2, diameter * (CROSS_ARM / 2))


def _box(xp: Any, x: Any, y: Any, half_width: Any, half_height: Any) -> Any:
    dx, dy = x - half_width, y - half_height
    outside = xp.sqrt(xp.clip(dx, 0, None) ** 2 + xp.clip(dy, 0, None) ** 2)
    return outside + xp.clip(xp.maximum(dx, dy), None, 0)


def _triangle(xp: Any, x: Any, y: Any, r: Any) -> Any:
    """Equilateral, apex up (y upward), half side `r`; the origin is the middle of the bounding box."""
    k = math.sqrt(3)
    x = xp.abs(x) - r
    y = y + r * (k / 6 + 1 / k)
    fold = x + k * y > 0
    x, y = xp.where(fold, (x - k * y) / 2, x), xp.where(fold, (-k * x - y) / 2, y)
    x = xp.where(x < -2 * r, x + 2 * r, xp.clip(x, 0, None))  # x - clip(x, -2 r, 0)
    return -xp.sqrt(x * x + y * y) * xp.sign(y)


def _star(xp: Any, x: Any, y: Any, r: Any, inner: Any) -> Any:
    """Five points, one of them up (y upward), circumradius `r`."""
    c, s = math.cos(math.pi / 5), math.sin(math.pi / 5)
    x = xp.abs(x)
    for kx in (c, -c):  # mirror at the axes of symmetry until one tenth of the star is left
        m = 2 * xp.clip(kx * x - s * y, 0, None)
        x, y = x - m * kx, y + m * s
    x, y = xp.abs(x), y - r
    bx, by = inner * s, inner * c - 1  # from the tip to the next inner corner, times r
    h = xp.clip((x * bx + y * by) / (bx * bx + by * by), 0, None)
    h = xp.where(h > r, r, h)
    return xp.sqrt((x - bx * h) ** 2 + (y - by * h) ** 2) * xp.sign(y * bx - x * by)


def _times(scene: Scene, frames: int, fps: float, start: float) -> Array:
    last = start + (frames - 1) / fps
    if last > scene.seconds:
        raise ConfigError(
            f"{frames} frames at {fps:g} fps end at {last:g} s, but the scene lasts {scene.seconds:g} s",
            fix=f"seconds={math.ceil(last)}",
        )
    return (start + np.arange(frames) / fps) / scene.seconds


def _state(body: Body, u: Array) -> tuple[Array, Array, Array]:
    """Centre x, centre y and diameter at the times `u`, float64, each of the shape of `u`."""
    angle = 2 * math.pi * (body.phase + body.turns * u)
    x = body.centre[0] + body.travel[0] * (u - 0.5) + body.orbit * np.cos(angle)
    y = body.centre[1] + body.travel[1] * (u - 0.5) + body.orbit * np.sin(angle)
    return x, y, body.diameter * np.exp(body.growth * (u - 0.5))


def _window(body: Body, u: Array, height: int, width: int) -> tuple[slice, slice]:
    """The rows and columns that the thing touches at any of the times `u`: the rest need not be computed."""
    side = min(height, width)
    cx, cy, d = _state(body, u)
    bounds = []
    for centre, size in ((cy, height), (cx, width)):
        low = float((centre - d / 2).min()) * side + (size - side) / 2
        high = float((centre + d / 2).max()) * side + (size - side) / 2
        bounds.append(slice(max(0, math.floor(low - 1)), min(size, math.ceil(high + 1))))
    return bounds[0], bounds[1]


def _coverage(shape: str, body: Body, u: Array, height: int, width: int, window: tuple[slice, slice]) -> Array:
    """(F, H', W') float32: the share of each pixel of `window` that the thing covers."""
    side = min(height, width)
    cx, cy, d = ((v * side).astype(np.float32)[:, None, None] for v in _state(body, u))
    y, x = (
        np.arange(part.start, part.stop, dtype=np.float32) + np.float32(0.5 - (size - side) / 2)
        for part, size in zip(window, (height, width), strict=True)
    )
    out: Array = np.clip(0.5 - distance(shape, x[None, None, :] - cx, y[None, :, None] - cy, d, body.inner), 0, 1)
    return out


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
    (ax, ay, ad), (bx, by, bd) = (_state(replace(body, centre=(0.0, 0.0)), np.linspace(0, 1, 9)) for body in bodies)
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
