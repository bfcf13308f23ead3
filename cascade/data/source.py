"""Where training clips come from: the procedural world, or a folder of the user's own videos."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from cascade.config import fingerprint
from cascade.data.clips import Clips, ClipsConfig, ingest
from cascade.data.shapes import ShapesConfig, check_length, sample
from cascade.noise import Key
from cascade.video import Shape


class Source(Protocol):
    """Captioned clips, any of which can be made again."""

    def sample(self, shape: Shape, fps: float, *key: Key) -> tuple[Tensor, str]:
        """A clip (3, F, H, W) in [-1, 1] and its caption, chosen by `key`."""
        ...


@dataclass(kw_only=True)
class DataConfig:
    """`clips` names a folder of videos; without it the world of shapes is drawn."""

    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    clips: ClipsConfig | None = None


@dataclass(frozen=True)
class World:
    """The procedural world as a `Source`."""

    cfg: ShapesConfig

    def sample(self, shape: Shape, fps: float, *key: Key) -> tuple[Tensor, str]:
        clip, caption, _ = sample(self.cfg, shape, fps, *key)
        return clip, caption


def open_source(cfg: DataConfig, shape: Shape, fps: float, cache: Path) -> Source:
    """The source that `cfg` names, of clips of up to `shape` at `fps`; videos are decoded once, into `cache`.

    Raises ConfigError if they cannot be that long, and what `ingest` raises.
    """
    if cfg.clips is None:
        check_length("shapes.seconds", cfg.shapes.seconds, shape.frames, fps)
        return World(cfg.shapes)
    check_length("clips.max_seconds", cfg.clips.max_seconds, shape.frames, fps)
    return ingest(cfg.clips, shape, fps, cache)


def contents(source: Source) -> list[str]:
    """What names the clips of a folder, which may change under the same settings; of the world nothing."""
    if not isinstance(source, Clips):
        return []
    return [fingerprint([[item.clip.name, list(item.captions)] for item in source.items])]
