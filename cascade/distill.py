"""Distillation: guidance folded into one evaluation, then again and again half the steps.

A round is one run of `cascade.train.fit` with the loss `Lesson`, in a directory of its own. Its averaged weights are
the next round's teacher and starting point, so a ladder that was cut short goes on after the last whole round, and
within a round from the last checkpoint.

OUT = {guidance/, 16/, 08/, 04/, ...}, each with weights/ and the checkpoints of its training.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cascade import attention, checkpoint, store
from cascade.config import fingerprint, parse, plain
from cascade.data.source import Source, open_source
from cascade.diffusion import Diffusion, Prediction
from cascade.errors import ConfigError
from cascade.examples import Pooled, pool_of
from cascade.loading import load_stage, save_stage
from cascade.preview import Preview as Sheet
from cascade.sampler import Denoise, Rule, ddim, keep_known
from cascade.settings import StageConfig, TrainConfig
from cascade.stage import Batch, Stage
from cascade.text import Text, text_source
from cascade.train import Preview, fit, settings
from cascade.unet import Cond

if TYPE_CHECKING:
    from cascade.tasks import Request

HIGHEST = 25.0  # weight of an example
log = logging.getLogger("cascade")


class Method(Enum):
    """How the number of steps shrinks."""

    PROGRESSIVE = "progressive"  # halving, Salimans & Ho 2022
    CONSISTENCY = "consistency"  # multistep consistency distillation, Heek et al. 2024


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

    def __post_init__(self) -> None:
        halves = all(2 * after == before for before, after in zip(self.steps, self.steps[1:], strict=False))
        if not self.steps or min(self.steps) < 1 or not halves:
            raise ValueError(f"steps is {self.steps}, expected such as [16, 8, 4], each half of the one before")
        if len(self.guidance) != 2 or not 0 <= self.guidance[0] <= self.guidance[1]:
            raise ValueError(f"guidance is {self.guidance}, expected the lowest and the highest w, such as [0, 4]")
        for name, low in (("round_steps", 1), ("guidance_steps", 0), ("grid", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {low}")

    @property
    def drawn(self) -> int:
        """Steps of the grid along which the method draws a student together; 0 where it halves."""
        return self.grid if self.method is Method.CONSISTENCY else 0


# what a student learns -----------------------------------------------------------------------------------------------


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
    return diffusion.split(z, net(z, diffusion.level(t), cond, w), t)[0]


@dataclass(frozen=True)
class Lesson:
    """The loss of one round, as `cascade.train.fit` takes it: (batch, student's network) -> (B,).

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
        z = diffusion.noised(batch.x, batch.eps, t)
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
        i = (batch.t * self.steps).floor().clamp(max=self.steps - 1) + 1
        start, end = i / self.steps, (i - 1) / self.steps
        if not self.grid:
            return start, (i - 0.5) / self.steps, end
        t = ((batch.t * self.grid).floor().clamp(max=self.grid - 1) + 1) / self.grid
        return t, torch.maximum(t - 1 / self.grid, end), end

    @torch.no_grad()
    def target(self, batch: Batch, net: Callable[..., Tensor] | None = None) -> Tensor:
        """The x_hat that the student should give (B, C, F, H, W); `net` is the student, for consistency."""
        diffusion, w = self.student.cfg.diffusion, self.weight(batch)
        t, middle, s = self.times(batch)
        z = diffusion.noised(batch.x, batch.eps, t)

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
                return keep_known(batch.x, batch.cond.mask)(x, z, t) if self.student.rule.KEEPS_KNOWN else x

            return limited

        if self.steps == 0:
            return taught(z, t)
        if not self.grid:
            return halved(diffusion, as_sampled(taught), z, t, middle, s)
        assert net is not None, "a consistency student learns from itself"

        def own(z: Tensor, t: Tensor) -> Tensor:
            return predict(diffusion, net, z, t, batch.cond, w)

        return halved(diffusion, as_sampled(taught), z, t, middle, s, as_sampled(own))


# the ladder ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """A student to train: `steps` of DDIM, or 0 for guidance distillation."""

    name: str
    steps: int
    train: TrainConfig


def rounds(cfg: DistillConfig, train: TrainConfig, guided: bool) -> list[Round]:
    """The rounds of a ladder; guidance distillation comes first if the teacher is `guided` by two evaluations.

    Every round has a seed of its own, and so clips and noise that no round before it saw. No clip goes without its
    caption: a student is never asked for the unconditional branch. No step is of images: a student makes whole clips.
    """

    def training(steps: int, number: int) -> TrainConfig:
        batch = train.batch if cfg.batch is None else cfg.batch
        try:
            return replace(
                train, steps=steps, batch=batch, lr=cfg.lr, warmup=cfg.warmup, ema=cfg.ema, drop_text=0.0,
                images=0.0, seed=train.seed + number,
            )  # fmt: skip
        except ValueError as error:
            raise ConfigError(f"distill: {error}") from error

    ladder = [Round(f"{steps:02d}", steps, training(cfg.round_steps, 2 + i)) for i, steps in enumerate(cfg.steps)]
    if guided and cfg.guidance_steps:
        ladder.insert(0, Round("guidance", 0, training(cfg.guidance_steps, 1)))
    return ladder


def ladder(
    teacher: Stage,
    key: str,
    source: Source,
    encode: Callable[[list[str]], Text],
    cfg: DistillConfig,
    train: TrainConfig,
    out: Path,
    *,
    preview: Callable[[Stage], Preview] | None = None,
    progress: bool = True,
    inputs: Any = None,
    pool: Pooled | None = None,
) -> Path:
    """Runs every round that is not yet done and returns the last student's weights, a directory.

    A round starts from the student of the one before. That is also its teacher in halving; consistency students all
    learn from the guidance-distilled network (or from `teacher`, if that needs no guidance).
    `key` names the teacher's weights (their hash), `inputs` what else decides the result (see `fit`);
    `preview(student)` makes the contact sheets of a round. Raises ConfigError if `out` holds a distillation with other
    settings, LockedError while another one works there, and what `fit` raises.
    """
    from accelerate import PartialState

    everyone = PartialState(cpu=teacher.device.type == "cpu")
    device = teacher.device if everyone.num_processes == 1 else everyone.device
    w_range, branches = told(teacher.cfg, cfg)
    blank = copy.deepcopy(teacher.net).to(device)
    state, lore, directory = teacher.net.state_dict(), teacher.net.state_dict(), out
    with store.lock(out) if everyone.is_main_process else nullcontext():
        for step in rounds(cfg, train, branches):
            directory = out / step.name / "weights"
            student = Stage(student_config(teacher.cfg, w_range, step.steps), teacher.rule, network(blank, state))
            own = replace(step.train, init=key)
            identity = fingerprint(settings(student, own, own=False) | {"inputs": inputs})
            done = finished(directory, identity)
            everyone.wait_for_everyone()  # nobody writes what another has yet to look for
            if not done:
                log.info("%s: %s", student.cfg.name, recipe(step, w_range, cfg.method))
                master = network(blank, lore).eval().requires_grad_(False)
                lesson = Lesson(student, master, branches, step.steps, cfg.drawn)
                average = fit(
                    student, source, encode, own, directory.parent, loss=lesson, progress=progress, inputs=inputs,
                    preview=None if preview is None else preview(student), pool=pool,
                )  # fmt: skip
                if everyone.is_main_process:
                    save(directory, student.cfg, average, step, key, identity, cfg.method)
                everyone.wait_for_everyone()
            weights = checkpoint.load(directory)
            state, key = weights.state, weights.hash
            if cfg.method is Method.PROGRESSIVE or not step.steps:
                lore, branches = state, False
    return directory


def told(stage: StageConfig, cfg: DistillConfig) -> tuple[list[float] | None, bool]:
    """The range of w that students are told, and whether the teacher needs two evaluations for one guided x_hat.

    Raises ConfigError for a range that the teacher does not know, or that the stage's sampler leaves.
    """
    if stage.w_range is None and stage.sampler.guidance == 0:
        return None, False
    low, high = cfg.guidance
    if stage.w_range is not None and not stage.w_range[0] <= low <= high <= stage.w_range[1]:
        raise ConfigError(
            f"{stage.name}: distill.guidance is {cfg.guidance}, the teacher knows w from {stage.w_range[0]:g} to "
            f"{stage.w_range[1]:g}",
            fix=f"distill.guidance={stage.w_range}",
        )
    sampler = stage.sampler
    for w in (sampler.guidance, sampler.guidance if sampler.guidance_low is None else sampler.guidance_low):
        if not low <= w <= high:
            raise ConfigError(
                f"{stage.name}: the sampler's guidance is {w:g}, the student would know w from {low:g} to {high:g}",
                fix=f"distill.guidance=[{min(low, w):g},{max(high, w):g}]",
            )
    return [low, high], stage.w_range is None


def student_config(cfg: StageConfig, w_range: list[float] | None, steps: int) -> StageConfig:
    """The stage as a student samples it; one of `steps` is made for DDIM."""
    sampler = replace(cfg.sampler, steps=steps, rule=Rule.DDIM) if steps else cfg.sampler
    return replace(cfg, sampler=sampler, w_range=w_range, weights=None, train=None)


def network(blank: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    net = copy.deepcopy(blank).requires_grad_(True)
    checkpoint.apply(net, state, "the teacher")
    return net


def finished(directory: Path, identity: str) -> bool:
    """Whether a round's weights are there and whole. ConfigError if they are of other settings."""
    if not directory.is_dir() or store.problems(directory, checkpoint.KIND):
        return False
    if checkpoint.load(directory).config.get("identity") != identity:
        raise ConfigError(f"{directory} was distilled with other settings", fix="out=ANOTHER_DIRECTORY")
    return True


def recipe(step: Round, w_range: list[float] | None, method: Method) -> str:
    """What a round does, in words."""
    told_w = "" if w_range is None else f", told the guidance weight w from {w_range[0]:g} to {w_range[1]:g}"
    if step.steps == 0:
        return f"guidance in one evaluation{told_w} (Meng et al. 2023)"
    if method is Method.CONSISTENCY:
        return f"{step.steps} steps of DDIM, each consistent along its span{told_w} (Heek et al. 2024)"
    return f"{step.steps} steps of DDIM, each doing two of the teacher's{told_w} (Salimans & Ho 2022)"


def save(
    directory: Path,
    cfg: StageConfig,
    average: dict[str, Tensor],
    step: Round,
    teacher: str,
    identity: str,
    method: Method,
) -> None:
    """A student's weights; their config records its range of w, its sampler and (halving) its number of steps."""
    steps: dict[str, Any] = {"steps": step.steps, "method": method.value} if step.steps else {}
    save_stage(
        directory,
        cfg,
        average,
        f"Distilled: {recipe(step, cfg.w_range, method)}. "
        f"Trained for {step.train.steps} steps of {step.train.batch} clips from the teacher {teacher[:16]}.",
        w_range=cfg.w_range,
        sampler=plain(cfg.sampler),
        teacher=teacher,
        identity=identity,
        **steps,
    )


def stage_task(ask: Request) -> None:
    """Distils the stage (`task=distill`); prints where the last student's weights are."""
    cfg = parse(ask.own.get("distill", {}), DistillConfig, "distill")
    train, weights = ask.training, ask.cfg.weights if cfg.teacher is None else cfg.teacher
    rounds(cfg, train, guided=True)  # says what is wrong with the settings before anything is read
    if weights is None:
        raise ConfigError(f"{ask.cfg.name} has no weights to learn from", fix="distill.teacher=DIRECTORY")
    if ask.cfg.diffusion.prediction is Prediction.EPS:
        raise ConfigError(
            f"{ask.cfg.name}: predicts eps, which at t = 1, where a student begins, says nothing of the video",
            fix="train the teacher with diffusion.prediction=v",
        )
    directory = checkpoint.locate(weights, ask.cfg.name, 2 * cfg.steps[0])
    teacher, key = load_stage(replace(ask.cfg, weights=str(directory)), ask.rule, ask.on.torch)
    made_for = checkpoint.load(directory).config.get("steps")
    if made_for is not None and cfg.method is Method.CONSISTENCY:
        raise ConfigError(
            f"{ask.cfg.name}: consistency follows a teacher at any time, {weights} was made for {made_for} steps",
            fix="distill.teacher=DIRECTORY of a teacher or of guidance distillation",
        )
    if made_for is not None and made_for != 2 * cfg.steps[0]:
        raise ConfigError(
            f"{ask.cfg.name}: distill.steps begins with {cfg.steps[0]}, the teacher {weights} was made for {made_for}",
            fix=f"distill.steps=[{made_for // 2}]" if made_for > 1 else "distill.teacher=DIRECTORY of more steps",
        )
    told(teacher.cfg, cfg)
    out, encoder = ask.out("distill"), text_source(ask.text)
    source = open_source(ask.data, ask.cfg.shape, ask.cfg.fps, out / "clips")
    pool, before = pool_of(teacher, source, encoder, train)
    with attention.use(ask.on.attention):
        last = ladder(
            teacher, key, source, encoder.encode, cfg, train, out,
            preview=lambda student: Sheet(student, source, encoder.encode, train),
            inputs=[plain(ask.data), encoder.fingerprint, *before], pool=pool,
        )  # fmt: skip
    print(last)
