"""Triton code of attention over frames. Imports Triton as it loads: only `cascade.kernels.temporal` does, to launch it.

A tile is `R` rows: all frames of R / FP positions of one head, FP being the frames rounded up to a power of two. The
scores of a tile are one R x R product of which only the blocks on the diagonal (same position) count: on tensor cores
the rest is free, the kernel waits for memory. At most 128 frames fit one tile, so a row of the softmax is never split:
the backward pass computes it again from q and k and needs neither the output nor its log-sum (the gradient's row sums
are those of P dP), which saves two of nine passes over memory against Dao et al. 2022, alg. 4.

A program keeps one head and walks over tiles, so that the bias is read once and its gradient is summed in registers;
programs that run side by side work at neighbouring heads and positions, which lie side by side in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cascade.kernels import EPS, multiprocessors
from cascade.kernels.queries_triton import prepare, unprepare

SIZES = ["S", "H", "tiles", "turns", "programs"]  # compiled once for all of them


@triton.jit
def _load(X, at, ok, LANES: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr):
    """The rows of X that begin at the offsets `at`; zeros where not `ok` and beyond D."""
    lane = tl.arange(0, LANES)
    x = tl.load(X + at[:, None] + lane[None, :], mask=ok[:, None] & (lane < D)[None, :], other=0.0)
    if WIDE:  # Triton's interpreter cannot multiply matrices of bfloat16
        x = x.to(tl.float32)
    return x


@triton.jit
def _store(X, at, ok, x, LANES: tl.constexpr, D: tl.constexpr):
    lane = tl.arange(0, LANES)
    tl.store(X + at[:, None] + lane[None, :], x.to(X.dtype.element_ty), mask=ok[:, None] & (lane < D)[None, :])


@triton.jit
def _bias(BIAS, outer, h, sb, sh, sm, sn, f, same, F: tl.constexpr):
    """The bias of one head in every diagonal block of the tile."""
    at = outer.to(tl.int64) * sb + h * sh + f[:, None] * sm + f[None, :] * sn
    return tl.load(BIAS + at, mask=same & (f < F)[:, None], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def _forward(
    Q, K, V, BIAS, GAINS, TURN, OUT, LSE,
    qb, qf, qs, qh, kb, kf, ks, kh, vb, vf, vs, vh, bb, bh, bm, bn,
    S, H, tiles, turns, programs, scale,
    F: tl.constexpr, FP: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr, R: tl.constexpr,
    BIASED: tl.constexpr, NORMED: tl.constexpr, TURNED: tl.constexpr, EPS: tl.constexpr,
    NEEDS_LSE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    h = (pid % H).to(tl.int64)
    first = (pid // H) % programs
    outer = pid // H // programs
    row = tl.arange(0, R)
    place = row // FP
    f = (row % FP).to(tl.int64)
    same = (place[:, None] == place[None, :]) & (f < F)[None, :]
    if BIASED:
        bias = _bias(BIAS, outer, h, bb, bh, bm, bn, f, same, F)
    for turn in range(first, turns, programs):
        tile = outer * turns + turn
        b = (tile // tiles).to(tl.int64)
        s = (tile % tiles).to(tl.int64) * (R // FP) + place
        ok = (f < F) & (s < S)
        q = _load(Q, b * qb + f * qf + s * qs + h * qh, ok, LANES, D, WIDE)
        k = _load(K, b * kb + f * kf + s * ks + h * kh, ok, LANES, D, WIDE)
        v = _load(V, b * vb + f * vf + s * vs + h * vh, ok, LANES, D, WIDE)
        if NORMED or TURNED:
            q = prepare(q, GAINS, TURN, f, EPS, F, D, LANES, NORMED, TURNED)
            k = prepare(k, GAINS + D, TURN, f, EPS, F, D, LANES, NORMED, TURNED)
        a = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if BIASED:
            a += bias
        a = tl.where(same, a, -1e30)
        top = tl.max(a, 1)
        p = tl.exp(a - top[:, None])
        total = tl.sum(p, 1)
        o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) / total[:, None]
        _store(OUT, (((b * F + f) * S + s) * H + h) * D, ok, o, LANES, D)
        if NEEDS_LSE:
            tl.store(LSE + ((b * S + s) * H + h) * F + f, top + tl.log(total), mask=ok)


@triton.jit(do_not_specialize=SIZES)
def _backward(
    G, Q, K, V, BIAS, GAINS, TURN, DQ, DK, DV, DBIAS, DGAINS,
    gb, gf, gs, gh, qb, qf, qs, qh, kb, kf, ks, kh, vb, vf, vs, vh, bb, bh, bm, bn,
    S, H, tiles, turns, programs, scale,
    F: tl.constexpr, FP: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr, R: tl.constexpr,
    BIASED: tl.constexpr, NORMED: tl.constexpr, TURNED: tl.constexpr, EPS: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    h = (pid % H).to(tl.int64)
    first = (pid // H) % programs
    outer = pid // H // programs
    row = tl.arange(0, R)
    place = row // FP
    f = (row % FP).to(tl.int64)
    same = (place[:, None] == place[None, :]) & (f < F)[None, :]
    if BIASED:
        bias = _bias(BIAS, outer, h, bb, bh, bm, bn, f, same, F)
    if BIAS_GRADIENT:
        dbias = tl.zeros((R, R), tl.float32)
    if NORMED:
        dgain_q = tl.zeros((LANES,), tl.float32)
        dgain_k = tl.zeros((LANES,), tl.float32)
    for turn in range(first, turns, programs):
        tile = outer * turns + turn
        b = (tile // tiles).to(tl.int64)
        s = (tile % tiles).to(tl.int64) * (R // FP) + place
        ok = (f < F) & (s < S)
        q = _load(Q, b * qb + f * qf + s * qs + h * qh, ok, LANES, D, WIDE)
        k = _load(K, b * kb + f * kf + s * ks + h * kh, ok, LANES, D, WIDE)
        v = _load(V, b * vb + f * vf + s * vs + h * vh, ok, LANES, D, WIDE)
        g = _load(G, b * gb + f * gf + s * gs + h * gh, ok, LANES, D, WIDE)
        if NORMED or TURNED:
            given_q = q
            given_k = k
            q = prepare(q, GAINS, TURN, f, EPS, F, D, LANES, NORMED, TURNED)
            k = prepare(k, GAINS + D, TURN, f, EPS, F, D, LANES, NORMED, TURNED)
        a = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if BIASED:
            a += bias
        a = tl.where(same, a, -1e30)
        p = tl.exp(a - tl.max(a, 1)[:, None])
        p = p / tl.sum(p, 1)[:, None]
        to = (((b * F + f) * S + s) * H + h) * D
        _store(DV, to, ok, tl.dot(tl.trans(p.to(g.dtype)), g, input_precision=PRECISION), LANES, D)
        da = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        da = p * (da - tl.sum(p * da, 1)[:, None])
        if BIAS_GRADIENT:
            dbias += da
        da = (da * scale).to(q.dtype)
        dq = tl.dot(da, k, input_precision=PRECISION)
        dk = tl.dot(tl.trans(da), q, input_precision=PRECISION)
        if NORMED or TURNED:
            dq, of_q = unprepare(dq, given_q, GAINS, TURN, f, EPS, F, D, LANES, NORMED, TURNED)
            dk, of_k = unprepare(dk, given_k, GAINS + D, TURN, f, EPS, F, D, LANES, NORMED, TURNED)
            if NORMED:
                dgain_q += of_q
                dgain_k += of_k
        _store(DQ, to, ok, dq, LANES, D)
        _store(DK, to, ok, dk, LANES, D)
    if NORMED:
        lane = tl.arange(0, LANES)
        to = DGAINS + pid.to(tl.int64) * 2 * D + lane
        tl.store(to, dgain_q, mask=lane < D)
        tl.store(to + D, dgain_k, mask=lane < D)
    if BIAS_GRADIENT:
        at = ((pid.to(tl.int64) * (R // FP) + place[:, None]) * F + f[:, None]) * F + f[None, :]
        tl.store(DBIAS + at, dbias, mask=same & (f < F)[:, None])


@dataclass(frozen=True)
class Launch:
    """How a kernel is compiled and spread over the GPU."""

    rows: int  # R
    warps: int
    stages: int  # tiles in flight
    turns: int  # tiles a program walks over, about


def configuration(frames: int, head: int, dtype: torch.dtype, backward: bool) -> Launch:
    """By hand instead of a search: what compiles for sm_90 with the fewest registers spilled.

    tests/test_kernels_compiled.py holds each to its limits. Short clips take small tiles: less of the R x R product is
    thrown away and the gradients' five products fit the registers.
    """
    rows = max(32, triton.next_power_of_2(frames))
    wide = head > 64
    if dtype is torch.float32:
        warps = 4 if not backward and rows == 32 and not wide else 16 if backward and rows > 32 else 8
        return Launch(rows, warps, 1, 4)
    if not backward:
        rows = max(64, rows)
        return Launch(rows, 8 if rows > 64 or wide else 4, 1 if rows > 64 and wide else 2, 4)
    # Many turns: every program leaves a gradient of the bias behind, which is to be small beside q, k and v.
    return Launch(rows, 4 if rows == 32 else 8, 1 if rows > 64 and wide else 2, 16 if rows == 32 else 32)


@dataclass(frozen=True)
class _Grid:
    """The numbers that both kernels need."""

    launch: Launch
    programs: int  # that share the tiles of a head
    outer: int  # batch entries if each has a bias of its own, else 1
    sizes: tuple[int, ...]  # S, H, tiles, turns, programs
    constants: dict[str, int | float | bool | str]

    @property
    def count(self) -> int:
        return self.outer * self.programs * self.sizes[1]


def _grid(
    q: Tensor,
    bias: Tensor | None,
    gains: Tensor | None,
    rotary: Tensor | None,
    precision: str,
    backward: bool,
    launch: Launch | None,
) -> _Grid:
    batch, frames, positions, heads, head = q.shape
    launch = launch or configuration(frames, head, q.dtype, backward)
    padded = triton.next_power_of_2(frames)
    tiles = triton.cdiv(positions, launch.rows // padded)
    outer = batch if bias is not None and bias.shape[0] > 1 else 1
    turns = batch * tiles // outer
    fill = triton.cdiv(4 * multiprocessors(q.device), outer * heads)  # programs that keep the whole GPU busy
    programs = max(min(turns, fill), triton.cdiv(turns, launch.turns))
    constants: dict[str, int | float | bool | str] = {
        "F": frames,
        "FP": padded,
        "D": head,
        "LANES": max(16, triton.next_power_of_2(head)),
        "R": launch.rows,
        "BIASED": bias is not None,
        "NORMED": gains is not None,
        "TURNED": rotary is not None,
        "EPS": EPS,
        "PRECISION": precision,
        "WIDE": q.device.type == "cpu" and q.dtype is torch.bfloat16,
    }
    return _Grid(launch, programs, outer, (positions, heads, tiles, turns, programs), constants)


def _bias_strides(bias: Tensor | None) -> tuple[int, ...]:
    if bias is None:
        return (0, 0, 0, 0)
    return tuple(0 if n == 1 else stride for n, stride in zip(bias.shape, bias.stride(), strict=True))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    lse: bool,
    precision: str,
    launch: Launch | None = None,
    gains: Tensor | None = None,
    rotary: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `cascade.kernels.temporal.attention`; the log-sum is (B, S, h, F), or empty where it is not asked for."""
    batch, frames, positions, heads, _ = q.shape
    grid = _grid(q, bias, gains, rotary, precision, False, launch)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    sums = q.new_empty((batch, positions, heads, frames) if lse else (0,), dtype=torch.float32)
    strides = (*q.stride()[:4], *k.stride()[:4], *v.stride()[:4], *_bias_strides(bias))
    _forward[(grid.count,)](
        q, k, v, q if bias is None else bias, q if gains is None else gains, q if rotary is None else rotary, out, sums,
        *strides, *grid.sizes, scale,
        NEEDS_LSE=lse, num_warps=grid.launch.warps, num_stages=grid.launch.stages, **grid.constants,
    )  # fmt: skip
    return out, sums


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    bias_gradient: bool,
    precision: str,
    launch: Launch | None = None,
    gains: Tensor | None = None,
    rotary: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv (B, F, S, h, D) and in float32, empty if not asked for, those of bias (B | 1, h, F, F) and gains."""
    frames, heads = q.shape[1], q.shape[3]
    grid = _grid(q, bias, gains, rotary, precision, True, launch)
    dq, dk, dv = (torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(3))
    parts = (grid.outer, grid.programs, heads, grid.launch.rows // int(grid.constants["FP"]), frames, frames)
    dbias = q.new_empty(parts if bias_gradient else (0,), dtype=torch.float32)
    dgains = q.new_empty((grid.count, 2, q.shape[-1]) if gains is not None else (0,), dtype=torch.float32)
    strides = (*grad.stride()[:4], *q.stride()[:4], *k.stride()[:4], *v.stride()[:4], *_bias_strides(bias))
    _backward[(grid.count,)](
        grad, q, k, v, q if bias is None else bias, q if gains is None else gains, q if rotary is None else rotary,
        dq, dk, dv, dbias, dgains, *strides, *grid.sizes, scale,
        BIAS_GRADIENT=bias_gradient, num_warps=grid.launch.warps, num_stages=grid.launch.stages, **grid.constants,
    )  # fmt: skip
    return dq, dk, dv, dbias.sum((1, 3)) if bias_gradient else dbias, dgains if gains is None else dgains.sum(0)
