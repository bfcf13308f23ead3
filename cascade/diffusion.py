"""The forward process in continuous time: a log-SNR schedule and what the network predicts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from functools import cache

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


class Schedule(Enum):
    """How the noise grows: the continuous cosine of our own stages, or a table of betas that others trained on."""

    COSINE = "cosine"
    LINEAR = "linear"  # betas (Ho et al. 2020)
    SCALED_LINEAR = "scaled_linear"  # square roots of betas (Rombach et al. 2022)
    SQUAREDCOS = "squaredcos"  # alpha_bar is a squared cosine, betas at most 0.999 (Nichol & Dhariwal 2021, eq. 17)


@dataclass(kw_only=True)
class Diffusion:
    """z_t = alpha_t x + sigma_t eps with alpha = cos(phi), sigma = sin(phi), t in [0, 1].

    phi(t) = atan(tan(pi t / 2) / shift) is the cosine schedule (Nichol & Dhariwal 2021) with its log-SNR moved by
    2 log(shift) for another resolution (Hoogeboom et al. 2023, eq. 4: shift = 64 / side). At t = 1 the signal is gone
    exactly (zero terminal SNR, Lin et al. 2023), at t = 0 the noise is.

    On the straight path alpha = 1 - t, sigma = t, and the incoming video takes the place of eps: DDIM's steps are then
    Euler's along z_t = (1 - t) x + t low.

    The other schedules are tables of training in `timesteps` discrete steps, given by their first and last beta
    (squaredcos has none to give): timestep n = 0, 1, ... stands at t = (n + 1) / timesteps, and t = 0 is the clean
    video before all of them. Between two timesteps log alpha is linear, as in a process whose rate of noise is constant
    from one to the next. The network is told t, which for it means n.
    """

    prediction: Prediction = Prediction.V
    shift: float = 1.0
    path: Path = Path.NOISE
    schedule: Schedule = Schedule.COSINE
    timesteps: int = 0  # of a table
    betas: list[float] | None = None  # first and last of a table

    def __post_init__(self) -> None:
        self._check_table()
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift is {self.shift}, expected a positive number")
        if self.path is Path.STRAIGHT and (self.prediction is not Prediction.X or self.shift != 1):
            raise ValueError(
                f"prediction and shift are {self.prediction.value} and {self.shift}, expected x and 1 where path is "
                "straight"
            )

    def _check_table(self) -> None:
        if not self.discrete:
            if self.timesteps or self.betas is not None:
                raise ValueError(
                    f"timesteps and betas are {self.timesteps} and {self.betas}, expected none where schedule is cosine"
                )
            return
        name = self.schedule.value
        if self.path is Path.STRAIGHT or self.shift != 1:
            raise ValueError(f"schedule is {name}, expected cosine where path is straight or shift is not 1")
        if not 2 <= self.timesteps <= 100_000:
            raise ValueError(f"timesteps is {self.timesteps}, expected 2 to 100000 where schedule is {name}")
        if self.schedule is Schedule.SQUAREDCOS:
            if self.betas is not None:
                raise ValueError(f"betas is {self.betas}, expected null where schedule is {name}")
        elif self.betas is None or len(self.betas) != 2 or not 0 < self.betas[0] <= self.betas[1] < 1:
            raise ValueError(f"betas is {self.betas}, expected the first and the last, 0 < first <= last < 1")
        elif not self.table[-2] > self.table[-1] > -math.inf:  # or times between the last two are 0 / 0
            raise ValueError(
                f"betas is {self.betas}, expected smaller ones where timesteps is {self.timesteps}: alpha_bar ends "
                "where float32 does"
            )

    @property
    def discrete(self) -> bool:
        """Whether the schedule is a table of timesteps."""
        return self.schedule is not Schedule.COSINE

    @property
    def table(self) -> Tensor:
        """log alpha_bar = log alpha^2 at t = 0, 1 / timesteps, ..., 1: (timesteps + 1,) float64, the first one 0."""
        assert self.discrete, "the cosine schedule has no table"
        return self._table(torch.device("cpu"))

    def _table(self, device: torch.device) -> Tensor:
        return _table(self.schedule, self.timesteps, tuple(self.betas or ()), device)

    def timestep(self, n: Tensor) -> Tensor:
        """The time t of timestep n of a table, (B,) -> (B,) float64."""
        return (n.double() + 1) / self.timesteps

    def number(self, t: Tensor) -> Tensor:
        """The inverse of `timestep`, (B,) -> (B,) float64: whole where rounding to float32 alone was in the way."""
        return _whole(t.double() * self.timesteps) - 1

    def angle(self, t: Tensor) -> Tensor:
        """phi(t) in [0, pi/2], float64 so that both ends are exact."""
        if self.path is Path.STRAIGHT:
            return torch.atan2(t.double(), 1 - t.double())
        if self.discrete:
            alpha, sigma = self._discrete(t)
            return torch.atan2(sigma, alpha)
        half = t.double() * (math.pi / 2)
        return torch.where(t >= 1, math.pi / 2, torch.atan2(half.sin(), self.shift * half.cos()))

    def level(self, t: Tensor) -> Tensor:
        """The time that a network is told, (B,) float32: phi(t) in units of a right angle; of a table t itself.

        The angle names the noise itself, so a network keeps its meaning when `shift` changes, in training or after it.
        """
        if self.discrete:
            return t.float()
        return (self.angle(t) * (2 / math.pi)).float()

    def alpha_sigma(self, t: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, (B,) -> two (B, 1, 1, 1, 1); exact 0 and 1 at both ends (of a table: at t = 0)."""
        if self.path is Path.STRAIGHT:
            alpha, sigma = 1 - t.double(), t.double()
            return alpha.to(dtype).view(-1, 1, 1, 1, 1), sigma.to(dtype).view(-1, 1, 1, 1, 1)
        if self.discrete:
            alpha, sigma = self._discrete(t)
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
        if self.discrete:
            log_bar = self._log_bar(t)
            return log_bar - torch.log(-torch.expm1(log_bar))
        log_snr = -2 * torch.log(torch.tan(t.double() * (math.pi / 2))) + 2 * math.log(self.shift)
        return torch.where(t >= 1, -math.inf, log_snr)

    def time(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`, (B,) -> (B,) in [0, 1]."""
        if self.path is Path.STRAIGHT:
            return torch.sigmoid(-0.5 * log_snr.double())
        if self.discrete:
            log_bar = torch.nn.functional.logsigmoid(log_snr.double())
            return _interpolated(-log_bar, -self._table(log_bar.device), self._places(log_bar)) / self.timesteps
        return torch.atan(self.shift * torch.exp(-0.5 * log_snr.double())) * (2 / math.pi)

    def _log_bar(self, t: Tensor) -> Tensor:
        """log alpha_bar of a table at t (B,), float64."""
        return _interpolated(_whole(t.double() * self.timesteps), self._places(t), self._table(t.device))

    def _places(self, like: Tensor) -> Tensor:
        return torch.arange(self.timesteps + 1, dtype=torch.float64, device=like.device)

    def _discrete(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of a table at t, (B,) float64."""
        log_bar = self._log_bar(t)
        return torch.exp(0.5 * log_bar), torch.sqrt(-torch.expm1(log_bar))

    def far(self, eps: Tensor, low: Tensor) -> Tensor:
        """What z is at t = 1, beside x in all that follows: noise, or on the straight path the incoming video."""
        return low if self.path is Path.STRAIGHT else eps

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


@cache
def _table(schedule: Schedule, timesteps: int, betas: tuple[float, ...], device: torch.device) -> Tensor:
    """log alpha_bar with that of the clean video before it. Rounded to float32 where those who trained on it did.

    Made on the CPU, and copied to a GPU once: each copy makes the host wait for all that was launched.
    """
    if device.type != "cpu":
        return _table(schedule, timesteps, betas, torch.device("cpu")).to(device)
    if schedule is Schedule.SQUAREDCOS:
        at = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        bar = torch.cos((at + 0.008) / 1.008 * (math.pi / 2)) ** 2
        beta = (1 - bar[1:] / bar[:-1]).clamp(max=0.999).float()
    elif schedule is Schedule.SCALED_LINEAR:
        beta = torch.linspace(betas[0] ** 0.5, betas[1] ** 0.5, timesteps, dtype=torch.float32) ** 2
    else:
        beta = torch.linspace(betas[0], betas[1], timesteps, dtype=torch.float32)
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumprod(1 - beta, 0).double().log()])


def _interpolated(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear through the points (xs, ys), xs rising; at a point exactly its y."""
    right = torch.searchsorted(xs, x, right=True).clamp(1, len(xs) - 1)
    left = right - 1
    return torch.lerp(ys[left], ys[right], (x - xs[left]) / (xs[right] - xs[left]))


def _whole(position: Tensor) -> Tensor:
    """Timesteps that a float32 time missed by rounding: within 1e-4 of a whole number is that number."""
    near = position.round()
    return torch.where((position - near).abs() < 1e-4, near, position)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b.clamp(min=1e-5), 0)


def _dtype(z: Tensor) -> torch.dtype:
    """float32, or float64 for a float64 z."""
    return torch.promote_types(z.dtype, torch.float32)
