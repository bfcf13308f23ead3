"""A command on one stage, typed; what it asks for is done in cascade/tasks.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cascade.chain import Device
from cascade.config import fingerprint, parse, plain, plugin
from cascade.data.source import DataConfig
from cascade.errors import ConfigError
from cascade.planning.memory import Memory
from cascade.request import Given, take
from cascade.settings import Rule, StageConfig, TrainConfig
from cascade.text import TextConfig


@dataclass(kw_only=True)
class Sections:
    """The settings that a single task reads, which types them."""

    distill: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)
    tune: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Folder:
    """That of --config-dir: the user's settings beside conf/."""

    config_dir: Path | None = None


@dataclass
class Request:
    """A command on one stage, typed; `own` holds the `Sections`.

    `command` is what was typed, without `out`.
    """

    cfg: StageConfig
    rule: Rule
    run: Given
    on: Device
    text: TextConfig
    data: DataConfig
    own: dict[str, Any]
    command: str = ""
    memory: str | None = None
    config_dir: Path | None = None

    @property
    def training(self) -> TrainConfig:
        if self.cfg.train is None:
            raise ConfigError(f"{self.cfg.name}: train is missing", fix="train.steps=... train.batch=... train.lr=...")
        return self.cfg.train

    def out(self, task: str) -> Path:
        """`out`, or a directory named by the hash of all settings."""
        if self.run.out is not None:
            return self.run.out
        settings = [plain(part) for part in (self.cfg, self.run, self.text, self.data, self.on)]
        return Path("runs") / f"{task}-{self.cfg.name}-{fingerprint([settings, self.own, self.memory])[:12]}"


def request(kind: str, tree: dict[str, Any]) -> Request:
    """The typed command; settings that belong to nothing are refused."""
    rule = plugin(kind)
    run, on = take(tree, Given), take(tree, Device)
    text = parse(tree.pop("text", {}), TextConfig, "text")
    data = parse(tree.pop("data", {}), DataConfig, "data")
    own = vars(take(tree, Sections))
    ask, folder = take(tree, Memory), take(tree, Folder)
    cfg: StageConfig = parse(tree, rule.Config)
    text = cfg.reads or text
    return Request(cfg, rule, run, on, text, data, own, ask.command or "", ask.memory, folder.config_dir)
