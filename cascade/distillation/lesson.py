"""What a student learns in a round of distillation: the target, and the loss towards it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cascade.cond import Cond
from cascade.diffusion import Diffusion
from cascade.sampling.guidance import Denoise, keep_known
from cascade.sampling.solvers import ddim
from cascade.stage import Batch, Stage

HIGHEST = 25.0  # weight of an example


def halved(
    diffusion: Diffusion,
    denoise: Denoise,
    z: Tensor,
    t: Tensor,
    middle: Tensor,
    s: Tensor,
    then: Denoise | None = None,
) -> Tensor:
    """x~ whose one DDIM step from t to s ends where one to `middle` and one on to s do, the second by `then`.

    With the teacher in both it is that of Salimans & Ho (2022, algorithm 2), x~ = (z'' - (sigma''/sigma) z) /
    (alpha'' - (sigma''/sigma) alpha) for t -> middle -> s; with the student itself in the second that of multistep
    consistency models (Heek et al. 2024, algorithm 2). Written out, z cancels: x~ is a mean of the two x_hat, the
    second weighing alpha'' - (sigma''/sigma') alpha' over that divisor. So short steps lose nothing to rounding, at
    s = 0 it is the second x_hat exactly, and the first one where middle = s.
    """
    x = denoise(z, t)
    x_middle = (then or denoise)(ddim(diffusion, z, x, t, middle), middle)
    weight = _share(diffusion, middle, s) / _share(diffusion, t, s)
    return torch.lerp(x, x_middle, weight.to(x.dtype))


def _share(diffusion: Diffusion, t: Tensor, s: Tensor) -> Tensor:
    """What x_hat counts in a DDIM step from t to s, (B, 1, 1, 1, 1) float64."""
    alpha, sigma = diffusion.alpha_sigma(t, torch.float64)
    alpha_s, sigma_s = diffusion.alpha_sigma(s, torch.float64)
    return alpha_s - alpha * torch.where(sigma > 0, sigma_s / sigma, 1)  # 0 for an empty step at s = t = 0


def predict(
    diffusion: Diffusion, net: Callable[..., Tensor], z: Tensor, t: Tensor, cond: Cond, w: Tensor | None
) -> Tensor:
    """x_hat (B, C, F, H, W) of a network, told w (B,) if it knows guidance weights."""
    return diffusion.clean(z, net(z, diffusion.level(t), cond, w), t)


@dataclass(frozen=True)
class Lesson:
    """The loss of one round, as `cascade.training.train.fit` takes it: (batch, student's network) -> (B,).

    `student` tells how the student will be sampled; `teacher` is a network in eval mode. Where `w_range` is set, w is
    drawn from it for every example and the student is told; a teacher that is not (`branches`) gives
    x_hat = (1 + w) x_c - w x_u from two evaluations. With `grid` = 0 the teacher takes both halves of a student's
    step; else it takes one of `grid` steps from any time on, and the student itself the rest (consistency).
    """

    student: Stage
    teacher: nn.Module
    branches: bool
    steps: int  # of the student; 0: it answers as the teacher does, at any time (guidance distillation)
    grid: int = 0

    def __call__(self, batch: Batch, net: Callable[..., Tensor]) -> Tensor:
        """Squared error of x_hat weighted by max(1, SNR), "truncated SNR" (Salimans & Ho 2022, sec. 4).

        Of v that is max(alpha^2, sigma^2) times the squared error, within a factor of 2 of training's own weights,
        SNR + 1. Unlike eps' weights, SNR, neither vanishes at t = 1, where a student's first step begins. It is cut at
        HIGHEST: an x_hat of limited precision at the smallest times would else be all that counts.
        """
        diffusion, cond, w = self.student.cfg.diffusion, batch.cond, self.weight(batch)
        t = self.times(batch)[0]
        z = diffusion.noised(batch.x, diffusion.far(batch.eps, cond.concat), t)
        target = self.target(batch, net)
        torch.clear_autocast_cache()  # what the student's weights were cast to without a gradient has none
        x = predict(diffusion, net, z, t, cond, w)
        weight = diffusion.log_snr(t).exp().clamp(1, HIGHEST).to(x.dtype)
        return weight * (x - target).square().mean((1, 2, 3, 4))

    def weight(self, batch: Batch) -> Tensor | None:
        """w (B,), or None for a stage without guidance."""
        if self.student.cfg.w_range is None:
            return None
        low, high = self.student.cfg.w_range
        return low + (high - low) * batch.u

    def times(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Where a step of the student begins, where the teacher halts, where it ends: (B,) each, as batch.t falls."""
        if self.steps == 0:
            return batch.t, batch.t, batch.t
        if not self.grid:
            i = (batch.t * self.steps).floor().clamp(max=self.steps - 1) + 1
            return i / self.steps, (i - 0.5) / self.steps, (i - 1) / self.steps
        # Counted in whole numbers: t times steps and t times grid, each rounded, can lie in different spans.
        n = (batch.t * self.grid).long().clamp(max=self.grid - 1)
        before = n // (self.grid // self.steps)
        start, middle = (n + 1).to(batch.t) / self.grid, n.to(batch.t) / self.grid
        return start, middle, before.to(batch.t) / self.steps

    @torch.no_grad()
    def target(self, batch: Batch, net: Callable[..., Tensor] | None = None) -> Tensor:
        """The x_hat that the student should give (B, C, F, H, W); `net` is the student, for consistency."""
        diffusion, w = self.student.cfg.diffusion, self.weight(batch)
        t, middle, s = self.times(batch)
        z = diffusion.noised(batch.x, diffusion.far(batch.eps, batch.cond.concat), t)

        def taught(z: Tensor, t: Tensor) -> Tensor:
            told_w = None if self.branches else w
            x = predict(diffusion, self.teacher, z, t, batch.cond, told_w)
            if not self.branches or w is None:
                return x
            dropped = predict(diffusion, self.teacher, z, t, batch.cond.without_text(), None)
            return x + w.view(-1, 1, 1, 1, 1) * (x - dropped)

        def as_sampled(denoise: Denoise) -> Denoise:
            def limited(z: Tensor, t: Tensor) -> Tensor:
                x = self.student.cfg.sampler.limit(denoise(z, t), z, t)
                return keep_known(batch.x, batch.cond.mask)(x, z, t) if self.student.keeps else x

            return limited

        if self.steps == 0:
            return taught(z, t)
        if not self.grid:
            return halved(diffusion, as_sampled(taught), z, t, middle, s)
        assert net is not None, "a consistency student learns from itself"

        def own(z: Tensor, t: Tensor) -> Tensor:
            return predict(diffusion, net, z, t, batch.cond, w)

        return halved(diffusion, as_sampled(taught), z, t, middle, s, as_sampled(own))
