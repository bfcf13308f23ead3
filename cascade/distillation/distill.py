"""Distillation: guidance folded into one evaluation, then again and again half the steps; and what comes after it.

A round is one run of `cascade.training.train.fit` with the loss `Lesson` or `Rewarded`, in a directory of its own. Its
averaged weights are the next round's teacher and starting point, so a ladder that was cut short goes on after the last
whole round, and within a round from the last checkpoint.

OUT = {guidance/, 16/, 08/, 04/, ...}, each with weights/ and the checkpoints of its training. A round of `rewarded`
begins with the student that it is to better, in as many steps.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cascade import attention, checkpoint, judge, store
from cascade.ask import Request
from cascade.config import fingerprint, locate, parse, plain
from cascade.data.source import Source, contents, open_source
from cascade.diffusion import Prediction
from cascade.distillation.lesson import Lesson
from cascade.distillation.reward import Rewarded
from cascade.distillation.rounds import (
    DistillConfig,
    Method,
    Round,
    check_reward,
    check_sampler,
    check_student,
    recipe,
    rounds,
    told,
)
from cascade.errors import ConfigError, NumericError
from cascade.loading import load_stage, save_stage
from cascade.sampling.sampler import Rule
from cascade.settings import StageConfig, TrainConfig
from cascade.stage import Stage
from cascade.text import Text, named, text_source
from cascade.training.examples import Draw, pool_of
from cascade.training.preview import Preview as Sheet
from cascade.training.train import Loss, Preview, first_process, fit, here, settings

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState


OWN = "student."  # how `Rewarded` names the student's weights, beside those of its discriminator
log = logging.getLogger("cascade")


@dataclass(frozen=True)
class Course:
    """What the rounds of a distillation share; `out` is theirs.

    `preview(student)` makes the contact sheets of a round; `inputs` and `pool` are those of `fit`.
    """

    source: Source
    encode: Callable[[list[str]], Text]
    cfg: DistillConfig
    train: TrainConfig
    out: Path
    preview: Callable[[Stage], Preview] | None = None
    progress: bool = True
    inputs: Any = None
    pool: Draw | None = None

    @contextmanager
    def begun(self, device: torch.device) -> Iterator[tuple[PartialState, torch.device]]:
        """All processes, and where this one works. Raises LockedError while others distil in `out`."""
        from accelerate import PartialState

        everyone = PartialState(cpu=device.type == "cpu")
        with store.lock(self.out) if everyone.is_main_process else nullcontext():
            yield everyone, here(device)

    def run(
        self,
        step: Round,
        student: Stage,
        task: Stage,
        loss: Loss,
        key: str,
        everyone: PartialState,
        result: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    ) -> Path:
        """A round's weights; not trained again if they are there.

        `task` is what is trained, `student` what is sampled, with the weights that `result` makes of the averaged ones.
        """
        directory, own = self.out / step.name / "weights", replace(step.train, init=key)
        inputs = [self.inputs, self.cfg.method.value, self.cfg.drawn]
        identity = fingerprint(settings(task, own, own=False) | {"inputs": inputs})
        done = finished(directory, identity)
        everyone.wait_for_everyone()  # nobody writes what another has yet to look for
        if done:
            return directory
        log.info("%s: %s", student.cfg.name, recipe(step, student.cfg.w_range, self.cfg.method))
        sheet = None if self.preview is None else self.preview(student)
        try:
            average = fit(
                task, self.source, self.encode, own, directory.parent, loss=loss,
                preview=None if sheet is None else lambda average, at: sheet(result(average), at),
                progress=self.progress, inputs=inputs, pool=self.pool,
            )  # fmt: skip
        except NumericError as error:
            raise NumericError(error.message, fix=error.fix.replace("train.lr", "distill.lr")) from error
        if everyone.is_main_process:
            save(directory, student.cfg, result(average), step, key, identity, self.cfg.method)
        everyone.wait_for_everyone()
        return directory


def ladder(teacher: Stage, key: str, course: Course) -> Path:
    """Runs every round that is not yet done and returns the last student's weights, a directory.

    A round starts from the student of the one before. That is also its teacher in halving; consistency students all
    learn from the guidance-distilled network (or from `teacher`, if that needs no guidance). `key` names the teacher's
    weights (their hash). Raises ConfigError if the course's `out` holds a distillation with other settings,
    LockedError while another one works there, and what `fit` raises.
    """
    cfg = course.cfg
    w_range, branches = told(teacher.cfg, cfg)
    state, lore, directory = teacher.net.state_dict(), teacher.net.state_dict(), course.out
    with course.begun(teacher.device) as (everyone, device):
        blank = copy.deepcopy(teacher.net).to(device)
        for step in rounds(cfg, course.train, branches):
            student = Stage(student_config(teacher.cfg, w_range, step.steps), teacher.rule, network(blank, state))
            master = network(blank, lore).eval().requires_grad_(False)
            lesson = Lesson(student, master, branches, step.steps, cfg.drawn)
            directory = course.run(step, student, student, lesson, key, everyone)
            weights = checkpoint.load(directory)
            state, key = weights.state, weights.hash
            if cfg.method is Method.PROGRESSIVE or not step.steps:
                lore, branches = state, False
    return directory


def rewarded(student: Stage, key: str, course: Course) -> Path:
    """Betters a student in as many steps as it has: see `reward`. Arguments, result and errors are those of `ladder`,
    and InputError for a judge that is none."""
    cfg = course.cfg
    net, by = (None, None) if cfg.judge is None else judge.load(locate(cfg.judge))
    (step,) = rounds(cfg, course.train, guided=False)
    with course.begun(student.device) as (everyone, device):
        before = copy.deepcopy(student.net).to(device).eval().requires_grad_(False)
        student.net.requires_grad_(True)
        better = Stage(student_config(student.cfg, student.cfg.w_range, step.steps), student.rule, student.net)
        task = Stage(better.cfg, better.rule, Rewarded(better, before, None if net is None else net.to(device), cfg))
        old = before.state_dict()

        def kept(average: dict[str, Tensor]) -> dict[str, Tensor]:
            """A part of the way: what was taught, and less of what was forgotten for it (Wortsman et al. 2022)."""
            new = {name.removeprefix(OWN): value for name, value in average.items() if name.startswith(OWN)}
            return {name: old[name].to(value).lerp(value, cfg.kept) for name, value in new.items()}

        own = [cfg.temperature, cfg.stay, cfg.truth, cfg.last, cfg.patches, cfg.blur, cfg.kept]
        own += [cfg.adversarial, cfg.through or 0, cfg.last_steps, cfg.first]
        judged = replace(course, inputs=[course.inputs, by, *own, together(step.train, everyone.num_processes, cfg)])
        return judged.run(step, better, task, lambda batch, net: net(batch), key, everyone, kept)


def together(train: TrainConfig, processes: int, cfg: DistillConfig) -> int:
    """Clips that one call of the reward sees and compares. ConfigError for a single one where it needs several."""
    count = (train.micro_batch or train.batch) // processes
    if count < 2 and (cfg.patches or (cfg.blur and cfg.judge)):
        raise ConfigError(
            "distill: patches and blur compare the clips of a batch, of which one is seen at a time",
            fix=f"distill.batch={2 * processes} train.micro_batch=null, or distill.patches=0 distill.blur=0",
        )
    return count


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
        raise ConfigError(f"{directory} was distilled with other settings or clips", fix="out=ANOTHER_DIRECTORY")
    return True


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


def settings_of(ask: Request) -> DistillConfig:
    """What is asked for. ConfigError for all that is wrong with it as far as it shows without the teacher's weights."""
    cfg = parse(ask.own.get("distill", {}), DistillConfig, "distill")
    rounds(cfg, ask.training, guided=True)
    if cfg.method is Method.REWARD and cfg.judge is None and not (cfg.truth or cfg.adversarial or cfg.last):
        raise ConfigError(
            f"{ask.cfg.name}: distill.judge is missing",
            fix="distill.judge=checkpoints/tiny/judge, distill.adversarial=1, or distill.truth=1 for a stage that is "
            "given a video",
        )
    if cfg.method is Method.REWARD and cfg.judge is not None and ask.data.clips is not None:
        raise ConfigError(
            f"{ask.cfg.name}: a judge knows the procedural world alone, not data.clips",
            fix="distill.judge=null distill.adversarial=1, or distill.judge=null distill.truth=1 for a stage that is "
            "given a video",
        )
    if ask.cfg.weights is None and cfg.teacher is None:
        raise ConfigError(f"{ask.cfg.name} has no weights to learn from", fix="distill.teacher=DIRECTORY")
    if ask.cfg.diffusion.prediction is Prediction.EPS:
        raise ConfigError(
            f"{ask.cfg.name}: predicts eps, which at t = 1, where a student begins, says nothing of the video",
            fix="train the teacher with diffusion.prediction=v",
        )
    check_sampler(ask.cfg)
    if cfg.method is Method.REWARD:
        check_reward(ask.cfg, ask.rule, cfg)
    else:
        told(replace(ask.cfg, w_range=None), cfg)
    return cfg


def stage_task(ask: Request) -> None:
    """Distils the stage (`task=distill`); prints where the last student's weights are."""
    cfg = settings_of(ask)  # says what is wrong with the settings before anything is read
    train, weights = ask.training, ask.cfg.weights if cfg.teacher is None else cfg.teacher
    begun = cfg.steps[0] if cfg.method is Method.REWARD else 2 * cfg.steps[0]  # steps of what it begins with
    directory = checkpoint.locate(weights, ask.cfg.name, begun)
    own = replace(ask.cfg, weights=str(directory), offload=False)  # for sampling alone: no gradient may pass
    teacher, key = load_stage(own, ask.rule, here(ask.on.torch))
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
    pool, before = pool_of(teacher, source, encoder, train, ask.config_dir)
    course = Course(
        source, encoder.encode, cfg, train, out, lambda student: Sheet(student, source, encoder.encode, train),
        inputs=[plain(ask.data), *contents(source), *named(ask.text, encoder), *before], pool=pool,
    )  # fmt: skip
    with attention.use(ask.on.attention):
        last = (rewarded if cfg.method is Method.REWARD else ladder)(teacher, key, course)
    if first_process():
        print(last)
