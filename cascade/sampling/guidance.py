"""What changes x_hat before a step uses it: guidance, what is known, thresholds."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from cascade.diffusion import Diffusion

Denoise = Callable[[Tensor, Tensor], Tensor]  # z (B, C, F, H, W), t (B,) -> x_hat
Hook = Callable[[Tensor, Tensor, Tensor], Tensor]  # x_hat, z, t -> x_hat


class Per(Enum):
    """What shares one dynamic threshold."""

    CLIP = "clip"
    FRAME = "frame"


def quantile(a: Tensor, q: float) -> Tensor:
    """The q-quantile of every row, interpolated linearly as in torch.quantile but without its limit of 2^24 elements.

    a (N, M) -> (N,) float32.
    """
    a = a.float()
    position = q * (a.shape[1] - 1)
    low = math.floor(position)
    high = min(low + 1, a.shape[1] - 1)
    # on the CPU kthvalue takes ten times as long, and an int64 index for every element
    select = _select_numpy if a.device.type == "cpu" else _select_torch
    return torch.lerp(*select(a, low, high), position - low)


def dynamic_threshold(x: Tensor, percentile: float, per: Per, highest: float | None = None) -> Tensor:
    """Clip x to [-s, s] and divide by s, with s = max(1, percentile of abs(x)) (Saharia et al. 2022, sec. 2.3).

    x (B, C, F, H, W); one s, of at most `highest`, for a whole clip or for every frame. Leaves an x within [-1, 1] as
    it is, bit for bit. To a gradient s is a constant.
    """
    rows = x.detach().abs().flatten(1) if per is Per.CLIP else x.detach().abs().transpose(1, 2).flatten(0, 1).flatten(1)
    s = quantile(rows, percentile).clamp(1, highest).to(x.dtype)
    s = s.view(x.shape[0], 1, -1, 1, 1)
    return torch.maximum(torch.minimum(x, s), -s) / s


def guided(conditional: Denoise, unconditional: Denoise, w: float) -> Denoise:
    """x_hat = (1 + w) x_c - w x_u (Ho & Salimans 2022, eq. 6). At w = 0 the unconditional one is never called."""
    if w == 0:
        return conditional

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        x = conditional(z, t)
        return x + w * (x - unconditional(z, t))

    return denoise


def keep_known(known: Tensor, mask: Tensor) -> Hook:
    """Hook that puts the known part into x_hat, so that it comes out of the sampler exactly.

    known (B, C, F, H, W); mask, bool or float, above 0 where known, of a shape that broadcasts to it.
    """

    def hook(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return torch.where(mask > 0, known.to(x), x)

    return hook


def reconstruction(
    diffusion: Diffusion, denoise: Denoise, observe: Callable[[Tensor], Tensor], target: Tensor, weight: float
) -> Denoise:
    """x_hat - (weight alpha_t / 2) grad_z |target - observe(x_hat)|^2 (Ho et al. 2022, Video Diffusion, sec. 3.1).

    `observe` selects known frames, or is any differentiable map such as a downsampling. Every part of x_hat moves:
    add `keep_known` to hold the known one. The gradient runs through the denoiser: about three evaluations' cost, and
    the memory of its graph.
    """

    def denoise_towards(z: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            x = denoise(z, t)
            (gradient,) = torch.autograd.grad((target - observe(x)).square().sum(), z)
        alpha, _ = diffusion.alpha_sigma(t, z.dtype)
        return x.detach() - (0.5 * weight) * alpha * gradient

    return denoise_towards


def _select_numpy(a: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Elements of rank `low` and `high`, counted from 0, of every row."""
    ranked = torch.from_numpy(np.partition(a.numpy(), (low, high), axis=1))
    return ranked[:, low], ranked[:, high]


def _select_torch(a: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    return a.kthvalue(low + 1, dim=1).values, a.kthvalue(high + 1, dim=1).values
