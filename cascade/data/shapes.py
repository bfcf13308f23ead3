"""A procedural captioned world: flat shapes that move, rendered exactly at any size, frame rate and frame count.

Frame f of a clip stands at start + f / fps seconds of its scene, so 8 frames at 4 fps are every second one of 16 at
8 fps and every fourth one of 31 at 16 fps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cascade.data.captions import say
from cascade.data.outlines import distance
from cascade.data.scenes import SPLITS, Body, Focus, Scene, draw_scene, draw_spec, drawable, numpy_generator, state
from cascade.errors import ConfigError
from cascade.noise import Key
from cascade.video import Shape

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Truth:
    """What a rendered clip shows: `centres` (F, N, 2) and `diameters` (F, N) in sides, `masks` (F, N, H, W) in [0, 1].

    Centres are (x, y) in the unit square, of the bounding box; a mask is the visible share of each pixel.
    """

    centres: Array
    diameters: Array
    masks: Array


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
            raise ValueError(f"two is {self.two}, expected 0 to 1")
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}, expected one of {', '.join(SPLITS)}")
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds is {self.seconds}, expected a positive number")
        if not drawable(self.two, self.split, self.focus):
            raise ValueError(
                f"split is {self.split}, of which focus leaves nothing, expected all, or a focus of smaller share"
            )


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
    states = [state(body, u) for body in scene.bodies]
    masks: list[Array] = []
    for thing, body in zip(scene.spec.things, scene.bodies, strict=True):
        cover = _coverage(thing.shape, body, u, height, width, (slice(0, height), slice(0, width)))
        masks = [*(mask * (1 - cover) for mask in masks), cover]
    centres = np.stack([np.stack(state[:2], axis=-1) for state in states], axis=1)
    return Truth(centres, np.stack([state[2] for state in states], axis=1), np.stack(masks, axis=1))


def check_length(name: str, seconds: float, frames: int, fps: float, start: float = 0.0) -> None:
    """Raises ConfigError for a clip longer than what data.<name> says that there is."""
    last = start + (frames - 1) / fps
    if last > seconds:
        raise ConfigError(
            f"data.{name} is {seconds:g}, but {frames} frames at {fps:g} fps end at {last:g} s",
            fix=f"data.{name}={math.ceil(last)}, or a smaller shape.frames",
        )


def _times(scene: Scene, frames: int, fps: float, start: float) -> Array:
    check_length("shapes.seconds", scene.seconds, frames, fps, start)
    return (start + np.arange(frames) / fps) / scene.seconds


def _window(body: Body, u: Array, height: int, width: int) -> tuple[slice, slice]:
    """The rows and columns that the thing touches at any of the times `u`: the rest need not be computed."""
    side = min(height, width)
    cx, cy, d = state(body, u)
    bounds = []
    for centre, size in ((cy, height), (cx, width)):
        low = float((centre - d / 2).min()) * side + (size - side) / 2
        high = float((centre + d / 2).max()) * side + (size - side) / 2
        bounds.append(slice(max(0, math.floor(low - 1)), min(size, math.ceil(high + 1))))
    return bounds[0], bounds[1]


def _coverage(shape: str, body: Body, u: Array, height: int, width: int, window: tuple[slice, slice]) -> Array:
    """(F, H', W') float32: the share of each pixel of `window` that the thing covers."""
    side = min(height, width)
    cx, cy, d = ((v * side).astype(np.float32)[:, None, None] for v in state(body, u))
    y, x = (
        np.arange(part.start, part.stop, dtype=np.float32) + np.float32(0.5 - (size - side) / 2)
        for part, size in zip(window, (height, width), strict=True)
    )
    out: Array = np.clip(0.5 - distance(shape, x[None, None, :] - cx, y[None, :, None] - cy, d, body.inner), 0, 1)
    return out
