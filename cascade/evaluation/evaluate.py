"""Judges a stage alone, or a whole chain, by the measures in cascade/metrics; one JSON and one picture each.

What is asked stands in exam.py, how it is answered in answers.py, what becomes of the answers in marks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from cascade import attention, checkpoint, store
from cascade.ask import Request
from cascade.chain import Chain, Device
from cascade.clipfiles import stage_clip
from cascade.config import fingerprint, parse, plain
from cascade.data.source import DataConfig, Source, open_source
from cascade.errors import ConfigError
from cascade.evaluation.answers import answers_of, borders, joined, variants_of
from cascade.evaluation.exam import (
    MADE,
    REAL,
    SHOWN,
    Answers,
    Case,
    EvaluateConfig,
    Exam,
    Question,
    about,
    judged,
    known_specs,
    lacking,
    measure,
)
from cascade.evaluation.marks import REPORT, Report, clips_of, described, rows_of, sheet_of, strips_of, table, write
from cascade.loading import check, load_stage
from cascade.pipeline import Progress, Runner, precision
from cascade.request import Out, bars, jobs_of, take
from cascade.settings import Rule, StageConfig
from cascade.stage import Stage
from cascade.text import Text, named, text_source

# one stage -----------------------------------------------------------------------------------------------------------


def judge_stage(
    stage: Stage,
    source: Source,
    encode: Callable[[list[str]], Text],
    cfg: EvaluateConfig,
    *,
    weights: str = "",
    config: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    work: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Judges a stage alone, on real clips that it was not trained on.

    A stage that takes a video gets real clips degraded by its own rule, and is judged without and with its noise
    conditioning augmentation (conditions `augment=...`). A stage that starts from text gets the prompts, and is set
    beside other real clips of the same prompts (condition `real`). `weights` is their hash, `config` what is
    recorded beside them and `dtype` the caller's precision, all for the report; with `work` the answers are kept there
    as they come, and a run that was cut short goes on (one directory, one setting).

    The networks run on the stage's device. Its sampler gives videos on the CPU, and there the measures run.
    """
    exam = Exam(source, cfg)
    names = cfg.metrics if cfg.metrics is not None else list(stage.rule.METRICS)
    questions = exam.questions(stage.cfg.shape, stage.cfg.fps)
    laps: list[tuple[int, float]] = []
    found, skipped = answers_of(exam, variants_of(stage), questions, encode, names, work, progress, laps)
    rows = rows_of(found, questions, stage.cfg, cfg.seed)
    stages = {stage.cfg.name: described(stage.cfg, weights, config or {})}
    return Report(
        subject("stage", stages, cfg, stage.device, dtype),
        cfg, rows, skipped, about(names), clips_of(found, questions),
        sheet=sheet_of(found, questions), strips=strips_of(found),
        laps={stage.cfg.name: laps}, machine=device_name(stage.device),
    )  # fmt: skip


def subject(what: str, stages: dict[str, Any], cfg: EvaluateConfig, device: torch.device, dtype: str) -> dict[str, Any]:
    """What is judged: all that decides the answers beside the questions, and the user's label for it."""
    return {"what": what, "stages": stages, "label": dict(cfg.label), "device": device.type, "dtype": dtype}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def stage_task(ask: Request) -> None:
    """`task=evaluate`: judges the stage; report.json and report.png in `out`, and a table on stdout."""
    cfg = parse({"seed": ask.run.seed, **ask.own.get("evaluate", {})}, EvaluateConfig, "evaluate")
    names = list(cfg.metrics or ask.rule.METRICS)
    out = ask.out("evaluate")
    store.check_into(out, REPORT)
    dtype = ask.on.computes(ask.cfg)
    stage, weights = load_stage(ask.cfg, ask.rule, ask.on.torch, dtype)
    config = read_weights(ask.cfg).config
    encoder = text_source(ask.text)
    work = kept(ask, out, stage.cfg, cfg, [weights, *named(ask.text, encoder), about(names)])
    with store.lock(out), bars() as progress, attention.use(ask.on.attention), precision(ask.on, ask.cfg):
        source = open_source(ask.data, ask.cfg.shape, ask.cfg.fps, out / "clips")
        report = judge_stage(
            stage, source, encoder.encode, cfg,
            weights=weights, config=config, dtype=str(dtype).removeprefix("torch."), work=work, progress=progress,
        )  # fmt: skip
        report.command = ask.command
        write(report, out)
    print(table(report))
    print(out / "report.png")


def kept(ask: Request, out: Path, stage: StageConfig, cfg: EvaluateConfig, others: list[Any]) -> Path | None:
    """Where the answers of a stage lie, by all that decides them; None for the user's own clips.

    Those may change under the same settings.
    """
    if ask.data.clips is not None:
        return None
    parts = [plain(part) for part in (stage, cfg, ask.on, ask.data)]
    for part, name in ((parts[0], "train"), (parts[0], "weights"), (parts[1], "n"), (parts[1], "label")):
        del part[name]  # none of them changes an answer
    return out / "answers" / fingerprint([parts, *others])[:16]


# a chain -------------------------------------------------------------------------------------------------------------


def judge_chain(runner: Runner, source: Source, cfg: EvaluateConfig, out: Path) -> Report:
    """Judges a whole chain by the measures of its first stage, which starts from text; every stage's clips apart.

    The clips are a chain's ordinary artefacts below `out`/videos, so that a run that was cut short goes on.
    """
    chain, exam = runner.chain, Exam(source, cfg)
    last = chain.stages[-1]
    names = cfg.metrics if cfg.metrics is not None else list(chain.rules[0].METRICS)
    stages = {}
    for stage in chain.stages:
        weights = read_weights(stage)
        told = replace(stage, w_range=weights.config.get("w_range"))
        stages[stage.name] = described(told, weights.hash, weights.config)
    questions = exam.questions(last.shape, last.fps)
    jobs = jobs_of([question.prompt for question in questions], 1, out / "videos")
    for job in jobs:
        store.sweep(job.directory / "stages")
    runner.run(jobs, None)
    rows = []
    for stage, rule in zip(chain.stages, chain.rules, strict=True):
        clips = [job.directory / "stages" / stage.name for job in jobs]
        found, skipped = answers_in(clips, exam, stage, rule, questions, names, runner.progress)
        rows += rows_of(found, questions, stage, cfg.seed)
    on = runner.on.torch
    return Report(
        subject("chain", stages, cfg, on, runner.on.dtype),
        cfg, rows, skipped, about(names), clips_of(found, questions),
        sheet=sheet_of(found, questions), strips=strips_of(found),
        laps=runner.laps, machine=device_name(on),
    )  # fmt: skip


def answers_in(
    clips: Sequence[Path],
    exam: Exam,
    stage: StageConfig,
    rule: Rule,
    questions: Sequence[Question],
    names: Sequence[str],
    progress: Progress | None,
) -> tuple[Answers, dict[str, str]]:
    """The answers in the artefacts `clips` that a chain's stage made, beside those of other real clips (REAL)."""
    cfg, parts = exam.cfg, []
    skipped: dict[str, str] = {}
    for first in range(0, cfg.n, cfg.batch):
        group, files = questions[first : first + cfg.batch], clips[first : first + cfg.batch]
        frames = torch.cat([stage_clip(f).frames for f in files])
        truth = exam.films(group, stage.shape, stage.fps)
        case = Case(frames, truth, rule.rate(stage), specs=known_specs(group), borders=borders(stage, rule))
        skipped = {name: why for name in names if (why := lacking(name, case))}
        answers = {"sheet/made": frames[[i for i, question in enumerate(group) if question.number < SHOWN]]}
        others = replace(case, frames=exam.films(group, stage.shape, stage.fps, REAL))
        for name in [name for name in names if name not in skipped]:
            answers |= judged(name, case, MADE) | judged(name, others, REAL)
        parts.append(answers)
        if progress is not None:
            progress(f"judge {stage.name}", first + len(group), cfg.n)
    return joined(parts), skipped


def read_weights(stage: StageConfig) -> checkpoint.Weights:
    """A stage's weights, all of whose files are read for their hash."""
    return checkpoint.load(checkpoint.locate(stage.weights, stage.name, stage.sampler.steps))


def chain_verb(tree: dict[str, Any]) -> Callable[[], None]:
    """`cascade evaluate`: judges a chain; report.json and report.png in `out`, and a table on stdout."""
    cfg, on = take(tree, EvaluateConfig), take(tree, Device)
    data = parse(tree.pop("data", {}), DataConfig, "data")
    where, command = take(tree, Out), str(tree.pop("command", None) or "")
    if cfg.image or cfg.given:
        raise ConfigError(
            "image and given are for a stage alone", fix="python -m stages.base task=evaluate evaluate.image=true"
        )
    chain = Chain.read(tree, ["out", "data", *(f.name for cls in (EvaluateConfig, Device) for f in fields(cls))])
    for name in cfg.metrics or chain.rules[0].METRICS:
        measure(name)
    chain.rules[0].output(None, chain.stages[0])
    chain.runs_on(on)  # before anything loads
    check(chain)  # the weights of all stages, before any of them is used
    parts = [plain(part) for part in (*chain.stages, cfg, on, data, chain.text)]
    out = where.out or Path("runs") / f"evaluate-{fingerprint(parts)[:12]}"
    last = chain.stages[-1]
    store.check_into(out, REPORT)

    def work() -> None:
        with store.lock(out), bars() as progress:
            runner = Runner(chain, text_source(chain.text), on, cfg.seed, None, progress)
            source = open_source(data, last.shape, last.fps, out / "clips")
            report = judge_chain(runner, source, cfg, out)
            report.command = command
            write(report, out)
        print(table(report))
        print(out / "report.png")

    return work
