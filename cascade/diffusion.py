"""The forward process in continuous time: a log-SNR schedule and what the network predicts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Prediction(Enum):
    """What the network's output means (Salimans & Ho 2022, sec. 4)."""

    V = "v"
    EPS = "eps"
    X = "x"


class Path(Enum):
    """What stands at the far end, t = 1."""

    NOISE = "noise"
    STRAIGHT = "straight"  # the incoming video: flow matching from low to high (FlashVideo, arXiv 2502.05179)


@dataclass(kw_only=True)
class Diffusion:
    """z_t = alpha_t x + sigma_t eps with alpha = cos(phi), sigma = sin(phi), t in [0, 1].

    phi(t) = atan(tan(pi t / 2) / shift) is the cosine schedule (Nichol & Dhariwal 2021) with its log-SNR moved by
    2 log(shift) for another resolution (Hoogeboom et al. 2023, eq. 4: shift = 64 / side). At t = 1 the signal is gone
    exactly (zero terminal SNR, Lin et al. 2023), at t = 0 the noise is.

    On the straight path alpha = 1 - t, sigma = t, and the incoming video takes the place of eps: DDIM's steps are then
    Euler's along z_t = (1 - t) x + t low.
    """

    prediction: Prediction = Prediction.V
    shift: float = 1.0
    path: Path = Path.NOISE

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift is {self.shift}, expected a positive number")
        if self.path is Path.STRAIGHT and (self.prediction is not Prediction.X or self.shift != 1):
            raise ValueError(
                f"prediction and shift are {self.prediction.value} and {self.shift}, expected x and 1 where path is "
                "straight"
            )

    def angle(self, t: Tensor) -> Tensor:
        """phi(t) in [0, pi/2], float64 so that both ends are exact."""
        if self.path is Path.STRAIGHT:
            return torch.atan2(t.double(), 1 - t.double())
        half = t.double() * (math.pi / 2)
        return torch.where(t >= 1, math.pi / 2, torch.atan2(half.sin(), self.shift * half.cos()))

    def level(self, t: Tensor) -> Tensor:
        """phi(t) in units of a right angle, (B,) float32: the time that a network is told.

        It names the noise itself, so a network keeps its meaning when `shift` changes, in training or after it.
        """
        return (self.angle(t) * (2 / math.pi)).float()

    def alpha_sigma(self, t: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, (B,) -> two (B, 1, 1, 1, 1); exact 0 and 1 at both ends."""
        if self.path is Path.STRAIGHT:
            alpha, sigma = 1 - t.double(), t.double()
            return alpha.to(dtype).view(-1, 1, 1, 1, 1), sigma.to(dtype).view(-1, 1, 1, 1, 1)
        phi = self.angle(t)
        alpha = torch.where(t >= 1, 0.0, phi.cos())
        return alpha.to(dtype).view(-1, 1, 1, 1, 1), phi.sin().to(dtype).view(-1, 1, 1, 1, 1)

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda_t = log(alpha^2 / sigma^2) = 2 log(shift) - 2 log tan(pi t / 2), (B,) -> (B,) float64.

        Infinite at both ends: clamp it before a network sees it.
        """
        if self.path is Path.STRAIGHT:
            return 2 * torch.log((1 - t.double()) / t.double())
        log_snr = -2 * torch.log(torch.tan(t.double() * (math.pi / 2))) + 2 * math.log(self.shift)
        return torch.where(t >= 1, -math.inf, log_snr)

    def time(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`, (B,) -> (B,) in [0, 1]."""
        if self.path is Path.STRAIGHT:
            return torch.sigmoid(-0.5 * log_snr.double())
        return torch.atan(self.shift * torch.exp(-0.5 * log_snr.double())) * (2 / math.pi)

    def noised(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z_t = alpha_t x + sigma_t eps (Salimans & Ho 2022, sec. 2)."""
        alpha, sigma = self.alpha_sigma(t, _dtype(x))
        return alpha * x + sigma * eps

    def velocity(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """v = alpha_t eps - sigma_t x (Salimans & Ho 2022, sec. 4)."""
        alpha, sigma = self.alpha_sigma(t, _dtype(x))
        return alpha * eps - sigma * x

    def target(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should say: v, eps or x."""
        if self.prediction is Prediction.V:
            return self.velocity(x, eps, t)
        return eps if self.prediction is Prediction.EPS else x

    def split(self, z: Tensor, out: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Clean video and noise from z_t and the network's output: x_hat = alpha z - sigma v.

        Where z holds nothing of a component (eps at alpha = 0, x at sigma = 0) it comes out as 0. Below 1e-5
        (abs(lambda) > 23) the divisor is 1e-5, so that the result stays finite.
        """
        x = self.clean(z, out, t)
        if self.prediction is Prediction.V:
            alpha, sigma = self.alpha_sigma(t, _dtype(z))
            return x, sigma * z + alpha * out
        return x, out if self.prediction is Prediction.EPS else self.noise_in(z, out, t)

    def clean(self, z: Tensor, out: Tensor, t: Tensor) -> Tensor:
        """The video alone of `split`: all that a sampler needs."""
        if self.prediction is Prediction.X:
            return out
        alpha, sigma = self.alpha_sigma(t, _dtype(z))
        return alpha * z - sigma * out if self.prediction is Prediction.V else _divide(z - sigma * out, alpha)

    def noise_in(self, z: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """eps_hat that makes z_t = alpha x + sigma eps_hat; 0 at sigma = 0."""
        alpha, sigma = self.alpha_sigma(t, _dtype(z))
        return _divide(z - alpha * x, sigma)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b.clamp(min=1e-5), 0)


def _dtype(z: Tensor) -> torch.dtype:
    """float32, or float64 for a float64 z."""
    return torch.promote_types(z.dtype, torch.float32)
