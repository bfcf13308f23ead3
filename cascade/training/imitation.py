"""What comes in as the stages before really make it, from degraded real clips: so the truth is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import cast

import torch

from cascade.compose import compose
from cascade.config import fingerprint, parse, plain, plugin
from cascade.errors import ConfigError
from cascade.loading import load_stage
from cascade.settings import Before, Rule
from cascade.stage import Stage
from cascade.text import Text
from cascade.video import Shape, Video

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


def imitation(before: Before, device: torch.device) -> tuple[Imitation, list[str]]:
    """The stages that make the input, and what names them: hashes of weights and samplers, the last stage's first.

    Raises what loading a stage raises.
    """
    tree = compose("stage", [f"stage={before.stage}"])
    rule = cast(Rule, plugin(str(tree["kind"])))
    known = {f.name for f in fields(rule.Config)}
    cfg = parse({key: value for key, value in tree.items() if key in known}, rule.Config, before.stage)
    if before.weights is not None:
        cfg = replace(cfg, weights=before.weights)
    if before.steps is not None:
        cfg = replace(cfg, sampler=replace(cfg.sampler, steps=before.steps))
    stage, key = load_stage(cfg, rule, device)
    first, keys = (None, []) if before.before is None else imitation(before.before, device)
    return Imitation(stage, before.strength, first), [fingerprint([key, plain(cfg.sampler)]), *keys]
