"""Triton code of the group norm's backward pass. Imports Triton as it loads: only `norm_triton` does.

With u = gain x^ + offset and dL/du, of which `_slope` makes SiLU's part, dx is rstd (gain du - the mean of gain du over
the group - x^ times the mean of gain du x^): two sums over an image, then one application. The same sums by channel are
the gradients of weight, bias and FiLM.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cascade.kernels.norm_forward_triton import (
    SIZES,
    TOGETHER,
    affine,
    backwards,
    gather,
    kept,
    last,
    members,
    owned,
    sigmoid,
    spread,
    tile,
)


@triton.jit
def _slope(grad, x, gain, b, rstd, middle, SILU: tl.constexpr, FAST: tl.constexpr):
    """dL/du and x^ = x rstd - middle; the lanes' numbers are (lanes,)."""
    normal = x * rstd[None, :] - middle[None, :]
    if SILU:
        u = normal * gain[None, :] + b[None, :]
        gate = sigmoid(u, FAST)
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
def backward_whole(
    GRAD, X, W, B, FILM, MEAN, RSTD, DX, DAFFINE, DFILM, S,
    C: tl.constexpr, G: tl.constexpr, SOME: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    FILMED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """SOME of the G groups of an image."""
    CG: tl.constexpr = C // G
    n, _, c, real, at, ok, hot = kept(S, C, G, SOME, LANES, ROWS)
    x = tl.load(X + at, mask=ok, other=0.0).to(tl.float32)
    grad = tl.load(GRAD + at, mask=ok, other=0.0).to(tl.float32)
    mean = tl.load(MEAN + n * G + c // CG, mask=real, other=0.0)
    rstd = tl.load(RSTD + n * G + c // CG, mask=real, other=0.0)
    gain, b, one = affine(W, B, FILM, n, c, real, C, FILMED)
    slope, normal = _slope(grad, x, gain, b, rstd, mean * rstd, SILU, FAST)
    sum1, sum2 = tl.sum(slope, 0), tl.sum(slope * normal, 0)
    _parameters(W, B, DAFFINE, DFILM, n, c, real, one, sum1, sum2, C, FILMED)
    m1 = spread(gather(gain * sum1, hot), hot) / (S * CG)
    m2 = spread(gather(gain * sum2, hot), hot) / (S * CG)
    gain *= rstd
    dx = slope * gain[None, :] - (m1 * rstd)[None, :] - normal * (m2 * rstd)[None, :]
    tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=SIZES)
def backward_sums(
    GRAD, X, W, B, FILM, MEAN, RSTD, PARTS, LANEWISE, MOMENTS, DONE, S, chunk, parts,
    C: tl.constexpr, G: tl.constexpr, FOLD: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    FILMED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Sums of du and du x^ of a program's rows, by lane and by group; by the last, MOMENTS (N, 2, G): their means."""
    WIDE: tl.constexpr = FOLD * C
    CG: tl.constexpr = C // G
    n, part, start, stop = owned(tl.program_id(0), S, chunk, parts, FOLD)
    size = S * C
    lane = tl.arange(0, LANES)
    c, real = lane % C, lane < WIDE
    X += n * size
    GRAD += n * size
    mean = tl.load(MEAN + n * G + c // CG, mask=real, other=0.0)
    rstd = tl.load(RSTD + n * G + c // CG, mask=real, other=0.0)
    gain, b, _ = affine(W, B, FILM, n, c, real, C, FILMED)
    du = tl.zeros((ROWS, LANES), tl.float32)
    dun = tl.zeros((ROWS, LANES), tl.float32)
    for row in range(start, stop, ROWS):
        at, ok = tile(row, stop, lane, size, WIDE, ROWS)
        x = tl.load(X + at, mask=ok, other=0.0).to(tl.float32)
        grad = tl.load(GRAD + at, mask=ok, other=0.0).to(tl.float32)
        slope, normal = _slope(grad, x, gain, b, rstd, mean * rstd, SILU, FAST)
        du += slope
        dun += slope * normal
    sum1 = tl.sum(du, 0)
    sum2 = tl.sum(dun, 0)
    tl.store(LANEWISE + (n * parts + part) * 2 * WIDE + lane, sum1, mask=real)
    tl.store(LANEWISE + (n * parts + part) * 2 * WIDE + WIDE + lane, sum2, mask=real)
    hot = members(c, real, G, CG)
    to = PARTS + (n * parts + part) * 2 * G + tl.arange(0, G)
    tl.store(to, gather(gain * sum1, hot))
    tl.store(to + G, gather(gain * sum2, hot))
    if last(DONE + n, parts):
        _moments(PARTS, MOMENTS, n, S, parts, G, CG)


@triton.jit
def _moments(PARTS, MOMENTS, n, S, parts, G: tl.constexpr, CG: tl.constexpr):
    g, t = tl.arange(0, G), tl.arange(0, TOGETHER)[:, None]
    m1 = tl.zeros((TOGETHER, G), tl.float32)
    m2 = tl.zeros((TOGETHER, G), tl.float32)
    for begin in range(0, parts, TOGETHER):
        p = begin + t
        at = PARTS + (n * parts + p) * 2 * G + g[None, :]
        m1 += tl.load(at, mask=p < parts, other=0.0, cache_modifier=".cg")
        m2 += tl.load(at + G, mask=p < parts, other=0.0, cache_modifier=".cg")
    tl.store(MOMENTS + n * 2 * G + g, tl.sum(m1, 0) / (S * CG))
    tl.store(MOMENTS + n * 2 * G + G + g, tl.sum(m2, 0) / (S * CG))


@triton.jit(do_not_specialize=SIZES)
def backward_apply(
    GRAD, X, W, B, FILM, MEAN, RSTD, DX, MOMENTS, S, chunk, parts,
    C: tl.constexpr, G: tl.constexpr, FOLD: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    FILMED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = FOLD * C
    CG: tl.constexpr = C // G
    n, _, start, stop = owned(backwards(), S, chunk, parts, FOLD)
    size = S * C
    lane = tl.arange(0, LANES)
    c, real = lane % C, lane < WIDE
    mean = tl.load(MEAN + n * G + c // CG, mask=real, other=0.0)
    rstd = tl.load(RSTD + n * G + c // CG, mask=real, other=0.0)
    gain, b, _ = affine(W, B, FILM, n, c, real, C, FILMED)
    full = gain * rstd
    m1 = rstd * tl.load(MOMENTS + n * 2 * G + c // CG, mask=real, other=0.0, cache_modifier=".cg")
    m2 = rstd * tl.load(MOMENTS + n * 2 * G + G + c // CG, mask=real, other=0.0, cache_modifier=".cg")
    X += n * size
    GRAD += n * size
    DX += n * size
    for row in range(start, stop, ROWS):
        at, ok = tile(row, stop, lane, size, WIDE, ROWS)
        x = tl.load(X + at, mask=ok, other=0.0, eviction_policy="evict_first").to(tl.float32)
        grad = tl.load(GRAD + at, mask=ok, other=0.0, eviction_policy="evict_first").to(tl.float32)
        slope, normal = _slope(grad, x, gain, b, rstd, mean * rstd, SILU, FAST)
        dx = slope * full[None, :] - m1[None, :] - normal * m2[None, :]
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=ok, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["parts"])
def parameter_gradients(
    W, B, FILM, LANEWISE, DAFFINE, DFILM, parts,
    C: tl.constexpr, FOLD: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, FILMED: tl.constexpr,
):  # fmt: skip
    """Of one image and `LANES` channels, from LANEWISE (N, parts, 2, FOLD, C), which `backward_sums` left."""
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
    _, _, one = affine(W, B, FILM, n, c, real, C, FILMED)
    _parameters(W, B, DAFFINE, DFILM, n, c, real, one, tl.sum(sum1, 0), tl.sum(sum2, 0), C, FILMED)
