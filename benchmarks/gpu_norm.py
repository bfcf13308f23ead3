"""Group norm + FiLM + SiLU: checked against float64, timed against PyTorch's."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from measure import INTERPRETED, TYPES, Run, error, poison
from torch import Tensor

# N, C, H, W
CHECKED = [(2, 12, 3, 3), (1, 40, 137, 11), (700, 96, 4, 4), (400, 64, 16, 16), (400, 192, 8, 8)]
CHECKED += [(2, 64, 64, 64), (2, 320, 48, 80), (2, 128, 48, 48)]
TIMED = [(2048, 64, 16, 16), (2048, 192, 8, 8), (62, 64, 64, 64), (32, 320, 48, 80), (16, 128, 192, 320)]
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


def check_one(run: Run, shape: tuple[int, ...], name: str, film: bool) -> None:
    """With SiLU, as most are."""
    grad, *leaves = draw(run, shape, TYPES[name], film)
    wide = [x.double().requires_grad_() for x in leaves if x is not None]
    out = torchs(*wide, *([] if film else [None]))  # type: ignore[arg-type]
    want = [out.detach(), *torch.autograd.grad(out, wide, grad.double())]
    poison(run, grad.numel())
    y, mean, rstd = ours(*leaves)
    dx, daffine, dfilm = ours_backward(grad, *leaves, mean, rstd)
    got = [y, dx, *daffine.unbind(0), *([dfilm] if film else [])]
    run.check("norm", name, [error(a, b) for a, b in zip(got, want, strict=True)], shape=shape, film=film)


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
        found = {}
        for kernel, (ahead, back) in calls.items():
            first = run.timed("norm", 2 * size, ahead, **row, kernel=kernel, way="forward")
            found[kernel] = [first, run.timed("norm", 3 * size, back, **row, kernel=kernel, way="backward")]
        run.say("norm", **row, **found)


def tiles(run: Run, shape: tuple[int, ...]) -> None:
    """Other sizes of tile than the shipped ones."""
    from cascade.kernels import norm_triton

    grad, *leaves = draw(run, shape, torch.bfloat16, False)
    size = grad.numel() * grad.element_size()
    _, mean, rstd = ours(*leaves)
    shipped = norm_triton.FORWARD, norm_triton.BACKWARD, norm_triton.WARPS
    found: dict[str, Any] = {}
    for elements, warps in ((1024, 4), (2048, 4), (4096, 8), (8192, 8)):
        if run.late("launches"):
            break
        norm_triton.FORWARD, norm_triton.BACKWARD, norm_triton.WARPS = elements, elements, warps
        ahead = run.timed("norm tiles", 2 * size, lambda: ours(*leaves))
        back = run.timed("norm tiles", 3 * size, lambda: ours_backward(grad, *leaves, mean, rstd))
        found[f"{elements} elements {warps} warps"] = [ahead, back]
    norm_triton.FORWARD, norm_triton.BACKWARD, norm_triton.WARPS = shipped
    run.say("launches", norm=shape, **found)
