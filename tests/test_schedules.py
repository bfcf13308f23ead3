"""Laws of tables of betas and their grids; parity with diffusers' schedulers as the public weights set them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from cascade.diffusion import Diffusion, Path, Prediction, Schedule
from cascade.noise import generator
from cascade.sampling.grid import End, Grid, Spacing, times
from cascade.sampling.guidance import Per
from cascade.sampling.sampler import Rule, Sampler, Threshold, sample

SHAPE = (2, 3, 2, 6, 5)
IF = {"beta_schedule": "squaredcos_cap_v2"}
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LAVIE = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
TABLES = [
    (IF, {"schedule": Schedule.SQUAREDCOS}),
    (LATENT, {"schedule": Schedule.SCALED_LINEAR, "betas": [0.00085, 0.012]}),
    (LAVIE, {"schedule": Schedule.LINEAR, "betas": [0.0001, 0.02]}),
]
NAMES = ["squaredcos", "scaled_linear", "linear"]


def table(number: int, prediction: Prediction = Prediction.EPS) -> Diffusion:
    return Diffusion(prediction=prediction, timesteps=1000, **TABLES[number][1])  # type: ignore[arg-type]


def draw(*key: str | int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=generator(*key))


def near(got: Tensor, expected: Tensor, atol: float) -> None:
    """Not torch.testing, whose first comparison imports torch.distributed for seconds."""
    assert got.shape == expected.shape
    assert (got.double() - expected.double()).abs().max() <= atol


# tables --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(3), ids=NAMES)
def test_a_table_holds_the_very_numbers_that_diffusers_trains_with(number: int) -> None:
    from diffusers import DDPMScheduler

    diffusion, theirs = table(number), DDPMScheduler(**TABLES[number][0]).alphas_cumprod
    for t in (diffusion.timestep(torch.arange(1000)), diffusion.timestep(torch.arange(1000)).float()):
        alpha, sigma = diffusion.alpha_sigma(t, torch.float64)
        near(alpha.flatten() ** 2 / theirs, torch.ones(1000), atol=1e-12)
        near(sigma.flatten() ** 2, 1 - theirs.double(), atol=1e-12)
        assert diffusion.number(t).tolist() == list(range(1000))


@pytest.mark.parametrize("number", range(3), ids=NAMES)
def test_between_timesteps_the_noise_grows_and_the_log_snr_has_its_inverse(number: int) -> None:
    diffusion = table(number)
    t = torch.linspace(0, 1, 3777, dtype=torch.float64)
    log_snr = diffusion.log_snr(t)
    assert bool((log_snr.diff() < 0).all()) and log_snr[0] == float("inf")
    alpha, sigma = diffusion.alpha_sigma(t, torch.float64)
    assert (alpha[0], sigma[0]) == (1, 0)
    near(alpha**2 + sigma**2, torch.ones_like(alpha), atol=1e-12)
    near(diffusion.time(log_snr), t, atol=1e-9)
    near(diffusion.angle(t), torch.atan2(sigma, alpha).flatten(), atol=1e-12)


@pytest.mark.parametrize("prediction", Prediction)
@pytest.mark.parametrize("number", range(3), ids=NAMES)
def test_split_undoes_noised(prediction: Prediction, number: int) -> None:
    diffusion = table(number, prediction)
    t = torch.linspace(0.001, 1, 64, dtype=torch.float64)
    x, eps = (draw(name, shape=(64, 1, 1, 2, 2)).double() for name in ("x", "eps"))
    got_x, got_eps = diffusion.split(diffusion.noised(x, eps, t), diffusion.target(x, eps, t), t)
    near(got_x, x, atol=1e-9)
    near(got_eps, eps, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"schedule": Schedule.LINEAR, "betas": [0.1, 0.2]}, "timesteps is 0"),
        ({"schedule": Schedule.LINEAR, "timesteps": 10}, "betas is None"),
        ({"schedule": Schedule.LINEAR, "timesteps": 10, "betas": [0.2, 0.1]}, "0 < first <= last < 1"),
        ({"schedule": Schedule.SQUAREDCOS, "timesteps": 10, "betas": [0.1, 0.2]}, "expected null"),
        ({"schedule": Schedule.LINEAR, "timesteps": 1000, "betas": [1e-4, 0.5]}, "expected smaller ones"),  # ends at 0
        (
            {"schedule": Schedule.LINEAR, "timesteps": 980, "betas": [0.1, 0.1]},
            "expected smaller ones",
        ),  # at 3e-45, twice
        ({"timesteps": 10}, "expected none where schedule is cosine"),
        ({"schedule": Schedule.SQUAREDCOS, "timesteps": 10, "shift": 2.0}, "shift is not 1"),
        (
            {"schedule": Schedule.SQUAREDCOS, "timesteps": 10, "path": Path.STRAIGHT, "prediction": Prediction.X},
            "expected cosine where path is straight",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Diffusion(**settings)


# grids ---------------------------------------------------------------------------------------------------------------


def scheduler(kind: str, **settings: Any) -> Any:
    import diffusers

    return getattr(diffusers, kind)(**settings)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers, numpy 2
@pytest.mark.parametrize("steps", [1, 3, 20, 27, 50, 75, 125])
@pytest.mark.parametrize("spacing", [Spacing.LINSPACE, Spacing.LEADING, Spacing.TRAILING])
@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_grids_are_those_of_diffusers(kind: str, spacing: Spacing, steps: int) -> None:
    offset = 1 if spacing is Spacing.LEADING else 0
    theirs = scheduler(kind, timestep_spacing=spacing.value, steps_offset=offset, **LATENT)
    theirs.set_timesteps(steps)
    rule = Rule.DPMPP_2M if kind.startswith("DPM") else Rule.DDIM
    diffusion = table(1)
    points = Sampler(steps=steps, rule=rule, grid=Grid(spacing=spacing, offset=offset)).times(diffusion)
    assert diffusion.number(torch.tensor(points[:-1])).tolist() == theirs.timesteps.tolist() and points[-1] == 0


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("steps", [10, 75])
def test_timesteps_without_signal_are_left_out_as_in_diffusers(steps: int) -> None:
    theirs = scheduler("DPMSolverMultistepScheduler", lambda_min_clipped=-5.1, **IF)
    theirs.set_timesteps(steps)
    grid = Grid(spacing=Spacing.LINSPACE, lambda_min=-5.1)
    points = grid.times(table(0), steps, closed=True)
    assert table(0).number(points[:-1]).tolist() == theirs.timesteps.tolist()
    assert theirs.timesteps[0] < 999


def test_a_video_to_start_from_takes_the_end_of_the_grid() -> None:
    """50 steps at strength 0.8 are the last 40 (diffusers' video-to-video)."""
    grid = Grid(spacing=Spacing.LEADING, offset=1)
    whole, part = grid.times(table(1), 50), grid.times(table(1), 40, start=0.8)
    assert torch.equal(part, whole[10:])
    uniform = Grid().times(table(1), 8, start=0.5)
    assert torch.equal(uniform, times(8, 0.5))


def test_the_first_timestep_is_an_end() -> None:
    grid = Grid(spacing=Spacing.LINSPACE, end=End.FIRST)
    assert table(1).number(grid.times(table(1), 5)[-1:]).tolist() == [0]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"offset": 1}, "offset is 1"),
        ({"offset": 1, "spacing": Spacing.TRAILING}, "more where spacing is leading"),
        ({"end": End.FIRST}, "null and clean where spacing is uniform"),
        ({"lambda_min": -5.0}, "null and clean where spacing is uniform"),
        ({"lambda_min": -5.0, "spacing": Spacing.TRAILING}, "null where spacing is trailing"),
    ],
)
def test_grids_that_mean_nothing_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Grid(**settings)


def test_more_steps_than_timesteps_are_refused() -> None:
    with pytest.raises(ValueError, match="1001 steps, expected at most the 1000"):
        Grid(spacing=Spacing.LEADING).times(table(1), 1001)


# whole runs ----------------------------------------------------------------------------------------------------------


def stub(diffusion: Diffusion, z: Tensor, level: Tensor) -> Tensor:
    """What a network says at timestep `level`, of an x_hat that is linear in nothing and differs between channels."""
    t = diffusion.timestep(level)
    gain = torch.linspace(0.8, 1.9, z.shape[1]).view(1, -1, 1, 1, 1).to(z)
    x = torch.tanh(gain * z + 0.3 * t.view(-1, 1, 1, 1, 1)) * 1.4
    return diffusion.target(x, diffusion.noise_in(z, x, t), t)


def between(z: Tensor) -> Tensor:
    """What it says of the variance."""
    return torch.sin(3 * z.flip(1))


def ours(diffusion: Diffusion, sampler: Sampler, start: Tensor | None = None) -> Tensor:
    def denoise(z: Tensor, t: Tensor, step: int) -> Tensor:
        x = diffusion.split(z, stub(diffusion, z, diffusion.number(t)), t)[0]
        return torch.cat([x, between(z)], 1) if sampler.learned else x

    def noise(shape: Any, step: int, purpose: str) -> Tensor:
        return draw(purpose, step).double()

    return sample(diffusion, denoise, sampler, noise, SHAPE, start=start)


def theirs(peer: Any, diffusion: Diffusion, steps: int, start: Tensor | None = None, learned: bool = False) -> Tensor:
    """diffusers' loop, frame by frame as its schedulers know images alone; from `start` on for the last 4/5."""
    peer.alphas_cumprod = peer.alphas_cumprod.double()
    peer.set_timesteps(steps)
    if hasattr(peer, "sigmas"):
        bar = peer.alphas_cumprod[peer.timesteps]
        peer.sigmas = torch.cat([((1 - bar) / bar).sqrt(), peer.sigmas[-1:].double()])
    timesteps = peer.timesteps if start is None else peer.timesteps[steps // 5 :]
    z = draw("start", 0).double()
    if start is not None:
        z = clips(peer.add_noise(images(start), images(z), timesteps[:1]))
    for step, timestep in enumerate(timesteps):
        out = stub(diffusion, z, torch.full((2,), float(timestep)))
        out = torch.cat([out, between(z)], 1) if learned else out
        with doubled(images(draw("step", step).double())):
            z = clips(peer.step(images(out), timestep, images(z)).prev_sample)
    return z


@contextmanager
def doubled(noise: Tensor) -> Iterator[None]:
    """What diffusers' DDPM draws is `noise`, and its DPM-Solver, which casts to float32, casts to float64."""
    from diffusers.schedulers import scheduling_ddpm, scheduling_dpmsolver_multistep

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, **k: noise)
        patch.setattr(scheduling_dpmsolver_multistep, "torch", Double())
        yield


class Double:
    """torch, whose float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def images(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def clips(x: Tensor) -> Tensor:
    return x.unflatten(0, (SHAPE[0], SHAPE[2])).transpose(1, 2)


SHOW1 = {"timestep_spacing": "linspace", "lambda_min_clipped": -5.1, **IF}
DYNAMIC: dict[str, Any] = {"threshold": Threshold.DYNAMIC, "percentile": 0.95, "per": Per.FRAME}
THEIRS = {"thresholding": True, "dynamic_thresholding_ratio": 0.95}
CLIPPED: dict[str, Any] = {"grid": Grid(spacing=Spacing.LINSPACE, lambda_min=-5.1)}
ENDING: dict[str, Any] = {"grid": Grid(spacing=Spacing.LINSPACE, lambda_min=-5.1, end=End.FIRST)}
LEADING: dict[str, Any] = {"grid": Grid(spacing=Spacing.LEADING, offset=1, end=End.FIRST)}
OFFSET: dict[str, Any] = {"grid": Grid(spacing=Spacing.LEADING, offset=1)}
STEPPED: dict[str, Any] = {"grid": Grid(spacing=Spacing.LEADING)}
LINEAR_END: dict[str, Any] = {"grid": Grid(spacing=Spacing.LINSPACE, end=End.FIRST)}
SPACED: dict[str, Any] = {"grid": Grid(spacing=Spacing.LINSPACE)}
DPM, DDPM, DDIM = "DPMSolverMultistepScheduler", "DDPMScheduler", "DDIMScheduler"
V = {"prediction_type": "v_prediction"}


@dataclass
class Run:
    """A scheduler of diffusers with its settings, and ours that should do the same."""

    name: str
    kind: str
    steps: int
    settings: dict[str, Any]
    table: int
    sampler: dict[str, Any]
    prediction: Prediction = Prediction.EPS


P15, P10 = THEIRS | {"sample_max_value": 1.5}, THEIRS | {"sample_max_value": 1.0}
RANGE, SIGMA_MIN, RAW = {"variance_type": "learned_range"}, {"final_sigmas_type": "sigma_min"}, {"clip_sample": False}
STABLE = {"steps_offset": 1, "set_alpha_to_one": False, **RAW}
LEARNED: dict[str, Any] = DYNAMIC | STEPPED | {"learned": True}
RUNS = [
    Run("show1 base", DPM, 75, SHOW1 | P15, 0, DYNAMIC | CLIPPED | {"highest": 1.5}),
    Run("show1 base, sigma_min", DPM, 75, SHOW1 | P15 | SIGMA_MIN, 0, DYNAMIC | ENDING | {"highest": 1.5}),
    Run("show1 base, 6 steps", DPM, 6, SHOW1 | P15 | SIGMA_MIN, 0, DYNAMIC | ENDING | {"highest": 1.5}),
    Run("show1 sr1", DPM, 125, SHOW1 | P10, 0, DYNAMIC | CLIPPED | {"highest": 1.0}),
    Run("show1 sr2", DPM, 40, LATENT | {"steps_offset": 1}, 1, SPACED | {"strength": 0.8}),
    Run("zeroscope", DPM, 40, LATENT | SIGMA_MIN, 1, LINEAR_END),
    Run("v", DPM, 20, LATENT | V, 1, SPACED, Prediction.V),
    Run("if I", DDPM, 100, IF | P15 | RANGE, 0, LEARNED | {"highest": 1.5}),
    Run("if II", DDPM, 50, IF | P10 | RANGE, 0, LEARNED | {"highest": 1.0}),
    Run("lavie base", DDPM, 50, LAVIE | RAW | {"steps_offset": 1}, 2, OFFSET),
    Run("lavie interp's grid", DDPM, 50, LAVIE | RAW | {"timestep_spacing": "linspace"}, 2, SPACED),
    Run("ddim", DDIM, 50, LAVIE | RAW, 2, STEPPED),
    Run("lavie vsr", DDIM, 50, LAVIE | V | STABLE, 2, LEADING, Prediction.V),
    Run("modelscope", DDIM, 50, LATENT | STABLE, 1, LEADING),
]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("run", RUNS, ids=[run.name for run in RUNS])
def test_a_whole_run_equals_diffusers(run: Run) -> None:
    """In float64: the networks' bounded answers leave nothing but rounding to differ by, and float32's is 1e-6."""
    rule = {DPM: Rule.DPMPP_2M, DDPM: Rule.ANCESTRAL, DDIM: Rule.DDIM}[run.kind]
    part = run.sampler.get("strength", 1.0)
    start = None if part == 1 else draw("video").clamp(-1, 1).double()
    diffusion, peer = table(run.table, run.prediction), scheduler(run.kind, **run.settings)
    got = ours(diffusion, Sampler(steps=run.steps, rule=rule, **run.sampler), start)
    expected = theirs(peer, diffusion, round(run.steps / part), start, run.sampler.get("learned", False))
    assert expected.std() > 0.3
    near(got, expected, atol=1e-6)


def test_a_network_of_discrete_training_is_told_whole_timesteps_though_times_are_float32() -> None:
    from cascade.nets.unet3d import timestep

    t = table(1).level(table(1).timestep(torch.arange(1000)).float())
    assert t.dtype == torch.float32 and timestep(t).tolist() == list(range(1000))
