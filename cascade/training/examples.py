"""Training examples: clips with noise, a time and what a stage is told, each step's following from (seed, step) alone.

`Examples` makes them one by one, from any source; `Pooled` makes all of a step at once where it is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cascade.data.pool import Pool
from cascade.data.source import Source, World
from cascade.errors import ConfigError
from cascade.noise import generator
from cascade.settings import TrainConfig
from cascade.stage import Batch, Stage
from cascade.text import T5Text, Text, TextSource
from cascade.training.imitation import Imitate, gap_makers, imitation
from cascade.video import Shape, Video

if TYPE_CHECKING:
    from accelerate import Accelerator


REMEMBERED = 512 << 20  # bytes of embedded captions that a process keeps: 21,000 of ours, 128 of the longest of T5-XXL


class Examples(torch.utils.data.Dataset[Batch]):
    """Training examples of `stage`, example `index` being the same whenever and wherever it is asked for.

    In a step of images an example is not a clip but as many single frames, each of a clip of its own: the same work
    shows the network that many more scenes (joint training on images and videos, Ho et al. 2022, VDM).
    """

    def __init__(self, stage: Stage, source: Source, encode: Callable[[list[str]], Text], cfg: TrainConfig) -> None:
        self.stage = Stage(stage.cfg, stage.rule, net=nn.Identity())
        self.source, self.cfg = source, cfg
        self.encode, self.kept, self.room = encode, dict[str, Text](), REMEMBERED

    def __len__(self) -> int:
        return self.cfg.steps * self.cfg.batch

    def text(self, caption: str) -> Text:
        """`caption`, embedded. Those of before are kept as far as there is room, the oldest go first."""
        if caption not in self.kept:
            self.kept[caption] = self.encode([caption])
            self.room -= self.kept[caption].tokens.nbytes
            while self.room < 0 and len(self.kept) > 1:
                self.room += self.kept.pop(next(iter(self.kept))).tokens.nbytes
        return self.kept[caption]

    def __getitem__(self, index: int) -> Batch:
        cfg, shape = self.cfg, self.stage.cfg.shape
        step, place = divmod(index, cfg.batch)
        images = torch.rand((), generator=generator(cfg.seed, "images", step)) < cfg.images
        parts = (cfg.crop or shape).frames if images else 1
        # Times are spread evenly over a step's batch: a uniform law with less variance than independent draws.
        offset = torch.rand(1, generator=generator(cfg.seed, "time", step))
        t = cfg.time((offset + (place + torch.arange(parts) / parts) / cfg.batch) % 1)
        if not images:
            return self.example(shape, cfg.crop, t, index)
        still, part = replace(shape, frames=1), cfg.crop and replace(cfg.crop, frames=1)
        return Batch.cat([self.example(still, part, t[i : i + 1], index, i) for i in range(parts)])

    def example(self, shape: Shape, size: Shape | None, t: Tensor, *key: int) -> Batch:
        """The training example of `key`: a clip of `shape`, or its part of `size`, at time `t` (1,)."""
        cfg = self.cfg
        rng = generator(cfg.seed, "train", *key)
        frames, caption = self.source.sample(shape, self.stage.cfg.fps, cfg.seed, "train", *key)
        video = Video(frames[None], self.stage.cfg.fps)
        if size is not None:
            rate = self.stage.rule.rate(self.stage.cfg)
            tries = [crop(video, size, rate, rng) for _ in range(cfg.crop_tries)]
            video = max(tries, key=lambda part: float(part.frames.std()))
        text = self.text(caption).drop(torch.rand(1, generator=rng) >= cfg.drop_text)
        x, cond = self.stage.example(video, text, rng)
        eps = torch.randn(x.shape, generator=rng)
        return Batch(x, eps, t, torch.rand(1, generator=rng), cond)


@dataclass
class Pooled:
    """Training examples of `stage` made a whole step at a time, on the stage's device, from scenes drawn beforehand.

    `text(index)` embeds the captions of scenes, on that device; `before` are the stages before (see `Gap`).
    """

    stage: Stage
    pool: Pool
    text: Callable[[Tensor], Text]
    cfg: TrainConfig
    before: Imitate | None = None

    @torch.no_grad()
    def step(self, step: int) -> Batch:
        """All examples of a step; those of a step of images are single frames, as many as make the same work."""
        cfg, stage, device = self.cfg, self.stage.cfg, self.stage.device
        rng = generator(cfg.seed, "pooled", step)
        noise = generator(cfg.seed, "pooled noise", step, device=device)
        shape, part = stage.shape, cfg.crop
        count = cfg.batch
        still = float(torch.rand((), generator=rng)) < cfg.images
        if still:
            count *= (part or shape).frames
            shape, part = replace(shape, frames=1), part and replace(part, frames=1)
        index = torch.randint(len(self.pool), (count,), generator=rng)
        video = self.pool.clips(index, shape, stage.fps, rng, part, cfg.crop_tries, self.stage.rule.rate(stage))
        text = self.text(index)
        kept = text.drop(torch.rand(count, generator=noise, device=device) >= cfg.drop_text)
        # The stages before make clips, of which no single frame has an input of its own.
        x, cond = self.stage.example(video, kept, noise, None if still else self.imitation(text, noise, rng))
        eps = torch.randn(x.shape, generator=noise, device=device)
        u = torch.rand(count, generator=noise, device=device)
        # Evenly spread times: a uniform law with less variance than independent draws.
        t = (torch.rand((), generator=noise, device=device) + torch.arange(count, device=device) / count) % 1
        return Batch(x, eps, cfg.time(t), u, cond)

    def imitation(self, text: Text, noise: torch.Generator, rng: torch.Generator) -> Callable[[Video], Video] | None:
        """Makes a share of the clips that come in, drawn from `rng` on the CPU, as the stages before do."""
        gap, before = self.cfg.gap, self.before
        if gap is None or before is None:
            return None
        chosen = (torch.rand(len(text), generator=rng) < gap.share).nonzero()[:, 0].to(noise.device)

        def mixed(low: Video) -> Video:
            if not len(chosen):
                return low
            part = Video(low.frames[chosen], low.fps, None if low.known is None else low.known[chosen])
            with torch.autocast(noise.device.type, torch.bfloat16, enabled=self.cfg.precision == "bf16"):
                made = before(part, text[chosen], noise).to(noise.device)
            return Video(low.frames.index_copy(0, chosen, made.frames), low.fps, low.known)

        return mixed

    def batches(self, start: int, accelerator: Accelerator) -> Iterator[Batch]:
        """This process's share of every micro-batch from step `start` on."""
        share, micro = shares(self.cfg, accelerator)
        for step in range(start, self.cfg.steps):
            batch = self.step(step)
            parts = len(batch) // self.cfg.batch
            for first in range(accelerator.process_index * share, self.cfg.batch, micro):
                yield batch[slice(first * parts, (first + share) * parts)]


Draw = Callable[[], Pooled]


def pool_of(
    stage: Stage, source: Source, encoder: TextSource, cfg: TrainConfig, config_dir: Path | None = None
) -> tuple[Draw | None, list[str]]:
    """What draws a pool, if `cfg` asks for one, and what names the stages before, if their videos are among them.

    A large one takes minutes: it is drawn once, by whoever needs it first, when all that can be refused has been.
    Raises ConfigError if the data or the text cannot be had that way, and what loading those stages raises.
    """
    if not cfg.pool:
        return None, []
    if not isinstance(source, World) or not isinstance(encoder, T5Text):
        raise ConfigError("train.pool is for the procedural world, its captions read by T5", fix="train.pool=0")
    before, keys = imitation(gap_makers(cfg, stage.cfg, stage.rule, encoder.cfg, config_dir), stage.device)
    return cache(partial(pooled, stage, source, encoder, cfg, before)), keys


def pooled(stage: Stage, source: World, encoder: T5Text, cfg: TrainConfig, before: Imitate | None = None) -> Pooled:
    """Examples from a pool that is drawn now."""
    pool = Pool.draw(source.cfg, cfg.pool, cfg.seed, "pool", workers=cfg.workers)
    device = stage.device
    ids, mask = (tensor.to(device) for tensor in encoder.pieces(pool.captions))

    def text(index: Tensor) -> Text:
        here = index.to(device)
        return encoder.embed(ids[here], mask[here])

    return Pooled(stage, pool.to(device), text, cfg, before)


def crop(video: Video, size: Shape, rate: int, rng: torch.Generator) -> Video:
    """A random part of `video`; its first frame is at a multiple of `rate`, so that known frames stay known."""
    whole = video.shape
    if size.frames > whole.frames or size.height > whole.height or size.width > whole.width:
        raise ConfigError(f"train.crop is {size}, larger than the clip ({whole})", fix=f"train.crop within {whole}")

    def start(room: int, step: int = 1) -> int:
        return step * int(torch.randint(room // step + 1, (), generator=rng))

    f, y, x = (
        start(whole.frames - size.frames, rate),
        start(whole.height - size.height),
        start(whole.width - size.width),
    )
    part = video.frames[:, :, f : f + size.frames, y : y + size.height, x : x + size.width]
    return Video(part, video.fps)


def batches(examples: Examples, cfg: TrainConfig, start: int, accelerator: Accelerator) -> Iterator[Batch]:
    """This process's share of every micro-batch from step `start` on."""
    share, micro = shares(cfg, accelerator)
    rank = accelerator.process_index
    plan = (  # never as a list: a long training of large batches has 500 million examples
        list(range(first + rank * share, first + (rank + 1) * share))
        for first in range(start * cfg.batch, cfg.steps * cfg.batch, micro)
    )
    return iter(
        torch.utils.data.DataLoader(
            examples,
            batch_sampler=plan,
            collate_fn=Batch.cat,
            num_workers=cfg.workers,
            multiprocessing_context="fork" if cfg.workers else None,  # rules are modules, which cannot be pickled
            generator=generator(cfg.seed, "loader"),  # unused, but without it the global one is advanced
        )
    )


def shares(cfg: TrainConfig, accelerator: Accelerator) -> tuple[int, int]:
    """Clips of a micro-batch that one process takes, and those of all. ConfigError if they do not come out even."""
    micro = cfg.micro_batch or cfg.batch
    if micro % accelerator.num_processes:
        raise ConfigError(
            f"{micro} clips at once cannot be shared by {accelerator.num_processes} processes",
            fix=f"train.batch={accelerator.num_processes * 8} train.micro_batch=null",
        )
    return micro // accelerator.num_processes, micro
