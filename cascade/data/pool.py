"""Many scenes of the procedural world, drawn beforehand and rendered in batches on the device that trains.

A worker process makes one clip at a time on the CPU, which no GPU would wait for: here a scene is a row of numbers, and
a batch of any part of any scenes, at any size, is a few hundred operations on tensors. What a network sees is the same
world, rendered by the same formula (`outlines.distance`).
"""

from __future__ import annotations

import math
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker

import torch
from torch import Tensor

from cascade.data.captions import SHAPES, say
from cascade.data.outlines import distance
from cascade.data.scenes import Scene, draw_scene, draw_spec, numpy_generator
from cascade.data.shapes import ShapesConfig
from cascade.noise import Key
from cascade.video import Shape, Video

THINGS = 2  # places for things in a row; the second may be empty
NOTHING = -1  # the shape of an empty place
CHUNK = 500  # scenes that a process draws at once


@dataclass(frozen=True)
class Part:
    """The part of each of B clips that is rendered: `size`, from frame, row and column `start` (B, 3) of `whole` on."""

    whole: Shape
    size: Shape
    start: Tensor


@dataclass(frozen=True)
class Pool:
    """N scenes: `shapes` (N, THINGS) on the CPU, `bodies` (N, THINGS, 13) and `backgrounds` (N, 3) on a device.

    `bodies` holds the fields of `scenes.Body` in their order; `captions` are the N captions.
    """

    cfg: ShapesConfig
    shapes: Tensor
    bodies: Tensor
    backgrounds: Tensor
    captions: list[str]

    @staticmethod
    def draw(cfg: ShapesConfig, count: int, *key: Key, workers: int = 0) -> Pool:
        """Scene i is the one of (`key`, i), in however many processes they are drawn."""
        chunks = [range(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]
        make = partial(_rows, cfg, key)
        if workers:
            # A fork of a process whose libraries run threads can hang on a lock that one of them held.
            with deaf():
                started = multiprocessing.get_context("spawn").Pool(workers)
            with started as pool:
                parts = pool.map(make, chunks)
        else:
            parts = [make(chunk) for chunk in chunks]
        shapes, bodies, backgrounds = (torch.cat([torch.tensor(part[i]) for part in parts]) for i in range(3))
        return Pool(cfg, shapes, bodies, backgrounds, [caption for part in parts for caption in part[3]])

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device | str) -> Pool:
        return Pool(self.cfg, self.shapes, self.bodies.to(device), self.backgrounds.to(device), self.captions)

    def render(self, index: Tensor, part: Part, fps: float, seconds: Tensor | None = None) -> Tensor:
        """Frames (B, 3, F, H, W) in [-1, 1] of the scenes `index` (B,), a CPU tensor.

        Frame f of the whole clip stands at `seconds` (B,; 0 if None) + f / fps. Nothing waits for a GPU.
        """
        device, size = self.bodies.device, part.size
        here = index.to(device)
        start = part.start.to(device, torch.float32)
        side = min(part.whole.height, part.whole.width)
        time = start[:, :1] + torch.arange(size.frames, device=device)  # (B, F), in frames
        time = time / fps + (0 if seconds is None else seconds.to(device)[:, None])
        u = (time / self.cfg.seconds)[..., None, None]
        y = _centres(start[:, 1], size.height, part.whole.height - side)[:, None, :, None]
        x = _centres(start[:, 2], size.width, part.whole.width - side)[:, None, None, :]
        out = (self.backgrounds[here] * 2 - 1)[:, :, None, None, None]
        out = out.repeat(1, 1, size.frames, size.height, size.width)
        for place in range(THINGS):
            for number, shape in enumerate(SHAPES):
                rows = (self.shapes[index, place] == number).nonzero()[:, 0]
                if not len(rows):
                    continue
                rows = rows.to(device)
                body = self.bodies[here[rows], place]
                cover = _cover(shape, body, u[rows], x[rows], y[rows], side)[:, None]
                rgb = (body[:, :3] * 2 - 1)[:, :, None, None, None]
                out[rows] = torch.lerp(out[rows], rgb, cover)
        return out

    def clips(
        self, index: Tensor, shape: Shape, fps: float, rng: torch.Generator, crop: Shape | None, tries: int, rate: int
    ) -> Video:
        """Clips of `shape`, or parts of them of the size `crop`; single frames are of random times.

        Of `tries` random parts the one with the most contrast is taken; a part begins at a multiple of `rate` frames.
        `rng` is a CPU generator.
        """
        seconds = torch.rand(len(index), generator=rng) * self.cfg.seconds if shape.frames == 1 else None
        size = crop or shape
        best, most = torch.empty(0), torch.empty(0)
        for attempt in range(1 if crop is None else tries):
            part = Part(shape, size, _starts(shape, size, rate, len(index), rng))
            frames = self.render(index, part, fps, seconds)
            contrast = frames.flatten(1).std(1)
            if attempt == 0:
                best, most = frames, contrast
            else:
                better = contrast > most
                best = torch.where(better.view(-1, 1, 1, 1, 1), frames, best)
                most = torch.maximum(most, contrast)
        return Video(best, fps)


@contextmanager
def deaf() -> Iterator[None]:
    """Processes started inside never hear Ctrl-C: who started them hears it, at the end of this at the soonest."""
    resource_tracker.ensure_running()  # it would unblock the signal when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which they inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


Row = tuple[list[list[int]], list[list[list[float]]], list[tuple[float, float, float]], list[str]]


def _rows(cfg: ShapesConfig, key: Sequence[Key], numbers: range) -> Row:
    shapes, bodies, backgrounds, captions = [], [], [], []
    for number in numbers:
        rng = numpy_generator(*key, number)
        spec = draw_spec(rng, cfg.two, cfg.split, cfg.focus)
        captions.append(say(spec, rng))
        scene = draw_scene(spec, rng, cfg.seconds)
        shapes.append([SHAPES.index(thing.shape) for thing in spec.things] + [NOTHING] * (THINGS - len(spec.things)))
        bodies.append(_numbers(scene))
        backgrounds.append(scene.background)
    return shapes, bodies, backgrounds, captions


def _numbers(scene: Scene) -> list[list[float]]:
    rows = [
        [*b.rgb, b.diameter, b.inner, *b.centre, *b.travel, b.growth, b.orbit, b.turns, b.phase] for b in scene.bodies
    ]
    return rows + [[0.0] * len(rows[0])] * (THINGS - len(rows))


def _centres(start: Tensor, size: int, margin: int) -> Tensor:
    """Pixel centres (B, size) from pixel `start` (B,) on, in pixels of the centred square."""
    return start[:, None] + torch.arange(size, device=start.device) + (0.5 - margin / 2)


def _cover(shape: str, body: Tensor, u: Tensor, x: Tensor, y: Tensor, side: int) -> Tensor:
    """Coverage (B, F, H, W): `shapes._coverage` for a batch; u (B, F, 1, 1), x (B, 1, 1, W), y (B, 1, H, 1)."""
    _, _, _, diameter, inner, cx, cy, tx, ty, growth, orbit, turns, phase = body[:, :, None, None, None].unbind(1)
    angle = 2 * math.pi * (phase + turns * u)
    cx = (cx + tx * (u - 0.5) + orbit * angle.cos()) * side
    cy = (cy + ty * (u - 0.5) + orbit * angle.sin()) * side
    diameter = diameter * (growth * (u - 0.5)).exp() * side
    cover: Tensor = (0.5 - distance(shape, x - cx, y - cy, diameter, inner)).clamp(0, 1)
    return cover


def _starts(shape: Shape, size: Shape, rate: int, count: int, rng: torch.Generator) -> Tensor:
    """(count, 3): random first frames (multiples of `rate`), rows and columns."""
    steps = ((shape.frames - size.frames, rate), (shape.height - size.height, 1), (shape.width - size.width, 1))
    draws = [step * torch.randint(room // step + 1, (count,), generator=rng) for room, step in steps]
    return torch.stack(draws, 1)
