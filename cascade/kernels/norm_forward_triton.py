"""Triton code of the group norm's forward pass, and what the backward pass shares with it.

Imports Triton as it loads: only `norm_triton` and `norm_backward_triton` do. How an image is cut into rows, chunks and
programs stands in `norm_plan`.

A program's sums are taken about its first row and those of an image's programs put together as in Chan et al. 1983: a
mean far from zero costs no precision.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ["S", "chunk", "parts"]  # compiled once for all of them
TOGETHER = tl.constexpr(64)  # parts whose sums are read at a time


# what forward and backward share -------------------------------------------------------------------------------------


@triton.jit
def owned(pid, S, chunk, parts, FOLD: tl.constexpr):
    """Image, part, and the rows of a program: `start` to before `stop`."""
    part = pid % parts
    start = part * chunk
    return (pid // parts).to(tl.int64), part, start, tl.minimum(start + chunk, tl.cdiv(S, FOLD))


@triton.jit
def backwards():
    """The program's number from the last: what was read last is read again first."""
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def last(DONE, parts):
    """Says that this program's sums are in memory; whether those of all programs of the image are."""
    tl.debug_barrier()
    return tl.atomic_add(DONE, 1, sem="acq_rel") == parts - 1


@triton.jit
def tile(row, stop, lane, size, W: tl.constexpr, ROWS: tl.constexpr):
    """Offsets within the image and mask of `ROWS` rows from `row`, of W of the lanes."""
    r = row + tl.arange(0, ROWS)
    at = r[:, None] * W + lane[None, :]
    return at, (r < stop)[:, None] & (lane < W)[None, :] & (at < size)


@triton.jit
def members(c, real, G: tl.constexpr, CG: tl.constexpr):
    """(G, lanes): which group a lane is of."""
    return (tl.arange(0, G)[:, None] == (c // CG)[None, :]) & real[None, :]


@triton.jit
def gather(x, hot):
    """(lanes,) -> (G,): the sum of each group."""
    return tl.sum(tl.where(hot, x[None, :], 0.0), 1)


@triton.jit
def spread(x, hot):
    """(G,) -> (lanes,)."""
    return tl.sum(tl.where(hot, x[:, None], 0.0), 0)


@triton.jit
def affine(W, B, FILM, n, c, real, C: tl.constexpr, FILMED: tl.constexpr):
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
def sigmoid(u, FAST: tl.constexpr):
    """To 3e-7. `FAST`, for GPUs alone, is 5 instructions instead of 12, of which half of the kernels' work would be."""
    if FAST:
        return tl.inline_asm_elementwise(
            "{.reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.f32 e, e, 0f3F800000;"
            " rcp.approx.ftz.f32 $0, e;}",
            "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return tl.sigmoid(u)


@triton.jit
def kept(S, C: tl.constexpr, G: tl.constexpr, SOME: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
    """The SOME groups that a program keeps: image, first group; channels, places and their masks; `members`."""
    CG: tl.constexpr = C // G
    pid = tl.program_id(0)
    n, first = (pid // (G // SOME)).to(tl.int64), pid % (G // SOME) * SOME
    lane, r = tl.arange(0, LANES), tl.arange(0, ROWS)
    c, real = first * CG + lane, lane < SOME * CG
    at = n * S * C + (r[:, None] * C + c[None, :])
    ok = (r < S)[:, None] & real[None, :]
    return n, first, c, real, at, ok, members(lane, real, SOME, CG)


# forward -------------------------------------------------------------------------------------------------------------


@triton.jit
def _activate(u, SILU: tl.constexpr, FAST: tl.constexpr):
    if SILU:
        u = u * sigmoid(u, FAST)
    return u


@triton.jit(do_not_specialize=["S"])
def forward_whole(
    X, W, B, FILM, Y, MEAN, RSTD, S, eps,
    C: tl.constexpr, G: tl.constexpr, SOME: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    FILMED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """SOME of the G groups of an image."""
    n, first, c, real, at, ok, hot = kept(S, C, G, SOME, LANES, ROWS)
    count = S * (C // G)
    x = tl.load(X + at, mask=ok, other=0.0).to(tl.float32)
    mean = gather(tl.sum(x, 0), hot) / count
    centred = tl.where(ok, x - spread(mean, hot)[None, :], 0.0)
    rstd = 1.0 / tl.sqrt(gather(tl.sum(centred * centred, 0), hot) / count + eps)
    g = n * G + first + tl.arange(0, SOME)
    tl.store(MEAN + g, mean)
    tl.store(RSTD + g, rstd)
    w, b, _ = affine(W, B, FILM, n, c, real, C, FILMED)
    u = _activate(centred * (w * spread(rstd, hot))[None, :] + b[None, :], SILU, FAST)
    tl.store(Y + at, u.to(Y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=SIZES)
def forward_sums(
    X, MEAN, RSTD, PARTS, DONE, S, chunk, parts, eps,
    C: tl.constexpr, G: tl.constexpr, FOLD: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squares about it of a program's rows into PARTS (N, parts, 2, G); by the last, MEAN and RSTD."""
    WIDE: tl.constexpr = FOLD * C
    CG: tl.constexpr = C // G
    n, part, start, stop = owned(tl.program_id(0), S, chunk, parts, FOLD)
    size = S * C
    lane = tl.arange(0, LANES)
    c, real = lane % C, lane < WIDE
    X += n * size
    pivot = tl.load(X + start * WIDE + lane, mask=real & (start * WIDE + lane < size), other=0.0).to(tl.float32)
    one = tl.zeros((ROWS, LANES), tl.float32)
    two = tl.zeros((ROWS, LANES), tl.float32)
    for row in range(start, stop, ROWS):
        at, ok = tile(row, stop, lane, size, WIDE, ROWS)
        x = tl.load(X + at, mask=ok, other=0.0).to(tl.float32)
        x = tl.where(ok, x - pivot[None, :], 0.0)
        one += x
        two += x * x
    s = tl.sum(one, 0)
    rows = tl.maximum(tl.minimum(stop * WIDE, size) - start * WIDE - lane + WIDE - 1, 0) // WIDE  # that a lane saw
    rows = tl.where(real, rows, 0).to(tl.float32)
    off = s / tl.maximum(rows, 1.0)
    mean = pivot + off
    hot = members(c, real, G, CG)
    middle = gather(rows * mean, hot) / gather(rows, hot)
    away = mean - spread(middle, hot)
    to = PARTS + (n * parts + part) * 2 * G + tl.arange(0, G)
    tl.store(to, middle)
    tl.store(to + G, gather(tl.sum(two, 0) - s * off + rows * away * away, hot))
    if last(DONE + n, parts):
        _statistics(PARTS, MEAN, RSTD, n, S, chunk * FOLD, parts, eps, G, CG)


@triton.jit
def _statistics(PARTS, MEAN, RSTD, n, S, each, parts, eps, G: tl.constexpr, CG: tl.constexpr):
    """Of an image, from those of its parts of `each` positions."""
    g, t = tl.arange(0, G), tl.arange(0, TOGETHER)[:, None]
    total = tl.zeros((TOGETHER, G), tl.float32)
    for begin in range(0, parts, TOGETHER):
        p = begin + t
        share = tl.minimum(each, S - p * each).to(tl.float32) / S
        at = PARTS + (n * parts + p) * 2 * G + g[None, :]
        total += share * tl.load(at, mask=p < parts, other=0.0, cache_modifier=".cg")
    mean = tl.sum(total, 0)
    total = tl.zeros((TOGETHER, G), tl.float32)
    for begin in range(0, parts, TOGETHER):
        p = begin + t
        count = tl.minimum(each, S - p * each).to(tl.float32) * CG
        at = PARTS + (n * parts + p) * 2 * G + g[None, :]
        apart = tl.load(at, mask=p < parts, other=0.0, cache_modifier=".cg") - mean[None, :]
        square = tl.load(at + G, mask=p < parts, other=0.0, cache_modifier=".cg")
        total += tl.where(p < parts, square + count * apart * apart, 0.0)
    tl.store(MEAN + n * G + g, mean)
    tl.store(RSTD + n * G + g, 1.0 / tl.sqrt(tl.sum(total, 0) / (S * CG) + eps))


@triton.jit(do_not_specialize=SIZES)
def forward_apply(
    X, W, B, FILM, Y, MEAN, RSTD, S, chunk, parts,
    C: tl.constexpr, G: tl.constexpr, FOLD: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    FILMED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = FOLD * C
    CG: tl.constexpr = C // G
    n, _, start, stop = owned(backwards(), S, chunk, parts, FOLD)
    size = S * C
    lane = tl.arange(0, LANES)
    c, real = lane % C, lane < WIDE
    w, b, _ = affine(W, B, FILM, n, c, real, C, FILMED)
    w *= tl.load(RSTD + n * G + c // CG, mask=real, other=0.0, cache_modifier=".cg")
    b -= w * tl.load(MEAN + n * G + c // CG, mask=real, other=0.0, cache_modifier=".cg")
    X += n * size
    Y += n * size
    for row in range(start, stop, ROWS):
        at, ok = tile(row, stop, lane, size, WIDE, ROWS)
        x = tl.load(X + at, mask=ok, other=0.0, eviction_policy="evict_first").to(tl.float32)
        u = _activate(x * w[None, :] + b[None, :], SILU, FAST)
        tl.store(Y + at, u.to(Y.dtype.element_ty), mask=ok, eviction_policy="evict_first")
