"""What comes in as the stages before really make it, from degraded real clips: so the truth is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import cast

import torch

from cascade.chain import check_pair
from cascade.compose import compose
from cascade.config import fingerprint, parse, plain, plugin
from cascade.errors import ConfigError
from cascade.loading import load_stage
from cascade.settings import Before, Rule, StageConfig, from_text
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

    def check(self, shape: Shape) -> None:
        """Raises ConfigError unless clips of `shape`, those that come in when training, can be made."""
        try:
            cfg = self.stage.sized(shape)
            low = self.stage.rule.takes(cfg)
        except ValueError as error:
            raise ConfigError(
                f"train.gap: {self.stage.cfg.name} cannot make {shape}: {error}", fix="train.crop=null, or a larger one"
            ) from error
        if self.before is not None:
            self.before.check(low)


def imitation(
    before: Before | None,
    after: StageConfig,
    after_rule: Rule,
    device: torch.device,
    where: str,
    text: TextConfig,
    config_dir: Path | None = None,
) -> tuple[Imitation | None, list[str]]:
    """The stages that make the input of `after`, and what names them: hashes of weights and samplers, the last first.

    `where` is the setting that names them, `text` what `after` reads, which they are given too. All are checked against
    each other before any is loaded. Raises ConfigError for one that does not come before the other or reads other text,
    and what loading a stage raises.
    """
    if before is None:
        return None, []
    if from_text(after, after_rule):
        raise ConfigError(f"{where} is set, but {after.name} starts from text: no stage comes before", f"{where}=null")
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
    first, keys = imitation(before.before, fitting, rule, device, f"{where}.before", text, config_dir)
    stage, key = load_stage(cfg, rule, device)
    return Imitation(stage, before.strength, first), [fingerprint([key, plain(cfg.sampler)]), *keys]


def check_text(reads: TextConfig, given: TextConfig, what: str, where: str) -> None:
    """Raises ConfigError where a stage that reads one text would be given another, wherever it is kept."""
    for name, wanted in plain(reads).items():
        got = plain(given)[name]
        if name not in ("store", "precision") and got != wanted:
            raise ConfigError(
                f"{what}, which reads other text: its {name} is {wanted!r}, that of the text it would be given {got!r}",
                fix=f"{where}=null, or {where}.stage=NAME of one that reads the same",
            )
