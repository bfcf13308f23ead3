"""Laws of the forward process."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import near
from torch import Tensor

from cascade.diffusion import Diffusion, Path, Prediction
from cascade.noise import generator
from cascade.sampling.solvers import ddim

SHIFTS = (0.25, 1.0, 2.0)
T = torch.linspace(0, 1, 1001, dtype=torch.float64)
LOG_SNR = torch.linspace(-20, 20, 81, dtype=torch.float64)


def draw(name: str, batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, 2, 2, 2, generator=generator(name), dtype=dtype)


@pytest.mark.parametrize("shift", SHIFTS)
def test_alpha_and_sigma_lie_on_the_circle_with_exact_ends(shift: float) -> None:
    alpha, sigma = Diffusion(shift=shift).alpha_sigma(T)
    assert alpha.dtype == sigma.dtype == torch.float32
    assert alpha.shape == sigma.shape == (1001, 1, 1, 1, 1)
    assert (alpha.double() ** 2 + sigma.double() ** 2 - 1).abs().max() <= 1e-7
    assert (alpha[0], sigma[0], alpha[-1], sigma[-1]) == (1, 0, 0, 1)


@pytest.mark.parametrize("shift", SHIFTS)
def test_log_snr_falls_is_the_ratio_and_inverts(shift: float) -> None:
    diffusion = Diffusion(shift=shift)
    log_snr = diffusion.log_snr(T)
    assert (log_snr[0], log_snr[-1]) == (math.inf, -math.inf)
    assert bool((log_snr.diff() < 0).all())
    alpha, sigma = diffusion.alpha_sigma(T, torch.float64)
    near(log_snr[1:-1], 2 * torch.log(alpha / sigma).flatten()[1:-1], atol=1e-9)
    near(diffusion.time(log_snr), T, atol=1e-12)


@pytest.mark.parametrize("side", [32, 128, 256])
def test_shift_gives_a_large_video_the_snr_of_its_64_pixel_average(side: int) -> None:
    alpha, sigma = Diffusion(shift=64 / side).alpha_sigma(T[1:-1], torch.float64)
    averaged = sigma * 64 / side
    expected = Diffusion().log_snr(T[1:-1])
    near(2 * torch.log(alpha / averaged).flatten(), expected, atol=1e-9)


def test_cosine_is_the_table_of_diffusers_but_for_its_offset() -> None:
    from diffusers import DDIMScheduler

    table = DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    offset = 0.008  # Nichol & Dhariwal 2021, eq. 17; the table divides by its value at 0 and caps its last entry
    alpha, _ = Diffusion().alpha_sigma((T + offset) / (1 + offset), torch.float64)
    squares = alpha.flatten() ** 2
    near((squares / squares[0])[1:-1], table[:-1].double(), atol=1e-6)


@pytest.mark.parametrize("prediction", Prediction)
@pytest.mark.parametrize("shift", SHIFTS)
def test_split_undoes_noised(prediction: Prediction, shift: float) -> None:
    diffusion = Diffusion(prediction=prediction, shift=shift)
    t = diffusion.time(LOG_SNR)
    x, eps = draw("x", len(t)), draw("eps", len(t))
    got_x, got_eps = diffusion.split(diffusion.noised(x, eps, t), diffusion.target(x, eps, t), t)
    near(got_x, x, atol=1e-9)
    near(got_eps, eps, atol=1e-9)
    assert torch.equal(diffusion.clean(diffusion.noised(x, eps, t), diffusion.target(x, eps, t), t), got_x)


def test_split_of_v_is_as_good_in_float32() -> None:
    diffusion = Diffusion()
    t = diffusion.time(LOG_SNR).float()
    x, eps = draw("x", len(t), torch.float32), draw("eps", len(t), torch.float32)
    got_x, got_eps = diffusion.split(diffusion.noised(x, eps, t), diffusion.target(x, eps, t), t)
    near(got_x, x, atol=1e-6)
    near(got_eps, eps, atol=1e-6)


@pytest.mark.parametrize("prediction", Prediction)
def test_both_ends_are_finite_and_what_is_not_in_z_comes_out_as_zero(prediction: Prediction) -> None:
    diffusion = Diffusion(prediction=prediction)
    t = torch.tensor([0.0, 1.0])
    x, eps = draw("x", 2, torch.float32), draw("eps", 2, torch.float32)
    z, out = diffusion.noised(x, eps, t), diffusion.target(x, eps, t)
    assert torch.equal(z, torch.stack([x[0], eps[1]]))
    got_x, got_eps = diffusion.split(z, out, t)
    assert torch.equal(got_x[0], x[0]) and torch.equal(got_eps[1], eps[1])
    assert torch.equal(got_x[1], torch.zeros_like(x[1]) if prediction is Prediction.EPS else x[1])
    assert torch.equal(got_eps[0], torch.zeros_like(x[0]) if prediction is Prediction.X else eps[0])


def test_v_is_the_slope_of_z_in_the_angle() -> None:
    diffusion = Diffusion(shift=0.5)
    t, h = torch.linspace(0.1, 0.9, 9, dtype=torch.float64), 1e-6
    x, eps = draw("x", len(t)), draw("eps", len(t))
    rise = diffusion.noised(x, eps, t + h) - diffusion.noised(x, eps, t - h)
    run = (diffusion.angle(t + h) - diffusion.angle(t - h)).view(-1, 1, 1, 1, 1)
    near(rise / run, diffusion.velocity(x, eps, t), atol=1e-8)


def test_target_is_what_the_prediction_says() -> None:
    t = torch.tensor([0.3])
    x, eps = draw("x", 1), draw("eps", 1)
    assert Diffusion(prediction=Prediction.X).target(x, eps, t) is x
    assert Diffusion(prediction=Prediction.EPS).target(x, eps, t) is eps
    assert torch.equal(Diffusion().target(x, eps, t), Diffusion().velocity(x, eps, t))


@pytest.mark.parametrize("time_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("given", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_video_decides_the_dtype(time_dtype: torch.dtype, given: torch.dtype, expected: torch.dtype) -> None:
    diffusion, t = Diffusion(), torch.tensor([0.3], dtype=time_dtype)
    x, eps = draw("x", 1).to(given), draw("eps", 1).to(given)
    z, v = diffusion.noised(x, eps, t), diffusion.target(x, eps, t)
    assert {a.dtype for a in (z, v, *diffusion.split(z, v, t), diffusion.noise_in(z, x, t))} == {expected}


@pytest.mark.parametrize("shift", [0.0, -1.0, math.inf, math.nan])
def test_a_shift_that_is_no_positive_number_is_refused(shift: float) -> None:
    with pytest.raises(ValueError, match=r"shift is .*, expected a positive number"):
        Diffusion(shift=shift)


# the straight path ---------------------------------------------------------------------------------------------------


def straight() -> Diffusion:
    return Diffusion(prediction=Prediction.X, path=Path.STRAIGHT)


def test_the_straight_path_is_straight_and_ddim_walks_along_it() -> None:
    """z_s = (s / t) z + (1 - s / t) x: Euler's step of flow matching, exact for the true x at any length."""
    x, low = torch.randn(2, 3, 1, 3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    t, s = torch.tensor([1.0, 0.9, 0.3]).double(), torch.tensor([0.4, 0.2, 0.0]).double()
    z = straight().noised(x, low, t)
    torch.testing.assert_close(z, torch.lerp(x, low, t.view(-1, 1, 1, 1, 1)))
    torch.testing.assert_close(ddim(straight(), z, x, t, s), straight().noised(x, low, s))


def test_level_and_log_snr_of_the_straight_path_have_their_inverse() -> None:
    t = torch.linspace(0.01, 0.99, 9).double()
    torch.testing.assert_close(straight().time(straight().log_snr(t)), t)
    level = straight().level(torch.tensor([0.0, 0.5, 1.0]))
    assert level.tolist() == [0.0, 0.5, 1.0]


def test_the_straight_path_is_for_x_alone() -> None:
    with pytest.raises(ValueError, match="expected x and 1 where path is straight"):
        Diffusion(path=Path.STRAIGHT)
