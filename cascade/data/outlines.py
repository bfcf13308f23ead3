"""The shapes of the procedural world as signed distances, in closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

RING_INNER = 0.5  # of the outer radius
CROSS_ARM = 1 / 3  # width of an arm over its length


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
