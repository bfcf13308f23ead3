"""How the norm's kernels are spread over a GPU: tiles, chunks, programs. Numbers alone, known without Triton.

An image is S positions of C channels one after the other. `Plan.whole`: a program keeps all positions of some groups in
registers, so that an image is read once. Else an image is split into `parts`: a program owns `chunk` rows, and one
launch takes the sums, another applies them.

A row is `FOLD` positions: 3 x 80 channels fill 240 of 256 lanes where 80 would leave 48 of 128 idle, and wherever
groups begin, loads are of 16 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from torch import Tensor

from cascade.kernels import multiprocessors

__all__ = ["BACKWARD", "FORWARD", "Plan", "Tuning", "ceil", "plan", "planned", "power"]


@dataclass(frozen=True)
class Tuning:
    """How a kernel is spread over the GPU; benchmarks/gpu_norm.py times others than the shipped ones."""

    each: int  # elements that a thread works on at a time
    chunk: int  # elements that a program owns, about
    whole: int  # elements that a program keeps in registers, at most: larger images are split
    registers: int  # of a thread, at most: what is spilled for it stands outside the loops


FORWARD = Tuning(each=16, chunk=16384, whole=16384, registers=80)
BACKWARD = Tuning(each=16, chunk=16384, whole=8192, registers=96)
PARTS = 512  # of an image, at most: one program puts their sums together


@dataclass(frozen=True)
class Plan:
    """How a kernel is launched for images of one size."""

    whole: bool
    programs: int  # of a launch
    constants: dict[str, int]  # of the kernel
    options: dict[str, int]  # of its compilation
    chunk: int = 0  # rows
    parts: int = 1  # of an image


@cache
def plan(images: int, channels: int, positions: int, groups: int, tuning: Tuning, processors: int) -> Plan:
    """Few idle lanes, every processor busy, and one read where an image fits."""
    per, rows = channels // groups, power(positions)
    some = groups
    while some > 1 and rows * power(some * per) > tuning.whole // 2:
        some //= 2
    lanes = power(some * per)
    constants = {"C": channels, "G": groups}
    if rows * lanes <= tuning.whole:
        constants |= {"SOME": some, "LANES": lanes, "ROWS": rows}
        return Plan(True, images * groups // some, constants, {"num_warps": min(16, max(1, rows * lanes // 1024))})
    fold = min((k for k in (1, 3, 7) if k == 1 or k * channels <= 1024), key=lambda k: idle(k * channels))
    lanes, length = power(fold * channels), ceil(positions, fold)
    warps = 4 if lanes <= 256 else 8
    step = max(1, tuning.each * 32 * warps // lanes)  # rows of a tile
    few = ceil(images * length, 8 * processors)  # rows of a chunk, so that every processor gets eight programs
    chunk = max(1, min(tuning.chunk // lanes, few), ceil(length, PARTS))
    chunk = ceil(chunk, step) * step
    parts = ceil(length, chunk)
    constants |= {"FOLD": fold, "LANES": lanes, "ROWS": step}
    options = {"num_warps": warps, "maxnreg": tuning.registers}
    return Plan(False, images * parts, constants, options, chunk, parts)


def planned(x: Tensor, groups: int, tuning: Tuning) -> Plan:
    """`plan` for x (N, C, H, W) where it lies."""
    images, channels, height, width = x.shape
    return plan(images, channels, height * width, groups, tuning, multiprocessors(x.device))


def idle(lanes: int) -> float:
    """Share of the lanes that a power of two has too many."""
    return 1.0 - lanes / power(lanes)


def power(n: int) -> int:
    """The power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def ceil(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
