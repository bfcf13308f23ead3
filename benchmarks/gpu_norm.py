"""Group norm + FiLM + SiLU: checked against float64, timed against PyTorch's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from measure import INTERPRETED, TYPES, Run, error, guarded, poison
from torch import Tensor

# N, C, H, W
CHECKED = [(2, 12, 3, 3), (1, 40, 137, 11), (700, 96, 4, 4), (400, 64, 16, 16), (400, 192, 8, 8)]
CHECKED += [(2, 64, 64, 64), (2, 320, 48, 80), (2, 128, 48, 48), (2, 80, 96, 64), (40, 288, 24, 20)]
TIMED = [(2048, 64, 16, 16), (2048, 192, 8, 8), (62, 64, 64, 64), (32, 320, 48, 80), (16, 128, 192, 320)]
TIMED += [(32, 80, 384, 640)]  # of imagen_video_8's last stage
TUNED = [TIMED[0], TIMED[3], TIMED[4]]
DRY = [(3, 16, 4, 4), (1, 12, 9, 5)]


def draw(run: Run, shape: tuple[int, ...], dtype: torch.dtype, film: bool) -> list[Any]:
    """Gradient, x, weight, bias and film."""
    grad, x = (
        torch.randn(shape, device=run.device).add(at).to(dtype).contiguous(memory_format=torch.channels_last)
        for at in (0, 3)
    )
    weight, bias = torch.randn(2, shape[1], device=run.device)
    return [grad, x, weight, bias, torch.randn(shape[0], 2 * shape[1], device=run.device) if film else None]


def ours(x: Tensor, w: Tensor, b: Tensor, film: Tensor | None) -> tuple[Tensor, ...]:
    args = (x, w, b, film, math.gcd(len(w), 8), 1e-5, True, x.dtype)
    if INTERPRETED:
        from cascade.kernels import norm_triton

        return norm_triton.forward(*args)
    return tuple(torch.ops.cascade.group_norm(*args))


def ours_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    args = (grad, *args, math.gcd(args[0].shape[1], 8), True)
    if INTERPRETED:
        from cascade.kernels import norm_triton

        return norm_triton.backward(*args)
    return tuple(torch.ops.cascade.group_norm_backward(*args))


def torchs(x: Tensor, w: Tensor, b: Tensor, film: Tensor | None, silu: bool = True) -> Tensor:
    y = F.group_norm(x, math.gcd(len(w), 8), w.to(x.dtype), b.to(x.dtype))
    if film is not None:
        scale, shift = film.to(x.dtype)[:, :, None, None].chunk(2, 1)
        y = torch.addcmul(shift, y, scale + 1)
    y = F.silu(y) if silu else y
    return y.contiguous(memory_format=torch.channels_last)  # what the convolution after it wants


def check(run: Run) -> None:
    for shape in DRY if run.dry else CHECKED:
        for name in ("fp32", "bf16", "fp16"):
            for film in (False, True):
                if run.mine():
                    check_one(run, shape, name, film)
    if run.dry and not INTERPRETED:
        return
    for n, c, height, width in DRY if run.dry else TUNED:
        smaller = min(n, 256) if height <= 16 else 3, c, min(height, 48), min(width, 80)  # compiles what `tiles` times
        for what in tunings():
            if run.mine():
                with tuned(what):
                    check_one(run, smaller, "bf16", False, what)


@guarded("norm")
def check_one(run: Run, shape: tuple[int, ...], name: str, film: bool, what: str | None = None) -> None:
    """With SiLU, as most are."""
    grad, *leaves = draw(run, shape, TYPES[name], film)
    wide = [x.double().requires_grad_() for x in leaves if x is not None]
    out = torchs(*wide, *([] if film else [None]))  # type: ignore[arg-type]
    want = [out.detach(), *torch.autograd.grad(out, wide, grad.double())]
    poison(run, grad.numel())
    y, mean, rstd = ours(*leaves)
    dx, daffine, dfilm = ours_backward(grad, *leaves, mean, rstd)
    got = [y, dx, *daffine.unbind(0), *([dfilm] if film else [])]
    run.check("norm", name, [error(a, b) for a, b in zip(got, want, strict=True)], shape=shape, film=film, tuning=what)


def timings(run: Run, shape: tuple[int, ...], name: str) -> None:
    """Forward and backward; in bytes x -> y and grad, x -> dx."""
    for film in (False, True) if name == "bf16" else (False,):
        if run.late("norm", 20):
            return
        grad, *leaves = draw(run, shape, TYPES[name], film)
        size = grad.numel() * grad.element_size()
        row: dict[str, Any] = {"shape": shape, "dtype": name, "film": film}
        _, mean, rstd = ours(*leaves)
        params = [x.detach().requires_grad_() for x in leaves if x is not None]
        out = torchs(*params, *([] if film else [None]))  # type: ignore[arg-type]
        calls = {
            "ours": (lambda a=leaves: ours(*a), lambda a=(grad, *leaves, mean, rstd): ours_backward(*a)),  # type: ignore[misc]
            "torch": (
                lambda a=leaves: torchs(*a),  # type: ignore[misc]
                lambda o=out, p=params, g=grad: torch.autograd.grad(o, p, g, retain_graph=True),  # type: ignore[misc]
            ),
        }
        other = torch.empty_like(grad)
        found: dict[str, Any] = {
            "copy": run.timed("norm", 2 * size, lambda g=grad, o=other: o.copy_(g), **row, kernel="copy")
        }  # type: ignore[misc]
        for kernel, (ahead, back) in calls.items():
            first = run.timed("norm", 2 * size, ahead, **row, kernel=kernel, way="forward")
            found[kernel] = [first, run.timed("norm", 3 * size, back, **row, kernel=kernel, way="backward")]
        run.say("norm", **row, **found)


def tunings() -> dict[str, tuple[Any, Any]]:
    """Other ways to spread the kernels than the shipped ones: forward, backward."""
    from cascade.kernels import norm_plan

    ahead, back = norm_plan.FORWARD, norm_plan.BACKWARD
    return {
        "shipped": (ahead, back),
        "chunks of 8,192": (replace(ahead, chunk=8192), replace(back, chunk=8192)),
        "chunks of 65,536": (replace(ahead, chunk=65536), replace(back, chunk=65536)),
        "smaller whole": (replace(ahead, whole=ahead.whole // 2), replace(back, whole=back.whole // 2)),
        "larger tiles": (replace(ahead, each=32, registers=128), replace(back, each=32, registers=128)),
        "nothing whole": (replace(ahead, whole=0), replace(back, whole=0)),
        "larger whole": (replace(ahead, whole=32768), replace(back, whole=16384)),
    }


@contextmanager
def tuned(what: str) -> Iterator[None]:
    """One of `tunings()` inside."""
    from cascade.kernels import norm_plan

    shipped = norm_plan.FORWARD, norm_plan.BACKWARD
    norm_plan.FORWARD, norm_plan.BACKWARD = tunings()[what]
    try:
        yield
    finally:
        norm_plan.FORWARD, norm_plan.BACKWARD = shipped


def tiles(run: Run, shape: tuple[int, ...]) -> None:
    """All `tunings()` that differ at this shape, the shipped one first and last."""
    from cascade.kernels import norm_plan

    grad, *leaves = draw(run, shape, torch.bfloat16, False)
    size = grad.numel() * grad.element_size()
    _, mean, rstd = ours(*leaves)
    found: dict[str, Any] = {}
    seen: list[Any] = []
    for what in [*tunings(), "shipped"]:
        if run.late("launches"):
            break
        with tuned(what):
            here = [norm_plan.planned(leaves[0], 8, each) for each in (norm_plan.FORWARD, norm_plan.BACKWARD)]
            if here in seen and what != "shipped":
                continue
            seen.append(here)
            ahead = run.timed("norm tiles", 2 * size, lambda: ours(*leaves), shape=shape, tuning=what)
            back = run.timed(
                "norm tiles", 3 * size, lambda: ours_backward(grad, *leaves, mean, rstd), shape=shape, tuning=what
            )
        form = ["whole" if each.whole else "split" for each in here]
        found[f"{what} again" if what in found else what] = [form[0], ahead, form[1], back]
    run.say("launches", norm=shape, **found)
