"""From noise to video: the settings of a run, and one loop of steps (solvers.py) over an x_hat that guidance, hooks and
thresholds (guidance.py) have changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from cascade.diffusion import Diffusion
from cascade.errors import NumericError
from cascade.sampling.grid import End, Grid
from cascade.sampling.guidance import Hook, Per, dynamic_threshold
from cascade.sampling.solvers import ancestral, ddim, dpmpp_2m, heun, stochastic

StepDenoise = Callable[[Tensor, Tensor, int], Tensor]  # z, t, step -> x_hat with the step's guidance (see `sample`)
After = Callable[[int, float, Tensor], Tensor]  # step, its t, the z it made -> z
Random = Callable[[Sequence[int], int, str], Tensor]  # shape, step, purpose -> N(0, 1); cascade.noise.Noise is one


MANY = 15  # steps: with fewer DPM-Solver ends in first order


class Rule(Enum):
    """How a step uses x_hat; each is a function of cascade/sampling/solvers.py."""

    DDIM = "ddim"
    ANCESTRAL = "ancestral"
    STOCHASTIC = "stochastic"
    DPMPP_2M = "dpmpp_2m"
    HEUN = "heun"


class Threshold(Enum):
    """How x_hat is brought into [-1, 1] (Saharia et al. 2022, sec. 2.3)."""

    NONE = "none"
    STATIC = "static"
    DYNAMIC = "dynamic"


@dataclass(kw_only=True)
class Sampler:
    """Settings of one sampling run.

    `guidance` is the papers' w (diffusers' guidance_scale is 1 + w; 0 is off). With `guidance_low` it oscillates:
    the first `guidance_constant` steps at `guidance`, then `guidance`, `guidance_low`, `guidance`, ... (Ho et al. 2022,
    Imagen Video, "Large guidance weights"). `gamma` belongs to the ancestral rule; with `learned` the network itself
    says it, for every value of the video. `percentile`, `per` and `highest`, the largest divisor, belong to the dynamic
    threshold. `strength` is the time at which a given video starts (SDEdit, Meng et al. 2022); 1 is pure noise.
    `reconstruction` is the weight of the gradient that pulls x_hat towards what is given of the video but not told to
    the network, see the function of that name; 0 is off. With `shared_noise` all frames get the same noise (Singer et
    al. 2022, Make-A-Video, sec. 3.2.2). `joint` sends both branches of guidance through the network as one batch: fewer
    calls, twice the memory, and other last bits than one after the other.
    """

    steps: int
    rule: Rule = Rule.DDIM
    grid: Grid = field(default_factory=Grid)
    gamma: float = 0.0
    learned: bool = False
    guidance: float = 0.0
    guidance_low: float | None = None
    guidance_constant: int = 0
    threshold: Threshold = Threshold.NONE
    percentile: float = 0.995
    per: Per = Per.CLIP
    highest: float | None = None
    strength: float = 1.0
    reconstruction: float = 0.0
    shared_noise: bool = False
    joint: bool = False

    def __post_init__(self) -> None:
        low = 0.0 if self.guidance_low is None else self.guidance_low
        for name, valid, expected in (
            ("steps", self.steps >= 1, "at least 1"),
            ("gamma", 0 <= self.gamma <= 1, "a number from 0 to 1"),
            ("guidance", 0 <= self.guidance < math.inf, "a number of at least 0"),
            ("guidance_low", 0 <= low <= self.guidance, f"a number from 0 to guidance, which is {self.guidance}"),
            ("guidance_constant", self.guidance_constant >= 0, "at least 0"),
            ("percentile", 0 < self.percentile <= 1, "a number above 0, at most 1"),
            ("strength", 0 < self.strength <= 1, "a number above 0, at most 1"),
            ("highest", self.highest is None or self.highest >= 1, "null, or at least 1"),
            ("learned", not self.learned or self.rule is Rule.ANCESTRAL, "false where rule is not ancestral"),
            ("reconstruction", 0 <= self.reconstruction < math.inf, "a number of at least 0"),
        ):
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {expected}")
        if self.learned and self.reconstruction:
            raise ValueError(f"reconstruction is {self.reconstruction}, expected 0 where learned is true")
        if self.grid.end is End.FIRST and self.rule in (Rule.STOCHASTIC, Rule.HEUN):
            raise ValueError(f"grid.end is first, expected clean where rule is {self.rule.value}")

    def weight(self, step: int) -> float:
        """Guidance weight w of a step, counted from 0."""
        past = step - self.guidance_constant
        return self.guidance if self.guidance_low is None or past < 0 or past % 2 == 0 else self.guidance_low

    def evaluations(self, guided: bool = False) -> int:
        """Network calls in a whole run; `guided`: a step whose weight is not 0 needs two for one x_hat."""
        calls = [2 if self.rule is Rule.HEUN else 1] * (self.steps - 1) + [1]
        return sum(n * (2 if guided and self.weight(step) else 1) for step, n in enumerate(calls))

    def limit(self, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The threshold as a hook."""
        if self.threshold is Threshold.NONE:
            return x
        if self.threshold is Threshold.STATIC:
            return x.clamp(-1, 1)
        return dynamic_threshold(x, self.percentile, self.per, self.highest)

    @property
    def smooth(self) -> bool:
        """Whether so many steps may end with one of second order; a long last one is not stable (Lu et al. 2022b)."""
        return self.grid.whole(self.steps, self.strength) >= MANY

    def times(self, diffusion: Diffusion) -> list[float]:
        """The time of every step, and where the last one lands."""
        closed = self.rule is Rule.DPMPP_2M
        return self.grid.times(diffusion, self.steps, self.strength, closed).tolist()


def sample(
    diffusion: Diffusion,
    denoise: StepDenoise,
    sampler: Sampler,
    noise: Random,
    shape: Sequence[int],
    *,
    start: Tensor | None = None,
    hooks: Sequence[Hook] = (),
    progress: Callable[[int], None] | None = None,
    after: After | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A video of `shape` (B, C, F, H, W): x_hat of the last step. Gradients, where enabled, run through all steps.

    On a GPU the loop never waits for a result: launches run ahead of the device from the first step to the last.
    `noise` is asked for ("start", step 0) and, by the rules that need it, for ("step", step i). `start` (B, C, F, H, W)
    is noised to sampler.strength and sampling goes on from there. `hooks` run in order on every x_hat, after the
    sampler's threshold. `after` may replace what a step made, `progress` gets the number of steps done. t (B,) comes in
    the dtype of the noise, and so do all results. Where sampler.learned, `denoise` gives (B, 2C, F, H, W): x_hat, and
    gamma as a number from -1 to 1.

    Raises ValueError for a strength below 1 without a video to start from or for a start of another shape, NumericError
    naming the step if x_hat is not finite.
    """
    if start is None and sampler.strength < 1:
        raise ValueError(f"strength is {sampler.strength}, expected 1 where no video is given to start from")
    if start is not None and tuple(start.shape) != tuple(shape):
        raise ValueError(f"the start video has shape {tuple(start.shape)}, expected {tuple(shape)}")
    watch = Watch(sampler.steps)
    z = _moved(noise(shape, 0, "start"), torch.device(device))
    points = sampler.times(diffusion)
    grid = [torch.full_like(z[:, 0, 0, 0, 0], t) for t in points]
    if start is not None:
        z = diffusion.noised(start.to(z), z, grid[0])

    def predict(z: Tensor, t: Tensor, step: int) -> tuple[Tensor, float | Tensor]:
        out = watch(denoise(z, t, step).to(z.dtype), step)
        x, gamma = _halves(out) if sampler.learned else (out, sampler.gamma)
        for hook in (sampler.limit, *hooks):
            x = hook(x, z, t)
        return watch(x, step), gamma

    def estimate(z: Tensor, t: Tensor, step: int) -> Tensor:
        return predict(z, t, step)[0]

    def drawn(step: int) -> Tensor:
        return _moved(noise(shape, step, "step"), z.device)

    before: tuple[Tensor, Tensor] | None = None
    for step, (t, s) in enumerate(pairwise(grid)):
        x, gamma = predict(z, t, step)
        if points[step + 1] == 0:
            z = x
        elif sampler.rule is Rule.DDIM:
            z = ddim(diffusion, z, x, t, s)
        elif sampler.rule is Rule.ANCESTRAL:
            z = ancestral(diffusion, z, x, t, s, gamma, drawn(step))
        elif sampler.rule is Rule.STOCHASTIC:
            z = stochastic(diffusion, z, x, t, s, grid[step + 2], drawn(step))
        elif sampler.rule is Rule.DPMPP_2M:
            z = dpmpp_2m(diffusion, z, x, t, s, before if step + 1 < sampler.steps or sampler.smooth else None)
        else:
            z = heun(diffusion, z, x, t, s, partial(estimate, step=step))
        before = (x, t) if sampler.rule is Rule.DPMPP_2M else None  # a whole video
        if after is not None:
            z = watch(after(step, points[step], z), step)
        if progress is not None:
            progress(step + 1)
    watch.report()
    return z


class Watch:
    """Counts the values of every x_hat that are not finite.

    On the CPU the first such x_hat ends the run. Reading a count from a GPU would make the host wait for all that was
    launched, so there they are read when the run is over. On the meta device there is nothing to see.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.seen: list[tuple[int, int, Tensor]] = []  # step, values, how many of them are finite

    def __call__(self, x: Tensor, step: int) -> Tensor:
        if x.device.type == "meta":
            return x
        self.seen.append((step, x.numel(), torch.isfinite(x).count_nonzero()))
        if x.device.type == "cpu":
            self.report()
        return x

    def report(self) -> None:
        """Raises NumericError for the first step with a value that is not finite."""
        seen, self.seen = self.seen, []
        finite = torch.stack([count for _, _, count in seen]).tolist() if seen else []
        for (step, values, _), good in zip(seen, finite, strict=True):
            if good < values:
                raise NumericError(
                    f"sampling step {step + 1} of {self.steps}: "
                    f"{values - good} of {values} values of x_hat are not finite",
                    "dtype=float32, or other weights if that is what ran",
                )


def _moved(drawn: Tensor, device: torch.device) -> Tensor:
    """Noise on `device`; from the CPU to a GPU through pinned memory, so that the host goes on at once."""
    if device.type != "cuda" or drawn.device.type != "cpu":
        return drawn.to(device)
    # frames that share their noise share its memory, which cannot be pinned
    return drawn.contiguous().pin_memory().to(device, non_blocking=True)


def _halves(out: Tensor) -> tuple[Tensor, Tensor]:
    """x_hat, and the number from -1 to 1 beside it as a gamma from 0 to 1."""
    x, between = out.chunk(2, dim=1)
    return x, (between + 1) / 2
