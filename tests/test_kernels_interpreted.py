"""The Triton code against float64, forward and backward, in Triton's interpreter on the CPU.

The interpreter must be chosen before Triton is imported, so one test here runs the others in a process of their own.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.kernels import norm, temporal

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
inside = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_the_kernels_in_tritons_interpreter")
# bfloat16 is multiplied in float32 here: the interpreter's own product of it is wrong (triton issue 11584).
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
CLIPS = [  # B, F, S, h, D
    (1, 1, 1, 1, 16),
    (2, 1, 70, 2, 16),
    (2, 8, 5, 2, 64),
    (2, 16, 9, 3, 24),
    (1, 31, 3, 1, 96),
    (3, 5, 33, 2, 8),
    (1, 100, 2, 1, 32),
    (1, 128, 1, 1, 64),
]
IMAGES = [(3, 64, 4, 5), (5, 96, 8, 8), (2, 12, 3, 3), (1, 40, 37, 11), (70, 8, 2, 2), (1, 64, 40, 40)]  # N, C, H, W
IMAGES += [(2, 80, 15, 17), (1, 320, 9, 7)]


@triton
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the process it starts")
def test_the_kernels_in_tritons_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def near(got: Tensor, want: Tensor, dtype: torch.dtype, floor: float = 0.0, times: float = 1.0) -> None:
    error = (got.double() - want).norm() / want.norm().clamp_min(floor or 1e-30)
    assert got.shape == want.shape and error <= times * TOLERANCE[dtype], f"relative error {error:.1e}"


def double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


def strided(shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> list[Tensor]:
    """q, k, v as views of a packed projection and a gradient whose heads and positions changed places."""
    b, f, s, h, d = shape
    q, k, v = torch.randn(b, f, s, 3, h, d, generator=g).to(dtype).unbind(3)
    return [torch.randn(b, f, h, s, d, generator=g).to(dtype).transpose(2, 3), q, k, v]


@triton
@inside
@pytest.mark.parametrize("biased", ["none", "table", "each", "keys"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", CLIPS, ids=str)
def test_temporal_attention(shape: tuple[int, ...], dtype: torch.dtype, biased: str) -> None:
    from cascade.kernels import temporal_triton

    b, f, _, h, d = shape
    g = torch.Generator().manual_seed(sum(shape))
    grad, q, k, v = strided(shape, dtype, g)
    dims = {"none": None, "table": (1, h, f, f), "each": (b, h, f, f), "keys": (b, 1, 1, f)}[biased]
    bias = None
    if dims is not None:
        hidden = torch.rand(dims, generator=g) < 0.3
        hidden[..., 0] = False
        bias = torch.randn(dims, generator=g).masked_fill(hidden, -math.inf)
    scale, wanted = d**-0.5, bias is not None
    got = temporal_triton.forward(q, k, v, bias, scale, True, "ieee")
    got += temporal_triton.backward(grad, q, k, v, bias, scale, wanted, "ieee")[:4]
    wide = [double(x) for x in (grad, q, k, v, bias)]
    want = temporal._forward(*wide[1:], scale, True) + temporal._backward(*wide, scale, wanted)[:4]  # type: ignore[arg-type]
    for name, mine, wide_one in zip(("out", "lse", "dq", "dk", "dv", "dbias"), got, want, strict=True):
        floor = 1.0 if f == 1 and name in ("dq", "dk", "dbias") else 0.0  # nothing but rounding: softmax of one score
        near(mine, wide_one, dtype if name not in ("lse", "dbias") else torch.float32, floor)
    assert got[0].is_contiguous()
    _, none = temporal_triton.forward(q, k, v, bias, scale, False, "ieee")
    assert none.numel() == 0


@triton
@inside
@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(2, 8, 5, 2, 64), (1, 31, 3, 1, 24), (2, 3, 17, 1, 6)], ids=str)
def test_temporal_attention_with_norm_and_rotation(
    shape: tuple[int, ...], dtype: torch.dtype, turned: bool, gained: bool
) -> None:
    from cascade.kernels import temporal_triton

    _, f, _, h, d = shape
    g = torch.Generator().manual_seed(sum(shape))
    grad, q, k, v = strided(shape, dtype, g)
    bias = torch.randn(1, h, f, f, generator=g)
    gains = torch.randn(2, d, generator=g) + 1 if gained else None
    rotary = temporal.angles(f, d, 100.0) if turned else None
    scale = d**-0.5
    extra = {"gains": gains, "rotary": rotary}
    got = temporal_triton.forward(q, k, v, bias, scale, True, "ieee", **extra)
    got += temporal_triton.backward(grad, q, k, v, bias, scale, True, "ieee", **extra)
    wide = [double(x) for x in (grad, q, k, v, bias)]
    extra = {name: double(x) for name, x in extra.items()}
    want = temporal._forward(*wide[1:], scale, True, **extra) + temporal._backward(*wide, scale, True, **extra)  # type: ignore[arg-type]
    times = 4.0 if gained or turned else 1.0  # what becomes of q and k is rounded again
    for mine, wide_one in zip(got[:6] + got[6:] * gained, want[:6] + want[6:] * gained, strict=True):
        near(mine, wide_one, dtype, times=times)


@triton
@inside
@pytest.mark.parametrize("rows", [32, 64, 128])
def test_temporal_attention_does_not_depend_on_how_it_is_launched(rows: int) -> None:
    from cascade.kernels import temporal_triton
    from cascade.kernels.temporal_triton import Launch

    g = torch.Generator().manual_seed(rows)
    grad, q, k, v = strided((2, 9, 21, 2, 16), torch.float32, g)
    bias = torch.randn(1, 2, 9, 9, generator=g)
    for turns in (1, 3, 100):
        launch = Launch(rows, 4, 1, turns)
        out, _ = temporal_triton.forward(q, k, v, bias, 0.3, False, "ieee", launch)
        near(out, temporal._forward(*(double(x) for x in (q, k, v, bias)), 0.3, False)[0], torch.float32)  # type: ignore[arg-type]
        got = temporal_triton.backward(grad, q, k, v, bias, 0.3, True, "ieee", launch)
        want = temporal._backward(*(double(x) for x in (grad, q, k, v, bias)), 0.3, True)  # type: ignore[arg-type]
        for mine, wide in zip(got[:4], want[:4], strict=True):
            near(mine, wide, torch.float32)


def normed(shape: tuple[int, ...], dtype: torch.dtype, film: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Any]:
    """x, its gradient, weight, bias and film."""
    g = torch.Generator().manual_seed(sum(shape))
    x, grad = (
        torch.randn(shape, generator=g).mul(2).add(at).to(dtype).contiguous(memory_format=torch.channels_last)
        for at in (10, 0)  # a mean far from zero
    )
    weight, bias = torch.randn(2, shape[1], generator=g)
    return x, grad, weight, bias, torch.randn(shape[0], 2 * shape[1], generator=g) if film else None


@triton
@inside
@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_group_norm(shape: tuple[int, ...], dtype: torch.dtype, silu: bool, film: bool) -> None:
    from cascade.kernels import norm_triton

    x, grad, weight, bias, told = normed(shape, dtype, film)
    groups = math.gcd(shape[1], 8)
    y, mean, rstd = norm_triton.forward(x, weight, bias, told, groups, 1e-5, silu, dtype)
    got = norm_triton.backward(grad, x, weight, bias, told, mean, rstd, groups, silu)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias, told) if t is not None]
    out = F.group_norm(leaves[0], groups, leaves[1], leaves[2], 1e-5)
    if film:
        scale, shift = leaves[3][:, :, None, None].chunk(2, 1)
        out = out * (1 + scale) + shift
    out = F.silu(out) if silu else out
    want = torch.autograd.grad(out, leaves, grad.double())
    near(y, out.detach(), dtype)
    near(got[0], want[0], dtype)
    exact = torch.float32
    near(got[1][0], want[1], exact, 1.0)
    near(got[1][1], want[2], exact, 1.0)
    if film:
        near(got[2], want[3], exact)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert got[0].is_contiguous(memory_format=torch.channels_last)


@triton
@inside
@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("chunk", [1, 400, 16384])
@pytest.mark.parametrize(
    "shape", [(3, 64, 4, 5), (2, 80, 7, 5), (2, 40, 37, 11), (3, 12, 3, 3), (1, 144, 5, 5)], ids=str
)
def test_group_norm_does_not_depend_on_how_it_is_launched(
    shape: tuple[int, ...], chunk: int, film: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cascade.kernels import norm_plan, norm_triton

    x, grad, weight, bias, told = normed(shape, torch.float32, film)
    groups = math.gcd(shape[1], 8)
    found = {}
    for whole in (0, 2**20):
        for name in ("FORWARD", "BACKWARD"):
            monkeypatch.setattr(norm_plan, name, norm_plan.Tuning(each=4, chunk=chunk, whole=whole, registers=80))
        y, mean, rstd = norm_triton.forward(x, weight, bias, told, groups, 1e-5, True, torch.float32)
        found[whole] = (y, mean, rstd, *norm_triton.backward(grad, x, weight, bias, told, mean, rstd, groups, True))
    for one, other in zip(*found.values(), strict=True):
        near(one, other.double(), torch.float32, 1.0)


@triton
@inside
def test_group_norm_answers_in_the_type_asked_for() -> None:
    from cascade.kernels import norm_triton

    x = torch.randn(2, 16, 3, 3).contiguous(memory_format=torch.channels_last)
    args = (torch.ones(16), torch.zeros(16), None, 8, 1e-5, True)
    y, _, _ = norm_triton.forward(x, *args, torch.bfloat16)
    want, _, _ = norm._forward(x, *args, torch.bfloat16)
    assert y.dtype is want.dtype is torch.bfloat16
    near(y, want.double(), torch.bfloat16)
