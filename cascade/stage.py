"""A stage: a config, a denoiser and a conditioning rule.

What distinguishes the kinds of stage is their rule, a module `stages/<kind>.py`; everything else they share stands
here. Sampling conditions on `low` from the stage before, training on `degrade(video)`, through the same `condition`, so
that the two cannot drift apart and every stage trains alone, from clean video.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from cascade.codec import COLOURS, Codec, Coder, Kind
from cascade.diffusion import Diffusion, Path
from cascade.errors import ConfigError
from cascade.grid import Spacing
from cascade.noise import generator
from cascade.sampler import Denoise, Draw, Hook, Sampler, Threshold, keep_known, reconstruction, sample, shared
from cascade.sampler import Rule as StepRule
from cascade.text import Text, TextConfig
from cascade.unet import Cond, UNetConfig, VideoUNet
from cascade.unet3d import UNet3D
from cascade.unet3d_config import UNet3DConfig
from cascade.video import Shape, Video
from cascade.windows import Join, Windows, windowed


@dataclass(kw_only=True)
class Gap:
    """Cascade-gap training: a `share` of the clips come in as the stage before really makes them.

    `stage` names its settings in conf/stage, `weights` its weights if not those. It makes them from a degraded real
    clip, so that the truth is known; a stage that starts from text alone goes on from the real clip noised to the time
    `strength` (SDEdit, Meng et al. 2022). Its sampler takes `steps` steps (None: as its settings say).
    """

    stage: str
    share: float = 0.0
    strength: float = 0.5
    weights: str | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or not 0 < self.strength <= 1:
            raise ValueError(f"share and strength are {self.share} and {self.strength}, expected 0 to 1")


@dataclass(kw_only=True)
class TrainConfig:
    """How a stage is trained (`task=train`). Every step's data follow from (seed, step) alone.

    With `pool` > 0 so many scenes of the procedural world are drawn beforehand, and each step's batch of them is
    rendered on the device that trains; with 0 each example is made by itself, by `workers` processes.
    """

    steps: int
    batch: int  # clips a step, over all processes
    lr: float
    micro_batch: int | None = None  # clips at once in memory; the rest is gradient accumulation. None: all
    warmup: int = 0  # steps of linear warm-up, then linear decay to zero at the last step
    weight_decay: float = 0.0
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.0  # decay of the average of the weights; it grows from 0 as (1 + step) / (10 + step)
    drop_text: float = 0.0  # fraction of clips trained without their caption (classifier-free guidance)
    times: list[float] = field(default_factory=lambda: [0.0, 1.0])  # lowest and highest t
    images: float = 0.0  # fraction of steps that train on single frames, each of a clip of its own
    crop: Shape | None = None  # train on random crops of this size (fully convolutional stages)
    crop_tries: int = 1  # of so many random crops the one with the most contrast is taken
    init: str | None = None  # weights to start from
    seed: int = 0
    checkpoint_every: int = 500
    sample_every: int = 0  # contact sheet of samples every so many steps; 0 = never
    keep: int = 2  # checkpoints kept
    workers: int = 0  # processes that make training clips, or draw the pool
    pool: int = 0  # scenes drawn beforehand
    gap: Gap | None = None  # train on what the stage before makes
    precision: str = "no"  # no | bf16 | fp16, as `accelerate` has it; tf32: float32 with TF32 products on a GPU
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time

    def __post_init__(self) -> None:
        for name, low, high in (
            ("steps", 1, 10**9), ("batch", 1, 10**6), ("lr", 0, 1), ("warmup", 0, 10**9), ("ema", 0, 0.99999999),
            ("drop_text", 0, 1), ("images", 0, 1), ("clip", 1e-9, 1e9), ("weight_decay", 0, 10), ("seed", 0, 2**62),
            ("checkpoint_every", 1, 10**9), ("sample_every", 0, 10**9), ("keep", 1, 10**6), ("workers", 0, 1024),
            ("crop_tries", 1, 100), ("pool", 0, 10**8),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {low} to {high}")
        if len(self.times) != 2 or not 0 <= self.times[0] < self.times[1] <= 1:
            raise ValueError(f"times is {self.times}, expected the lowest and the highest t, such as [0, 1]")
        if self.micro_batch is not None and (self.micro_batch < 1 or self.batch % self.micro_batch):
            raise ValueError(f"micro_batch is {self.micro_batch}, expected a divisor of batch ({self.batch})")
        if self.precision not in ("no", "bf16", "fp16", "tf32"):
            raise ValueError(f"precision is {self.precision!r}, expected no, bf16, fp16 or tf32")
        if self.gap is not None and self.gap.share > 0 and not self.pool:
            raise ValueError(f"gap.share is {self.gap.share}, which needs batches made on the device: pool=20000")

    def time(self, u: Tensor) -> Tensor:
        """u in [0, 1] as times within `times`."""
        lowest, highest = self.times
        return lowest + (highest - lowest) * u


@dataclass(kw_only=True)
class StageConfig:
    """What every stage needs; a rule may add fields of its own."""

    name: str  # unique in a chain; keys the stage's noise
    kind: str  # the rule: stages/<kind>.py
    shape: Shape  # of the output
    fps: float  # of the output, frames per second
    net: UNetConfig | UNet3DConfig
    diffusion: Diffusion
    sampler: Sampler
    codec: Codec = field(default_factory=Codec)
    windows: Windows = field(default_factory=Windows)
    reads: TextConfig | None = None  # a text encoder of its own; None: the chain's
    keep_known: bool = True  # given frames come out as they came in, where the kind can; false: they are made again
    augment: float = 0.0  # noise level t in [0, 1] added to the incoming video when sampling
    augment_known: bool = True  # to its known frames too
    noising: Diffusion | None = None  # whose times these levels are; None: the plain cosine schedule's
    told: bool = True  # the network hears of what comes in; if not, only the sampler does (replacement, reconstruction)
    augment_max: float = 0.0  # training draws that level from [0, augment_max], or, half of the time, 0
    weights: str | None = None
    w_range: list[float] | None = None  # a guidance-distilled network takes w within this range as an input
    train: TrainConfig | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"name is {self.name!r}, expected letters, digits, _ - and . (it becomes a folder's name)")
        if not 0 < self.fps <= 1000:
            raise ValueError(f"fps is {self.fps}, expected 0 to 1000")
        if not 0 <= self.augment <= 1 or not 0 <= self.augment_max <= 1:
            raise ValueError(f"augment and augment_max are {self.augment} and {self.augment_max}, expected 0 to 1")
        if self.diffusion.path is Path.STRAIGHT and self.sampler.rule not in (StepRule.DDIM, StepRule.HEUN):
            raise ValueError(f"sampler.rule is {self.sampler.rule.value}, expected ddim or heun: the path has no noise")
        if self.diffusion.path is Path.STRAIGHT and not self.told:
            raise ValueError(f"told is {self.told}, expected true: the path starts from the incoming video")
        if not self.net.text and self.sampler.guidance:
            raise ValueError(f"sampler.guidance is {self.sampler.guidance}, expected 0: net.text is 0, no text is told")
        if self.w_range is not None and isinstance(self.net, UNet3DConfig):
            raise ValueError(f"w_range is {self.w_range}, expected null: this network is not told a guidance weight")
        if self.codec.kind is Kind.LATENT:
            self._check_latent()
        self._check_sampling()
        multiple = self.net.multiple * self.codec.stride
        for setting, shape in self.shapes().items():
            for side in ("frames", "height", "width"):
                size, whole = getattr(shape, side), getattr(self.shape, side)
                if size > whole:
                    raise ValueError(f"{setting}.{side} is {size}, expected at most shape.{side}, {whole}")
                if side != "frames" and size % multiple:
                    near = max(1, round(size / multiple)) * multiple
                    stride = "" if self.codec.stride == 1 else f", codec stride {self.codec.stride}"
                    raise ValueError(
                        f"{setting}.{side} is {size}, expected a multiple of {multiple} "
                        f"(patch {self.net.patch}, {len(self.net.levels)} levels{stride}), such as {near}"
                    )

    def _check_sampling(self) -> None:
        """The sampler's settings against the network's."""
        sampler, spacing = self.sampler, self.sampler.grid.spacing
        if spacing is not Spacing.UNIFORM:
            if not self.diffusion.discrete:
                raise ValueError(f"sampler.grid.spacing is {spacing.value}, expected uniform where schedule is cosine")
            if sampler.grid.whole(sampler.steps, sampler.strength) >= self.diffusion.timesteps:
                raise ValueError(f"sampler.steps is {sampler.steps}, expected fewer than diffusion.timesteps")
        if sampler.learned and not getattr(self.net, "variance", False):
            raise ValueError("sampler.learned is true, expected false: the network says no variance")

    def _check_latent(self) -> None:
        if self.net.channels != self.codec.channels:
            raise ValueError(f"net.channels is {self.net.channels}, expected codec.channels, {self.codec.channels}")
        if self.sampler.threshold is not Threshold.NONE:
            raise ValueError(
                f"sampler.threshold is {self.sampler.threshold.value}, expected none: latents do not end at -1 and 1"
            )

    @property
    def colours(self) -> int:
        """Channels of the videos it takes and gives."""
        return COLOURS if self.codec.kind is Kind.LATENT else self.net.channels

    def shapes(self) -> dict[str, Shape]:
        """The sizes of clips that the network is made for, by setting: the output, and the crops it trains on."""
        crop = None if self.train is None else self.train.crop
        return {"shape": self.shape} | ({} if crop is None else {"train.crop": crop})


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


def check_told(cfg: StageConfig, rule: Rule) -> None:
    """Raises ConfigError for a stage that would not heed what it is given, or cannot in the way that is asked for."""
    if rule.KEEPS_KNOWN:
        return
    if not cfg.told and not cfg.sampler.reconstruction:
        raise ConfigError(
            f"{cfg.name}: told is false and sampler.reconstruction 0, so that the incoming video would go unheard",
            fix=f"{cfg.name}.told=true or {cfg.name}.sampler.reconstruction=2",
        )
    if cfg.sampler.reconstruction and cfg.codec.kind is Kind.LATENT:
        raise ConfigError(
            f"{cfg.name}: sampler.reconstruction is {cfg.sampler.reconstruction:g}, but no gradient passes the codec",
            fix=f"{cfg.name}.sampler.reconstruction=0",
        )


@dataclass
class Batch:
    """Training examples: clean x (B, C, F, H, W), noise eps, time t (B,) and what the denoiser is told.

    `u` (B,) is uniform in [0, 1), for whatever else a loss draws for each example.
    """

    x: Tensor
    eps: Tensor
    t: Tensor
    u: Tensor
    cond: Cond

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: slice) -> Batch:
        return Batch(self.x[index], self.eps[index], self.t[index], self.u[index], self.cond[index])

    @staticmethod
    def cat(parts: Sequence[Batch]) -> Batch:
        x, eps, t, u = (torch.cat([getattr(part, name) for part in parts]) for name in ("x", "eps", "t", "u"))
        return Batch(x, eps, t, u, Cond.cat([part.cond for part in parts]))

    def to(self, device: torch.device | str) -> Batch:
        x, eps, t, u = (tensor.to(device) for tensor in (self.x, self.eps, self.t, self.u))
        return Batch(x, eps, t, u, self.cond.to(device))


def denoiser(cfg: UNetConfig | UNet3DConfig) -> torch.nn.Module:
    """A new network of that architecture."""
    return UNet3D(cfg) if isinstance(cfg, UNet3DConfig) else VideoUNet(cfg)


class Stage:
    """One diffusion model of a cascade. `net` may be any module with `VideoUNet`'s signature."""

    def __init__(self, cfg: StageConfig, rule: Rule, net: torch.nn.Module | None = None) -> None:
        check_told(cfg, rule)
        self.cfg, self.rule = cfg, rule
        self.net = denoiser(cfg.net) if net is None else net

    @property
    def device(self) -> torch.device:
        parameter = next(self.net.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def to(self, device: torch.device) -> Stage:
        self.net.to(device)
        return self

    @cached_property
    def coder(self) -> Coder:
        """From pixels to what the denoiser works on; loaded when it is first asked for."""
        return self.cfg.codec.open()

    def encode(self, x: Tensor) -> Tensor:
        """Pixels (B, C, F, H, W) as the denoiser sees them."""
        return self.coder.to(self.device).encode(x)

    def condition(self, low: Video | None, shape: Shape, text: Text, fps: float, level: Tensor, eps: Tensor) -> Cond:
        """What the denoiser is told: `low` at size `shape`, encoded, noised to `level` (B,) with `eps` of its size."""
        batch, c = len(text.mask), self.cfg.net.channels
        rate = torch.full((batch,), fps, device=level.device)
        if low is None or not self.cfg.told:
            blank = torch.zeros(batch, c, *self.cfg.codec.inside(shape), device=level.device)
            return Cond(blank, blank[:, :1, :, :1, :1], torch.zeros_like(level), rate, text)
        concat, mask = self.rule.condition(low, self.cfg, shape)
        concat, mask = self.encode(concat), self.cfg.codec.mask(mask)
        if bool((level > 0).any()):
            noised = (self.cfg.noising or AUGMENTATION).noised(concat, eps, level)
            clean = level.view(-1, 1, 1, 1, 1) == 0
            concat = torch.where(clean if self.cfg.augment_known else clean | (mask > 0), concat, noised)
        return Cond(concat, mask, level, rate, text)

    def example(
        self, video: Video, text: Text, rng: torch.Generator, before: Callable[[Video], Video] | None = None
    ) -> tuple[Tensor, Cond]:
        """Training pairs from clean clips (B, C, F, H, W): the targets x and their conditioning.

        Clips, text and `rng` are on one device. `before` turns the degraded clips into what comes in.
        """
        x = self.encode(video.frames)
        low = self.rule.degrade(video, self.cfg, rng)
        drawn = torch.rand(len(x), generator=rng, device=rng.device)
        level = (2 * drawn - 1).clamp(min=0) * self.cfg.augment_max  # half of them without
        if before is not None and low is not None:
            low = before(low)
        eps = torch.randn(x.shape, generator=rng, device=rng.device)
        return x, self.condition(low, video.shape, text, video.fps, level, eps)

    def far(self, cond: Cond, eps: Tensor) -> Tensor:
        """What z is at t = 1: noise, or on the straight path the incoming video."""
        return cond.concat if self.cfg.diffusion.path is Path.STRAIGHT else eps

    def imitate(self, video: Video, text: Text, rng: torch.Generator, strength: float) -> Video:
        """What this stage makes of its own input to `video` (B, C, F, H, W), of any size; noise is drawn from `rng`.

        A stage whose input is text alone goes on from `video` noised to the time `strength`.
        """
        if video.shape != self.cfg.shape:
            cfg = replace(self.cfg, shape=video.shape, windows=Windows(), train=None)
            return Stage(cfg, self.rule, self.net).imitate(video, text, rng, strength)

        def draw(shape: Sequence[int], step: int, purpose: str) -> Tensor:
            return torch.randn(tuple(shape), generator=rng, device=rng.device)

        low = self.rule.degrade(video, self.cfg, rng)
        if low is not None and low.known is None:
            return self.sample(low, text, None, draw)
        return self.sample(None, text, None, draw, start=(video, strength))

    def loss(self, batch: Batch, net: Callable[..., Tensor] | None = None) -> Tensor:
        """Mean squared error of what the network says, v, eps or x, (B,)."""
        diffusion = self.cfg.diffusion
        z = diffusion.noised(batch.x, batch.eps, batch.t)
        out = (self.net if net is None else net)(z, diffusion.level(batch.t), batch.cond)
        return (out - diffusion.target(batch.x, batch.eps, batch.t)).square().mean((1, 2, 3, 4))

    def denoise(self, z: Tensor, t: Tensor, cond: Cond, w: float | None = None) -> Tensor:
        """x_hat of shape (B, C, F, H, W); `w` is for a guidance-distilled network. Long clips go in windows.

        Where the sampler takes a learned variance the network's word on it follows on the channels.
        """
        weight = None if w is None else torch.full_like(t, w)
        diffusion, level = self.cfg.diffusion, self.cfg.diffusion.level(t)

        def whole(z: Tensor, cond: Cond) -> Tensor:
            if not self.cfg.sampler.learned:
                return diffusion.split(z, self.net(z, level, cond, weight), t)[0]
            out, variance = self.net.predict(z, level, cond).chunk(2, 1)  # type: ignore[operator]
            return torch.cat([diffusion.split(z, out, t)[0], variance], 1)

        return windowed(whole, z, cond, self.cfg.windows, self.rule.rate(self.cfg))

    def made(self, low: Video | None) -> Shape:
        """Size of the output. A clip that says which of its frames are known is as long as the output already."""
        if low is not None and low.known is not None and self.rule.rate(self.cfg) > 1:
            return low.shape
        return self.rule.output(None if low is None else low.shape, self.cfg)

    def towards(self, low: Video, shape: Shape) -> Callable[[Denoise], Denoise]:
        """What adds reconstruction guidance towards `low` to a denoiser, where the sampler asks for it.

        What is compared is known frames that the network is not told of, or where the kind has none, what `degrade`
        makes of x_hat (Ho et al. 2022, Video Diffusion Models, sec. 3.1).
        """
        cfg, weight = self.cfg, self.cfg.sampler.reconstruction
        if weight and not self.rule.KEEPS_KNOWN:

            def observe(x: Tensor) -> Tensor:
                made = self.rule.degrade(Video(x, cfg.fps), cfg, generator("observe"))
                assert made is not None, f"a stage of kind {cfg.kind} is given a video that it does not keep"
                return made.frames

            target = low.frames.to(self.device)
            return lambda denoise: reconstruction(cfg.diffusion, denoise, observe, target, weight)
        if weight and not cfg.told:
            known, mask = (part.to(self.device) for part in self.rule.condition(low, cfg, shape))
            known, mask = self.encode(known), cfg.codec.mask(mask)
            return lambda denoise: reconstruction(cfg.diffusion, denoise, lambda x: x * mask, known * mask, weight)
        return lambda denoise: denoise

    def sample(
        self,
        low: Video | None,
        text: Text,
        negative: Text | None,
        noise: Draw,
        progress: Callable[[int], None] | None = None,
        start: tuple[Video, float] | None = None,
    ) -> Video:
        """A video from the one before (None: from text alone), on the CPU.

        `noise` says what its randomness depends on (see `Noise`). With `start`, a video and a time, sampling goes on
        from that video noised to that time, on as fine a grid.
        """
        if not self.cfg.windows.in_turn:
            return self._sample(low, text, negative, noise, progress, start)
        if low is None:
            raise ConfigError(
                f"{self.cfg.name}: windows.rule is {self.cfg.windows.rule.value}, which needs an incoming video",
                fix=f"{self.cfg.name}.windows.rule=blend",
            )
        return self._in_turn(low, text, negative, noise, progress)

    def _in_turn(
        self,
        low: Video,
        text: Text,
        negative: Text | None,
        noise: Draw,
        progress: Callable[[int], None] | None,
    ) -> Video:
        """Windows that are clips of their own, one after the other."""
        cfg, rate, steps = self.cfg, self.rule.rate(self.cfg), self.cfg.sampler.steps
        shape = self.rule.output(low.shape, cfg)
        out = self.rule.condition(low, cfg, shape)[0].cpu().clone()
        spans = cfg.windows.spans(shape.frames, rate)
        for number, (first, end) in enumerate(spans):
            given = low.frames[:, :, first // rate : -(-end // rate)].clone()
            if cfg.windows.rule is Join.CHAINED and first > 0:
                given[:, :, 0] = out[:, :, first]

            def draw(size: Sequence[int], step: int, purpose: str, first: int = first, end: int = end) -> Tensor:
                if cfg.windows.same_noise:
                    return noise(size, step, purpose)
                return noise((*size[:2], shape.frames, *size[3:]), step, purpose)[:, :, first:end]

            def tick(done: int, number: int = number) -> None:
                if progress is not None:
                    progress((number * steps + done) // len(spans))

            out[:, :, first:end] = self._sample(Video(given, low.fps), text, negative, draw, tick, None).frames
        return Video(out, low.fps * rate)

    def _sample(
        self,
        low: Video | None,
        text: Text,
        negative: Text | None,
        noise: Draw,
        progress: Callable[[int], None] | None,
        start: tuple[Video, float] | None,
    ) -> Video:
        """One run of the sampler."""
        cfg, sampler = self.cfg, self.cfg.sampler
        shape = self.made(low)
        full = (len(text.mask), cfg.net.channels, *cfg.codec.inside(shape))
        if start is not None:
            sampler = replace(sampler, strength=start[1], steps=max(1, round(sampler.steps * start[1])))
        here = torch.device("cpu") if low is None else low.frames.device
        level = torch.full((full[0],), cfg.augment, device=here)
        noise = shared(noise) if sampler.shared_noise else noise
        augmentation = noise(full, 0, "augment") if cfg.augment > 0 else torch.zeros(full)
        # The network is told the rate it was trained at; the video keeps its own.
        cond = self.condition(low, shape, text.to(here), cfg.fps, level, augmentation.to(here)).to(self.device)
        dropped = cond.without_text() if negative is None else cond.with_text(negative.to(self.device))

        def guided(z: Tensor, t: Tensor, w: float) -> Tensor:
            if cfg.w_range is not None:
                return self.denoise(z, t, cond, w)
            x = self.denoise(z, t, cond)
            if w == 0:
                return x
            c, other = z.shape[1], self.denoise(z, t, dropped)
            guided = (1 + w) * x[:, :c] - w * other[:, :c]
            return torch.cat([guided, x[:, c:]], 1) if sampler.learned else guided  # the variance is that of the text

        drawn_on = self.towards(low, shape) if low is not None else lambda denoise: denoise

        def denoise(z: Tensor, t: Tensor, step: int) -> Tensor:
            return drawn_on(partial(guided, w=sampler.weight(step)))(z, t)

        hooks: list[Hook] = []
        keeps = self.rule.KEEPS_KNOWN and cfg.keep_known and low is not None
        if keeps:
            known, mask = self.rule.condition(low, cfg, shape)  # type: ignore[arg-type]
            known, mask = known.to(self.device), mask.to(self.device)
            hooks.append(keep_known(self.encode(known), cfg.codec.mask(mask)))

        def draw(shape: Sequence[int], step: int, purpose: str) -> Tensor:
            drawn = noise(shape, step, purpose)
            return self.far(cond, drawn) if purpose == "start" else drawn

        if start is not None:
            first: Tensor | None = self.encode(start[0].frames.to(self.device))
        elif low is not None and sampler.strength < 1:
            first = self.encode(self.rule.condition(low, cfg, shape)[0].to(self.device))
        else:
            first = None
        x = sample(
            cfg.diffusion, denoise, sampler, draw, full,
            start=first, hooks=hooks, progress=progress, device=self.device,
        )  # fmt: skip
        x = self.coder.to(self.device).decode(x).clamp(-1, 1)
        fps = cfg.fps if low is None else low.fps if shape == low.shape else low.fps * self.rule.rate(cfg)
        return Video((torch.where(mask > 0, known, x) if keeps else x).cpu(), fps)


AUGMENTATION = Diffusion()  # noise levels are times of the plain cosine schedule unless a stage says otherwise
