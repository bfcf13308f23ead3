"""Distillation: guidance folded into one evaluation, then again and again half the steps; and what comes after it.

A round is one run of `cascade.train.fit` with the loss `Lesson`, in a directory of its own. Its averaged weights are
the next round's teacher and starting point, so a ladder that was cut short goes on after the last whole round, and
within a round from the last checkpoint.

OUT = {guidance/, 16/, 08/, 04/, ...}, each with weights/ and the checkpoints of its training. A round of `rewarded`
begins with the student that it is to better, in as many steps.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cascade import attention, checkpoint, store
from cascade.codec import Kind
from cascade.config import fingerprint, locate, parse, plain
from cascade.data.source import Source, open_source
from cascade.diffusion import Prediction
from cascade.errors import ConfigError
from cascade.examples import Pooled, pool_of
from cascade.lesson import Lesson
from cascade.loading import load_stage, save_stage
from cascade.metrics import features
from cascade.preview import Preview as Sheet
from cascade.reward import Rewarded
from cascade.sampler import Rule
from cascade.settings import StageConfig, TrainConfig
from cascade.stage import Stage
from cascade.text import Text, text_source
from cascade.train import Preview, fit, settings

if TYPE_CHECKING:
    from cascade.tasks import Request

log = logging.getLogger("cascade")


class Method(Enum):
    """How a student comes by its steps."""

    PROGRESSIVE = "progressive"  # halving, Salimans & Ho 2022
    CONSISTENCY = "consistency"  # multistep consistency distillation, Heek et al. 2024
    REWARD = "reward"  # no fewer steps, but better ones, by a judge of what they make, Clark et al. 2024


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
    stay: float = 1.0  # what the change of a clip counts beside that

    def __post_init__(self) -> None:
        halves = all(2 * after == before for before, after in zip(self.steps, self.steps[1:], strict=False))
        if not self.steps or min(self.steps) < 1 or not halves:
            raise ValueError(f"steps is {self.steps}, expected such as [16, 8, 4], each half of the one before")
        if len(self.guidance) != 2 or not 0 <= self.guidance[0] <= self.guidance[1]:
            raise ValueError(f"guidance is {self.guidance}, expected the lowest and the highest w, such as [0, 4]")
        for name, low in (("round_steps", 1), ("guidance_steps", 0), ("grid", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {low}")
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}, expected a number above 0")
        if not 0 <= self.stay < math.inf:
            raise ValueError(f"stay is {self.stay}, expected a number of at least 0")
        if self.method is Method.REWARD and len(self.steps) > 1:
            raise ValueError(f"steps is {self.steps}, expected one number: a rewarded student keeps its steps")

    @property
    def drawn(self) -> int:
        """Steps of the grid along which the method draws a student together; 0 where it halves."""
        return self.grid if self.method is Method.CONSISTENCY else 0


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


def rewarded(
    student: Stage,
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
    """Betters a student in as many steps as it has: see `reward`. Arguments, result and errors are those of `ladder`,
    and InputError for a judge that is none."""
    from accelerate import PartialState

    everyone = PartialState(cpu=student.device.type == "cpu")
    device = student.device if everyone.num_processes == 1 else everyone.device
    assert cfg.judge is not None
    judge, by = features.load(locate(cfg.judge))
    (step,) = rounds(cfg, train, guided=False)
    directory, own = out / step.name / "weights", replace(step.train, init=key)
    before = copy.deepcopy(student.net).to(device).eval().requires_grad_(False)
    student.net.requires_grad_(True)
    as_made = Stage(student_config(student.cfg, student.cfg.w_range, step.steps), student.rule, student.net)
    stage = Stage(as_made.cfg, as_made.rule, Rewarded(as_made, before, judge.to(device), cfg.stay))
    inputs = [inputs, by, cfg.stay]
    identity = fingerprint([settings(stage, own, own=False), inputs])
    with store.lock(out) if everyone.is_main_process else nullcontext():
        done = finished(directory, identity)
        everyone.wait_for_everyone()
        if done:
            return directory
        log.info("%s: %s", stage.cfg.name, recipe(step, stage.cfg.w_range, cfg.method))
        shown = None if preview is None else preview(as_made)
        average = fit(
            stage, source, encode, own, directory.parent, loss=lambda batch, net: net(batch),
            preview=None if shown is None else lambda average, at: shown(of_student(average), at),
            progress=progress, inputs=inputs, pool=pool,
        )  # fmt: skip
        if everyone.is_main_process:
            save(directory, stage.cfg, of_student(average), step, key, identity, cfg.method)
        everyone.wait_for_everyone()
    return directory


def of_student(average: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of what `Rewarded` holds."""
    return {name.removeprefix("student."): value for name, value in average.items()}


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
    check_weights(stage, low, high)
    return [low, high], stage.w_range is None


def check_weights(stage: StageConfig, low: float, high: float) -> None:
    """Raises ConfigError for a sampler whose guidance a student would not know."""
    sampler = stage.sampler
    for w in (sampler.guidance, sampler.guidance if sampler.guidance_low is None else sampler.guidance_low):
        if not low <= w <= high:
            raise ConfigError(
                f"{stage.name}: the sampler's guidance is {w:g}, the student would know w from {low:g} to {high:g}",
                fix=f"distill.guidance=[{min(low, w):g},{max(high, w):g}]",
            )


def check_student(stage: StageConfig) -> None:
    """Raises ConfigError for a student that a judge cannot better."""
    if stage.codec.kind is Kind.LATENT:
        raise ConfigError(f"{stage.name}: a judge sees pixels, not latents", fix="distill.method=consistency")
    if stage.w_range is not None:
        check_weights(stage, *stage.w_range)
    elif stage.sampler.guidance:
        raise ConfigError(
            f"{stage.name}: sampler.guidance is {stage.sampler.guidance:g}, which needs two evaluations: no student",
            fix="distill.teacher=DIRECTORY of a guidance-distilled network, or sampler.guidance=0",
        )


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
    if method is Method.REWARD:
        return f"{step.steps} steps of DDIM, judged by what they make{told_w} (Clark et al. 2024)"
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
    if cfg.method is Method.REWARD and cfg.judge is None:
        raise ConfigError(f"{ask.cfg.name}: distill.judge is missing", fix="distill.judge=checkpoints/tiny/judge")
    if weights is None:
        raise ConfigError(f"{ask.cfg.name} has no weights to learn from", fix="distill.teacher=DIRECTORY")
    if ask.cfg.diffusion.prediction is Prediction.EPS:
        raise ConfigError(
            f"{ask.cfg.name}: predicts eps, which at t = 1, where a student begins, says nothing of the video",
            fix="train the teacher with diffusion.prediction=v",
        )
    begun = cfg.steps[0] if cfg.method is Method.REWARD else 2 * cfg.steps[0]  # steps of what it begins with
    directory = checkpoint.locate(weights, ask.cfg.name, begun)
    teacher, key = load_stage(replace(ask.cfg, weights=str(directory)), ask.rule, ask.on.torch)
    made_for = checkpoint.load(directory).config.get("steps")
    if made_for is not None and cfg.method is Method.CONSISTENCY:
        raise ConfigError(
            f"{ask.cfg.name}: consistency follows a teacher at any time, {weights} was made for {made_for} steps",
            fix="distill.teacher=DIRECTORY of a teacher or of guidance distillation",
        )
    if made_for is not None and made_for != begun:
        fitting = made_for * cfg.steps[0] // begun
        raise ConfigError(
            f"{ask.cfg.name}: distill.steps begins with {cfg.steps[0]}, the teacher {weights} was made for {made_for}",
            fix=f"distill.steps=[{fitting}]" if fitting else "distill.teacher=DIRECTORY of more steps",
        )
    if cfg.method is Method.REWARD:
        check_student(teacher.cfg)
    else:
        told(teacher.cfg, cfg)
    out, encoder = ask.out("distill"), text_source(ask.text)
    source = open_source(ask.data, ask.cfg.shape, ask.cfg.fps, out / "clips")
    pool, before = pool_of(teacher, source, encoder, train)
    with attention.use(ask.on.attention):
        last = (rewarded if cfg.method is Method.REWARD else ladder)(
            teacher, key, source, encoder.encode, cfg, train, out,
            preview=lambda student: Sheet(student, source, encoder.encode, train),
            inputs=[plain(ask.data), encoder.fingerprint, *before], pool=pool,
        )  # fmt: skip
    print(last)
