"""What comes in as the stages before really make it, from degraded real clips: so the truth is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import cast

import torch

from cascade.chain import check_pair
from cascade.compose import compose
from cascade.config import fingerprint, parse, plain, plugin
from cascade.errors import ConfigError
from cascade.loading import load_stage
from cascade.settings import Before, Rule, StageConfig, TrainConfig, from_text
from cascade.stage import Stage
from cascade.text import Text, TextConfig
from cascade.video import Shape, Video
from cascade.windows import Windows

Imitate = Callable[[Video, Text, torch.Generator], Video]  # (degraded clips, text, where noise is drawn from)


@dataclass(frozen=True)
class Imitation:
    """`stage` makes its own output again, of its input as `before` makes that; see `Stage.imitate`."""

    stage: Stage
    strength: float
    before: Imitation | None = None

    def __call__(self, video: Video, text: Text, rng: torch.Generator) -> Video:
        before = self.before
        comes = None if before is None else lambda low: before(low, text, rng)
        return self.stage.imitate(video, text, rng, self.strength, comes)


Maker = tuple[StageConfig, Rule, float]  # a stage before, and its strength


def makers(
    before: Before | None,
    after: StageConfig,
    after_rule: Rule,
    where: str,
    text: TextConfig,
    config_dir: Path | None = None,
) -> list[Maker]:
    """The stages that make the input of `after`, the last first, checked against each other; nothing is loaded.

    `where` is the setting that names them, `text` what `after` reads, which they are given too. Raises ConfigError for
    one that does not come before the other or reads other text.
    """
    if before is None:
        return []
    if from_text(after, after_rule):
        raise ConfigError(f"{where} is set, but {after.name} starts from text: no stage comes before", f"{where}=null")
    if share := getattr(after, "known", 0):  # a whole clip comes in then, of which frames are known
        raise ConfigError(
            f"{where} is set, but {after.name}.known is {share:g}: no stage before makes those frames", f"{where}=null"
        )
    try:
        tree = compose("stage", [f"stage={before.stage}"], config_dir)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", error.fix.replace("stage=", f"{where}.stage=")) from error
    rule = cast(Rule, plugin(str(tree["kind"])))
    known = {f.name for f in fields(rule.Config)}
    cfg = parse({key: value for key, value in tree.items() if key in known}, rule.Config, before.stage)
    if before.weights is not None:
        cfg = replace(cfg, weights=before.weights)
    if before.steps is not None:
        cfg = replace(cfg, sampler=replace(cfg.sampler, steps=before.steps))
    try:  # for clips of the size that `after` is trained at, as `Imitation` makes them
        fitting = replace(cfg, shape=after_rule.takes(after), windows=Windows(), train=None)
        check_pair(fitting, after, after_rule)
    except ValueError as error:
        raise ConfigError(f"{where}.stage is {before.stage}, which cannot: {error}", f"{where}=null") from error
    except ConfigError as error:
        fix = f"{where}.stage=NAME of the stage before {after.name}"
        raise ConfigError(f"{where}.stage is {before.stage}: {error.message}", fix) from error
    if cfg.net.text:
        shared = text if after.reads is None else parse(tree["text"], TextConfig, "text")
        check_text(cfg.reads or shared, text, f"{where}.stage is {before.stage}", where)
    return [(cfg, rule, before.strength), *makers(before.before, fitting, rule, f"{where}.before", text, config_dir)]


def gap_makers(
    cfg: TrainConfig, stage: StageConfig, rule: Rule, text: TextConfig, config_dir: Path | None = None
) -> list[Maker]:
    """Those of `train.gap`; ConfigError too if they cannot make clips of the size that comes in when training."""
    found = makers(cfg.gap, stage, rule, "train.gap", text, config_dir)
    if found:
        check_clips(found, rule.takes(replace(stage, shape=cfg.crop or stage.shape, train=None)))
    return found


def check_clips(stages: Sequence[Maker], shape: Shape) -> None:
    """Raises ConfigError unless clips of `shape`, those that come in when training, can be made."""
    for cfg, rule, _ in stages:
        try:
            low = rule.takes(replace(cfg, shape=shape, windows=Windows(), train=None))
        except ValueError as error:
            raise ConfigError(
                f"train.gap: {cfg.name} cannot make {shape}: {error}", fix="train.crop=null, or a larger one"
            ) from error
        shape = low


def imitation(stages: Sequence[Maker], device: torch.device) -> tuple[Imitation | None, list[str]]:
    """`makers`, loaded, and what names them: hashes of weights and samplers, the last first."""
    made, keys = None, list[str]()
    for cfg, rule, strength in reversed(stages):
        stage, key = load_stage(cfg, rule, device)
        made, keys = Imitation(stage, strength, made), [fingerprint([key, plain(cfg.sampler)]), *keys]
    return made, keys


def check_text(reads: TextConfig, given: TextConfig, what: str, where: str) -> None:
    """Raises ConfigError where a stage that reads one text would be given another, wherever it is kept."""
    for name, wanted in plain(reads).items():
        got = plain(given)[name]
        if name not in ("store", "precision") and got != wanted:
            raise ConfigError(
                f"{what}, which reads other text: its {name} is {wanted!r}, that of the text it would be given {got!r}",
                fix=f"{where}=null, or {where}.stage=NAME of one that reads the same",
            )
