"""A stage at every level of noise on its input, and the rule that chooses one.

Training draws the level of noise conditioning augmentation at random, sampling fixes it (Ho et al. 2022, Imagen Video,
sec. 2.5, and Cascaded Diffusion Models, sec. 4). Which level is best depends on what the stage before gets wrong, so
each is judged on real clips, degraded by the stage's own rule, and on what the stage before makes of the same clips.

All levels see the same clips, inputs and sampling noise. Two levels are therefore compared clip by clip: the error of
their difference, far below that of either, is what the choice heeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cascade.config import suggest
from cascade.errors import ConfigError
from cascade.evaluation.answers import Comes, answers_of, at_level, augmented
from cascade.evaluation.exam import SPLITS, Answers, EvaluateConfig, Exam, measure, measures
from cascade.evaluation.marks import Row, grouped, jackknife, left_out, numbers
from cascade.pipeline import Progress
from cascade.settings import Before, Rule, StageConfig, from_text
from cascade.stage import Stage
from cascade.text import Text

LEAST = 3  # clips; to leave one out of fewer leaves no Fréchet distance
BESIDE = ("fvd", "attributes", "outline")  # measures beside those that the kind of stage names


class Better(Enum):
    HIGHER = "higher"
    LOWER = "lower"


class Input(Enum):
    """What comes in: real clips as the rule degrades them, or what the stage before makes of the same clips."""

    DEGRADED = "degraded"
    BEFORE = "before"


@dataclass(kw_only=True)
class By:
    """The number that is to be best: `measure.value`, such as fidelity.psnr, on one kind of input."""

    measure: str
    better: Better
    input: Input


@dataclass(kw_only=True)
class TuneConfig:
    """A sweep over levels of noise. Every clip and every sample follows from the run's seed and its number alone.

    The smallest level is chosen that lies at most `within` standard errors behind the best one: less noise leaves more
    of the input.
    """

    levels: list[float]  # times in [0, augment_max]
    n: int  # clips
    batch: int  # clips at once in memory
    split: str  # compositions, see EvaluateConfig
    by: By
    within: float
    before: Before | None = None  # the stage before; None: real clips alone
    metrics: list[str] | None = None  # modules of cascade/metrics; None: those of the kind, and BESIDE
    write: Path | None = None  # the stage's YAML, whose line `augment:` is to say what was chosen

    def __post_init__(self) -> None:
        self.levels = sorted(self.levels)
        if not self.levels or len(set(self.levels)) < len(self.levels) or self.levels[0] < 0:
            raise ValueError(f"levels is {self.levels}, expected different numbers from 0 on")
        for name, low, high in (("n", LEAST, 10**6), ("batch", 1, 10**4), ("within", 0, 100)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {low} to {high}")
        if self.split not in (*SPLITS, "all"):
            raise ValueError(f"split is {self.split!r}, expected one of {', '.join((*SPLITS, 'all'))}")

    @property
    def inputs(self) -> list[Input]:
        return [Input.DEGRADED] if self.before is None else [Input.DEGRADED, Input.BEFORE]

    def exam(self, seed: int, rule: Rule) -> EvaluateConfig:
        """The evaluation that each level is judged by."""
        names = self.metrics if self.metrics is not None else list(dict.fromkeys((*rule.METRICS, *BESIDE)))
        return EvaluateConfig(n=self.n, seed=seed, metrics=names, batch=self.batch, split=self.split)


@dataclass(frozen=True)
class Choice:
    """The level that is chosen and the best one; `behind` says of each level by how much, with its error."""

    level: float
    best: float
    behind: list[tuple[float, float, float]]  # level, distance to the best, standard error of the distance


def choose(found: Mapping[float, Tensor], better: Better, within: float) -> Choice:
    """The smallest level at most `within` standard errors behind the best, from `left_out` numbers of each level."""
    sign = 1 if better is Better.HIGHER else -1
    levels = sorted(found)
    best = max(levels, key=lambda level: sign * float(found[level][0]))
    apart = {level: sign * (found[best] - found[level]) for level in levels}
    behind = [(level, float(gap[0]), jackknife(gap)) for level, gap in apart.items()]
    return Choice(next(level for level, gap, spread in behind if gap <= within * spread), best, behind)


@dataclass
class Sweep:
    """What was found: a number and its error for each input, level and value, and what of it the rule compares."""

    rows: list[Row]
    skipped: dict[str, str]
    compared: dict[float, Tensor] = field(default_factory=dict)


def check(stage: StageConfig, rule: Rule, cfg: TuneConfig) -> None:
    """Raises ConfigError for a stage without an input, a level it never saw and a rule that nothing answers."""
    if from_text(stage, rule) or not stage.told:
        why = "starts from text" if stage.told else "is not told what comes in"
        raise ConfigError(f"{stage.name}: {why}, so that there is no input to add noise to", fix="a stage after it")
    if cfg.levels[-1] > stage.augment_max:
        raise ConfigError(
            f"{stage.name}: tune.levels has {cfg.levels[-1]:g}, never trained: augment_max is {stage.augment_max:g}",
            fix=f"levels of at most {stage.augment_max:g}, or the augment_max that it was trained with",
        )
    if cfg.by.input not in cfg.inputs:
        raise ConfigError(
            f"{stage.name}: tune.by.input is {cfg.by.input.value}, but tune.before names no stage",
            fix="tune.before.stage=tiny/... or tune.by.input=degraded",
        )
    names = cfg.exam(0, rule).metrics or []
    for name in names:
        measure(name)
    metric, _, value = cfg.by.measure.partition(".")
    if metric not in names:
        raise ConfigError(
            f"{stage.name}: tune.by.measure is {cfg.by.measure!r}, of which tune.metrics has no {metric!r}",
            fix=f"tune.metrics=[{','.join((*names, metric))}]"
            if metric in measures()
            else suggest(cfg.by.measure, [f"{name}.{value}" for name in names], "tune.by.measure="),
        )


def sweep(
    stage: Stage,
    exam: Exam,
    cfg: TuneConfig,
    encode: Callable[[list[str]], Text],
    comes: Comes | None = None,
    work: Callable[[Input, StageConfig], Path | None] = lambda *_: None,
    progress: Progress | None = None,
) -> Sweep:
    """Judges the stage at every level on every input. `comes` makes the input as the stage before does.

    With `work`, which says where answers to an input at some settings lie, what was judged before is not again.
    """
    questions = exam.questions(stage.cfg.shape, stage.cfg.fps)
    out = Sweep([], {})
    for of in cfg.inputs:
        answers: dict[float, Answers] = {}
        for level in cfg.levels:
            variant = augmented(stage, level)
            found, out.skipped = answers_of(
                exam, {at_level(level): variant}, questions, encode, exam.cfg.metrics or [],
                work(of, variant.cfg), progress and partial(_named, progress, f"{of.value} {level:g}"), [],
                comes if of is Input.BEFORE else None,
            )  # fmt: skip
            answers[level] = found
            names = [f"{m}.{number[0]}" for (_, m), mine in grouped(found).items() for number in numbers(m, mine)]
            if cfg.by.measure not in names:  # known as soon as one level is judged
                raise unanswered(cfg, names, out.skipped)
        add(out, of, answers, stage.cfg, cfg, exam.cfg.seed)
    if not out.compared:
        raise unanswered(cfg, names, out.skipped)
    return out


def _named(progress: Progress, name: str, stage: str, done: int, total: int) -> None:
    progress(name, done, total)  # a bar for each level, whose stage is always the same


def unanswered(cfg: TuneConfig, names: Sequence[str], skipped: Mapping[str, str]) -> ConfigError:
    """What is said of a rule whose number is not among those `names` that there are."""
    why = skipped.get(cfg.by.measure.partition(".")[0], f"there is no such number of {LEAST} clips or more")
    left = [name for name in names if name != cfg.by.measure]
    return ConfigError(
        f"tune.by.measure is {cfg.by.measure!r}: {why}", fix=suggest(cfg.by.measure, left, "tune.by.measure=")
    )


def add(
    out: Sweep, of: Input, answers: Mapping[float, Answers], stage: StageConfig, cfg: TuneConfig, seed: int
) -> None:
    """The numbers of all levels on one input. A clip that a measure cannot judge at one level counts at none."""
    size = (str(stage.shape), stage.fps, seed)
    found = {level: grouped(mine) for level, mine in answers.items()}
    for _, metric in found[cfg.levels[0]]:
        values = {level: mine[at_level(level), metric] for level, mine in found.items()}
        usable = ~torch.stack([bad(answer) for mine in values.values() for answer in mine.values()]).any(0)
        n = int(usable.sum())
        if n < LEAST:
            continue
        for level, mine in values.items():
            for name, number in left_out(metric, {key: answer[usable] for key, answer in mine.items()}).items():
                value, spread = float(number[0]), jackknife(number)
                out.rows.append(Row(stage.name, metric, name, at_level(level), of.value, value, spread, n, *size))
                if of is cfg.by.input and f"{metric}.{name}" == cfg.by.measure:
                    out.compared[level] = number


def bad(answer: Tensor) -> Tensor:
    """Which clips (n,) were not judged."""
    return answer.isnan().view(len(answer), -1).any(1)
