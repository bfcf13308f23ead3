"""One step from z_t to z_s: ancestral, DDIM, stochastic, DPM-Solver++(2M), Heun."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade.diffusion import Diffusion
from cascade.sampling.guidance import Denoise


def ddim(diffusion: Diffusion, z: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """z_s = alpha_s x_hat + sigma_s eps_hat, for s < t, both (B,) (Song et al. 2021, eq. 12).

    That is z_s = cos(d) z - sin(d) v_hat with d = phi_t - phi_s (Salimans & Ho 2022, app. D); at s = 0 it is x_hat.
    """
    alpha, sigma = diffusion.alpha_sigma(t, torch.float64)
    alpha_s, sigma_s = diffusion.alpha_sigma(s, torch.float64)
    return _mix(sigma_s / sigma, z, alpha_s - alpha * sigma_s / sigma, x)


def ancestral(
    diffusion: Diffusion, z: Tensor, x: Tensor, t: Tensor, s: Tensor, gamma: float | Tensor, eps: Tensor
) -> Tensor:
    """Draw from q(z_s | z_t, x_hat), its variance moved towards that of q(z_t | z_s) by gamma.

    Variance lower^(1 - gamma) upper^gamma (Ho et al. 2022, Video Diffusion Models, sec. 2), s > 0; with a gamma of z's
    shape for every value by itself (Nichol & Dhariwal 2021, eq. 15).
    """
    alpha, sigma = diffusion.alpha_sigma(t, torch.float64)
    alpha_s, sigma_s = diffusion.alpha_sigma(s, torch.float64)
    ratio = alpha / alpha_s
    upper = sigma**2 - (ratio * sigma_s) ** 2
    lower = upper * (sigma_s / sigma) ** 2
    mean = _mix(ratio * (sigma_s / sigma) ** 2, z, alpha_s * upper / sigma**2, x)
    return mean + (lower ** (1 - gamma) * upper**gamma).sqrt().to(z.dtype) * eps


def renoised(diffusion: Diffusion, z: Tensor, s: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Draw from q(z_t | z_s) for s <= t: the forward process from s on."""
    alpha, sigma = diffusion.alpha_sigma(t, torch.float64)
    alpha_s, sigma_s = diffusion.alpha_sigma(s, torch.float64)
    ratio = alpha / alpha_s
    return _mix(ratio, z, (sigma**2 - (ratio * sigma_s) ** 2).clamp(min=0).sqrt(), eps)


def stochastic(diffusion: Diffusion, z: Tensor, x: Tensor, t: Tensor, s: Tensor, after: Tensor, eps: Tensor) -> Tensor:
    """DDIM over two steps, to the time `after` s, then noise for one step back (Ho et al. 2022, Imagen Video)."""
    return renoised(diffusion, ddim(diffusion, z, x, t, after), after, s, eps)


def dpmpp_2m(
    diffusion: Diffusion, z: Tensor, x: Tensor, t: Tensor, s: Tensor, before: tuple[Tensor, Tensor] | None
) -> Tensor:
    """DPM-Solver++(2M), data prediction, midpoint (Lu et al. 2022b, algorithm 2); s > 0.

    `before` is x_hat and t of the step before, None on the first step, which is then DDIM's. A step from t = 1 is
    infinitely long in log-SNR, so the correction after it weighs 1 / (2 r) = 0.
    """
    if before is None:
        return ddim(diffusion, z, x, t, s)
    x_before, t_before = before
    here, there, past = (_half_log_snr(diffusion, time) for time in (t, s, t_before))
    weight = (there - here) / (2 * (here - past))
    return ddim(diffusion, z, x + weight.to(x.dtype) * (x - x_before), t, s)


def heun(diffusion: Diffusion, z: Tensor, x: Tensor, t: Tensor, s: Tensor, predict: Denoise) -> Tensor:
    """Second order: a DDIM step, then the mean of both ends' slopes (Karras et al. 2022, algorithm 1); s > 0.

    The slope is dz / dphi = v_hat, finite at t = 1 too. Beyond the rotation that DDIM already takes exactly, v_hat
    changes by (x_hat_t - x_hat_s) / sigma_s, so the step is exact where x_hat stays.
    """
    alpha, sigma = diffusion.alpha_sigma(t, torch.float64)
    alpha_s, sigma_s = diffusion.alpha_sigma(s, torch.float64)
    ahead = ddim(diffusion, z, x, t, s)
    weight = (sigma * alpha_s - alpha * sigma_s) / (2 * sigma_s)  # sin(phi_t - phi_s) / (2 sin(phi_s))
    return ahead + weight.to(z.dtype) * (predict(ahead, s) - x)


def _mix(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """a x + b y, the float64 weights rounded to the dtype of x once."""
    return a.to(x.dtype) * x + b.to(x.dtype) * y


def _half_log_snr(diffusion: Diffusion, t: Tensor) -> Tensor:
    alpha, sigma = diffusion.alpha_sigma(t, torch.float64)
    return torch.log(alpha / sigma)
