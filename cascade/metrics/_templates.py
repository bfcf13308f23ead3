"""The shape of a soft mask: templates rendered at its place and size, sharp and blurred, and how well each fits."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade.data.captions import SHAPES
from cascade.data.outlines import distance

Array = npt.NDArray[Any]

SHARP_MATCH = 0.93  # overlap with a sharp template above which blurred ones are not tried
LEAST_MATCH = 0.65  # overlap of mask and template (intersection over union) below which a thing has no shape
STARS = (0.38, 0.44, 0.5)
TEMPLATES = [(s, inner) for s in SHAPES for inner in (STARS if s == "star" else (0.44,))]
MATCHED_FRAMES = 8
# How often a template is blurred, and its diameter over the one of equal area: blur makes what is normalised larger.
BLURS = ((0, 1.0), (1, 1.0), (1, 0.93), (2, 1.0), (2, 0.93), (2, 0.86), (3, 0.93), (3, 0.86), (3, 0.79))


def blurred(x: Array, axes: tuple[int, int]) -> Array:
    """Filtered by (1, 2, 1) / 4 along `axes`; edges are repeated."""
    for axis in axes:
        n = x.shape[axis]
        ends = np.clip(np.arange(-1, n + 1), 0, n - 1)
        wide = np.take(x, ends, axis)
        x = x / 2 + (np.take(wide, np.arange(n), axis) + np.take(wide, np.arange(2, n + 2), axis)) / 4
    return x


def shape_of(mask: Array, area: Array, x: Array, y: Array) -> tuple[str | None, float, float]:
    """Shape, its match and its diameter in pixels, of masks (F, H, W) with areas and centroids (F,) in pixels.

    Every template is rendered with the mask's area at the mask's centroid; the match is sum min / sum max.
    """
    pool = max(1, round(float(np.sqrt(area.max())) / 20))
    pick = np.unique(np.linspace(0, len(mask) - 1, MATCHED_FRAMES).round().astype(int))
    mask, area, x, y = _pooled(mask[pick], pool), area[pick] / pool**2, x[pick] / pool, y[pick] / pool
    mask, x, y = _cropped(mask, x, y, 2 + math.ceil(1.1 * math.sqrt(float(area.max()))))
    best: tuple[float, str, float] = (0.0, "", 0.0)
    size = mask.shape[1]
    px = (np.arange(size) + 0.5)[None, None, :] - x[:, None, None]
    py = (np.arange(size) + 0.5)[None, :, None] - y[:, None, None]
    for (blurs, scale), (shape, inner) in product(BLURS, TEMPLATES):
        if blurs and best[0] >= SHARP_MATCH:
            break
        share, drop = _moments(shape, inner)
        diameter = scale * np.sqrt(area / share)[:, None, None]
        template = np.clip(0.5 - distance(shape, px, py + drop * diameter, diameter, inner), 0, 1)
        for _ in range(blurs):
            template = blurred(template, (1, 2))
        template = np.minimum(template / _level(template), 1) if blurs else template
        match = float(np.minimum(mask, template).sum() / np.maximum(mask, template).sum())
        if match > best[0]:
            best = (match, shape, float(np.median(diameter)) * pool)
    return (best[1] if best[0] >= LEAST_MATCH else None), best[0], best[2]


def _level(template: Array) -> float:
    """What counts as full cover in a blurred template: the rule by which a thing's own colour is found."""
    inside = template[template > 0.33 * template.max()]
    return float(np.median(inside[inside >= 0.8 * np.quantile(inside, 0.95)]))


@lru_cache
def _moments(shape: str, inner: float) -> tuple[float, float]:
    """Area over squared diameter, and how far below the origin the centroid lies, over the diameter."""
    grid = (np.arange(512) + 0.5) / 512 - 0.5
    inside = distance(shape, *np.meshgrid(grid, grid), 1.0, inner) < 0
    return float(inside.mean()), float((inside.sum(axis=1) @ grid) / inside.sum())


def _pooled(mask: Array, k: int) -> Array:
    """Means over k x k blocks, zeros beyond the edge."""
    height, width = (-(-n // k) * k for n in mask.shape[1:])
    full = np.zeros((len(mask), height, width), mask.dtype)
    full[:, : mask.shape[1], : mask.shape[2]] = mask
    means: Array = full.reshape(len(mask), height // k, k, width // k, k).mean(axis=(2, 4))
    return means


def _cropped(mask: Array, x: Array, y: Array, reach: int) -> tuple[Array, Array, Array]:
    """Squares of side 2 reach + 1 around the centroids, zeros beyond the edge, and the centroids in them."""
    full = np.pad(mask, ((0, 0), (reach, reach), (reach, reach)))
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    span = np.arange(2 * reach + 1)
    frame = np.arange(len(mask))[:, None, None]
    squares = full[frame, (top[:, None] + span)[:, :, None], (left[:, None] + span)[:, None, :]]
    return squares, x - left + reach, y - top + reach
