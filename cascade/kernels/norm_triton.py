"""Triton code of the group norm. Imports Triton as it loads: only `cascade.kernels.norm` does, to launch it.

In memory an image is S positions of C channels one after the other; a group is C / G neighbouring channels. `Form`
says how often an image is read:

- WHOLE: a program keeps all positions of some groups in registers.
- ORDERED: a program owns `chunk` rows, first for their sums, later to apply them, when the second read finds them in
  the L2 cache. Programs draw tickets: all sums of an image, then all its applications, then the next image. Sums have
  the lower tickets and wait for nothing, so whoever waits for them waits for programs that run.
- TWICE: the same as two launches, the sums of all images before the first application. What does not fit the cache is
  read from memory twice.

A row is FOLD positions: 3 x 80 channels fill 240 of 256 lanes where 80 would leave 48 of 128 idle, and wherever groups
begin, loads are of 16 bytes. A program's sums are taken about its first row and those of the programs put together in
a fixed order (Chan et al. 1983): a mean far from zero costs no precision, and equal inputs give equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from cascade.kernels import multiprocessors

SIZES = ["S", "chunk", "parts", "images"]  # compiled once for all of them
SUMS, APPLY, BOTH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what the programs of a launch do
POLLS = tl.constexpr(1 << 22)  # seconds: a program that waits longer answers NaN


# what forward and backward share -------------------------------------------------------------------------------------


@triton.jit
def _job(TICKETS, images, parts, WORK: tl.constexpr):
    """(image, part, whether to sum): by ticket where a launch does both; applications go backwards, newest first."""
    if WORK == BOTH:
        ticket = tl.atomic_add(TICKETS, 1, sem="relaxed")
        n = ticket // (2 * parts)
        place = ticket % (2 * parts)
        part = tl.where(place < parts, place, 2 * parts - 1 - place)
        return n.to(tl.int64), part, place < parts
    pid = tl.program_id(0)
    if WORK == APPLY:
        pid = images * parts - 1 - pid
    return (pid // parts).to(tl.int64), pid % parts, WORK == SUMS


@triton.jit
def _last(DONE, parts):
    """Says that this program's sums are in memory; whether those of all programs of the image are."""
    tl.debug_barrier()
    return tl.atomic_add(DONE, 1, sem="acq_rel") == parts - 1


@triton.jit
def _publish(DONE):
    tl.debug_barrier()
    tl.atomic_add(DONE, 1, sem="release")


@triton.jit
def _wait(DONE, parts):
    """Until `_publish`; whether that came."""
    polls = 0
    while (tl.atomic_add(DONE, 0, sem="acquire") <= parts) & (polls < POLLS):
        polls += 1
    return polls < POLLS


@triton.jit
def _tile(row, stop, lane, size, W: tl.constexpr, ROWS: tl.constexpr):
    """Offsets within the image and mask of `ROWS` rows from `row`, of W of the lanes."""
    r = row + tl.arange(0, ROWS)
    at = r[:, None] * W + lane[None, :]
    return at, (r < stop)[:, None] & (lane < W)[None, :] & (at < size)


@triton.jit
def _hot(c, real, G: tl.constexpr, CG: tl.constexpr):
    """(G, lanes): which group a lane is of."""
    return (tl.arange(0, G)[:, None] == (c // CG)[None, :]) & real[None, :]


@triton.jit
def _gather(x, hot):
    """(lanes,) -> (G,): the sum of each group."""
    return tl.sum(tl.where(hot, x[None, :], 0.0), 1)


@triton.jit
def _spread(x, hot):
    """(G,) -> (lanes,)."""
    return tl.sum(tl.where(hot, x[:, None], 0.0), 0)


@triton.jit
def _affine(W, B, FILM, n, c, real, C: tl.constexpr, FILMED: tl.constexpr):
    """gain and offset of u = gain x^ + offset, and 1 + scale."""
    w = tl.load(W + c, mask=real, other=0.0).to(tl.float32)
    b = tl.load(B + c, mask=real, other=0.0).to(tl.float32)
    one = tl.full(c.shape, 1.0, tl.float32)
    if FILMED:
        one += tl.load(FILM + n * 2 * C + c, mask=real, other=0.0).to(tl.float32)
        shift = tl.load(FILM + n * 2 * C + C + c, mask=real, other=0.0).to(tl.float32)
        return w * one, b * one + shift, one
    return w, b, one


@triton.jit
def _sigmoid(u, FAST: tl.constexpr):
    """To 3e-7. `FAST`, for GPUs alone, is 5 instructions instead of 12, of which half of the kernels' work would be."""
    if FAST:
        return tl.inline_asm_elementwise(
            "{.reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.f32 e, e, 0f3F800000;"
            " rcp.approx.ftz.f32 $0, e;}",
            "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return tl.sigmoid(u)


# forward -------------------------------------------------------------------------------------------------------------


@triton.jit
def _activate(u, SILU: tl.constexpr, FAST: tl.constexpr):
    if SILU:
        u = u * _sigmoid(u, FAST)
    return u


@triton.jit(do_not_specialize=["S"])
def _forward_whole(
    X, W, B, FILM, Y, MEAN, RSTD, S, eps,
    C: tl.constexpr, G: tl.constexpr, SOME: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    FILMED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """SOME of the G groups of an image."""
    CG: tl.constexpr = C // G
    pid = tl.program_id(0)
    n, first = (pid // (G // SOME)).to(tl.int64), pid % (G // SOME) * SOME
    lane, r = tl.arange(0, LANES), tl.arange(0, ROWS)
    c, real = first * CG + lane, lane < SOME * CG
    at = n * S * C + (r[:, None] * C + c[None, :])
    ok = (r < S)[:, None] & real[None, :]
    hot = _hot(lane, real, SOME, CG)
    count = S * CG
    x = tl.load(X + at, mask=ok, other=0.0).to(tl.float32)
    mean = _gather(tl.sum(x, 0), hot) / count
    centred = tl.where(ok, x - _spread(mean, hot)[None, :], 0.0)
    rstd = 1.0 / tl.sqrt(_gather(tl.sum(centred * centred, 0), hot) / count + eps)
    g = n * G + first + tl.arange(0, SOME)
    tl.store(MEAN + g, mean)
    tl.store(RSTD + g, rstd)
    w, b, _ = _affine(W, B, FILM, n, c, real, C, FILMED)
    u = _activate(centred * (w * _spread(rstd, hot))[None, :] + b[None, :], SILU, FAST)
    tl.store(Y + at, u.to(Y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=SIZES)
def _forward(
    X, W, B, FILM, Y, MEAN, RSTD, PARTS, TICKETS, S, chunk, parts, images, eps,
    C: tl.constexpr, G: tl.constexpr, FOLD: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, TP: tl.constexpr,
    WORK: tl.constexpr, FILMED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = FOLD * C
    CG: tl.constexpr = C // G
    n, part, sums = _job(TICKETS, images, parts, WORK)
    DONE = TICKETS + 1 + n
    size = S * C
    lane = tl.arange(0, LANES)
    c, real = lane % C, lane < WIDE
    start = part * chunk
    stop = tl.minimum(start + chunk, tl.cdiv(S, FOLD))
    X += n * size
    if sums:
        pivot = tl.load(X + start * WIDE + lane, mask=real & (start * WIDE + lane < size), other=0.0).to(tl.float32)
        one = tl.zeros((ROWS, LANES), tl.float32)
        two = tl.zeros((ROWS, LANES), tl.float32)
        for row in range(start, stop, ROWS):
            at, ok = _tile(row, stop, lane, size, WIDE, ROWS)
            x = tl.load(X + at, mask=ok, other=0.0).to(tl.float32)
            x = tl.where(ok, x - pivot[None, :], 0.0)
            one += x
            two += x * x
        s = tl.sum(one, 0)
        rows = tl.maximum(tl.minimum(stop * WIDE, size) - start * WIDE - lane + WIDE - 1, 0) // WIDE  # that a lane saw
        rows = tl.where(real, rows, 0).to(tl.float32)
        off = s / tl.maximum(rows, 1.0)
        mean = pivot + off
        hot = _hot(c, real, G, CG)
        g = tl.arange(0, G)
        all = _gather(rows * mean, hot) / _gather(rows, hot)
        away = mean - _spread(all, hot)
        tl.store(PARTS + (n * parts + part) * 2 * G + g, all)
        tl.store(
            PARTS + (n * parts + part) * 2 * G + G + g, _gather(tl.sum(two, 0) - s * off + rows * away * away, hot)
        )
        if _last(DONE, parts):
            t = tl.arange(0, TP)[:, None]
            total = tl.zeros((TP, G), tl.float32)
            for begin in range(0, parts, TP):
                p = begin + t
                seen = tl.minimum(chunk * FOLD, S - p * chunk * FOLD).to(tl.float32) / S
                to = (n * parts + p) * 2 * G + g[None, :]
                total += seen * tl.load(PARTS + to, mask=p < parts, other=0.0, cache_modifier=".cg")
            middle = tl.sum(total, 0)
            total = tl.zeros((TP, G), tl.float32)
            for begin in range(0, parts, TP):
                p = begin + t
                seen = tl.minimum(chunk * FOLD, S - p * chunk * FOLD).to(tl.float32) * CG
                to = (n * parts + p) * 2 * G + g[None, :]
                apart = tl.load(PARTS + to, mask=p < parts, other=0.0, cache_modifier=".cg") - middle[None, :]
                square = tl.load(PARTS + to + G, mask=p < parts, other=0.0, cache_modifier=".cg")
                total += tl.where(p < parts, square + seen * apart * apart, 0.0)
            tl.store(MEAN + n * G + g, middle)
            tl.store(RSTD + n * G + g, 1.0 / tl.sqrt(tl.sum(total, 0) / (S * CG) + eps))
            _publish(DONE)
    else:
        w, b, _ = _affine(W, B, FILM, n, c, real, C, FILMED)
        if WORK == BOTH and not _wait(DONE, parts):
            b += float("nan")
        w *= tl.load(RSTD + n * G + c // CG, mask=real, other=0.0, cache_modifier=".cg")
        b -= w * tl.load(MEAN + n * G + c // CG, mask=real, other=0.0, cache_modifier=".cg")
        Y += n * size
        for row in range(start, stop, ROWS):
            at, ok = _tile(row, stop, lane, size, WIDE, ROWS)
            x = tl.load(X + at, mask=ok, other=0.0, eviction_policy="evict_first").to(tl.float32)
            u = _activate(x * w[None, :] + b[None, :], SILU, FAST)
            tl.store(Y + at, u.to(Y.dtype.element_ty), mask=ok, eviction_policy="evict_first")


# backward ------------------------------------------------------------------------------------------------------------


@triton.jit
def _slope(grad, x, gain, b, rstd, middle, SILU: tl.constexpr, FAST: tl.constexpr):
    """dL/du and x^ = x rstd - middle; the lanes' numbers are (lanes,)."""
    normal = x * rstd[None, :] - middle[None, :]
    if SILU:
        u = normal * gain[None, :] + b[None, :]
        gate = _sigmoid(u, FAST)
        u = u * gate
        grad = grad * ((gate + u) - u * gate)
    return grad, normal


@triton.jit
def _parameters(W, B, DAFFINE, DFILM, n, c, real, one, sum1, sum2, C: tl.constexpr, FILMED: tl.constexpr):
    """Gradients of weight, bias and film, of one image: `sum1` is that of du, `sum2` that of du x^."""
    tl.store(DAFFINE + n * 2 * C + c, sum2 * one, mask=real)
    tl.store(DAFFINE + n * 2 * C + C + c, sum1 * one, mask=real)
    if FILMED:
        w = tl.load(W + c, mask=real, other=0.0).to(tl.float32)
        b = tl.load(B + c, mask=real, other=0.0).to(tl.float32)
        scale = w * sum2 + b * sum1
        tl.store(DFILM + n * 2 * C + c, scale.to(DFILM.dtype.element_ty), mask=real)
        tl.store(DFILM + n * 2 * C + C + c, sum1.to(DFILM.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["S"])
def _backward_whole(
    GRAD, X, W, B, FILM, MEAN, RSTD, DX, DAFFINE, DFILM, S,
    C: tl.constexpr, G: tl.constexpr, SOME: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    FILMED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """SOME of the G groups of an image."""
    CG: tl.constexpr = C // G
    pid = tl.program_id(0)
    n, first = (pid // (G // SOME)).to(tl.int64), pid % (G // SOME) * SOME
    lane, r = tl.arange(0, LANES), tl.arange(0, ROWS)
    c, real = first * CG + lane, lane < SOME * CG
    at = n * S * C + (r[:, None] * C + c[None, :])
    ok = (r < S)[:, None] & real[None, :]
    x = tl.load(X + at, mask=ok, other=0.0).to(tl.float32)
    grad = tl.load(GRAD + at, mask=ok, other=0.0).to(tl.float32)
    hot = _hot(lane, real, SOME, CG)
    mean = tl.load(MEAN + n * G + c // CG, mask=real, other=0.0)
    rstd = tl.load(RSTD + n * G + c // CG, mask=real, other=0.0)
    gain, b, one = _affine(W, B, FILM, n, c, real, C, FILMED)
    slope, normal = _slope(grad, x, gain, b, rstd, mean * rstd, SILU, FAST)
    sum1, sum2 = tl.sum(slope, 0), tl.sum(slope * normal, 0)
    _parameters(W, B, DAFFINE, DFILM, n, c, real, one, sum1, sum2, C, FILMED)
    m1 = _spread(_gather(gain * sum1, hot), hot) / (S * CG)
    m2 = _spread(_gather(gain * sum2, hot), hot) / (S * CG)
    gain *= rstd
    dx = slope * gain[None, :] - (m1 * rstd)[None, :] - normal * (m2 * rstd)[None, :]
    tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=SIZES)
def _backward(
    GRAD, X, W, B, FILM, MEAN, RSTD, DX, PARTS, LANEWISE, MOMENTS, TICKETS, S, chunk, parts, images,
    C: tl.constexpr, G: tl.constexpr, FOLD: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, TP: tl.constexpr,
    WORK: tl.constexpr, FILMED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = FOLD * C
    CG: tl.constexpr = C // G
    n, part, sums = _job(TICKETS, images, parts, WORK)
    DONE = TICKETS + 1 + n
    size = S * C
    lane = tl.arange(0, LANES)
    c, real = lane % C, lane < WIDE
    start = part * chunk
    stop = tl.minimum(start + chunk, tl.cdiv(S, FOLD))
    X += n * size
    GRAD += n * size
    mean = tl.load(MEAN + n * G + c // CG, mask=real, other=0.0)
    rstd = tl.load(RSTD + n * G + c // CG, mask=real, other=0.0)
    gain, b, _ = _affine(W, B, FILM, n, c, real, C, FILMED)
    if sums:
        du = tl.zeros((ROWS, LANES), tl.float32)
        dun = tl.zeros((ROWS, LANES), tl.float32)
        for row in range(start, stop, ROWS):
            at, ok = _tile(row, stop, lane, size, WIDE, ROWS)
            x = tl.load(X + at, mask=ok, other=0.0).to(tl.float32)
            grad = tl.load(GRAD + at, mask=ok, other=0.0).to(tl.float32)
            slope, normal = _slope(grad, x, gain, b, rstd, mean * rstd, SILU, FAST)
            du += slope
            dun += slope * normal
        sum1 = tl.sum(du, 0)
        sum2 = tl.sum(dun, 0)
        tl.store(LANEWISE + (n * parts + part) * 2 * WIDE + lane, sum1, mask=real)
        tl.store(LANEWISE + (n * parts + part) * 2 * WIDE + WIDE + lane, sum2, mask=real)
        hot = _hot(c, real, G, CG)
        g = tl.arange(0, G)
        tl.store(PARTS + (n * parts + part) * 2 * G + g, _gather(gain * sum1, hot))
        tl.store(PARTS + (n * parts + part) * 2 * G + G + g, _gather(gain * sum2, hot))
        if _last(DONE, parts):
            t = tl.arange(0, TP)[:, None]
            m1 = tl.zeros((TP, G), tl.float32)
            m2 = tl.zeros((TP, G), tl.float32)
            for begin in range(0, parts, TP):
                p = begin + t
                to = (n * parts + p) * 2 * G + g[None, :]
                m1 += tl.load(PARTS + to, mask=p < parts, other=0.0, cache_modifier=".cg")
                m2 += tl.load(PARTS + to + G, mask=p < parts, other=0.0, cache_modifier=".cg")
            tl.store(MOMENTS + n * 2 * G + g, tl.sum(m1, 0) / (S * CG))
            tl.store(MOMENTS + n * 2 * G + G + g, tl.sum(m2, 0) / (S * CG))
            _publish(DONE)
    else:
        full = gain * rstd
        if WORK == BOTH and not _wait(DONE, parts):
            full += float("nan")
        m1 = rstd * tl.load(MOMENTS + n * 2 * G + c // CG, mask=real, other=0.0, cache_modifier=".cg")
        m2 = rstd * tl.load(MOMENTS + n * 2 * G + G + c // CG, mask=real, other=0.0, cache_modifier=".cg")
        DX += n * size
        for row in range(start, stop, ROWS):
            at, ok = _tile(row, stop, lane, size, WIDE, ROWS)
            x = tl.load(X + at, mask=ok, other=0.0, eviction_policy="evict_first").to(tl.float32)
            grad = tl.load(GRAD + at, mask=ok, other=0.0, eviction_policy="evict_first").to(tl.float32)
            slope, normal = _slope(grad, x, gain, b, rstd, mean * rstd, SILU, FAST)
            dx = slope * full[None, :] - m1[None, :] - normal * m2[None, :]
            tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=ok, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["parts"])
def _parameter_gradients(
    W, B, FILM, LANEWISE, DAFFINE, DFILM, parts,
    C: tl.constexpr, FOLD: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, FILMED: tl.constexpr,
):  # fmt: skip
    """Of one image and `LANES` channels, from the sums that `_backward` left."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * LANES + tl.arange(0, LANES)
    real = c < C
    sum1 = tl.zeros((ROWS, LANES), tl.float32)
    sum2 = tl.zeros((ROWS, LANES), tl.float32)
    for begin in range(0, parts * FOLD, ROWS):
        row = begin + tl.arange(0, ROWS)
        at = ((n * parts + row // FOLD) * 2 * FOLD + row % FOLD)[:, None] * C + c[None, :]
        ok = (row < parts * FOLD)[:, None] & real[None, :]
        sum1 += tl.load(LANEWISE + at, mask=ok, other=0.0)
        sum2 += tl.load(LANEWISE + at + FOLD * C, mask=ok, other=0.0)
    _, _, one = _affine(W, B, FILM, n, c, real, C, FILMED)
    _parameters(W, B, DAFFINE, DFILM, n, c, real, one, tl.sum(sum1, 0), tl.sum(sum2, 0), C, FILMED)


# launching -----------------------------------------------------------------------------------------------------------


class Form(Enum):
    """How often an image is read; see above."""

    WHOLE = "whole"
    ORDERED = "ordered"
    TWICE = "twice"


@dataclass(frozen=True)
class Tuning:
    """How a kernel is spread over the GPU; benchmarks/gpu_norm.py times others than the shipped ones."""

    each: int  # elements that a thread works on at a time
    chunk: int  # elements that a program owns, about
    whole: int  # elements that a program keeps in registers, at most: larger images take the other forms
    registers: int  # of a thread, at most: what is spilled for it stands outside the loops
    split: Form = Form.ORDERED  # of larger images


# Chunks of 65,536 rather than 16,384 took 7 to 35 % less on an H200 (bf16; docs/performance.md).
FORWARD = Tuning(each=16, chunk=65536, whole=16384, registers=80)
BACKWARD = Tuning(each=16, chunk=65536, whole=8192, registers=96)
PARTS = 512  # of an image, at most: one program puts their sums together


@dataclass(frozen=True)
class Plan:
    """How a kernel is launched for images of one size."""

    form: Form
    programs: int
    constants: dict[str, int]  # of the kernel
    options: dict[str, int]  # of its compilation
    chunk: int = 0  # rows
    parts: int = 1  # of an image

    @property
    def launches(self) -> tuple[tuple[int, int], ...]:
        """(programs, the kernel's WORK), launch by launch."""
        return ((2 * self.programs, 2),) if self.form is Form.ORDERED else ((self.programs, 0), (self.programs, 1))


@cache
def plan(images: int, channels: int, positions: int, groups: int, tuning: Tuning, processors: int) -> Plan:
    """Few idle lanes, every processor busy, and as few reads as fit."""
    per, rows = channels // groups, triton.next_power_of_2(positions)
    some = groups
    while some > 1 and rows * triton.next_power_of_2(some * per) > tuning.whole // 2:
        some //= 2
    lanes = triton.next_power_of_2(some * per)
    constants = {"C": channels, "G": groups}
    if rows * lanes <= tuning.whole:
        constants |= {"SOME": some, "LANES": lanes, "ROWS": rows}
        return Plan(
            Form.WHOLE, images * groups // some, constants, {"num_warps": min(16, max(1, rows * lanes // 1024))}
        )
    fold = min((k for k in (1, 3, 7) if k == 1 or k * channels <= 1024), key=lambda k: idle(k * channels))
    lanes, length = triton.next_power_of_2(fold * channels), triton.cdiv(positions, fold)
    warps = 4 if lanes <= 256 else 8
    step = max(1, tuning.each * 32 * warps // lanes)  # rows of a tile
    few = triton.cdiv(images * length, 8 * processors)  # rows of a chunk, so that every processor gets eight programs
    chunk = max(1, min(tuning.chunk // lanes, few), triton.cdiv(length, PARTS))
    chunk = triton.cdiv(chunk, step) * step
    parts = triton.cdiv(length, chunk)
    constants |= {"FOLD": fold, "LANES": lanes, "ROWS": step, "TP": 64}
    options = {"num_warps": warps, "maxnreg": tuning.registers}
    return Plan(tuning.split, images * parts, constants, options, chunk, parts)


def idle(lanes: int) -> float:
    """Share of the lanes that a power of two has too many."""
    return 1.0 - lanes / int(triton.next_power_of_2(lanes))


def planned(x: Tensor, groups: int, tuning: Tuning) -> Plan:
    """`plan` for x (N, C, H, W) where it lies."""
    images, channels, height, width = x.shape
    return plan(images, channels, height * width, groups, tuning, multiprocessors(x.device))


def _tickets(x: Tensor) -> Tensor:
    """The next ticket, and how many programs of each image are done."""
    return x.new_zeros(1 + len(x), dtype=torch.int32)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cascade.kernels.norm.group_norm`, and the mean and 1 / deviation of every group, (N, G) float32."""
    images, positions = len(x), prod(x.shape[2:])
    how = planned(x, groups, FORWARD)
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
    # two tensors and no views of one: what an operator answers may share no memory
    mean, rstd = (x.new_empty((images, groups), dtype=torch.float32) for _ in range(2))
    told = x if film is None else film
    flags = {"FILMED": film is not None, "SILU": silu, "FAST": x.is_cuda, **how.options}
    if how.form is Form.WHOLE:
        _forward_whole[(how.programs,)](x, weight, bias, told, y, mean, rstd, positions, eps, **how.constants, **flags)
        return y, mean, rstd
    sums = x.new_empty((images, how.parts, 2, groups), dtype=torch.float32)
    tickets = _tickets(x)
    for programs, work in how.launches:
        _forward[(programs,)](
            x, weight, bias, told, y, mean, rstd, sums, tickets, positions, how.chunk, how.parts, images, eps,
            WORK=work, **how.constants, **flags,
        )  # fmt: skip
    return y, mean, rstd


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, the gradients of weight and bias (2, C) in float32, dfilm (empty without film)."""
    images, channels, positions = len(x), x.shape[1], prod(x.shape[2:])
    how = planned(x, groups, BACKWARD)
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    daffine = x.new_empty((images, 2, channels), dtype=torch.float32)
    dfilm = x.new_empty(0) if film is None else torch.empty_like(film)
    told = x if film is None else film
    flags = {"FILMED": film is not None, "SILU": silu, "FAST": x.is_cuda, **how.options}
    if how.form is Form.WHOLE:
        _backward_whole[(how.programs,)](
            grad, x, weight, bias, told, mean, rstd, dx, daffine, dfilm, positions, **how.constants, **flags
        )
        return dx, daffine.sum(0), dfilm
    fold = how.constants["FOLD"]
    sums = x.new_empty((images, how.parts, 2, groups), dtype=torch.float32)
    lanewise = x.new_empty((images, how.parts, 2, fold, channels), dtype=torch.float32)
    moments = x.new_empty((images, 2, groups), dtype=torch.float32)
    tickets = _tickets(x)
    for programs, work in how.launches:
        _backward[(programs,)](
            grad, x, weight, bias, told, mean, rstd, dx, sums, lanewise, moments, tickets,
            positions, how.chunk, how.parts, images, WORK=work, **how.constants, **flags,
        )  # fmt: skip
    lanes = min(64, triton.next_power_of_2(channels))
    _parameter_gradients[(images, triton.cdiv(channels, lanes))](
        weight, bias, told, lanewise, daffine, dfilm, how.parts,
        C=channels, FOLD=fold, LANES=lanes, ROWS=32, FILMED=film is not None,
    )  # fmt: skip
    return dx, daffine.sum(0), dfilm
