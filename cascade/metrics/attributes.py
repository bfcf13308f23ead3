"""Reads off a clip of the procedural world what it shows, and compares that with what its caption says.

No network and no prompt is used: colours are read from hue, motion from the path of the centroid, shape by comparing
the soft mask with templates rendered at the same place and size. What is not clearly one of the world's values is None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cascade.data.captions import COLOURS, Spec
from cascade.metrics._templates import blurred, shape_of

Array = npt.NDArray[Any]
KEYS = ("colour", "background", "shape", "motion", "size", "count", "all")

PALETTE = {"black": (0.0, 0.0, 0.0), "gray": (0.475, 0.475, 0.475), "navy": (0.0, 0.0, 0.5), "brown": (0.4, 0.26, 0.13)}
BACKGROUND_REACH = 0.2  # farthest that a background's colour may lie from the palette, RGB in [0, 1]
HUE_BORDERS = (11.0, 43.0, 77.0, 162.0, 205.0, 255.0, 337.0)  # degrees, between the hues of COLOURS from red to purple
WHITE = 0.3  # saturation below which a pure colour is white
NOISE = 0.02  # standard deviation of the background above which the clip is smoothed first
CONTRAST = 0.2  # distance from the background above which a pixel's colour can be read
LEAST_AREA = 0.005  # of the picture, on average over the frames: smaller things do not count
TOUCHING = 0.6  # a patch of which more than this borders on a larger one is its rim, not a thing

# Looser than the world itself (cascade/data/scenes.py), in sides, ratios of diameters and turns.
TRAVEL, STILL_TRAVEL, GROWTH, STILL_GROWTH, TURNS, ORBIT = 0.15, 0.08, 1.25, 1.2, 0.5, 0.05
LARGE = 0.335  # diameter


@dataclass(frozen=True)
class Seen:
    """One thing that a clip shows; None where it is unclear. `match` in [0, 1] is how well `shape` fits."""

    shape: str | None
    colour: str | None
    size: str | None
    motion: str | None
    match: float
    area: float  # of the picture, on average over the frames


@dataclass(frozen=True)
class Measured:
    """What a clip shows: things by falling area, at most three, and the background (None if it is unclear)."""

    things: tuple[Seen, ...]
    background: str | None


@dataclass(frozen=True)
class _Patch:
    """A thing on its way to being seen: its colour in [0, 1] and its soft mask (F, H, W)."""

    rgb: Array
    mask: Array


def measure(frames: Tensor) -> list[Measured]:
    """What each clip of `frames` (B, 3, F, H, W) in [-1, 1] shows; F >= 2, any size from about 24 pixels on."""
    clips = (frames.detach().float().cpu().permute(0, 2, 3, 4, 1).clamp(-1, 1) + 1) / 2
    return [_measure(clip) for clip in clips.numpy()]


def judge(frames: Tensor, specs: Sequence[Spec]) -> dict[str, Tensor]:
    """For each of KEYS, which clips (B,) are right: every thing of the spec for that attribute.

    `count`: as many things as the spec says; `all`: colour, background, shape, motion and count. Things are paired so
    that most agrees; a thing that is missing is wrong in everything.
    """
    rows = [_judge(seen, spec) for seen, spec in zip(measure(frames), specs, strict=True)]
    return {key: torch.tensor([row[key] for row in rows], dtype=torch.bool) for key in KEYS}


def accuracy(frames: Tensor, specs: Sequence[Spec]) -> dict[str, float]:
    """The share of clips that is right, for each of KEYS."""
    return {key: float(right.float().mean()) for key, right in judge(frames, specs).items()}


def _judge(seen: Measured, spec: Spec) -> dict[str, bool]:
    attributes = ("colour", "shape", "motion", "size")

    def compare(things: Sequence[Seen]) -> dict[str, bool]:
        pairs = list(zip(things, spec.things, strict=True))
        return {a: all(getattr(got, a) == getattr(want, a) for got, want in pairs) for a in attributes}

    def agreement(things: Sequence[Seen]) -> int:
        pairs = zip(things, spec.things, strict=True)
        return sum(getattr(got, a) == getattr(want, a) for got, want in pairs for a in attributes)

    largest = seen.things[: len(spec.things)]
    if len(largest) < len(spec.things):
        out = dict.fromkeys(attributes, False)
    else:
        out = compare(max(permutations(largest), key=agreement))
    out["background"] = seen.background == spec.background
    out["count"] = len(seen.things) == len(spec.things)
    out["all"] = all(out[key] for key in ("colour", "background", "shape", "motion", "count"))
    return out


def _measure(clip: Array) -> Measured:
    """`clip` (F, H, W, 3) in [0, 1]."""
    border = np.concatenate([clip[:, 0], clip[:, -1], clip[:, :, 0], clip[:, :, -1]], axis=1).reshape(-1, 3)
    background = np.median(border, axis=0)
    noise = float(np.quantile(np.abs(border - background), 0.9)) / 1.64  # a black background shows half of it
    if noise > NOISE:
        clip, noise = blurred(clip, (1, 2)), noise * 0.375
    patches = _patches(clip, background, max(CONTRAST, 6 * noise))
    seen = [_look(patch, [other for other in patches if other is not patch], background) for patch in patches]
    return Measured(tuple(seen), _background(background))


def _background(rgb: Array) -> str | None:
    gray = np.full(3, np.clip(rgb.mean(), 0.4, 0.55))
    far = {name: float(np.linalg.norm(rgb - (gray if name == "gray" else c))) for name, c in PALETTE.items()}
    name = min(far, key=lambda key: far[key])
    return name if far[name] < BACKGROUND_REACH else None


def _patches(clip: Array, background: Array, contrast: float) -> list[_Patch]:
    """Separates the things by colour, largest first.

    A pixel at the rim of a thing is a mix of its colour and the background, so the ray from the background through
    the pixel's colour, followed to the face of the RGB cube, gives the colour of the thing itself.
    """
    offset = clip - background
    visible = np.sqrt((offset**2).sum(axis=-1)) > contrast
    visible &= blurred(visible.astype(np.float32), (1, 2)) > 0.45  # single pixels are noise
    labels = np.full(visible.shape, -1)
    labels[visible] = _colour_class(_pure(offset[visible], background))
    classes = [c for c in range(len(COLOURS)) if (labels == c).mean() >= LEAST_AREA / 2]
    classes.sort(key=lambda c: -(labels == c).sum())
    kept: list[int] = []
    for c in classes:
        mine = labels == c
        near = [(_grown(labels == k)[mine]).mean() for k in kept]
        if near and max(near) > TOUCHING:
            labels[mine] = kept[int(np.argmax(near))]
        else:
            kept.append(c)
    labels[~np.isin(labels, kept)] = -1
    patches = [_patch(clip, background, labels, k) for k in kept]
    patches = [patch for patch in patches if patch.mask.mean() >= LEAST_AREA]
    return sorted(patches, key=lambda patch: -float(patch.mask.sum()))[:3]


def _pure(offset: Array, background: Array) -> Array:
    """The colours (N, 3) where the rays from `background` along `offset` (N, 3) leave the RGB cube."""
    room = np.where(offset > 0, 1 - background, background)
    steps = room / np.maximum(np.abs(offset), 1e-6)
    pure: Array = np.clip(background + offset * steps.min(axis=1, keepdims=True), 0, 1)
    return pure


def _colour_class(rgb: Array) -> Array:
    """(N,) indices into COLOURS of the pure colours `rgb` (N, 3)."""
    high, low = rgb.max(axis=1), rgb.min(axis=1)
    span = np.maximum(high - low, 1e-6)
    r, g, b = rgb.T
    sector = np.where(high == r, (g - b) / span % 6, np.where(high == g, (b - r) / span + 2, (r - g) / span + 4))
    index = np.searchsorted(HUE_BORDERS, sector * 60) % len(HUE_BORDERS)
    return np.where(span < WHITE * high, COLOURS.index("white"), index)


def _patch(clip: Array, background: Array, labels: Array, label: int) -> _Patch:
    """The soft mask of the pixels of `label` and their neighbours: the share of the thing's colour in each."""
    mine = labels == label
    offset = clip - background
    far = np.sqrt((offset[mine] ** 2).sum(axis=-1))
    rgb = np.median(clip[mine][far >= 0.8 * np.quantile(far, 0.95)], axis=0)
    axis = rgb - background
    share = np.clip(offset @ axis / (axis @ axis), 0, 1)
    return _Patch(rgb, np.where(mine | ((labels == -1) & _grown(mine)), share, 0))


def _grown(mask: Array) -> Array:
    """`mask` (F, H, W) and the eight neighbours of every pixel in it."""
    out = mask.copy()
    for axis in (1, 2):
        wide = out.copy()
        low, high = [slice(None)] * 3, [slice(None)] * 3
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        wide[tuple(low)] |= out[tuple(high)]
        wide[tuple(high)] |= out[tuple(low)]
        out = wide
    return out


def _look(patch: _Patch, others: list[_Patch], background: Array) -> Seen:
    """Reads one thing, from the frames in which no other touches it, or the 40 % that are touched least."""
    mask = patch.mask
    frames, height, width = mask.shape
    side = min(height, width)
    area = mask.sum(axis=(1, 2))
    present = area > 0.2 * np.median(area)
    touch = np.zeros(frames)
    for other in others:
        touch += (_grown(mask > 0.1) & (other.mask > 0.1)).sum(axis=(1, 2))
    enough = min(math.ceil(0.4 * frames), int(present.sum()))
    free = present & (touch <= np.sort(touch[present])[enough - 1])
    weight = np.maximum(area, 1e-6)
    x = (mask.sum(axis=1) @ (np.arange(width) + 0.5)) / weight / side
    y = (mask.sum(axis=2) @ (np.arange(height) + 0.5)) / weight / side
    shape, match, diameter = shape_of(mask[free], area[free], x[free] * side, y[free] * side)
    pure = _pure((patch.rgb - background)[None], background)
    return Seen(
        shape=shape,
        colour=COLOURS[int(_colour_class(pure)[0])],
        size="large" if diameter / side > LARGE else "small",
        motion=_motion(x, y, np.sqrt(weight) / side, present, free),
        match=match,
        area=float(mask.mean()),
    )


def _motion(x: Array, y: Array, scale: Array, present: Array, free: Array) -> str | None:
    """The motion of a path (x, y) (F,) of a thing of size `scale` (F,), all in sides."""
    if present.mean() < 0.75:
        return None
    turns, radius, stray = _orbit(x, y, present, free)
    if abs(turns) >= TURNS and radius >= ORBIT and stray <= 0.35 * radius:
        return "circles clockwise" if turns > 0 else "circles counterclockwise"
    t = np.linspace(0, 1, len(x))[free]
    (dx, x_stray), (dy, y_stray), (growth, _) = (_slope(t, v[free]) for v in (x, y, np.log(scale)))
    ratio = math.exp(abs(growth))
    major, minor = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if major >= TRAVEL:
        straight = minor <= major / 2 and math.hypot(x_stray, y_stray) <= 0.15 * major
        if not straight or ratio > 1.6:
            return None
        if abs(dx) > abs(dy):
            return "moves right" if dx > 0 else "moves left"
        return "moves down" if dy > 0 else "moves up"
    extent = max(float(np.ptp(x[free])), float(np.ptp(y[free])))
    if ratio >= GROWTH and extent < TRAVEL:
        return "grows" if growth > 0 else "shrinks"
    if ratio < STILL_GROWTH and extent < STILL_TRAVEL and np.ptp(np.log(scale[free])) < math.log(1.5):
        return "stands still"
    return None


def _slope(t: Array, v: Array) -> tuple[float, float]:
    """Change of the line fitted to `v` over t in [0, 1], and the root mean square distance from it."""
    design = np.stack([t, np.ones_like(t)], axis=1)
    solution = np.linalg.lstsq(design, v, rcond=None)[0]
    return float(solution[0]), float(np.sqrt(np.mean((design @ solution - v) ** 2)))


def _orbit(x: Array, y: Array, present: Array, free: Array) -> tuple[float, float, float]:
    """Turns (clockwise as seen > 0), radius and stray of the circle fitted to a path (I. Kasa, 1976)."""
    design = np.stack([2 * x[free], 2 * y[free], np.ones(int(free.sum()))], axis=1)
    a, b, c = np.linalg.lstsq(design, x[free] ** 2 + y[free] ** 2, rcond=None)[0]
    radius = math.sqrt(max(c + a * a + b * b, 0))
    angle = np.unwrap(np.arctan2(y[present] - b, x[present] - a))
    stray = np.sqrt(np.mean((np.hypot(x[free] - a, y[free] - b) - radius) ** 2))
    return float(angle[-1] - angle[0]) / (2 * math.pi), radius, float(stray)
