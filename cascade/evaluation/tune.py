"""`task=tune`: the noise that a stage's input is given when sampling, chosen by a sweep and written into its YAML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch

from cascade import attention, store
from cascade.ask import Request
from cascade.config import locate, parse, plain
from cascade.data.source import open_source
from cascade.errors import InputError
from cascade.evaluation.answers import Comes
from cascade.evaluation.evaluate import kept, read_weights, subject
from cascade.evaluation.exam import Exam, Question, about
from cascade.evaluation.marks import described, pivot
from cascade.evaluation.sweep import Choice, Input, Sweep, TuneConfig, check, choose, sweep
from cascade.loading import load_stage
from cascade.noise import generator
from cascade.pipeline import precision
from cascade.request import bars
from cascade.settings import StageConfig
from cascade.text import Text, named, text_source
from cascade.training.imitation import Imitate, imitation, makers
from cascade.video import Video

JSON, KIND = "tune.json", "tune"
LINE = re.compile(r"(?m)^(augment:[ \t]*)([^\s#]+)")  # of a stage's YAML, its value apart


def imitated(before: Imitate, seed: int, folder: Path | None) -> Comes:
    """What the stages `before` make of degraded clips, whatever clips stand beside them; kept in `folder`."""

    def comes(low: Video, questions: Sequence[Question], text: Text) -> Video:
        file = None if folder is None else folder / f"{questions[0].number:06d}-{len(questions)}.safetensors"
        if file is not None and file.is_file() and not store.problems(file, "inputs"):
            artefact = store.read(file, "inputs")
            frames = store.bytes_to_tensors(artefact.files[file.name], str(file))["frames"]
            return Video(frames, low.fps, low.known)
        made = []
        for i, question in enumerate(questions):
            clip, rng = Video(low.frames[i : i + 1], low.fps), generator("imitate", seed, question.number)
            made.append(before(clip, text[i : i + 1], rng).frames)
        frames = torch.cat(made)
        if file is not None:
            store.commit_file(file, store.tensors_to_bytes({"frames": frames}), kind="inputs")
        return Video(frames, low.fps, low.known)

    return comes


# the file ------------------------------------------------------------------------------------------------------------


def edited(text: str, stage: str, level: float, where: str) -> str:
    """The YAML `text` of that stage with `level` on its line `augment:`; nothing else changes.

    Raises InputError if it is another stage's, or has that line not exactly once.
    """
    if not re.search(rf"(?m)^name:[ \t]*{re.escape(stage)}[ \t\r]*(?:#.*)?$", text):
        raise InputError(f"{where}: has no line `name: {stage}`, so it is another stage's", fix="tune.write=ITS_FILE")
    count = len(LINE.findall(text))
    if count != 1:
        raise InputError(f"{where}: has {count} lines `augment: LEVEL`, expected one", fix="write it as augment: 0.0")
    # Never 1e-05: YAML takes a number without a dot for text.
    number = numpy.format_float_positional(level, trim="0")
    return LINE.sub(lambda found: found[1] + number, text)


def read_yaml(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise InputError(f"tune.write {path}: {fault}", fix="tune.write=conf/stage/.../NAME.yaml") from fault


# the task ------------------------------------------------------------------------------------------------------------


def table(found: Sweep, choice: Choice, cfg: TuneConfig, stage: StageConfig) -> str:
    """All numbers, a block for each input and a column for each level, and what was chosen."""
    titles = {Input.DEGRADED: "real clips, degraded"}
    if cfg.before is not None:
        titles[Input.BEFORE] = f"the same clips as {cfg.before.stage} makes them"
    lines = [f"{stage.name}: {stage.shape} at {stage.fps:g} fps, value ±standard error (clips)"]
    for of in cfg.inputs:
        rows = [row for row in found.rows if row.group == of.value]
        lines += ["", titles[of], *pivot(rows, lambda row: row.condition)]
    lines += [f"{name} is left out: {why}" for name, why in found.skipped.items()]
    behind = ", ".join(f"{level:g} by {gap:.3g} ±{spread:.2g}" for level, gap, spread in choice.behind)
    lines += ["", f"{cfg.by.measure}, {titles[cfg.by.input]}: best at {choice.best:g}; behind it {behind}"]
    return "\n".join([*lines, f"augment: {choice.level:g} (was {stage.augment:g})"])


def stage_task(ask: Request) -> None:
    """`task=tune`: tune.json in `out`, a table on stdout, and with `tune.write` the level in the stage's YAML."""
    cfg = parse(ask.own.get("tune", {}), TuneConfig, "tune")
    check(ask.cfg, ask.rule, cfg)
    target = None if cfg.write is None else locate(cfg.write).resolve()  # a link stays one
    if target is not None:
        store.check_place(target)
        edited(read_yaml(target), ask.cfg.name, 0.0, str(target))  # refused before anything is made
    questions, out = cfg.exam(ask.run.seed, ask.rule), ask.out("tune")
    store.check_into(out, KIND)
    dtype = ask.on.computes(ask.cfg)
    stage, weights = load_stage(ask.cfg, ask.rule, ask.on.torch, dtype)
    config, encoder = read_weights(ask.cfg).config, text_source(ask.text)
    stages = makers(cfg.before, ask.cfg, ask.rule, "tune.before", ask.text, ask.config_dir)
    before, keys = imitation(stages, ask.on.torch)
    others = [weights, *named(ask.text, encoder), about(questions.metrics or [])]
    made_by = [*keys, plain(cfg.before)] if cfg.before is not None else []

    def work(of: Input, variant: StageConfig) -> Path | None:
        return kept(ask, out, variant, questions, [*others, made_by if of is Input.BEFORE else []])

    with store.lock(out), bars() as progress, attention.use(ask.on.attention), precision(ask.on, ask.cfg):
        source = open_source(ask.data, ask.cfg.shape, ask.cfg.fps, out / "clips")
        comes = None
        if before is not None:
            folder = work(Input.BEFORE, replace(stage.cfg, augment=0.0))
            comes = imitated(before, ask.run.seed, folder and out / "inputs" / folder.name)
        found = sweep(stage, Exam(source, questions), cfg, encoder.encode, comes, work, progress)
        choice = choose(found.compared, cfg.by.better, cfg.within)
        told = {stage.cfg.name: described(stage.cfg, weights, config)}
        tree: dict[str, Any] = {
            "subject": subject("stage", told, questions, stage.device, str(dtype).removeprefix("torch.")),
            "settings": {name: value for name, value in plain(cfg).items() if name != "write"},
            "seed": ask.run.seed,
            "before": keys,
            "rows": [plain(row) for row in found.rows],
            "skipped": found.skipped,
            "choice": plain(choice),
            "command": ask.command,
        }
        store.commit_into(out, {JSON: store.canonical(tree)}, kind=KIND, meta={"stage": stage.cfg.name})
    print(table(found, choice, cfg, stage.cfg))
    print(out / JSON)
    if target is not None:
        text = edited(read_yaml(target), stage.cfg.name, choice.level, str(target))
        store.write_file(target, text.encode())
        print(target)
