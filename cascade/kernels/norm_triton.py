"""Triton code of the group norm. Imports Triton as it loads: only `cascade.kernels.norm` does, to launch it.

x is (N, S, C) in memory, a group is C / G neighbouring channels, so a tile is `ROWS` positions of all channels, shaped
(ROWS, G, CP): CP is C / G rounded up to a power of two. A program owns `chunk` positions of one frame. If that is the
whole frame (many small ones) it sums and applies in one launch, and what it reads twice is still in the cache; else
(PHASE 1, then PHASE 2) the programs of a frame leave their sums in memory for one another.

Sums are taken about the frame's first position, so that a mean far from zero costs no precision.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cascade.kernels import multiprocessors

SIZES = ["S", "chunk", "parts"]  # compiled once for all of them
ALL, SUMS, APPLY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _channels(G: tl.constexpr, CG: tl.constexpr, CP: tl.constexpr):
    """The channel of each (group, place within it), and whether there is one."""
    place = tl.arange(0, CP)[None, :]
    return tl.arange(0, G)[:, None] * CG + place, (place < CG) & (tl.arange(0, G)[:, None] < G)


@triton.jit
def _rows(start, stop, c, real, C: tl.constexpr, ROWS: tl.constexpr):
    """Offsets and mask of `ROWS` positions from `start`."""
    s = start + tl.arange(0, ROWS)
    return s.to(tl.int64)[:, None, None] * C + c[None, :, :], (s < stop)[:, None, None] & real[None, :, :]


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


@triton.jit(do_not_specialize=SIZES)
def _forward(
    X, W, B, FILM, Y, MEAN, RSTD, PARTS, S, chunk, parts, eps,
    C: tl.constexpr, G: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr, TP: tl.constexpr,
    PHASE: tl.constexpr, FILMED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    n, part = pid // parts, (pid % parts).to(tl.int32)
    start = part * chunk
    stop = tl.minimum(start + chunk, S)
    c, real = _channels(G, C // G, CP)
    g = tl.arange(0, G)
    X += n * S * C
    first = tl.load(X + c, mask=real, other=0.0).to(tl.float32)
    pivot = tl.sum(first, 1) / (C // G)
    if PHASE != APPLY:
        one = tl.zeros((ROWS, G, CP), tl.float32)
        two = tl.zeros((ROWS, G, CP), tl.float32)
        for at in range(start, stop, ROWS):
            offset, ok = _rows(at, stop, c, real, C, ROWS)
            x = tl.load(X + offset, mask=ok, other=0.0).to(tl.float32)
            x = tl.where(ok, x - pivot[None, :, None], 0.0)
            one += x
            two += x * x
        sum1 = tl.sum(tl.sum(one, 0), 1)
        sum2 = tl.sum(tl.sum(two, 0), 1)
    if PHASE == SUMS:
        tl.store(PARTS + pid * 2 * G + g, sum1)
        tl.store(PARTS + pid * 2 * G + G + g, sum2)
    else:
        if PHASE == APPLY:
            t = tl.arange(0, TP)[:, None]
            at = (n * parts + t) * 2 * G + g[None, :]
            sum1 = tl.sum(tl.load(PARTS + at, mask=t < parts, other=0.0), 0)
            sum2 = tl.sum(tl.load(PARTS + at + G, mask=t < parts, other=0.0), 0)
        count = S * (C // G)
        off = sum1 / count
        mean = pivot + off
        rstd = 1.0 / tl.sqrt(tl.maximum(sum2 / count - off * off, 0.0) + eps)
        if part == 0:
            tl.store(MEAN + n * G + g, mean)
            tl.store(RSTD + n * G + g, rstd)
        w, b, _ = _affine(W, B, FILM, n, c, real, C, FILMED)
        w = w * rstd[:, None]
        b = b - mean[:, None] * w
        for at in range(start, stop, ROWS):
            offset, ok = _rows(at, stop, c, real, C, ROWS)
            u = tl.load(X + offset, mask=ok, other=0.0).to(tl.float32) * w[None, :, :] + b[None, :, :]
            if SILU:
                u = u * tl.sigmoid(u)
            tl.store(Y + n * S * C + offset, u.to(Y.dtype.element_ty), mask=ok)


@triton.jit
def _slope(GRAD, X, offset, ok, w, b, mean, rstd, SILU: tl.constexpr):
    """dL/du and x^ of a tile."""
    normal = (tl.load(X + offset, mask=ok, other=0.0).to(tl.float32) - mean) * rstd
    slope = tl.load(GRAD + offset, mask=ok, other=0.0).to(tl.float32)
    if SILU:
        u = normal * w + b
        gate = tl.sigmoid(u)
        slope = slope * gate * (1.0 + u * (1.0 - gate))
    return slope, normal


@triton.jit(do_not_specialize=SIZES)
def _backward(
    GRAD, X, W, B, FILM, MEAN, RSTD, DX, DAFFINE, DFILM, PARTS, S, chunk, parts,
    C: tl.constexpr, G: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr,
    PHASE: tl.constexpr, FILMED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    n, part = pid // parts, (pid % parts).to(tl.int32)
    start = part * chunk
    stop = tl.minimum(start + chunk, S)
    c, real = _channels(G, C // G, CP)
    g = tl.arange(0, G)
    X += n * S * C
    GRAD += n * S * C
    mean, rstd = tl.load(MEAN + n * G + g)[None, :, None], tl.load(RSTD + n * G + g)[None, :, None]
    gain, b, one = _affine(W, B, FILM, n, c, real, C, FILMED)
    if PHASE != APPLY:
        du = tl.zeros((ROWS, G, CP), tl.float32)
        dun = tl.zeros((ROWS, G, CP), tl.float32)
        for at in range(start, stop, ROWS):
            offset, ok = _rows(at, stop, c, real, C, ROWS)
            slope, normal = _slope(GRAD, X, offset, ok, gain[None, :, :], b[None, :, :], mean, rstd, SILU)
            du += slope
            dun += slope * normal
        sum1 = tl.sum(du, 0)
        sum2 = tl.sum(dun, 0)
    if PHASE == SUMS:
        tl.store(PARTS + pid * 2 * C + c, sum1, mask=real)
        tl.store(PARTS + pid * 2 * C + C + c, sum2, mask=real)
    else:
        if PHASE == APPLY:
            sum1 = tl.zeros((G, CP), tl.float32)
            sum2 = tl.zeros((G, CP), tl.float32)
            for t in range(parts):
                at = (n * parts + t) * 2 * C + c
                sum1 += tl.load(PARTS + at, mask=real, other=0.0)
                sum2 += tl.load(PARTS + at + C, mask=real, other=0.0)
        if part == 0:
            tl.store(DAFFINE + n * 2 * C + c, sum2 * one, mask=real)
            tl.store(DAFFINE + n * 2 * C + C + c, sum1 * one, mask=real)
            if FILMED:
                w = tl.load(W + c, mask=real, other=0.0).to(tl.float32)
                bias = tl.load(B + c, mask=real, other=0.0).to(tl.float32)
                scale = w * sum2 + bias * sum1
                tl.store(DFILM + n * 2 * C + c, scale.to(DFILM.dtype.element_ty), mask=real)
                tl.store(DFILM + n * 2 * C + C + c, sum1.to(DFILM.dtype.element_ty), mask=real)
        count = S * (C // G)
        m1 = (tl.sum(gain * sum1, 1) / count)[None, :, None]
        m2 = (tl.sum(gain * sum2, 1) / count)[None, :, None]
        for at in range(start, stop, ROWS):
            offset, ok = _rows(at, stop, c, real, C, ROWS)
            slope, normal = _slope(GRAD, X, offset, ok, gain[None, :, :], b[None, :, :], mean, rstd, SILU)
            dx = rstd * (slope * gain[None, :, :] - m1 - normal * m2)
            tl.store(DX + n * S * C + offset, dx.to(DX.dtype.element_ty), mask=ok)


def _spread(frames: int, positions: int, rows: int, device: torch.device) -> tuple[int, int]:
    """(chunk, parts): positions of a program, a multiple of `rows`, and programs of a frame."""
    wanted = max(1, 2 * multiprocessors(device) // frames)  # frames alone fill the GPU: one launch
    chunk = triton.cdiv(triton.cdiv(positions, wanted), rows) * rows
    return chunk, triton.cdiv(positions, chunk)


def _constants(x: Tensor, film: Tensor | None, groups: int, silu: bool, elements: int) -> dict[str, int | bool]:
    channels = x.shape[1]
    padded = triton.next_power_of_2(channels // groups)
    rows = max(1, min(elements // (groups * padded), triton.next_power_of_2(x.shape[2] * x.shape[3])))
    return {
        "C": channels,
        "G": groups,
        "CP": padded,
        "ROWS": rows,
        "FILMED": film is not None,
        "SILU": silu,
    }


FORWARD, BACKWARD = 4096, 2048  # elements of a tile
WARPS = 4


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
    frames, _, height, width = x.shape
    constants = _constants(x, film, groups, silu, FORWARD)
    chunk, parts = _spread(frames, height * width, int(constants["ROWS"]), x.device)
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
    mean, rstd = (x.new_empty((frames, groups), dtype=torch.float32) for _ in range(2))
    sums = x.new_empty((frames, parts, 2, groups) if parts > 1 else (1,), dtype=torch.float32)
    constants["TP"] = 1 if parts == 1 else 64 if parts <= 64 else triton.next_power_of_2(parts)
    for phase in (0,) if parts == 1 else (1, 2):
        _forward[(frames * parts,)](
            x, weight, bias, x if film is None else film, y, mean, rstd, sums, height * width, chunk, parts, eps,
            PHASE=phase, num_warps=WARPS, **constants,
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
    frames, channels, height, width = x.shape
    constants = _constants(x, film, groups, silu, BACKWARD)
    chunk, parts = _spread(frames, height * width, int(constants["ROWS"]), x.device)
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    daffine = x.new_empty((frames, 2, channels), dtype=torch.float32)
    dfilm = x.new_empty(0) if film is None else torch.empty_like(film)
    sums = x.new_empty((frames, parts, 2, channels) if parts > 1 else (1,), dtype=torch.float32)
    for phase in (0,) if parts == 1 else (1, 2):
        _backward[(frames * parts,)](
            grad, x, weight, bias, x if film is None else film, mean, rstd, dx, daffine, dfilm, sums,
            height * width, chunk, parts, PHASE=phase, num_warps=WARPS, **constants,
        )  # fmt: skip
    return dx, daffine.sum(0), dfilm
