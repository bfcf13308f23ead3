"""Contact sheets of a training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade import checkpoint, media
from cascade.data.source import Source
from cascade.noise import Noise, generator, sample_id
from cascade.settings import TrainConfig
from cascade.stage import Stage
from cascade.text import Text
from cascade.video import Video


@dataclass
class Preview:
    """Contact sheet of a training: truth and samples of the averaged weights, for clips never trained on."""

    stage: Stage
    source: Source
    encode: Callable[[list[str]], Text]
    cfg: TrainConfig
    clips: int = 4

    def __call__(self, average: dict[str, Tensor], step: int) -> bytes:
        net = copy.deepcopy(self.stage.net).eval()
        checkpoint.apply(net, average, "the average")
        stage = Stage(self.stage.cfg, self.stage.rule, net)
        rows, captions = [], []
        for i in range(self.clips):
            clip, caption = self.source.sample(stage.cfg.shape, stage.cfg.fps, self.cfg.seed, "preview", i)
            low = stage.rule.degrade(
                Video(clip[None], stage.cfg.fps), stage.cfg, generator(self.cfg.seed, "preview", i)
            )
            noise = Noise(self.cfg.seed, stage.cfg.name, (sample_id(caption, i),))
            rows += [clip[None], stage.sample(low, self.encode([caption]), None, noise).frames]
            captions += [f"truth: {caption}", "sample"]
        return media.sheet(torch.cat(rows), captions)
