"""What a stage answers to the questions of an exam: its clips, judged, a few at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cascade import store
from cascade.errors import ConfigError
from cascade.evaluation.exam import MADE, REAL, SHOWN, Answers, Case, Exam, Question, judged, known_specs, lacking
from cascade.noise import Noise, generator, sample_id
from cascade.pipeline import Progress
from cascade.settings import Rule, StageConfig, from_text
from cascade.stage import Stage
from cascade.text import Text
from cascade.video import Video

Comes = Callable[[Video, Sequence[Question], Text], Video]  # what really comes in, in place of degraded clips


def answers_of(
    exam: Exam,
    variants: dict[str, Stage],
    questions: Sequence[Question],
    encode: Callable[[list[str]], Text],
    names: Sequence[str],
    work: Path | None,
    progress: Progress | None,
    laps: list[tuple[int, float]],
    comes: Comes | None = None,
) -> tuple[Answers, dict[str, str]]:
    """The answers of all conditions on all questions, and which measures could not be asked, and why.

    With `work` they are kept there and read from there; see `answer` for the rest.
    """
    stage, cfg = next(iter(variants.values())), exam.cfg
    total = cfg.n * stage.cfg.sampler.steps * len(variants)
    parts: list[Answers] = []
    skipped: dict[str, str] = {}
    for first in range(0, cfg.n, cfg.batch):
        group = questions[first : first + cfg.batch]
        file = None if work is None else work / f"{first:06d}-{len(group)}.safetensors"
        if file is not None and file.is_file() and not store.problems(file, "answers"):
            artefact = store.read(file, "answers")
            parts.append(store.bytes_to_tensors(artefact.files[file.name], str(file)))
            skipped = artefact.meta["skipped"]
            continue
        done = first * stage.cfg.sampler.steps * len(variants)

        def tick(step: int, done: int = done, size: int = len(group)) -> None:
            if progress is not None:
                progress(stage.cfg.name, done + step * size, total)

        answers, skipped = answer(exam, variants, group, encode, names, tick, laps, comes)
        parts.append(answers)
        if file is not None:
            store.commit_file(file, store.tensors_to_bytes(answers), kind="answers", meta={"skipped": skipped})
    return joined(parts), skipped


def variants_of(stage: Stage) -> dict[str, Stage]:
    """The stage as it is judged, by condition: without and with noise on its input, if it takes a video."""
    if from_text(stage.cfg, stage.rule):
        return {MADE: stage}
    return {at_level(level): augmented(stage, level) for level in sorted({0.0, stage.cfg.augment})}


def at_level(level: float) -> str:
    """The name of a level of noise conditioning augmentation."""
    return f"augment={level:g}"


def augmented(stage: Stage, level: float) -> Stage:
    """The stage as it samples with its input noised to `level`; the network is shared."""
    variant = copy(stage)
    variant.cfg = replace(stage.cfg, augment=level)
    return variant


def answer(
    exam: Exam,
    variants: dict[str, Stage],
    questions: Sequence[Question],
    encode: Callable[[list[str]], Text],
    names: Sequence[str],
    tick: Callable[[int], None],
    laps: list[tuple[int, float]],
    comes: Comes | None = None,
) -> tuple[Answers, dict[str, str]]:
    """The answers of all conditions on a few questions, and which measures could not be asked, and why.

    Every call of the sampler adds its clips and seconds to `laps`. `comes` turns the degraded clips into what comes in.
    """
    stage = next(iter(variants.values()))
    cfg = stage.cfg
    text = encode([question.prompt for question in questions])
    case, low = posed(exam, stage, MADE in variants, questions, text, comes)
    skipped = {name: why for name in names if (why := lacking(name, case))}
    asked = [name for name in names if name not in skipped]
    shown = [i for i, question in enumerate(questions) if question.number < SHOWN]
    span = slice(None) if case.rate == 1 else slice(0, 8)  # neighbours: of frames far apart all may be given ones
    answers: Answers = {} if case.low is None or case.given is None else {"sheet/input": case.given[shown, :, span]}
    noise = Noise(exam.cfg.seed, cfg.name, tuple(sample_id(question.prompt, question.copy) for question in questions))
    for turn, (condition, variant) in enumerate(variants.items()):
        start = time.perf_counter()
        case.frames = variant.sample(low, text, None, noise, partial(_from, tick, turn * cfg.sampler.steps)).frames
        laps.append((len(questions), time.perf_counter() - start))
        for name in asked:
            answers |= judged(name, case, condition)
        answers[f"sheet/{condition}"] = case.frames[shown, :, span]
    if case.low is None:
        case.frames = exam.films(questions, cfg.shape, cfg.fps, REAL)
        for name in asked:
            answers |= judged(name, case, REAL)
    else:
        answers["sheet/truth"] = case.truth[shown, :, span]
    return answers, skipped


def posed(
    exam: Exam, stage: Stage, from_noise: bool, questions: Sequence[Question], text: Text, comes: Comes | None
) -> tuple[Case, Video | None]:
    """What the measures may ask of a few clips, those of the stage still missing, and what comes in."""
    cfg, rule = stage.cfg, stage.rule
    truth = exam.films(questions, cfg.shape, cfg.fps)
    case = Case(truth, truth, rate=rule.rate(cfg), specs=known_specs(questions), borders=borders(cfg, rule))
    low = None
    if not from_noise or exam.cfg.given:
        low = degraded(stage, truth, questions, exam.cfg.seed)
        low = low if comes is None else comes(low, questions, text)
        case.low = None if from_noise else low.frames
    elif exam.cfg.image:
        first = torch.arange(cfg.shape.frames) < 1
        low = Video(truth, cfg.fps, first.expand(len(truth), -1))
    if low is not None:
        known = low.known is not None
        case.given, mask = (low.frames * low.mask, low.mask) if known else rule.condition(low, cfg, cfg.shape)
        case.mask = (mask > 0) & rule.KEEPS_KNOWN
        case.known = case.mask[:, 0].flatten(2).all(2)
    return case, low


def degraded(stage: Stage, truth: Tensor, questions: Sequence[Question], seed: int) -> Video:
    """What the stage before would have made of each real clip, whatever clips stand beside it.

    Of a stage that starts from text: what its training would give it. ConfigError if that is nothing of any clip.
    """
    cfg, lows = stage.cfg, []
    for clip, question in zip(truth, questions, strict=True):
        rng = generator("degrade", seed, question.number)
        lows.append(stage.rule.degrade(Video(clip[None], cfg.fps), cfg, rng))
    made = [low for low in lows if low is not None]
    if not made:
        raise ConfigError(f"{cfg.name}: evaluate.given is true, but nothing is given in training", fix="known=1")
    frames = [clip[None] if low is None else low.frames for clip, low in zip(truth, lows, strict=True)]
    fps, some = made[0].fps, made[0].known
    if some is None:
        return Video(torch.cat(frames), fps)
    known = [torch.zeros_like(some) if low is None or low.known is None else low.known for low in lows]
    return Video(torch.cat(frames), fps, torch.cat(known))


def _from(tick: Callable[[int], None], start: int, step: int) -> None:
    tick(start + step)


def borders(stage: StageConfig, rule: Rule) -> list[int] | None:
    return stage.windows.borders(stage.shape.frames, rule.rate(stage)) or None


def joined(parts: Sequence[Answers]) -> Answers:
    keys = sorted(parts[0], key=lambda key: key.split("/"))
    return {key: torch.cat([part[key] for part in parts]) for key in keys}
