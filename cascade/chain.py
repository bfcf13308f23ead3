"""A chain: named stages in order, checked against each other before any weights are read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from cascade import attention, checkpoint
from cascade.compose import compose
from cascade.config import fingerprint, parse, plugin, suggest
from cascade.errors import CascadeError, ConfigError, HostError, InputError
from cascade.request import take
from cascade.settings import DTYPES, Rule, StageConfig, check_told, from_text
from cascade.stage import Stage
from cascade.text import TextConfig, known_width, read_width
from cascade.video import Video
from cascade.windows import Join


@dataclass(kw_only=True)
class Device:
    """Where and how precisely the networks run."""

    device: str = "auto"
    dtype: str = "float32"
    micro_batch: int = 1
    attention: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected float32, bfloat16 or float16")
        if self.micro_batch < 1:
            raise ValueError(f"micro_batch is {self.micro_batch}, expected at least 1")
        attention.check(self.attention)
        if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", self.device):
            raise HostError(f"device is {self.device!r}, expected cpu, cuda or cuda:N", fix="device=auto")

    def computes(self, cfg: StageConfig) -> torch.dtype:
        """What the stage's products are computed in."""
        found: torch.dtype = getattr(torch, cfg.dtype or self.dtype)
        return found

    @property
    def type(self) -> str:
        """cpu or cuda, also where there is none."""
        return self.torch.type if self.device == "auto" else self.device.partition(":")[0]

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


def chain_settings(name: str, words: Sequence[str] = (), config_dir: Path | None = None) -> dict[str, Any]:
    """The settings of a chain alone, as conf/chain/<name>.yaml and `words` ("base.sampler.steps=16") say."""
    tree = compose("export", [f"chain={name}", *words], config_dir)
    del tree["format"], tree["out"]
    return tree


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
        if "chain" in tree:  # where Hydra puts a file that does not say where it goes
            raise ConfigError("the chain's file sets nothing", fix="its first line: # @package _global_")
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
            _check_parts(stage, rule)
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
            check_pair(before, after, rule)

    def text_of(self, stage: StageConfig) -> TextConfig:
        """The text encoder that `stage` reads."""
        return self.text if stage.reads is None else stage.reads

    @property
    def texts(self) -> list[TextConfig]:
        """The different ones that its stages read."""
        return list({fingerprint(text): text for text in map(self.text_of, self.stages)}.values())

    def fps(self, given: Video | None) -> float:
        """The rate of the video that the last stage makes."""
        stages = list(zip(self.stages, self.rules, strict=True))
        if given is None or given.known is not None:
            rate, stages = self.stages[0].fps, stages[1:]
        else:
            rate = given.fps
        return rate * math.prod(rule.rate(stage) for stage, rule in stages)

    def runs_on(self, on: Device) -> None:
        """Raises HostError without such a device, ConfigError for a stage that cannot be launched there as it says."""
        for stage in self.stages:
            stage.compile.check(f"{stage.name}.compile", on.torch)

    def since(self, start: str | None) -> Chain:
        """The chain from stage `start` on."""
        names = [stage.name for stage in self.stages]
        if start is None:
            return self
        if start not in names:
            raise ConfigError(f"start is {start!r}, expected one of {', '.join(names)}", fix=f"start={names[0]}")
        at = names.index(start)
        return Chain(self.stages[at:], self.rules[at:], self.text)

    def absent(self) -> dict[str, CascadeError]:
        """The stages whose weights are not there, and why; nothing heavy loads."""
        found: dict[str, CascadeError] = {}
        for stage in self.stages:
            try:
                if stage.weights != checkpoint.RANDOM:
                    checkpoint.check(checkpoint.locate(stage.weights, stage.name, stage.sampler.steps))
                stage.codec.folder()
            except (ConfigError, InputError) as error:
                found[stage.name] = error
        return found

    def check_weights(self) -> None:
        """Raises ConfigError or InputError for the first stage whose weights are not there."""
        for error in self.absent().values():
            raise error


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
    if windows.rule is Join.EXTEND and not from_text(stage, rule):
        raise ConfigError(
            f"{stage.name}: windows.rule is extend, but it is given a whole video, not known parts of its own output",
            fix=f"{stage.name}.windows.rule=blend",
        )
    if windows.in_turn and windows.rule is not Join.EXTEND and from_text(stage, rule):
        raise ConfigError(
            f"{stage.name}: windows.rule is {windows.rule.value}, but it is not given a whole video",
            fix=f"{stage.name}.windows.rule=extend",
        )
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


def _check_parts(stage: StageConfig, rule: Rule) -> None:
    """The network gives an exact answer from as few frames at once as are set."""
    if stage.frames_at_once:
        with torch.device("meta"):
            size = (1, stage.net.channels, *stage.codec.inside(stage.shape))
            Stage(stage, rule).at_once(torch.empty(size))


def check_pair(before: StageConfig, after: StageConfig, rule: Rule) -> None:
    """Raises ConfigError unless what `before` gives is what `after`, of that `rule`, takes."""
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
