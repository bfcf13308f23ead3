"""What a distillation consists of: its settings, its rounds, and which of them a stage allows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import Enum

from cascade.codec import Kind
from cascade.config import mend
from cascade.errors import ConfigError
from cascade.nets.unet3d_config import UNet3DConfig
from cascade.sampling.grid import Spacing
from cascade.settings import Rule, StageConfig, TrainConfig, from_text


class Method(Enum):
    """How a student comes by its steps."""

    PROGRESSIVE = "progressive"  # halving, Salimans & Ho 2022
    CONSISTENCY = "consistency"  # multistep consistency distillation, Heek et al. 2024
    REWARD = "reward"  # no fewer steps, but better ones, by a judge of what they make or the truth, Clark et al. 2024


@dataclass(kw_only=True)
class DistillConfig:
    """How a stage is distilled (`task=distill`). What does not stand here, such as crop or seed, is as in `train`."""

    steps: list[int]  # of each round's student, every entry half of the one before; the first teacher runs 2 steps[0]
    round_steps: int  # training steps of a round of halving
    guidance_steps: int = 0  # of guidance distillation; 0: the first round of halving folds the guidance in as well
    guidance: list[float] = field(default_factory=lambda: [0.0, 4.0])  # lowest and highest w that a student is told
    teacher: str | None = None  # weights to learn from; None: the stage's own
    method: Method = Method.PROGRESSIVE
    grid: int = 64  # teacher's steps along which a consistency student is drawn together
    batch: int | None = None  # clips a step; None: as in `train`
    lr: float = 3e-4  # at the start of every round, falling linearly to zero
    warmup: int = 50  # steps; a new optimizer's first steps would throw the teacher's weights away
    ema: float = 0.99
    judge: str | None = None  # weights of the network that says what a clip shows, for `reward`
    temperature: float = 3.0  # of its answers, see `reward.softly`
    stay: float = 1.0  # what the change of a clip counts beside that
    truth: float = 0.0  # and what its difference from the real clip does, for a stage that is given a video
    last: float = 0.0  # and what the error of the last steps on real clips does
    last_steps: int = 1  # how many these are
    first: float = 0.0  # and what the change of x_hat in the steps before these does
    patches: float = 0.0  # and what the distance of the patches of all its clips from those of real clips does
    adversarial: float = 0.0  # and what a discriminator that learns beside the student finds unreal in its clips does
    blur: float = 0.05  # standard deviation of the noise through which the judge looks, of values from -1 to 1
    through: int | None = None  # last steps that the gradient runs through (DRaFT-K); None: all
    kept: float = 1.0  # of what the judge taught: 0.5 gives the mean of the weights before and after

    def __post_init__(self) -> None:
        halves = all(2 * after == before for before, after in zip(self.steps, self.steps[1:], strict=False))
        if not self.steps or min(self.steps) < 1 or not halves:
            raise ValueError(f"steps is {self.steps}, expected such as [16, 8, 4], each half of the one before")
        if len(self.guidance) != 2 or not 0 <= self.guidance[0] <= self.guidance[1]:
            raise ValueError(f"guidance is {self.guidance}, expected the lowest and the highest w, such as [0, 4]")
        for name, low in (("round_steps", 1), ("guidance_steps", 0), ("grid", 1)):
            if not low <= getattr(self, name) <= 10**9:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {low} to {10**9}")
        for name in ("lr", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number above 0")
        for name in ("stay", "truth", "last", "first", "patches", "adversarial", "blur"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number of at least 0")
        if not 0 < self.kept <= 1:
            raise ValueError(f"kept is {self.kept}, expected a number above 0 and up to 1")
        if not 1 <= self.last_steps <= self.steps[0]:
            raise ValueError(f"last_steps is {self.last_steps}, expected 1 to the number of steps, {self.steps[0]}")
        if self.first and self.last_steps == self.steps[0]:
            raise ValueError(f"first is {self.first}, expected 0: no step comes before the last {self.last_steps}")
        if self.through is not None and not 1 <= self.through <= self.steps[0]:
            raise ValueError(f"through is {self.through}, expected 1 to the number of steps, {self.steps[0]}")
        if self.method is Method.CONSISTENCY and self.grid % self.steps[0]:
            raise ValueError(f"grid is {self.grid}, expected a multiple of the first of steps, {self.steps[0]}")
        if self.method is Method.REWARD and len(self.steps) > 1:
            raise ValueError(f"steps is {self.steps}, expected one number: a rewarded student keeps its steps")

    @property
    def drawn(self) -> int:
        """Steps of the grid along which the method draws a student together; 0 where it halves."""
        return self.grid if self.method is Method.CONSISTENCY else 0


@dataclass(frozen=True)
class Round:
    """A student to train: `steps` of DDIM, or 0 for guidance distillation."""

    name: str
    steps: int
    train: TrainConfig


def rounds(cfg: DistillConfig, train: TrainConfig, guided: bool) -> list[Round]:
    """The rounds of a ladder; guidance distillation comes first if the teacher is `guided` by two evaluations.

    Every round has a seed of its own, and so noise (without a pool clips too) that no round before it saw. No clip goes
    without its caption: a student is never asked for the unconditional branch. No step is of images: a student makes
    whole clips, at all of its times.
    """

    def training(steps: int, number: int) -> TrainConfig:
        batch = train.batch if cfg.batch is None else cfg.batch
        try:
            return replace(
                train, steps=steps, batch=batch, lr=cfg.lr, warmup=cfg.warmup, ema=cfg.ema, drop_text=0.0,
                images=0.0, times=[0.0, 1.0], seed=train.seed + number,
            )  # fmt: skip
        except ValueError as error:
            where = "distill" if hasattr(cfg, str(error).split()[0]) else "train"
            raise ConfigError(f"{where}: {error}", fix=mend(str(error), where)) from error

    ladder = [Round(f"{steps:02d}", steps, training(cfg.round_steps, 2 + i)) for i, steps in enumerate(cfg.steps)]
    if guided and cfg.guidance_steps:
        ladder.insert(0, Round("guidance", 0, training(cfg.guidance_steps, 1)))
    return ladder


def recipe(step: Round, w_range: list[float] | None, method: Method) -> str:
    """What a round does, in words."""
    told_w = "" if w_range is None else f", told the guidance weight w from {w_range[0]:g} to {w_range[1]:g}"
    steps = f"{step.steps} step{'s' * (step.steps > 1)}"
    if step.steps == 0:
        return f"guidance in one evaluation{told_w} (Meng et al. 2023)"
    if method is Method.REWARD:
        return f"{steps} of DDIM, taught by what they make{told_w} (Clark et al. 2024)"
    if method is Method.CONSISTENCY:
        return f"{steps} of DDIM, each consistent along its span{told_w} (Heek et al. 2024)"
    return f"{steps} of DDIM, each doing two of the teacher's{told_w} (Salimans & Ho 2022)"


def told(stage: StageConfig, cfg: DistillConfig) -> tuple[list[float] | None, bool]:
    """The range of w that students are told, and whether the teacher needs two evaluations for one guided x_hat.

    Raises ConfigError for a range that the teacher does not know, or that the stage's sampler leaves.
    """
    if stage.w_range is None and stage.sampler.guidance == 0:
        return None, False
    if isinstance(stage.net, UNet3DConfig):
        raise ConfigError(
            f"{stage.name}: sampler.guidance is {stage.sampler.guidance:g}, and this network is not told of it",
            fix="sampler.guidance=0",
        )
    low, high = cfg.guidance
    if stage.w_range is not None and not stage.w_range[0] <= low <= high <= stage.w_range[1]:
        raise ConfigError(
            f"{stage.name}: distill.guidance is {cfg.guidance}, the teacher knows w from {stage.w_range[0]:g} to "
            f"{stage.w_range[1]:g}",
            fix=f"distill.guidance={stage.w_range}",
        )
    check_weights(stage, low, high)
    return [low, high], stage.w_range is None


def check_sampler(stage: StageConfig) -> None:
    """Raises ConfigError for a sampler whose times or noise are not those at which a student learns."""
    sampler = stage.sampler
    for name, unlike, fix in (
        ("grid.spacing", sampler.grid.spacing is not Spacing.UNIFORM, "grid.spacing=uniform"),
        ("strength", sampler.strength < 1, "strength=1"),
        ("guidance_low", sampler.guidance_low is not None, "guidance_low=null"),
        ("shared_noise", sampler.shared_noise, "shared_noise=false"),
    ):
        if unlike:
            raise ConfigError(f"{stage.name}: no student is made for this sampler.{name}", fix=f"sampler.{fix}")


def check_weights(stage: StageConfig, low: float, high: float) -> None:
    """Raises ConfigError for a sampler whose guidance a student would not know."""
    sampler = stage.sampler
    for w in (sampler.guidance, sampler.guidance if sampler.guidance_low is None else sampler.guidance_low):
        if not low <= w <= high:
            raise ConfigError(
                f"{stage.name}: the sampler's guidance is {w:g}, the student would know w from {low:g} to {high:g}",
                fix=f"distill.guidance=[{min(low, w):g},{max(high, w):g}]",
            )


def check_reward(stage: StageConfig, rule: Rule, cfg: DistillConfig) -> None:
    """Raises ConfigError for a stage that neither a judge nor the truth can better."""
    if stage.codec.kind is Kind.LATENT and cfg.judge is not None:
        raise ConfigError(f"{stage.name}: a judge sees pixels, not latents", fix="distill.method=consistency")
    if cfg.truth and from_text(stage, rule):
        raise ConfigError(
            f"{stage.name}: starts from text, which leaves open what is to be seen: the nearest to all clips is a blur",
            fix="distill.truth=0",
        )


def check_student(stage: StageConfig) -> None:
    """Raises ConfigError for weights that are no student's at the sampler's guidance."""
    if stage.w_range is not None:
        check_weights(stage, *stage.w_range)
    elif stage.sampler.guidance:
        raise ConfigError(
            f"{stage.name}: sampler.guidance is {stage.sampler.guidance:g}, which needs two evaluations: no student",
            fix="distill.teacher=DIRECTORY of a guidance-distilled network, or sampler.guidance=0",
        )
