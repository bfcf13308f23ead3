"""What one stage can do alone: `python -m stages.<kind> task=sample|train|distill|evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cascade import attention, checkpoint, media, store
from cascade.config import fingerprint, locate, parse, plain, plugin, suggest
from cascade.data.source import DataConfig, open_source
from cascade.errors import ConfigError
from cascade.examples import pool_of
from cascade.pipeline import Chain, Device, Runner, digest, first_frame, load_stage, read_input, save_stage, video_bytes
from cascade.preview import Preview
from cascade.request import Prompts, bars, jobs_of, take
from cascade.stage import Rule, Stage, StageConfig, TrainConfig
from cascade.text import TextConfig, text_source
from cascade.train import fit
from cascade.unet import completed
from cascade.video import Video


@dataclass
class Request:
    """A command on one stage, typed. `own` holds the sections that a single task reads: distill, evaluate.

    `command` is what was typed, without `out`.
    """

    cfg: StageConfig
    rule: Rule
    run: Prompts
    on: Device
    text: TextConfig
    data: DataConfig
    own: dict[str, Any]
    command: str = ""

    @property
    def training(self) -> TrainConfig:
        if self.cfg.train is None:
            raise ConfigError(f"{self.cfg.name}: train is missing", fix="train.steps=... train.batch=... train.lr=...")
        return self.cfg.train

    def out(self, task: str) -> Path:
        """`out`, or a directory named by the hash of all settings."""
        if self.run.out is not None:
            return Path(self.run.out)
        settings = [plain(part) for part in (self.cfg, self.run, self.text, self.data)]
        return Path("runs") / f"{task}-{self.cfg.name}-{fingerprint([settings, self.own])[:12]}"


def request(kind: str, tree: dict[str, Any]) -> Request:
    """The typed command; settings that belong to nothing are refused."""
    rule = plugin(kind)
    run, on = take(tree, Prompts), take(tree, Device)
    text = parse(tree.pop("text", {}), TextConfig, "text")
    data = parse(tree.pop("data", {}), DataConfig, "data")
    own = {name: tree.pop(name) for name in ("distill", "evaluate") if name in tree}
    command = str(tree.pop("command", None) or "")
    cfg: StageConfig = parse(tree, rule.Config)
    return Request(cfg, rule, run, on, cfg.reads or text, data, own, command)  # type: ignore[arg-type]


def sample(ask: Request) -> None:
    """Videos of the stage for the prompts, from the file `input` (base: nothing, or an image)."""
    texts = ask.run.texts()
    out = Path(ask.run.out) if ask.run.out else ask.out("sample") / "video.safetensors"
    given = incoming(ask)
    ask.rule.output(None if given is None else given.shape, ask.cfg)
    chain = Chain([ask.cfg], [ask.rule], ask.text)
    chain.check()
    stage, weights = load_stage(ask.cfg, ask.rule, ask.on.torch)
    jobs = jobs_of(texts, ask.run.samples, out)
    suffix = out.suffix if len(jobs) == 1 else ".safetensors"
    with bars() as progress:
        runner = Runner(chain, text_source(ask.text), ask.on, ask.run.seed, ask.run.negative_prompt)
        for number, job in enumerate(jobs):

            def tick(step: int, done: int = number * stage.cfg.sampler.steps) -> None:
                progress(stage.cfg.name, done + step, len(jobs) * stage.cfg.sampler.steps)

            (video,) = runner.sample(stage, [job], [given], tick)
            key = runner.key(stage, weights, job, digest(given))
            write(job.directory.with_suffix(suffix), video, {"key": key, "prompt": job.prompt})
    print(out)


def incoming(ask: Request) -> Video | None:
    """The clip that the stage is given."""
    if ask.run.input is None:
        return None
    path = Path(ask.run.input)
    if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
        return first_frame(path, ask.cfg)
    takes = ask.rule.takes(ask.cfg)
    return read_input(path, (takes.height, takes.width))


def write(path: Path, video: Video, meta: dict[str, Any]) -> None:
    """One clip as a file: lossless, or a video file by its suffix."""
    if path.suffix == ".safetensors":
        store.commit_file(path, video_bytes(video), kind="stage", meta=meta)
    else:
        store.commit_file(path, media.encoded(video.frames[0], video.fps, path.suffix), kind="stage", meta=meta)


def train(ask: Request) -> None:
    """Trains the stage and writes its averaged weights to <out>/weights."""
    cfg, out = ask.training, ask.out("train")
    stage = new_stage(ask.cfg, ask.rule, cfg).to(ask.on.torch)
    source = open_source(ask.data, ask.cfg.shape, ask.cfg.fps, out / "clips")
    encoder = text_source(ask.text)
    preview = Preview(stage, source, encoder.encode, cfg)
    pool, before = pool_of(stage, source, encoder, cfg)
    inputs = [plain(ask.data), encoder.fingerprint, *before]
    with attention.use(ask.on.attention):
        average = fit(stage, source, encoder.encode, cfg, out, preview=preview, inputs=inputs, pool=pool)
    if first_process():
        save_stage(out / "weights", stage.cfg, average, f"Trained for {cfg.steps} steps of {cfg.batch} clips.")
        print(out / "weights")


def first_process() -> bool:
    """Whether this is the process that writes, under `accelerate launch`."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def new_stage(cfg: StageConfig, rule: Rule, train: TrainConfig) -> Stage:
    """The stage with the weights of `train.init`, or new ones drawn from `train.seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(train.seed)
        stage = Stage(cfg, rule)
    if train.init is not None:
        weights = checkpoint.load(locate(train.init))
        checkpoint.compatible(completed(weights.config["net"]), plain(cfg.net), f"{cfg.name}.net in {train.init}")
        checkpoint.apply(stage.net, weights.state, train.init)
    return stage


def distill(ask: Request) -> None:
    """Teaches a student with guidance inside and then with fewer and fewer steps."""
    from cascade.distill import stage_task

    stage_task(ask)


def evaluate(ask: Request) -> None:
    """Judges the stage alone by the measures that its kind names."""
    from cascade.evaluate import stage_task

    stage_task(ask)


TASKS = {"sample": sample, "train": train, "distill": distill, "evaluate": evaluate}


def run(kind: str, tree: dict[str, Any]) -> None:
    """The task that the settings ask for."""
    name = tree.pop("task", "sample")
    if name not in TASKS:
        raise ConfigError(f"task is {name!r}, expected one of {', '.join(TASKS)}", fix=suggest(str(name), TASKS))
    TASKS[name](request(kind, tree))
