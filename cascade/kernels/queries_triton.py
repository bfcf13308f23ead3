"""Triton code of what may be done to q and k before they meet: division by the root mean square, rotation by the frame.

Imports Triton as it loads: only `temporal_triton` does.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rotate(x, TURN, f, F: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr, BACK: tl.constexpr):
    """Each pair of neighbouring lanes turned by its frame's angle, or back. TURN: cosines, then sines, (F, D / 2)."""
    pair = tl.arange(0, LANES // 2)
    at = f[:, None] * (D // 2) + pair[None, :]
    ok = (f < F)[:, None] & (pair < D // 2)[None, :]
    cos = tl.load(TURN + at, mask=ok, other=0.0)
    sin = tl.load(TURN + F * (D // 2) + at, mask=ok, other=0.0)
    if BACK:
        sin = -sin
    one, two = tl.split(tl.reshape(x, (x.shape[0], LANES // 2, 2)))
    return tl.reshape(tl.join(one * cos - two * sin, one * sin + two * cos), (x.shape[0], LANES))


@triton.jit
def prepare(
    x, GAINS, TURN, f, EPS: tl.constexpr, F: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr,
    NORMED: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """What the scores are made of: x over its root mean square, times the gains, turned."""
    y = x.to(tl.float32)
    if NORMED:
        lane = tl.arange(0, LANES)
        gain = tl.load(GAINS + lane, mask=lane < D, other=0.0).to(tl.float32)
        y = y * tl.rsqrt(tl.sum(y * y, 1) / D + EPS)[:, None] * gain[None, :]
    if TURNED:
        y = _rotate(y, TURN, f, F, D, LANES, False)
    return y.to(x.dtype)


@triton.jit
def unprepare(
    dy, x, GAINS, TURN, f, EPS: tl.constexpr, F: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr,
    NORMED: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """The gradient of x and the gains from that of `prepare`'s answer."""
    dgain = tl.zeros((LANES,), tl.float32)
    if TURNED:
        dy = _rotate(dy, TURN, f, F, D, LANES, True)
    if NORMED:
        lane = tl.arange(0, LANES)
        gain = tl.load(GAINS + lane, mask=lane < D, other=0.0).to(tl.float32)
        x = x.to(tl.float32)
        rms = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)[:, None]
        dgain = tl.sum(dy * x * rms, 0)
        dy = dy * gain[None, :]
        dy = rms * (dy - x * rms * (tl.sum(dy * x * rms, 1) / D)[:, None])
    return dy, dgain
