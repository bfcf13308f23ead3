"""Runs a chain: one stage on the device at a time, every stage's output an artefact, and nothing is done twice.

While a stage runs, the weights of the next are read and verified: they are all that is in memory of any other stage.

DIR = {video.mp4, sheet.png, manifest.json, stages/<name>/{video.safetensors, manifest.json}}; many samples stand in
DIR/0000, DIR/0001, ... A stage's artefact carries a key: the hash of all that decides its content (its settings and
weights, prompt, seed, input, device). On the next run a stage whose key is the same is read, any other is replaced.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade import __version__, attention, media, store
from cascade.chain import Chain, Device
from cascade.clipfiles import Clip, Clips, commit_stage, digest, finished
from cascade.config import fingerprint, plain
from cascade.errors import CascadeError
from cascade.kernels import say_once
from cascade.loading import Load, Loaded, known, launched, load_stage
from cascade.noise import Noise
from cascade.request import Job
from cascade.settings import StageConfig
from cascade.stage import Stage
from cascade.text import Text, TextSource, text_source
from cascade.video import Video

SHEET = "sheet.png"
MARK = "cascade"  # the version that made it, in the manifest of a run
log = logging.getLogger("cascade")
Progress = Callable[[str, int, int], None]  # stage name, steps done, steps in all


def stage_key(
    cfg: StageConfig,
    weights: Sequence[str],
    text: str,
    negative: str | None,
    job: Job,
    seed: int,
    source: str,
    on: Device,
) -> str:
    """Hash of everything that decides a stage's output; `cfg` and `weights` are those of `known`."""
    settings = plain(cfg)
    for name in ("train", "weights"):
        settings.pop(name)
    return fingerprint(
        {
            "format": 1,
            "settings": settings,
            "weights": weights,
            "text": [text, job.prompt, negative],
            "sample": [job.sample, seed],
            "input": source,
            "device": [on.torch.type, on.dtype, on.micro_batch, on.attention],
        }
    )


@dataclass
class Runner:
    """Makes the videos of many jobs, stage by stage, each stage loaded once.

    `negative` is what guidance moves away from in place of no text. Without `disk` nothing is written, and no earlier
    result is looked for. `after` is told at every step the stage, the jobs and what `sampler.After` is told.
    """

    chain: Chain
    source: TextSource
    on: Device
    seed: int = 0
    negative: str | None = None
    progress: Progress | None = None
    load: Load = field(default_factory=lambda: load_stage)
    disk: bool = True
    after: Callable[[str, Sequence[Job], int, float, Tensor], Tensor] | None = None
    laps: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # by stage, of every call: clips, seconds
    _sources: dict[str, TextSource] = field(default_factory=dict)  # encoders that only some stages read
    _texts: dict[tuple[str, str | None, str], Text] = field(default_factory=dict)

    def run(self, jobs: Sequence[Job], given: Video | Sequence[Video | None] | None) -> Clips:
        """Every stage of every job, as artefacts under job.directory/stages; returns the last stage's videos.

        `given` is what the first stage gets: the same clip for all jobs, or one for each. With `disk` the next stage's
        weights load while one runs, and of many jobs only the clips that are worked on are in memory; without, whoever
        gives `load` keeps the weights.
        """
        clips = given if isinstance(given, Sequence) else [given] * len(jobs)
        inputs: dict[Path, tuple[Clip, str]] = {
            job.directory: (clip, digest(clip)) for job, clip in zip(jobs, clips, strict=True)
        }
        stages = list(zip(self.chain.stages, self.chain.rules, strict=True))
        place = torch.device("cpu") if self.disk else self.on.torch
        ahead: dict[int, Future[Loaded]] = {}
        with ThreadPoolExecutor(1) as thread:

            def load(i: int) -> Future[Loaded]:
                return thread.submit(self.load, *stages[i], place, self.on.computes(stages[i][0]))

            for i, (cfg, _) in enumerate(stages):
                todo = self.missing(cfg, jobs, inputs)
                if not todo:
                    continue
                loading = ahead.pop(i, None) or load(i)
                self.text([todo[0][0].prompt], cfg)  # its encoder loads meanwhile
                stage = launched(loading.result()[0], self.on)
                # While diffusers loads a codec, modules that other threads build get parameters without data.
                stage.coder  # noqa: B018
                if self.disk and i + 1 < len(stages):
                    ahead[i + 1] = load(i + 1)
                self.make(stage, todo, inputs, preview=i == 0)
                del stage, loading
        return Clips({path: clip for path, (clip, _) in inputs.items()})

    def missing(
        self, cfg: StageConfig, jobs: Sequence[Job], inputs: dict[Path, tuple[Clip, str]]
    ) -> list[tuple[Job, str]]:
        """The jobs whose clip of this stage has to be made, with its key; what is there replaces its input."""
        if not self.disk:
            return [(job, "") for job in jobs]
        told, weights = known(cfg)
        todo = []
        for job in jobs:
            key = self.key(told, weights, job, inputs[job.directory][1])
            done = finished(job.directory / "stages" / cfg.name, key)
            if done is None:
                todo.append((job, key))
            else:
                inputs[job.directory] = done
        return todo

    def make(
        self,
        stage: Stage,
        todo: Sequence[tuple[Job, str]],
        inputs: dict[Path, tuple[Clip, str]],
        preview: bool,
    ) -> None:
        """The stage's clips of `todo` from their inputs, which they replace."""
        name, steps, total = stage.cfg.name, stage.cfg.sampler.steps, len(todo) * stage.cfg.sampler.steps
        show = self.progress or (lambda *_: None)
        show(name, 0, total)
        for part in range(0, len(todo), self.on.micro_batch):
            group = todo[part : part + self.on.micro_batch]

            def tick(step: int, base: int = part * steps, size: int = len(group)) -> None:
                show(name, base + step * size, total)

            lows = Clips({job.directory: inputs[job.directory][0] for job, _ in group})
            videos = self.sample(stage, [job for job, _ in group], [lows.get(job.directory) for job, _ in group], tick)
            for (job, key), video in zip(group, videos, strict=True):
                folder = job.directory / "stages" / name
                done = (folder, commit_stage(folder, video, key, preview)) if self.disk else (video, "")
                inputs[job.directory] = done

    def key(self, cfg: StageConfig, weights: Sequence[str], job: Job, source: str) -> str:
        text, negative = self.source_of(cfg).fingerprint, self.negative
        if negative is None:
            negative = self.chain.text_of(cfg).negative
        return stage_key(cfg, weights, text, negative, job, self.seed_of(job), source, self.on)

    def seed_of(self, job: Job) -> int:
        return self.seed if job.seed is None else job.seed

    def source_of(self, stage: StageConfig) -> TextSource:
        """What reads the prompts for `stage`; an encoder of its own loads when it is first asked for."""
        text = self.chain.text_of(stage)
        if text == self.chain.text:
            return self.source
        name = fingerprint(text)
        if name not in self._sources:
            self._sources[name] = text_source(text)
        return self._sources[name]

    def text(self, prompts: Sequence[str], stage: StageConfig) -> Text:
        source, nothing = self.source_of(stage), self.chain.text_of(stage).negative
        keys = [(source.fingerprint, nothing, prompt) for prompt in prompts]
        for key in keys:
            if key not in self._texts:
                self._texts[key] = source.encode([key[2]])
        return Text.cat([self._texts[key] for key in keys])

    def sample(
        self, stage: Stage, jobs: Sequence[Job], lows: Sequence[Video | None], tick: Callable[[int], None]
    ) -> list[Video]:
        """The stage's videos for a few jobs at once."""
        low = None
        if lows[0] is not None:
            clips = [clip for clip in lows if clip is not None]
            known = None if clips[0].known is None else torch.cat([c.known for c in clips if c.known is not None])
            low = Video(torch.cat([clip.frames for clip in clips]), clips[0].fps, known)
        text = self.text([job.prompt for job in jobs], stage.cfg)
        negative = None if self.negative is None else self.text([self.negative] * len(jobs), stage.cfg)
        if self.negative and stage.cfg.w_range is not None:
            say_once(f"{stage.cfg.name}: distilled guidance leads away from no prompt: negative_prompt is not heard")
        seeds = tuple(self.seed_of(job) for job in jobs)
        noise = Noise(seeds, stage.cfg.name, tuple(job.sample for job in jobs))
        after = None if self.after is None else partial(self.after, stage.cfg.name, jobs)
        start = time.perf_counter()
        try:
            with attention.use(self.on.attention), precision(self.on, stage.cfg):
                video = stage.sample(low, text, negative, noise, tick, after=after)
        except CascadeError as error:
            raise type(error)(f"{stage.cfg.name}: {error.message}", error.fix) from error
        self.laps.setdefault(stage.cfg.name, []).append((len(jobs), time.perf_counter() - start))
        return [Video(video.frames[i : i + 1], video.fps) for i in range(len(jobs))]


@contextmanager
def precision(on: Device, cfg: StageConfig) -> Iterator[None]:
    """Products in the dtype that `on` has the stage compute in, by autocast."""
    dtype = on.computes(cfg)
    if dtype is torch.float32:
        yield
        return
    with torch.autocast(on.torch.type, dtype):
        yield


def check_outputs(job: Job, formats: Sequence[str]) -> None:
    """Raises InputError where `finish` would replace what no run has made."""
    names = [*(f"video.{suffix}" for suffix in formats), SHEET]
    store.check_plain([job.directory / name for name in names], job.directory / store.MANIFEST, MARK)


def finish(job: Job, video: Video, formats: Sequence[str], fps: float | None, meta: dict[str, Any]) -> None:
    """video.mp4 (gif, webm), sheet.png and manifest.json of a job from its last stage's clip.

    The manifest is first, and names what earlier runs made too, so that a file of ours is always known as such.
    """
    rate = fps or video.fps
    outputs = {f"video.{suffix}": media.encoded(video.frames[0], rate, f".{suffix}") for suffix in formats}
    outputs[SHEET] = media.sheet(video.frames, [job.prompt])
    file = job.directory / store.MANIFEST
    hashes = {name: key for name, key in store.named(file, MARK).items() if (job.directory / name).is_file()}
    hashes |= {name: hashlib.sha256(data).hexdigest() for name, data in outputs.items()}
    tree = {"prompt": job.prompt, "copy": job.copy, "fps": rate, "shape": str(video.shape), "files": hashes, **meta}
    store.write_file(file, store.canonical(tree | {MARK: __version__}))
    for name, data in outputs.items():
        store.write_file(job.directory / name, data)
