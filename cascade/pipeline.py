"""Runs a chain: one stage in memory at a time, every stage's output an artefact, and nothing is done twice.

DIR = {video.mp4, sheet.png, manifest.json, stages/<name>/{video.safetensors, manifest.json}}; many samples stand in
DIR/0000, DIR/0001, ... A stage's artefact carries a key: the hash of all that decides its content (its settings and
weights, prompt, seed, input, device). On the next run a stage whose key is the same is read, any other is replaced.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from cascade import attention, checkpoint, media, store
from cascade.config import fingerprint, parse, plain, plugin, suggest
from cascade.diffusion import Schedule
from cascade.errors import CascadeError, ConfigError, HostError, InputError, NumericError
from cascade.layers import channels_last
from cascade.noise import Noise
from cascade.request import Job, take
from cascade.stage import Rule, Stage, StageConfig, check_told
from cascade.text import Text, TextConfig, TextSource, known_width, read_width, text_source
from cascade.unet import completed
from cascade.video import Video
from cascade.windows import Join

VIDEO = "video.safetensors"
FORMATS = ("mp4", "gif", "webm")
log = logging.getLogger("cascade")
Progress = Callable[[str, int, int], None]  # stage name, steps done, steps in all


@dataclass(kw_only=True)
class Device:
    """Where and how precisely the networks run."""

    device: str = "auto"
    dtype: str = "float32"
    micro_batch: int = 1
    attention: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {self.dtype!r}, expected float32, bfloat16 or float16")
        if self.micro_batch < 1:
            raise ValueError(f"micro_batch is {self.micro_batch}, expected at least 1")

    @property
    def torch(self) -> torch.device:
        """The device itself; HostError if there is none of that name."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            found = torch.device(self.device)
            torch.zeros(1, device=found)
        except (RuntimeError, AssertionError) as error:
            raise HostError(f"device {self.device!r}: {str(error).splitlines()[0]}", fix="device=auto") from error
        return found


@dataclass(kw_only=True)
class _Names:
    stages: list[str] = field(default_factory=list)


@dataclass
class Chain:
    """Named stages in order, and the text encoder that all of them share."""

    stages: list[StageConfig]
    rules: list[Rule]
    text: TextConfig

    @staticmethod
    def read(tree: dict[str, Any], others: Sequence[str] = ()) -> Chain:
        """The chain that the remaining settings describe.

        Stages that `stages` does not name are left out (`stages=[base, tsr]` is a chain's beginning); whatever else is
        left over is unknown, and `others` names what would have been legal.
        """
        names = take(tree, _Names).stages
        text = parse(tree.pop("text", {}), TextConfig, "text")
        sections = {name: tree.pop(name) for name in names if name in tree}
        for key in (key for key, value in tree.items() if not (isinstance(value, Mapping) and "kind" in value)):
            raise ConfigError(f"unknown setting {key}", fix=suggest(key, [*names, "stages", "text", *others]))
        return Chain.build(names, sections, text)

    @staticmethod
    def build(names: Sequence[str], trees: Mapping[str, Mapping[str, Any]], text: TextConfig) -> Chain:
        """Typed stages from their settings, checked against each other before any weights are read."""
        stages: list[StageConfig] = []
        rules: list[Rule] = []
        for name in names:
            if name not in trees:
                raise ConfigError(
                    f"stages names {name!r}, which has no settings", fix=f"a section {name}: in the chain"
                )
            tree = trees[name]
            if not isinstance(tree, Mapping):
                raise ConfigError(f"{name} is {tree!r}, expected the settings of a stage", fix=f"{name}.kind=base")
            if "kind" not in tree:
                raise ConfigError(f"{name}: kind is missing", fix=f"{name}.kind=base")
            rule = plugin(str(tree.get("kind")))
            cfg = parse(tree, rule.Config, name)
            stages.append(replace(cfg, name=name))
            rules.append(cast(Rule, rule))
        chain = Chain(stages, rules, text)
        chain.check()
        return chain

    def check(self) -> None:
        """Raises ConfigError for the first thing that cannot work, as far as it shows without weights.

        Every stage's output must be the next one's input, a window a clip that the stage could make, and all must read
        embeddings as wide as the encoder's (if that is on this machine).
        """
        if not self.stages:
            raise ConfigError("stages is empty", fix="stages=[base]")
        if len({stage.name for stage in self.stages}) < len(self.stages):
            raise ConfigError("two stages have one name, which keys their noise", fix="different names in `stages`")
        for stage, rule in zip(self.stages, self.rules, strict=True):
            check_told(stage, rule)
            _check_windows(stage, rule)
            text = self.text_of(stage)
            _check_prior(text)
            width = known_width(text)
            if width is not None and stage.net.text not in (0, width):
                source = text.store or ("text.prior" if text.prior is not None else text.encoder)
                raise ConfigError(
                    f"{stage.name}: net.text is {stage.net.text}, but the embeddings of {source} are {width} wide",
                    fix=f"{stage.name}.net.text={width}",
                )
        for before, after, rule in zip(self.stages, self.stages[1:], self.rules[1:], strict=False):
            _check_pair(before, after, rule)

    def text_of(self, stage: StageConfig) -> TextConfig:
        """The text encoder that `stage` reads."""
        return self.text if stage.reads is None else stage.reads

    @property
    def texts(self) -> list[TextConfig]:
        """The different ones that its stages read."""
        return list({fingerprint(text): text for text in map(self.text_of, self.stages)}.values())

    def since(self, start: str | None) -> Chain:
        """The chain from stage `start` on."""
        names = [stage.name for stage in self.stages]
        if start is None:
            return self
        if start not in names:
            raise ConfigError(f"start is {start!r}, expected one of {', '.join(names)}", fix=f"start={names[0]}")
        at = names.index(start)
        return Chain(self.stages[at:], self.rules[at:], self.text)


def _check_prior(text: TextConfig) -> None:
    """What a prior reads is as wide as it expects."""
    width = None if text.prior is None or text.store is not None else read_width(text)
    if text.prior is not None and width not in (None, text.prior.width):
        raise ConfigError(
            f"text.prior.width is {text.prior.width}, but the embeddings of {text.encoder} are {width} wide",
            fix=f"text.prior.width={width}",
        )


def _check_windows(stage: StageConfig, rule: Rule) -> None:
    """A window holds whole groups of frames: from one known frame to the next, as the clip itself does.

    Those that are sampled by themselves fill the clip, and where each goes on from the one before, what it is given has
    the size of what it makes.
    """
    windows, rate = stage.windows, rule.rate(stage)
    frames, extra = windows.frames, stage.shape.frames % rate
    if frames and windows.rule is not Join.FIRST and (frames < rate or frames % rate != extra):
        near = max(1, round((frames - extra) / rate)) * rate + extra
        raise ConfigError(
            f"{stage.name}: windows.frames is {frames}, expected {f'{extra} more than ' if extra else ''}a multiple of "
            f"{rate}, as many as the stage makes of one frame",
            fix=f"{stage.name}.windows.frames={near}",
        )
    try:
        windows.spans(stage.shape.frames, rate)
    except ConfigError as error:
        raise ConfigError(f"{stage.name}: {error.message}", f"{stage.name}.{error.fix}") from error
    if windows.rule is Join.CHAINED and rule.takes(stage) != stage.shape:
        raise ConfigError(
            f"{stage.name}: windows.rule is chained, but it takes {rule.takes(stage)} and gives {stage.shape}",
            fix=f"{stage.name}.windows.rule=overwrite",
        )


def _check_pair(before: StageConfig, after: StageConfig, rule: Rule) -> None:
    takes, rate = rule.takes(after), rule.rate(after)
    wrong = [side for side in ("frames", "height", "width") if getattr(before.shape, side) != getattr(takes, side)]
    if wrong:
        raise ConfigError(
            f"{after.name} takes {takes}, but {before.name} gives {before.shape} (frames x height x width)",
            fix=" ".join(f"{before.name}.shape.{side}={getattr(takes, side)}" for side in wrong),
        )
    if abs(before.fps * rate - after.fps) > 1e-6:
        raise ConfigError(
            f"{after.name}: fps is {after.fps:g}, but {rate} x {before.name}'s {before.fps:g} is {before.fps * rate:g}",
            fix=f"{after.name}.fps={before.fps * rate:g}",
        )
    if before.colours != after.colours:
        raise ConfigError(
            f"{after.name} takes videos of {after.colours} channels, but {before.name} gives {before.colours}",
            fix=f"{after.name}.net.channels={before.colours}",
        )


def load_stage(cfg: StageConfig, rule: Rule, device: torch.device) -> tuple[Stage, str]:
    """The stage with its verified weights, ready to sample, and the weights' hash."""
    cfg.codec.folder()
    if cfg.weights == checkpoint.RANDOM:
        return untrained(cfg, rule, device)
    directory = checkpoint.locate(cfg.weights, cfg.name, cfg.sampler.steps)
    weights = checkpoint.load(directory)
    saved = weights.config
    trained = _trained(saved.get("diffusion", {}))
    wanted = {"kind": cfg.kind, "net": plain(cfg.net), **{name: plain(cfg.diffusion)[name] for name in trained}}
    found = {"kind": saved.get("kind"), "net": completed(saved.get("net", {})), **trained}
    checkpoint.compatible(found, wanted, f"{cfg.name} in {directory}")
    cfg = replace(cfg, w_range=saved.get("w_range"))
    with torch.device("meta"):
        stage = Stage(cfg, rule)
    checkpoint.apply(stage.net, weights.state, f"{cfg.name}: {directory}")
    return _ready(stage, device), weights.hash


def _trained(diffusion: Mapping[str, Any]) -> dict[str, Any]:
    """What a network cannot do without of the process that its card says it was trained on.

    `shift` is not of it: networks are told the noise level, whatever the schedule that leads there. A table is.
    """
    table = {name: diffusion.get(name) for name in ("schedule", "timesteps", "betas")}
    discrete = table["schedule"] not in (None, Schedule.COSINE.value)
    return {"prediction": diffusion.get("prediction"), **(table if discrete else {})}


def untrained(cfg: StageConfig, rule: Rule, device: torch.device) -> tuple[Stage, str]:
    """A stage whose weights are drawn at random (`weights=random`), the same ones for equal settings of its network.

    What starts at zero is drawn too: a branch that adds nothing would hide its faults and its cost.
    """
    name = fingerprint(plain(cfg.net))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(name[:12], 16))
        stage = Stage(cfg, rule)
        for parameter in stage.net.parameters():
            if not parameter.detach().any():
                torch.nn.init.uniform_(parameter, -0.035, 0.035)  # standard deviation 0.02
    return _ready(stage, device), f"random {name}"


def _ready(stage: Stage, device: torch.device) -> Stage:
    stage.net.to(device, torch.float32).eval().requires_grad_(False)
    channels_last(stage.net)
    return stage


def save_stage(
    directory: Path,
    cfg: StageConfig,
    state: dict[str, Tensor],
    recipe: str,
    dtype: torch.dtype | None = None,
    **extra: Any,
) -> None:
    """Weights (in half precision, if `dtype` says so) with the architecture they belong to and a model card."""
    config = {"kind": cfg.kind, "net": plain(cfg.net), "diffusion": plain(cfg.diffusion), **extra}
    millions = sum(value.numel() for value in state.values()) / 1e6
    card = (
        f"# {cfg.name}\n\n{cfg.kind} stage of Cascade: {cfg.shape} (frames x height x width) at {cfg.fps:g} fps, "
        f"{millions:.2f} M parameters.\n\n{recipe}\n\nLicence: Apache-2.0.\n"
    )
    checkpoint.save(directory, state, config, card=card, dtype=dtype)


def stage_key(
    stage: Stage, weights: str, text: str, negative: str | None, job: Job, seed: int, source: str, on: Device
) -> str:
    """Hash of everything that decides a stage's output."""
    settings = plain(stage.cfg)
    for name in ("train", "weights"):
        settings.pop(name)
    return fingerprint(
        {
            "format": 1,
            "settings": settings,
            "weights": [weights, stage.coder.hash],
            "text": [text, job.prompt, negative],
            "sample": [job.sample, seed],
            "input": source,
            "device": [on.torch.type, on.dtype, on.micro_batch, on.attention],
        }
    )


def video_bytes(video: Video) -> bytes:
    """A lossless clip: float32 (C, F, H, W) in [-1, 1] and its fps."""
    frames = video.frames[0].to("cpu", torch.float32).contiguous()
    return store.tensors_to_bytes({"video": frames}, metadata=("fps", repr(float(video.fps))))


def read_clip(data: bytes, where: str) -> Video:
    """The inverse of `video_bytes`."""
    frames = store.bytes_to_tensors(data, where).get("video")
    fps = store.metadata(data).get("fps")
    if frames is None or frames.ndim != 4 or fps is None:
        raise InputError(
            f"{where}: is not a clip (a tensor `video` (C, F, H, W) with its fps)", fix="a file `out` made"
        )
    if not torch.isfinite(frames).all():
        raise NumericError(f"{where}: not all values are finite", fix="make it again")
    return Video(frames[None].float(), float(fps))


def read_input(path: Path, size: tuple[int, int]) -> Video:
    """The user's own clip, lossless or any video file, at the height and width that a stage takes."""
    if not path.is_file():
        raise InputError(f"input {path}: no such file", fix="input=FILE")
    if path.suffix == ".safetensors":
        return read_clip(path.read_bytes(), str(path)).resize(*size)
    video = media.read_video(path)
    return Video(media.fit(video.frames[0].transpose(0, 1), *size).transpose(0, 1)[None], video.fps)


def first_frame(path: Path, cfg: StageConfig) -> Video:
    """An image as the known first frame of a clip."""
    if not path.is_file():
        raise InputError(f"image {path}: no such file", fix="image=FILE")
    image = media.fit(media.read_image(path)[None], cfg.shape.height, cfg.shape.width)[0]
    frames = image[None, :, None].repeat(1, 1, cfg.shape.frames, 1, 1)
    known = torch.zeros(1, cfg.shape.frames, dtype=torch.bool)
    known[:, 0] = True
    return Video(frames, cfg.fps, known)


@dataclass
class Runner:
    """Makes the videos of many jobs, stage by stage, each stage loaded once."""

    chain: Chain
    source: TextSource
    on: Device
    seed: int = 0
    negative: str | None = None
    progress: Progress | None = None
    laps: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # by stage, of every call: clips, seconds
    _sources: dict[str, TextSource] = field(default_factory=dict)  # encoders that only some stages read
    _texts: dict[tuple[str, str], Text] = field(default_factory=dict)

    def run(self, jobs: Sequence[Job], given: Video | None) -> dict[Path, Video]:
        """Every stage of every job, as artefacts under job.directory/stages; returns the last stage's videos."""
        inputs: dict[Path, tuple[Video | None, str]] = {job.directory: (given, digest(given)) for job in jobs}
        for i, (cfg, rule) in enumerate(zip(self.chain.stages, self.chain.rules, strict=True)):
            stage, weights = load_stage(cfg, rule, self.on.torch)
            todo = []
            for job in jobs:
                key = self.key(stage, weights, job, inputs[job.directory][1])
                folder = job.directory / "stages" / cfg.name
                done = finished(folder, key)
                if done is None:
                    todo.append((job, key))
                else:
                    inputs[job.directory] = done
            total, counter = len(todo) * cfg.sampler.steps, 0
            if todo and self.progress is not None:
                self.progress(cfg.name, 0, total)
            for part in range(0, len(todo), self.on.micro_batch):
                group = todo[part : part + self.on.micro_batch]

                def tick(
                    step: int, base: int = counter, size: int = len(group), name: str = cfg.name, of: int = total
                ) -> None:
                    if self.progress is not None:
                        self.progress(name, base + step * size, of)

                videos = self.sample(
                    stage, [job for job, _ in group], [inputs[job.directory][0] for job, _ in group], tick
                )
                for (job, key), video in zip(group, videos, strict=True):
                    inputs[job.directory] = (
                        video,
                        commit_stage(job.directory / "stages" / cfg.name, video, key, preview=i == 0),
                    )
                counter += len(group) * cfg.sampler.steps
            del stage
        return {path: video for path, (video, _) in inputs.items() if video is not None}

    def key(self, stage: Stage, weights: str, job: Job, source: str) -> str:
        text, negative = self.source_of(stage.cfg).fingerprint, self.negative_of(stage.cfg)
        return stage_key(stage, weights, text, negative, job, self.seed, source, self.on)

    def source_of(self, stage: StageConfig) -> TextSource:
        """What reads the prompts for `stage`; an encoder of its own loads when it is first asked for."""
        text = self.chain.text_of(stage)
        if text == self.chain.text:
            return self.source
        name = fingerprint(text)
        if name not in self._sources:
            self._sources[name] = text_source(text)
        return self._sources[name]

    def negative_of(self, stage: StageConfig) -> str | None:
        """What guidance moves away from: as asked for, or as the stage's text settings say; None: no text."""
        return self.chain.text_of(stage).negative if self.negative is None else self.negative

    def text(self, prompts: Sequence[str], stage: StageConfig) -> Text:
        source = self.source_of(stage)
        for prompt in prompts:
            if (source.fingerprint, prompt) not in self._texts:
                self._texts[source.fingerprint, prompt] = source.encode([prompt])
        return Text.cat([self._texts[source.fingerprint, prompt] for prompt in prompts])

    def sample(
        self, stage: Stage, jobs: Sequence[Job], lows: Sequence[Video | None], tick: Callable[[int], None]
    ) -> list[Video]:
        """The stage's videos for a few jobs at once."""
        low = None
        if lows[0] is not None:
            clips = [clip for clip in lows if clip is not None]
            known = None if clips[0].known is None else torch.cat([c.known for c in clips if c.known is not None])
            low = Video(torch.cat([clip.frames for clip in clips]), clips[0].fps, known)
        text, away = self.text([job.prompt for job in jobs], stage.cfg), self.negative_of(stage.cfg)
        negative = None if away is None else self.text([away] * len(jobs), stage.cfg)
        noise = Noise(self.seed, stage.cfg.name, tuple(job.sample for job in jobs))
        start = time.perf_counter()
        try:
            with attention.use(self.on.attention), precision(self.on):
                video = stage.sample(low, text, negative, noise, tick)
        except CascadeError as error:
            raise type(error)(f"{stage.cfg.name}: {error.message}", error.fix) from error
        self.laps.setdefault(stage.cfg.name, []).append((len(jobs), time.perf_counter() - start))
        return [Video(video.frames[i : i + 1], video.fps) for i in range(len(jobs))]


@contextmanager
def precision(on: Device) -> Iterator[None]:
    if on.dtype == "float32":
        yield
        return
    with torch.autocast(on.torch.type, getattr(torch, on.dtype)):
        yield


def finished(folder: Path, key: str) -> tuple[Video, str] | None:
    """The clip in `folder` and its hash, if it is the one of `key` and whole."""
    if not folder.is_dir() or store.problems(folder, "stage"):
        return None
    artefact = store.read(folder, "stage")
    if artefact.meta.get("key") != key:
        return None
    data = artefact.files[VIDEO]
    return read_clip(data, str(folder / VIDEO)), hashlib.sha256(data).hexdigest()


def commit_stage(folder: Path, video: Video, key: str, preview: bool) -> str:
    """Writes a stage's clip (and a small mp4 to look at, if asked); returns its hash."""
    data = video_bytes(video)
    files = {VIDEO: data}
    if preview:
        files["preview.mp4"] = media.encoded(video.frames[0], video.fps, ".mp4")
    store.commit(
        folder, files, kind="stage", meta={"key": key, "shape": str(video.shape), "fps": video.fps}, replace=True
    )
    return hashlib.sha256(data).hexdigest()


def digest(video: Video | None) -> str:
    """Hash of a clip; of none: the empty string."""
    if video is None:
        return ""
    known = "" if video.known is None else str(video.known.int().tolist())
    return hashlib.sha256(video_bytes(video) + known.encode()).hexdigest()


def finish(job: Job, video: Video, formats: Sequence[str], fps: float | None, meta: dict[str, Any]) -> None:
    """video.mp4 (gif, webm), sheet.png and manifest.json of a job from its last stage's clip."""
    rate = fps or video.fps
    outputs = {f"video.{suffix}": media.encoded(video.frames[0], rate, f".{suffix}") for suffix in formats}
    outputs["sheet.png"] = media.sheet(video.frames, [job.prompt])
    for name, data in outputs.items():
        store.write_file(job.directory / name, data)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in outputs.items()}
    tree = {"prompt": job.prompt, "copy": job.copy, "fps": rate, "shape": str(video.shape), "files": hashes, **meta}
    store.write_file(job.directory / "manifest.json", store.canonical(tree))
