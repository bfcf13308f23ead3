"""Laws of the sampler: closed forms for Gaussian data, parity with diffusers, exactness, independence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import near
from torch import Tensor

from cascade.diffusion import Diffusion, Prediction
from cascade.errors import NumericError
from cascade.noise import Noise, generator, sample_id
from cascade.sampling.grid import times
from cascade.sampling.guidance import (
    Denoise,
    Hook,
    Per,
    _select_numpy,
    _select_torch,
    dynamic_threshold,
    guided,
    keep_known,
    quantile,
    reconstruction,
)
from cascade.sampling.sampler import Rule, Sampler, Threshold, sample
from cascade.sampling.solvers import ancestral, ddim, dpmpp_2m, heun, renoised, stochastic

COSINE = Diffusion()
DETERMINISTIC = (Rule.DDIM, Rule.DPMPP_2M, Rule.HEUN)
DRAWING = (Rule.ANCESTRAL, Rule.STOCHASTIC)
SHAPE = (2, 3, 4, 6, 5)
NAMES = (sample_id("a"), sample_id("b"))
NOISE = Noise(seed=0, stage="base", samples=NAMES)
STD = 0.5  # of the Gaussian data


def draw(name: str, shape: Sequence[int] = SHAPE, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(tuple(shape), generator=generator(name), dtype=dtype)


def times_of(*values: float) -> list[Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def gaussian(z: Tensor, t: Tensor, step: int = 0) -> Tensor:
    """The exact denoiser of data N(0, STD^2)."""
    alpha, sigma = COSINE.alpha_sigma(t, z.dtype)
    return z * alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2)


def toy(z: Tensor, t: Tensor, step: int = 0) -> Tensor:
    """A denoiser that is linear in nothing and treats every element alone."""
    return torch.tanh(1.3 * z + 0.2) * (1.1 - t.view(-1, 1, 1, 1, 1).to(z.dtype) * 0.4)


def moments(
    sampler: Sampler, denoise: Denoise = gaussian, frames: int = 1, hooks: Sequence[Hook] = ()
) -> tuple[Tensor, Tensor]:
    """Exact mean and standard deviation per frame of what a denoiser that is affine in z gives.

    The batch holds one run without any noise and, for every number that is drawn, one run where that number alone is 1.
    """

    def impulse(shape: Sequence[int], step: int, purpose: str) -> Tensor:
        noise = torch.zeros(tuple(shape), dtype=torch.float64)
        first = 1 + frames * (0 if purpose == "start" else step + 1)
        for frame in range(frames):
            noise[first + frame, 0, frame] = 1
        return noise

    shape = (1 + frames * sampler.steps, 1, frames, 1, 1)
    x = sample(COSINE, lambda z, t, step: denoise(z, t), sampler, impulse, shape, hooks=hooks).flatten(1)
    return x[0], (x[1:] - x[0]).square().sum(0).sqrt()


def std(steps: int, rule: Rule, gamma: float = 0.0) -> float:
    return moments(Sampler(steps=steps, rule=rule, gamma=gamma))[1].item()


# Closed forms


@pytest.mark.parametrize(
    ("rule", "gamma", "expected"),
    [
        (Rule.DDIM, 0.0, (0.41138, 0.45393, 0.48809, 0.49700)),
        (Rule.STOCHASTIC, 0.0, (0.33418, 0.39895, 0.47040, 0.49228)),
        (Rule.ANCESTRAL, 0.0, (0.37113, 0.41993, 0.47394, 0.49268)),
        (Rule.ANCESTRAL, 0.3, (0.40840, 0.44552, 0.48304, 0.49533)),
        (Rule.ANCESTRAL, 1.0, (0.52540, 0.52059, 0.50669, 0.50177)),
    ],
)
def test_std_on_gaussian_data_is_what_the_step_formulas_multiply_to(
    rule: Rule, gamma: float, expected: tuple[float, ...]
) -> None:
    got = [std(steps, rule, gamma) for steps in (8, 16, 64, 256)]
    assert got == pytest.approx(expected, abs=1e-5)
    errors = [abs(value - STD) for value in got]
    assert all(more > less for more, less in pairwise(errors))
    assert all((value > STD) is (gamma == 1) for value in got)


def test_ddim_product_is_written_out_once_more() -> None:
    """The map of a step is a number: m = alpha_s k + sigma_s (1 - alpha k) / sigma, for x_hat = k z."""
    product, half_pi = 1.0, math.pi / 2
    for t, s in pairwise(1 - i / 8 for i in range(9)):
        alpha, sigma = math.cos(t * half_pi), math.sin(t * half_pi)
        k = alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2)
        product *= math.cos(s * half_pi) * k + math.sin(s * half_pi) * (1 - alpha * k) / sigma
    assert std(8, Rule.DDIM) == pytest.approx(product, abs=1e-12)


@pytest.mark.parametrize(("rule", "order"), [(Rule.DDIM, 1), (Rule.HEUN, 2), (Rule.DPMPP_2M, 2)])
def test_order_of_convergence(rule: Rule, order: int) -> None:
    coarse, fine = (abs(std(steps, rule) - STD) for steps in (128, 256))
    # the infinite first step leaves 2M a logarithm below its order: 1.63 here, 1.77 at 1024
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.4)


@pytest.mark.parametrize("rule", Rule)
def test_mean_of_bright_data_is_reached_from_pure_noise(rule: Rule) -> None:
    """Zero terminal SNR: a mean of 0.8 comes out although the start knows nothing of it."""

    def bright(z: Tensor, t: Tensor) -> Tensor:
        alpha, _ = COSINE.alpha_sigma(t, z.dtype)
        return 0.8 + gaussian(z - 0.8 * alpha, t)

    mean, _ = moments(Sampler(steps=64, rule=rule), bright)
    assert mean.item() == pytest.approx(0.8, abs=1e-9)


def test_reconstruction_guidance_beats_replacement_on_correlated_frames() -> None:
    """Two frames of unit variance and correlation 0.9, the first known to be 1.5: the truth is 1.35 +- 0.436."""
    rho, known = 0.9, torch.tensor([1.5, 0.0], dtype=torch.float64).view(1, 1, 2, 1, 1)
    covariance = torch.tensor([[1, rho], [rho, 1]], dtype=torch.float64)

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (level.flatten()[0] for level in COSINE.alpha_sigma(t, z.dtype))
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2))
        return (z.flatten(1) @ gain.T).view_as(z)

    hooks = [keep_known(known, known > 0)]
    sampler = Sampler(steps=256, rule=Rule.ANCESTRAL)
    got: dict[float, tuple[float, float]] = {}
    for weight in (0.0, 1.0, 2.0):
        towards = reconstruction(COSINE, denoise, lambda x: x[:, :, :1], known[:, :, :1], weight)
        mean, deviation = moments(sampler, towards, 2, hooks)
        assert (mean[0], deviation[0]) == (1.5, 0)
        got[weight] = mean[1].item(), deviation[1].item()
    assert abs(got[0.0][0] - 1.35) >= 0.35
    assert got[1.0] == pytest.approx((1.13, 0.47), abs=0.02)
    assert got[2.0] == pytest.approx((1.28, 0.42), abs=0.01)
    assert abs(got[2.0][0] - 1.35) <= 0.1


def test_reconstruction_through_a_downsampling_pulls_its_average_to_the_target() -> None:
    def average(x: Tensor) -> Tensor:
        return x.mean((3, 4), keepdim=True)

    target = torch.full((2, 3, 4, 1, 1), 0.3)
    errors = []
    for weight in (0.0, 50.0, 200.0):
        denoise = reconstruction(COSINE, gaussian, average, target, weight)
        x = sample(COSINE, lambda z, t, step: denoise(z, t), Sampler(steps=32), NOISE, SHAPE)  # noqa: B023
        assert not x.requires_grad
        errors.append((average(x) - target).abs().mean().item())
    assert errors[1] < 0.5 * errors[0] and errors[2] < 0.25 * errors[0]


def test_reconstruction_of_weight_zero_changes_no_bit() -> None:
    z, t = NOISE(SHAPE, 0, "start"), torch.tensor([0.3, 0.8])
    assert torch.equal(reconstruction(COSINE, toy, lambda x: x, torch.zeros(()), 0.0)(z, t), toy(z, t))


def test_reconstruction_leaves_the_weights_alone() -> None:
    layer = torch.nn.Conv3d(3, 3, 1)
    denoise = reconstruction(COSINE, lambda z, t: layer(z), lambda x: x, torch.zeros(()), 1.0)
    z, t = NOISE(SHAPE, 0, "start"), torch.full((2,), 0.5)
    with torch.no_grad():
        assert not denoise(z, t).requires_grad
    assert layer.weight.grad is None and not z.requires_grad


# The network is right: the sampler is


@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
@pytest.mark.parametrize("shift", [0.5, 1.0])
def test_true_v_gives_x(rule: Rule, steps: int, shift: float) -> None:
    diffusion, x = Diffusion(shift=shift), draw("x", dtype=torch.float32)

    def denoise(z: Tensor, t: Tensor, step: int) -> Tensor:
        return diffusion.split(z, diffusion.target(x, diffusion.noise_in(z, x, t), t), t)[0]

    got = sample(diffusion, denoise, Sampler(steps=steps, rule=rule, gamma=0.5), NOISE, SHAPE)
    near(got, x, atol=1e-6)


@pytest.mark.parametrize("rule", DETERMINISTIC)
@pytest.mark.parametrize("prediction", [Prediction.V, Prediction.X])
def test_deterministic_rules_stay_on_the_line_from_noise_to_x(rule: Rule, prediction: Prediction) -> None:
    diffusion, x, eps = Diffusion(prediction=prediction), draw("x"), draw("eps")

    def denoise(z: Tensor, t: Tensor, step: int) -> Tensor:
        near(z, diffusion.noised(x, eps, t), atol=1e-12)
        return diffusion.split(z, diffusion.target(x, eps, t), t)[0]

    got = sample(diffusion, denoise, Sampler(steps=7, rule=rule), lambda *_: eps, SHAPE)
    near(got, x, atol=1e-12)


@pytest.mark.parametrize("rule", Rule)
def test_the_result_is_the_last_x_hat_bit_for_bit(rule: Rule) -> None:
    seen: list[Tensor] = []

    def denoise(z: Tensor, t: Tensor, step: int) -> Tensor:
        seen.append(toy(z, t))
        return seen[-1]

    assert torch.equal(sample(COSINE, denoise, Sampler(steps=5, rule=rule), NOISE, SHAPE), seen[-1])


def test_ddim_is_a_rotation_by_the_angle() -> None:
    z, v = draw("z"), draw("v")
    for t, s in pairwise(times_of(1.0, 0.9, 0.5, 0.1, 0.001, 0.0)):
        x, _ = COSINE.split(z, v, t)
        angle = COSINE.angle(t) - COSINE.angle(s)
        rotated = angle.cos() * z - angle.sin() * v
        near(ddim(COSINE, z, x, t, s), rotated, atol=1e-12)


def test_a_step_may_have_its_own_times_for_every_sample() -> None:
    z, x = draw("z"), draw("x")
    t, s = torch.tensor([0.9, 0.4], dtype=torch.float64), torch.tensor([0.5, 0.1], dtype=torch.float64)
    both = ddim(COSINE, z, x, t, s)
    for b in range(2):
        alone = ddim(COSINE, z[b : b + 1], x[b : b + 1], t[b : b + 1], s[b : b + 1])
        assert torch.equal(both[b : b + 1], alone)


def test_renoised_continues_the_forward_process() -> None:
    """alpha and variance of q(z_t | z_s) make q(z_t | x) out of q(z_s | x)."""
    s, t = times_of(0.3, 0.7)
    (alpha_s, sigma_s), (alpha, sigma) = (COSINE.alpha_sigma(time, torch.float64) for time in (s, t))
    one, none = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, 1, dtype=torch.float64)
    scale, added = renoised(COSINE, one, s, t, none), renoised(COSINE, none, s, t, one)
    near(scale * alpha_s, alpha, 1e-12)
    near(torch.hypot(scale * sigma_s, added), sigma, 1e-12)
    assert torch.equal(renoised(COSINE, one, *times_of(0.3, 1.0), 2 * one), 2 * one)


def test_ancestral_step_draws_from_the_posterior() -> None:
    """z_s of a z_t of x has the mean and the variance of q(z_s | x); gamma moves the added variance alone."""
    t, s = times_of(0.7, 0.3)
    (alpha_s, sigma_s), (alpha, sigma) = (COSINE.alpha_sigma(time, torch.float64) for time in (s, t))
    one, none = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, 1, dtype=torch.float64)
    near(ancestral(COSINE, alpha, one, t, s, 0.0, none), alpha_s, 1e-12)
    from_eps, added = (ancestral(COSINE, z, none, t, s, 0.0, eps) for z, eps in ((sigma, none), (none, one)))
    near(torch.hypot(from_eps, added), sigma_s, 1e-12)
    low, middle, high = (ancestral(COSINE, none, none, t, s, gamma, one) for gamma in (0.0, 0.5, 1.0))
    near(middle**2, low * high, 1e-12)
    assert low < middle < high


def test_stochastic_step_is_a_double_step_and_one_back() -> None:
    z, x, eps = draw("z"), draw("x"), draw("eps")
    t, s, after = times_of(0.75, 0.5, 0.25)
    there = ddim(COSINE, z, x, t, after)
    assert torch.equal(stochastic(COSINE, z, x, t, s, after, eps), renoised(COSINE, there, after, s, eps))


def test_dpmpp_after_the_infinite_first_step_is_first_order() -> None:
    z, x, before = draw("z"), draw("x"), draw("before")
    start, t, s = times_of(1.0, 0.75, 0.5)
    assert torch.equal(dpmpp_2m(COSINE, z, x, t, s, None), ddim(COSINE, z, x, t, s))
    assert torch.equal(dpmpp_2m(COSINE, z, x, t, s, (before, start)), ddim(COSINE, z, x, t, s))
    assert not torch.allclose(dpmpp_2m(COSINE, z, x, t, s, (before, t + 0.1)), ddim(COSINE, z, x, t, s))


def test_heun_is_the_trapezoid_of_the_two_slopes() -> None:
    """z_t - d (v_t + v_s) / 2 up to the third order of the angle d."""
    z = draw("z")
    gaps = []
    for step in (0.02, 0.01):
        t, s = times_of(0.6, 0.6 - step)
        x = toy(z, t)
        ahead = ddim(COSINE, z, x, t, s)
        slopes = [COSINE.velocity(y, COSINE.noise_in(w, y, u), u) for w, y, u in ((z, x, t), (ahead, toy(ahead, s), s))]
        trapezoid = z - step * math.pi / 4 * (slopes[0] + slopes[1])
        gaps.append((heun(COSINE, z, x, t, s, toy) - trapezoid).abs().max().item())
    assert gaps[0] / gaps[1] == pytest.approx(8, rel=0.1)


# Parity with diffusers


@dataclass(kw_only=True)
class Table(Diffusion):
    """A discrete scheduler's noise levels: time (i + 1) / n is its timestep i, time 0 is clean."""

    alphas_cumprod: Tensor = field(default_factory=lambda: torch.ones(1))

    def alpha_sigma(self, t: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        levels = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod.double()])
        squared = levels[(t * (len(levels) - 1)).round().long()].view(-1, 1, 1, 1, 1)
        return squared.sqrt().to(dtype), (1 - squared).sqrt().to(dtype)


def peer(kind: str, **settings: Any) -> tuple[Any, Table]:
    import diffusers

    settings = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"} | settings
    scheduler = getattr(diffusers, kind)(**settings)
    return scheduler, Table(alphas_cumprod=scheduler.alphas_cumprod)


def peer_run(scheduler: Any, table: Table, steps: int) -> Tensor:
    """Its own loop, told v by the toy denoiser."""
    scheduler.set_timesteps(steps)
    z = NOISE(SHAPE, 0, "start")
    for timestep in scheduler.timesteps:
        t = (timestep + 1).expand(2) / 1000
        x = toy(z, t)
        v = table.velocity(x, table.noise_in(z, x, t), t)
        z = scheduler.step(v, timestep, z).prev_sample
    return z


@pytest.mark.parametrize("steps", [1, 4, 8, 20])
@pytest.mark.parametrize("zero_terminal", [False, True])
def test_ddim_run_equals_diffusers(steps: int, zero_terminal: bool) -> None:
    scheduler, table = peer(
        "DDIMScheduler", timestep_spacing="trailing", clip_sample=False, rescale_betas_zero_snr=zero_terminal
    )
    got = sample(table, toy, Sampler(steps=steps), NOISE, SHAPE)
    near(got, peer_run(scheduler, table, steps), atol=1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers, numpy 2
@pytest.mark.parametrize("steps", [2, 5, 8, 20])
def test_dpmpp_2m_run_equals_diffusers(steps: int) -> None:
    scheduler, table = peer(
        "DPMSolverMultistepScheduler", timestep_spacing="trailing", algorithm_type="dpmsolver++", solver_order=2
    )
    got = sample(table, toy, Sampler(steps=steps, rule=Rule.DPMPP_2M), NOISE, SHAPE)
    near(got, peer_run(scheduler, table, steps), atol=1e-5)


@pytest.mark.parametrize(("gamma", "variance"), [(0.0, "fixed_small"), (1.0, "fixed_large")])
@pytest.mark.parametrize("timestep", [999, 749, 499, 249])
def test_ancestral_step_equals_diffusers(gamma: float, variance: str, timestep: int) -> None:
    scheduler, table = peer("DDPMScheduler", timestep_spacing="trailing", clip_sample=False, variance_type=variance)
    scheduler.set_timesteps(4)
    z, v = draw("z", dtype=torch.float32), draw("v", dtype=torch.float32)
    t, s = torch.full((2,), (timestep + 1) / 1000), torch.full((2,), (timestep - 249) / 1000)
    expected = scheduler.step(v, timestep, z, generator=generator("eps")).prev_sample
    got = ancestral(table, z, table.split(z, v, t)[0], t, s, gamma, draw("eps", dtype=torch.float32))
    near(got, expected, atol=1e-6)


def test_forward_process_and_velocity_equal_diffusers() -> None:
    scheduler, table = peer("DDIMScheduler")
    x, eps, step = draw("x", dtype=torch.float32), draw("eps", dtype=torch.float32), torch.tensor([3, 700])
    t = (step + 1) / 1000
    near(table.noised(x, eps, t), scheduler.add_noise(x, eps, step), atol=1e-6)
    near(table.velocity(x, eps, t), scheduler.get_velocity(x, eps, step), atol=1e-6)


@pytest.mark.parametrize("percentile", [0.5, 0.995, 1.0])
def test_dynamic_threshold_equals_diffusers(percentile: float) -> None:
    scheduler, _ = peer("DDIMScheduler", thresholding=True, dynamic_thresholding_ratio=percentile, sample_max_value=1e9)
    x = 3 * draw("x", dtype=torch.float32)
    got = dynamic_threshold(x, percentile, Per.CLIP)
    near(got, scheduler._threshold_sample(x), atol=1e-5)
    frames = scheduler._threshold_sample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 4)).transpose(1, 2)
    near(dynamic_threshold(x, percentile, Per.FRAME), frames, atol=1e-5)


# Thresholds


@pytest.mark.parametrize("q", [0.001, 0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_quantile_equals_torch(q: float, n: int) -> None:
    a = draw("a", (3, n), torch.float32)
    near(quantile(a, q), torch.quantile(a, q, dim=1), atol=1e-5)


def test_both_selections_agree() -> None:
    a = draw("a", (3, 1001), torch.float32).mul(10).round()
    for ours, theirs in zip(_select_numpy(a, 400, 401), _select_torch(a, 400, 401), strict=True):
        assert torch.equal(ours, theirs)


def test_dynamic_threshold_of_25_million_elements() -> None:
    """Beyond torch.quantile's 2^24: every integer below 1000, 25,000 times, so the 0.995-quantile is 994.005."""
    x = torch.arange(25_000_000).remainder_(1000).float().view(1, 1, 1, 5000, 5000)
    got = dynamic_threshold(x, 0.995, Per.CLIP)
    assert got.max() == 1
    assert got[0, 0, 0, 0, 500].item() == pytest.approx(500 / 994.005, abs=1e-6)


@pytest.mark.parametrize("per", Per)
def test_dynamic_threshold_leaves_a_quiet_video_alone(per: Per) -> None:
    x = draw("x", dtype=torch.float32).clamp(-1, 1)
    assert torch.equal(dynamic_threshold(x, 0.995, per), x)


def test_a_loud_frame_dims_the_others_per_clip_only() -> None:
    x = draw("x", dtype=torch.float32).clamp(-1, 1)
    x[0, :, 1] *= 10
    clip, frame = dynamic_threshold(x, 0.995, Per.CLIP), dynamic_threshold(x, 0.995, Per.FRAME)
    assert torch.equal(frame[0, :, 2], x[0, :, 2]) and clip[0, :, 2].abs().max() < 0.2
    assert torch.equal(clip[1], x[1]) and frame.abs().max() <= 1


def test_what_a_dynamic_threshold_divides_by_is_a_constant_to_a_gradient() -> None:
    x = draw("x", dtype=torch.float64).mul(3).requires_grad_()
    dynamic_threshold(x, 0.9, Per.CLIP).sum().backward()
    s = quantile(x.detach().abs().flatten(1), 0.9).clamp(min=1).double().view(-1, 1, 1, 1, 1)
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.where(x.abs() < s, 1 / s, 0.0))


def test_sampler_limits_every_x_hat_before_the_hooks() -> None:
    def loud(z: Tensor, t: Tensor, step: int) -> Tensor:
        return 5 * z

    def result(**settings: Any) -> tuple[Tensor, list[float]]:
        peaks: list[float] = []

        def look(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
            peaks.append(x.abs().max().item())
            return x

        return sample(COSINE, loud, Sampler(steps=3, **settings), NOISE, SHAPE, hooks=[look]), peaks

    for threshold in (Threshold.STATIC, Threshold.DYNAMIC):
        x, peaks = result(threshold=threshold)
        assert len(peaks) == 3 and max(peaks) <= 1 and x.abs().max() <= 1
    x, peaks = result()
    assert min(peaks) > 1
    assert torch.equal(result(threshold=Threshold.STATIC, percentile=0.5)[0], result(threshold=Threshold.STATIC)[0])


# Guidance


def test_guidance_formula() -> None:
    z, t = draw("z"), torch.tensor([0.5, 0.5])
    for w in (0.5, 6.0):
        got = guided(toy, gaussian, w)(z, t)
        near(got, (1 + w) * toy(z, t) - w * gaussian(z, t), atol=1e-12)
    assert torch.equal(guided(toy, toy, 15.0)(z, t), toy(z, t))


def test_no_guidance_never_calls_the_unconditional_network() -> None:
    def never(z: Tensor, t: Tensor) -> Tensor:
        raise AssertionError

    z, t = draw("z"), torch.tensor([0.5, 0.5])
    assert torch.equal(guided(toy, never, 0.0)(z, t), toy(z, t))


def test_oscillating_weights() -> None:
    sampler = Sampler(steps=8, guidance=15.0, guidance_low=1.0, guidance_constant=3)
    assert [sampler.weight(step) for step in range(8)] == [15, 15, 15, 15, 1, 15, 1, 15]
    sampler = Sampler(steps=4, guidance=6.0, guidance_low=0.0)
    assert [sampler.weight(step) for step in range(4)] == [6, 0, 6, 0]
    sampler = Sampler(steps=4, guidance=6.0, guidance_constant=2)
    assert [sampler.weight(step) for step in range(4)] == [6, 6, 6, 6]
    assert Sampler(steps=1).weight(0) == 0


# The loop


def test_times_are_uniform_and_end_on_zero() -> None:
    assert times(4).tolist() == [1, 0.75, 0.5, 0.25, 0] and times(4).dtype == torch.float64
    assert times(3, 0.6).tolist() == pytest.approx([0.6, 0.4, 0.2, 0])
    assert all(times(n)[0] == 1 and times(n)[-1] == 0 for n in range(1, 100))


@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_calls_of_the_network_the_noise_and_the_progress(rule: Rule, steps: int) -> None:
    calls: list[tuple[int, float]] = []
    asked: list[tuple[int, str]] = []
    done: list[int] = []

    def denoise(z: Tensor, t: Tensor, step: int) -> Tensor:
        assert t.shape == (2,) and t.dtype == z.dtype == torch.float32
        if not calls:
            assert torch.equal(z, NOISE(SHAPE, 0, "start"))
        calls.append((step, t[0].item()))
        return toy(z, t)

    def noise(shape: Sequence[int], step: int, purpose: str) -> Tensor:
        asked.append((step, purpose))
        return NOISE(shape, step, purpose)

    sampler = Sampler(steps=steps, rule=rule)
    sample(COSINE, denoise, sampler, noise, SHAPE, progress=done.append)
    assert len(calls) == sampler.evaluations() == (2 * steps - 1 if rule is Rule.HEUN else steps)
    grid = [(step, step + ahead) for step in range(steps) for ahead in (0, 1)]
    if rule is not Rule.HEUN:
        grid = grid[::2]
    expected_calls = [(step, 1 - at / steps) for step, at in grid if at < steps]
    assert [step for step, _ in calls] == [step for step, _ in expected_calls]
    assert [t for _, t in calls] == pytest.approx([t for _, t in expected_calls])
    expected = [(step, "step") for step in range(steps - 1)] if rule in DRAWING else []
    assert asked == [(0, "start"), *expected]
    assert done == list(range(1, steps + 1))


@pytest.mark.parametrize("rule", Rule)
def test_batch_order_and_batch_size_change_no_bit(rule: Rule) -> None:
    sampler = Sampler(steps=5, rule=rule, gamma=0.5, threshold=Threshold.DYNAMIC, percentile=0.9)

    def run(*names: str) -> Tensor:
        noise = Noise(seed=0, stage="base", samples=names)
        return sample(COSINE, toy, sampler, noise, (len(names), *SHAPE[1:]))

    both = run(*NAMES)
    assert torch.equal(run(*NAMES[::-1]), both.flip(0))
    assert torch.equal(torch.cat([run(NAMES[0]), run(NAMES[1])]), both)


@pytest.mark.parametrize("rule", Rule)
def test_the_global_generator_is_neither_read_nor_moved(rule: Rule) -> None:
    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        x = sample(COSINE, toy, Sampler(steps=4, rule=rule, gamma=0.3), NOISE, SHAPE)
        assert torch.equal(torch.get_rng_state(), state)
        return x

    assert torch.equal(run(1), run(2))


@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
def test_known_frames_come_out_exactly(rule: Rule, mask_dtype: torch.dtype) -> None:
    known = draw("known", dtype=torch.float32)
    mask = torch.tensor([True, False, False, True]).view(1, 1, 4, 1, 1).to(mask_dtype)
    sampler = Sampler(steps=4, rule=rule, threshold=Threshold.STATIC)
    x = sample(COSINE, toy, sampler, NOISE, SHAPE, hooks=[keep_known(known, mask)])
    assert torch.equal(x[:, :, [0, 3]], known[:, :, [0, 3]])
    assert not torch.equal(x[:, :, 1], known[:, :, 1])


@pytest.mark.parametrize("rule", Rule)
def test_a_given_video_starts_at_its_strength(rule: Rule) -> None:
    start = draw("video", dtype=torch.float32)
    first: list[tuple[Tensor, Tensor]] = []

    def denoise(z: Tensor, t: Tensor, step: int) -> Tensor:
        first.append((z, t))
        return start

    x = sample(COSINE, denoise, Sampler(steps=3, rule=rule, strength=0.4), NOISE, SHAPE, start=start)
    t = torch.full((2,), 0.4)
    assert torch.equal(first[0][1], t)
    assert torch.equal(first[0][0], COSINE.noised(start, NOISE(SHAPE, 0, "start"), t))
    assert torch.equal(x, start)


def test_a_start_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"strength is 0\.4, expected 1"):
        sample(COSINE, toy, Sampler(steps=2, strength=0.4), NOISE, SHAPE)
    with pytest.raises(ValueError, match=r"shape \(2, 3\), expected \(2, 3, 4, 6, 5\)"):
        sample(COSINE, toy, Sampler(steps=2), NOISE, SHAPE, start=torch.zeros(2, 3))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_none_names_its_step(bad: float) -> None:
    def denoise(z: Tensor, t: Tensor, step: int) -> Tensor:
        return torch.where(torch.arange(5) == 0, bad, toy(z, t)) if step == 2 else toy(z, t)

    with pytest.raises(NumericError, match=r"step 3 of 4: 144 of 720 values .* not finite"):
        sample(COSINE, denoise, Sampler(steps=4, threshold=Threshold.STATIC), NOISE, SHAPE)
    with pytest.raises(NumericError, match="step 1 of 4"):
        sample(COSINE, toy, Sampler(steps=4), NOISE, SHAPE, hooks=[lambda x, z, t: x + bad])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_noise_decides_the_dtype(dtype: torch.dtype) -> None:
    def half(z: Tensor, t: Tensor, step: int) -> Tensor:
        return toy(z, t).bfloat16()

    for rule in Rule:
        x = sample(COSINE, half, Sampler(steps=3, rule=rule), lambda *key: NOISE(*key).to(dtype), SHAPE)
        assert x.dtype == dtype


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"gamma": 1.5}, "gamma is 1.5, expected a number from 0 to 1"),
        ({"gamma": math.nan}, "gamma is nan, expected a number from 0 to 1"),
        ({"guidance": -1.0}, "guidance is -1.0, expected a number of at least 0"),
        ({"guidance": math.inf}, "guidance is inf, expected a number of at least 0"),
        ({"guidance_low": 1.0}, "guidance_low is 1.0, expected a number from 0 to guidance, which is 0.0"),
        ({"guidance_constant": -1}, "guidance_constant is -1, expected at least 0"),
        ({"percentile": 0.0}, "percentile is 0.0, expected a number above 0, at most 1"),
        (
            {"reconstruction": 1.0, "learned": True, "rule": Rule.ANCESTRAL},
            "reconstruction is 1.0, expected 0 where learned is true",
        ),
        ({"reconstruction": -1.0}, "reconstruction is -1.0, expected a number of at least 0"),
        ({"strength": 0.0}, "strength is 0.0, expected a number above 0, at most 1"),
        ({"strength": 1.1}, "strength is 1.1, expected a number above 0, at most 1"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Sampler(**({"steps": 4} | settings))
    assert str(caught.value) == message
