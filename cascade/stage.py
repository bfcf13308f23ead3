"""A stage: a config, a denoiser and a conditioning rule.

What distinguishes the kinds of stage is their rule, a module `stages/<kind>.py`; everything else they share stands
here. Sampling conditions on `low` from the stage before, training on `degrade(video)`, through the same `condition`, so
that the two cannot drift apart and every stage trains alone, from clean video.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from cascade.diffusion import Diffusion, Prediction
from cascade.noise import Noise
from cascade.sampler import Hook, Sampler, keep_known, sample
from cascade.text import Text
from cascade.unet import Cond, UNetConfig, VideoUNet
from cascade.video import Shape, Video
from cascade.windows import Windows, windowed


@dataclass(kw_only=True)
class TrainConfig:
    """How a stage is trained (`task=train`). Every step's data follow from (seed, step) alone."""

    steps: int
    batch: int  # clips a step, over all processes
    lr: float
    micro_batch: int | None = None  # clips at once in memory; the rest is gradient accumulation. None: all
    warmup: int = 0  # steps of linear warm-up, then linear decay to zero at the last step
    weight_decay: float = 0.0
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.0  # decay of the average of the weights; it grows from 0 as (1 + step) / (10 + step)
    drop_text: float = 0.0  # fraction of clips trained without their caption (classifier-free guidance)
    images: float = 0.0  # fraction of clips whose frames are trained as images, each a segment of its own
    crop: Shape | None = None  # train on random crops of this size (fully convolutional stages)
    init: str | None = None  # weights to start from
    seed: int = 0
    checkpoint_every: int = 500
    sample_every: int = 0  # contact sheet of samples every so many steps; 0 = never
    keep: int = 2  # checkpoints kept
    workers: int = 0  # processes that make training clips
    precision: str = "no"  # no | bf16 | fp16, as `accelerate` has it
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time

    def __post_init__(self) -> None:
        for name, low, high in (
            ("steps", 1, 10**9), ("batch", 1, 10**6), ("lr", 0, 1), ("warmup", 0, 10**9), ("ema", 0, 0.99999999),
            ("drop_text", 0, 1), ("images", 0, 1), ("clip", 1e-9, 1e9), ("checkpoint_every", 1, 10**9), ("keep", 1, 10**6),
            ("workers", 0, 1024), ("sample_every", 0, 10**9), ("weight_decay", 0, 10), ("seed", 0, 2**62),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {low} to {high}")
        if self.batch % (self.micro_batch or self.batch):
            raise ValueError(f"micro_batch is {self.micro_batch}, expected a divisor of batch ({self.batch})")
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"precision is {self.precision!r}, expected no, bf16 or fp16")


@dataclass(kw_only=True)
class StageConfig:
    """What every stage needs; a rule may add fields of its own."""

    name: str  # unique in a chain; keys the stage's noise
    kind: str  # the rule: stages/<kind>.py
    shape: Shape  # of the output
    fps: float  # of the output, frames per second
    net: UNetConfig
    diffusion: Diffusion
    sampler: Sampler
    windows: Windows = field(default_factory=Windows)
    augment: float = 0.0  # noise level t in [0, 1] added to the incoming video when sampling
    augment_max: float = 0.0  # training draws that level from [0, augment_max]
    weights: str | None = None
    w_range: list[float] | None = None  # a guidance-distilled network takes w within this range as an input
    train: TrainConfig | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fps <= 1000:
            raise ValueError(f"fps is {self.fps}, expected 0 to 1000")
        if not 0 <= self.augment <= 1 or not 0 <= self.augment_max <= 1:
            raise ValueError(f"augment and augment_max are {self.augment} and {self.augment_max}, expected 0 to 1")
        for side in ("height", "width"):
            size = getattr(self.shape, side)
            if size % self.net.multiple:
                near = max(1, round(size / self.net.multiple)) * self.net.multiple
                raise ValueError(
                    f"shape.{side} is {size}, expected a multiple of {self.net.multiple} "
                    f"(patch {self.net.patch}, {len(self.net.levels)} levels), such as {near}"
                )


class Rule(Protocol):
    """What a module `stages/<kind>.py` provides."""

    Config: type[StageConfig]
    KEEPS_KNOWN: bool  # frames whose mask is 1 come out exactly as they came in
    METRICS: Sequence[str]  # modules of cascade/metrics that judge this kind

    def takes(self, cfg: Any) -> Shape:
        """Size of the input that gives the configured output."""
        ...

    def output(self, low: Shape | None, cfg: Any) -> Shape:
        """Size of the stage's output for an input of size `low`; ConfigError if it cannot take it."""
        ...

    def rate(self, cfg: Any) -> int:
        """Output frames for each input frame."""
        ...

    def degrade(self, video: Video, cfg: Any, rng: torch.Generator) -> Video | None:
        """What the stage before would have made of `video` (B, C, F, H, W)."""
        ...

    def condition(self, low: Video, cfg: Any, shape: Shape) -> tuple[Tensor, Tensor]:
        """The incoming video at the output's size (B, C, F, H, W) and its mask (B, 1, F, 1, 1)."""
        ...


@dataclass
class Batch:
    """Training examples: clean x (B, C, F, H, W), noise eps, time t (B,) and what the denoiser is told."""

    x: Tensor
    eps: Tensor
    t: Tensor
    cond: Cond

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: slice) -> Batch:
        return Batch(self.x[index], self.eps[index], self.t[index], self.cond[index])

    @staticmethod
    def cat(parts: Sequence[Batch]) -> Batch:
        x, eps, t = (torch.cat([getattr(part, name) for part in parts]) for name in ("x", "eps", "t"))
        return Batch(x, eps, t, Cond.cat([part.cond for part in parts]))

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.x.to(device), self.eps.to(device), self.t.to(device), self.cond.to(device))


class Stage:
    """One diffusion model of a cascade. `net` may be any module with `VideoUNet`'s signature."""

    def __init__(self, cfg: StageConfig, rule: Rule, net: torch.nn.Module | None = None) -> None:
        self.cfg, self.rule = cfg, rule
        self.net = VideoUNet(cfg.net) if net is None else net

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def to(self, device: torch.device) -> Stage:
        self.net.to(device)
        return self

    def condition(self, low: Video | None, shape: Shape, text: Text, fps: float, level: Tensor, eps: Tensor) -> Cond:
        """What the denoiser is told: `low` at size `shape`, noised to `level` (B,) with `eps` (B, C, F, H, W)."""
        batch, c = len(text.mask), self.cfg.net.channels
        rate = torch.full((batch,), fps)
        if low is None:
            blank = torch.zeros(batch, c, shape.frames, shape.height, shape.width)
            return Cond(blank, blank[:, :1, :, :1, :1], torch.zeros(batch), rate, text)
        concat, mask = self.rule.condition(low, self.cfg, shape)
        if bool((level > 0).any()):
            concat = torch.where(level.view(-1, 1, 1, 1, 1) > 0, AUGMENTATION.noised(concat, eps, level), concat)
        return Cond(concat, mask, level, rate, text)

    def example(self, video: Video, text: Text, rng: torch.Generator) -> tuple[Tensor, Cond]:
        """A training pair from one clean clip (1, C, F, H, W): the target x and its conditioning."""
        x = video.frames
        low = self.rule.degrade(video, self.cfg, rng)
        level = torch.rand(1, generator=rng) * self.cfg.augment_max
        eps = torch.randn(x.shape, generator=rng)
        return x, self.condition(low, video.shape, text, video.fps, level, eps)

    def loss(self, batch: Batch, net: Callable[..., Tensor] | None = None) -> Tensor:
        """Mean squared error of the network's target (B,); for x-prediction weighted by max(1, SNR)."""
        diffusion = self.cfg.diffusion
        z = diffusion.noised(batch.x, batch.eps, batch.t)
        out = (net or self.net)(z, batch.t, batch.cond)
        error = (out - diffusion.target(batch.x, batch.eps, batch.t)).square().mean((1, 2, 3, 4))
        if diffusion.prediction is Prediction.X:  # truncated SNR weighting, Salimans & Ho 2022, sec. 4
            error = error * diffusion.log_snr(batch.t).exp().clamp(1, 1e4).to(error.dtype)
        return error

    def denoise(self, z: Tensor, t: Tensor, cond: Cond, w: float | None = None) -> Tensor:
        """x_hat of shape (B, C, F, H, W); `w` is for a guidance-distilled network. Long clips go in windows."""
        weight = None if w is None else torch.full_like(t, w)

        def whole(z: Tensor, cond: Cond) -> Tensor:
            out = self.net(z, t, cond, weight)
            return self.cfg.diffusion.split(z, out, t)[0]

        return windowed(whole, z, cond, self.cfg.windows, self.rule.rate(self.cfg))

    def sample(
        self,
        low: Video | None,
        text: Text,
        negative: Text | None,
        noise: Noise,
        progress: Callable[[int], None] | None = None,
    ) -> Video:
        """A video from the one before (None: from text alone); see `Noise` for what its randomness depends on."""
        cfg = self.cfg
        shape = self.rule.output(None if low is None else low.shape, cfg)
        full = (len(text.mask), cfg.net.channels, shape.frames, shape.height, shape.width)
        level = torch.full((full[0],), cfg.augment)
        augmentation = noise(full, 0, "augment") if cfg.augment > 0 else torch.zeros(full)
        # The network is told the rate it was trained at; the video keeps its own.
        cond = self.condition(low, shape, text, cfg.fps, level, augmentation).to(self.device)
        dropped = cond.without_text() if negative is None else cond.with_text(negative.to(self.device))

        def denoise(z: Tensor, t: Tensor, step: int) -> Tensor:
            w = cfg.sampler.weight(step)
            if cfg.w_range is not None:
                return self.denoise(z, t, cond, w)
            x = self.denoise(z, t, cond)
            return x if w == 0 else (1 + w) * x - w * self.denoise(z, t, dropped)

        hooks: list[Hook] = []
        keeps = self.rule.KEEPS_KNOWN and low is not None
        if keeps:
            known, mask = self.rule.condition(low, cfg, shape)  # type: ignore[arg-type]
            known, mask = known.to(self.device), mask.to(self.device) > 0
            hooks.append(keep_known(known, mask))
        x = sample(cfg.diffusion, denoise, cfg.sampler, noise, full, hooks=hooks, progress=progress, device=self.device)
        x = x.clamp(-1, 1)
        fps = cfg.fps if low is None else low.fps * self.rule.rate(cfg)
        return Video((torch.where(mask, known, x) if keeps else x).cpu(), fps)


AUGMENTATION = Diffusion()  # noise levels are times of the plain cosine schedule, whatever the stage's own
