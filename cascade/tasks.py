"""What one stage can do alone: `python -m stages.<kind> task=sample|train|distill|evaluate|tune`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from cascade import attention, checkpoint, media, store
from cascade.ask import Request, request
from cascade.chain import Chain
from cascade.clipfiles import digest, video_bytes
from cascade.config import locate, parse, plain, suggest
from cascade.data.source import contents, open_source
from cascade.errors import CascadeError, ConfigError
from cascade.given import given
from cascade.loading import check_trained, known, launched, load_stage, save_stage
from cascade.pipeline import Runner
from cascade.planning.memory import Memory, within
from cascade.request import Given, Job, bars, jobs_of
from cascade.settings import Rule, StageConfig, TrainConfig
from cascade.stage import Stage
from cascade.text import named, text_source
from cascade.training.examples import pool_of
from cascade.training.imitation import gap_makers, makers
from cascade.training.preview import Preview
from cascade.training.train import first_process, fit, here
from cascade.video import Video

LOSSLESS = ".safetensors"


def sample(ask: Request) -> None:
    """Videos of the stage for the prompts, from the file `input`, or from what is known of them."""
    texts = ask.run.texts()
    out = ask.run.out or ask.out("sample") / f"video{LOSSLESS}"
    jobs = jobs_of(texts, ask.run.samples, out)
    suffix = out.suffix if len(jobs) == 1 else LOSSLESS
    if suffix not in (LOSSLESS, *media.VIDEO_SUFFIXES) or (len(jobs) == 1 and out.is_dir()):
        raise ConfigError(f"out={out}: is not the name of a video file", fix=f"out=NAME{LOSSLESS}, .mp4, .webm or .gif")
    if len(jobs) > 1 and out.is_file():
        raise ConfigError(f"out={out}: is a file, but {len(jobs)} clips are asked for", fix="out=DIR")
    for job in jobs:
        store.check_file(job.directory.with_suffix(suffix))
    first = given(ask.run, ask.cfg, ask.rule)
    size = None if first is None else first.shape
    chain = Chain([ask.cfg], [ask.rule], ask.text)
    chain.check()
    if suffix != LOSSLESS:
        media.check_rate(suffix, chain.fps(first))
    chain.runs_on(ask.on)
    chain = within(chain, ask.on, Memory(memory=ask.memory, command=ask.command), size)
    make(Runner(chain, text_source(ask.text), ask.on, ask.run.seed, ask.run.negative), jobs, first, suffix)
    print(out)


def make(runner: Runner, jobs: Sequence[Job], first: Video | None, suffix: str) -> None:
    """The clips of `jobs` as files, but for those that are there, whole and of the same key."""
    (cfg,), (rule,) = runner.chain.stages, runner.chain.rules
    told, weights = known(cfg)
    todo = []
    for job in jobs:
        path, key = job.directory.with_suffix(suffix), runner.key(told, weights, job, digest(first))
        if not path.is_file() or store.problems(path, "stage") or store.manifest(path)["meta"].get("key") != key:
            todo.append((job, path, key))
    if not todo:
        return
    loaded, _ = load_stage(cfg, rule, torch.device("cpu"), runner.on.computes(cfg))
    stage = launched(loaded, runner.on)
    steps = cfg.sampler.steps
    with bars() as progress:
        for number, (job, path, key) in enumerate(todo):

            def tick(step: int, done: int = number * steps) -> None:
                progress(cfg.name, done + step, len(todo) * steps)

            (video,) = runner.sample(stage, [job], [first], tick)
            write(path, video, {"key": key, "prompt": job.prompt})


def write(path: Path, video: Video, meta: dict[str, Any]) -> None:
    """One clip as a file: lossless, or a video file by its suffix."""
    if path.suffix == LOSSLESS:
        store.commit_file(path, video_bytes(video), kind="stage", meta=meta)
    else:
        store.commit_file(path, media.encoded(video.frames[0], video.fps, path.suffix), kind="stage", meta=meta)


def train(ask: Request) -> None:
    """Trains the stage and writes its averaged weights to <out>/weights."""
    cfg, out = ask.training, ask.out("train")
    store.check_ours(out / "weights", checkpoint.KIND)
    stage, key = new_stage(ask.cfg, ask.rule, cfg)
    stage, cfg = stage.to(here(ask.on.torch)), replace(cfg, init=key)  # what it starts from is named by content
    source = open_source(ask.data, ask.cfg.shape, ask.cfg.fps, out / "clips")
    encoder = text_source(ask.text)
    preview = Preview(stage, source, encoder.encode, cfg)
    pool, before = pool_of(stage, source, encoder, cfg, ask.config_dir)
    inputs = [plain(ask.data), *contents(source), *named(ask.text, encoder), *before]
    with attention.use(ask.on.attention):
        average = fit(stage, source, encoder.encode, cfg, out, preview=preview, inputs=inputs, pool=pool)
    if first_process():
        save_stage(out / "weights", stage.cfg, average, f"Trained for {cfg.steps} steps of {cfg.batch} clips.")
        print(out / "weights")


def new_stage(cfg: StageConfig, rule: Rule, train: TrainConfig) -> tuple[Stage, str | None]:
    """The stage with the weights of `train.init` and their hash, or with new ones drawn from `train.seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(train.seed)
        stage = Stage(replace(cfg, offload=False), rule)  # for sampling alone: no gradient may pass
    if train.init is None:
        return stage, None
    weights = checkpoint.load(locate(train.init))
    check_trained(cfg, weights.config, f"{cfg.name} in {train.init}")
    checkpoint.apply(stage.net, weights.state, train.init)
    return stage, weights.hash


def distill(ask: Request) -> None:
    """Teaches a student with guidance inside and then with fewer and fewer steps."""
    from cascade.distillation.distill import stage_task

    for weights in ask.out("distill").glob("*/weights"):  # of a round
        store.check_ours(weights, checkpoint.KIND)
    stage_task(ask)


def evaluate(ask: Request) -> None:
    """Judges the stage alone by the measures that its kind names."""
    from cascade.evaluation.evaluate import stage_task

    stage_task(ask)


def tune(ask: Request) -> None:
    """Finds the noise that the stage's input is best given when sampling."""
    from cascade.evaluation.tune import stage_task

    stage_task(ask)


TASKS = {"sample": sample, "train": train, "distill": distill, "evaluate": evaluate, "tune": tune}
SOME = ("dtype", "micro_batch", "memory")  # of Device and Memory what not every task reads
INSTEAD = {  # of what a task does not read
    ("train", "seed"): "train.seed=N",
    ("distill", "seed"): "train.seed=N",
    ("train", "dtype"): "train.precision=bf16",
    ("distill", "dtype"): "train.precision=bf16",
    ("train", "micro_batch"): "train.micro_batch=N",
    ("distill", "micro_batch"): "train.micro_batch=N",
    ("evaluate", "micro_batch"): "evaluate.batch=N",
    ("tune", "micro_batch"): "tune.batch=N",
}
READS = {  # of `Given`, of SOME, and of the sections that belong to one task
    "sample": [*(f.name for f in fields(Given)), *SOME],
    "train": ["out"],
    "distill": ["out", "distill"],
    "evaluate": ["out", "seed", "dtype", "evaluate"],
    "tune": ["out", "seed", "dtype", "tune"],
}


def task(kind: str, tree: dict[str, Any]) -> Callable[[], None]:
    """What the settings ask for, checked. Raises HostError where its `out` cannot be written, before anything loads."""
    name, ask = asked(kind, tree)
    store.check_place(ask.out(name))

    def work() -> None:
        try:
            TASKS[name](ask)
        except CascadeError as error:  # in a chain it is base.weights=..., alone weights=...
            error.fix = re.sub(rf"\b{re.escape(ask.cfg.name)}\.(?=[\w.]+=)", "", error.fix)
            raise

    return work


def asked(kind: str, tree: dict[str, Any]) -> tuple[str, Request]:
    """The task and its settings, typed; ConfigError for what is wrong with them before anything is read."""
    name = tree.pop("task", "sample")
    if not isinstance(name, str) or name not in TASKS:
        raise ConfigError(
            f"task is {name!r}, expected one of {', '.join(TASKS)}", fix=suggest(str(name), TASKS, "task=")
        )
    ask = request(kind, tree)
    check_read(name, ask)
    check(name, ask)
    return name, ask


def check_read(task: str, ask: Request) -> None:
    """Raises ConfigError for a setting that `task` would ignore: another task reads it.

    A section counts if it was typed, for a stage's YAML may hold those of all tasks, and so does one of SOME.
    """
    typed = {re.split(r"[.=]", word.lstrip("+"))[0] for word in shlex.split(ask.command)}
    said = [f.name for f in fields(Given) if getattr(ask.run, f.name) != f.default]
    for name in (*said, *(name for name in (*ask.own, *SOME) if name in typed)):
        if name not in READS[task]:
            readers = " or ".join(other for other, names in READS.items() if name in names)
            fix = INSTEAD.get((task, name), f"remove {name}, or task={readers}")
            raise ConfigError(f"task={task} does not read {name}", fix=fix)


def check(task: str, ask: Request) -> None:
    """Raises ConfigError for settings that `task` alone reads, as far as they can be judged without any weights."""
    from cascade.distillation.distill import settings_of
    from cascade.evaluation import exam, sweep

    own = ask.own.get(task, {})
    if task == "distill":
        settings_of(ask)
    elif task == "evaluate":
        for name in parse(own, exam.EvaluateConfig, task).metrics or ask.rule.METRICS:
            exam.measure(name)
    elif task == "tune":
        swept = parse(own, sweep.TuneConfig, task)
        sweep.check(ask.cfg, ask.rule, swept)
        makers(swept.before, ask.cfg, ask.rule, "tune.before", ask.text, ask.config_dir)
    if task in ("train", "distill"):
        gap_makers(ask.training, ask.cfg, ask.rule, ask.text, ask.config_dir)
