"""What a stage is, as data: its settings, how it is trained, and the rule that makes it of its kind."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from cascade.codec import COLOURS, Codec, Kind
from cascade.diffusion import Diffusion, Path
from cascade.errors import ConfigError
from cascade.media import RATES
from cascade.nets.compiled import Compile
from cascade.nets.unet3d_config import UNet3DConfig
from cascade.nets.unet_config import UNetConfig
from cascade.sampling.grid import Spacing
from cascade.sampling.sampler import Rule as StepRule
from cascade.sampling.sampler import Sampler, Threshold
from cascade.text import TextConfig
from cascade.video import Shape, Video
from cascade.windows import Windows

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(kw_only=True)
class Before:
    """The stage before, which makes a stage's input as it really comes.

    `stage` names its settings in conf/stage, `weights` its weights if not those. It makes the input from a degraded
    real clip, so that the truth is known, or from what the stage `before` makes of that; a stage that starts from text
    alone goes on from the real clip noised to the time `strength` (SDEdit, Meng et al. 2022). Its sampler takes `steps`
    steps (None: as its settings say).
    """

    stage: str
    strength: float = 0.5
    weights: str | None = None
    steps: int | None = None
    before: Before | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength is {self.strength}, expected more than 0, at most 1")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected at least 1")


@dataclass(kw_only=True)
class Gap(Before):
    """Cascade-gap training: a `share` of the clips come in as the stages before really make them."""

    share: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}, expected more than 0, at most 1")


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
        if self.gap is not None and not self.pool:
            raise ValueError(f"pool is {self.pool}, expected scenes such as 20000 where gap is set")

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
    frames_at_once: int = 0  # that the network sees, exactly (see `in_parts`); 0: all of them, or of a window
    dtype: str | None = None  # float32 | bfloat16 | float16; None: as the run says
    offload: bool = False  # weights stay in host memory and visit the device while they work (see `offload`)
    reads: TextConfig | None = None  # a text encoder of its own; None: the chain's
    keep_known: bool = True  # given frames come out as they came in, where the kind can; false: they are made again
    augment: float = 0.0  # noise level t in [0, 1] added to the incoming video when sampling
    augment_known: bool = True  # to its known frames too
    noising: Diffusion | None = None  # whose times these levels are; None: the plain cosine schedule's
    told: bool = True  # the network hears of what comes in; if not, only the sampler does (replacement, reconstruction)
    augment_max: float = 0.0  # training draws that level from [0, augment_max], or, half of the time, 0
    weights: str | None = None
    compile: Compile = Compile.NONE  # how the network is launched when sampling
    w_range: list[float] | None = None  # a guidance-distilled network takes w within this range as an input
    train: TrainConfig | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"name is {self.name!r}, expected letters, digits, _ - and . (it becomes a folder's name)")
        if not RATES[0] <= self.fps <= RATES[1]:
            raise ValueError(f"fps is {self.fps:g}, expected {RATES[0]:g} to {RATES[1]:g}")
        if self.offload and self.bound:
            why, fix = self.bound
            raise ConfigError(f"offload is true, but {why}", fix=f"{self.name}.offload=false, or {self.name}.{fix}")
        if self.frames_at_once < 0:
            raise ValueError(f"frames_at_once is {self.frames_at_once}, expected at least 0")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype is {self.dtype!r}, expected {', '.join(DTYPES)} or null")
        if not 0 <= self.augment <= 1 or not 0 <= self.augment_max <= 1:
            raise ValueError(f"augment and augment_max are {self.augment} and {self.augment_max}, expected 0 to 1")
        if self.diffusion.path is Path.STRAIGHT and self.sampler.rule not in (StepRule.DDIM, StepRule.HEUN):
            raise ValueError(f"sampler.rule is {self.sampler.rule.value}, expected ddim or heun: the path has no noise")
        if self.diffusion.path is Path.STRAIGHT and self.sampler.strength < 1:
            raise ValueError(f"sampler.strength is {self.sampler.strength}, expected 1 where path is straight")
        if self.diffusion.path is Path.STRAIGHT and not self.told:
            raise ValueError(f"told is {self.told}, expected true: the path starts from the incoming video")
        if not self.net.text and self.sampler.guidance:
            raise ValueError(f"sampler.guidance is {self.sampler.guidance}, expected 0: net.text is 0, no text is told")
        if self.w_range is not None and isinstance(self.net, UNet3DConfig):
            raise ValueError(f"w_range is {self.w_range}, expected null: this network is not told a guidance weight")
        if self.codec.kind is Kind.LATENT:
            self._check_latent()
        if self.pixels_beside:
            self._check_beside()
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

    @property
    def bound(self) -> tuple[str, str] | None:
        """Why the weights have to stay on the device (no `offload`), and a setting with which they need not."""
        if self.sampler.reconstruction:  # backwards they would be where they stay
            weight = f"{self.sampler.reconstruction:g}"
            return f"the gradient of sampler.reconstruction, {weight}, passes the network", "sampler.reconstruction=0"
        if self.compile is Compile.GRAPH:
            return "a CUDA graph reads weights where they were when it was captured", "compile=none"
        return None

    def _check_latent(self) -> None:
        if self.net.channels != self.codec.channels:
            raise ValueError(f"net.channels is {self.net.channels}, expected codec.channels, {self.codec.channels}")
        if self.sampler.threshold is not Threshold.NONE:
            raise ValueError(
                f"sampler.threshold is {self.sampler.threshold.value}, expected none: latents do not end at -1 and 1"
            )

    def _check_beside(self) -> None:
        wanted = COLOURS if self.codec.kind is Kind.LATENT else None
        if (given := self.incoming(self.shape)[0]) != wanted:
            raise ValueError(
                f"net.concat_channels is {given}, expected {wanted or 'null'} where codec.kind is "
                f"{self.codec.kind.value}: the colours of pixels that stand beside latents"
            )
        if self.diffusion.path is Path.STRAIGHT:
            raise ValueError("diffusion.path is straight, expected noise where net.concat_channels is set")

    @property
    def pixels_beside(self) -> bool:
        """Whether what comes in is told as pixels, as large as the latents that it stands beside, not as latents."""
        return isinstance(self.net, UNet3DConfig) and self.net.concat_channels is not None

    def incoming(self, shape: Shape) -> tuple[int, int, int, int]:
        """Size (C, F, H, W) of what the network is told of the incoming video for an output of `shape`."""
        channels = self.net.incoming if isinstance(self.net, UNet3DConfig) else self.net.channels
        return channels, *self.codec.inside(shape)

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
        """What the network is told: the incoming video at the output's size (B, C, F, H, W), and its mask.

        The mask is (B, 1, F, 1, 1), or (B, 1, F, H, W) where the network was trained to know parts of frames.
        """
        ...


def from_text(cfg: StageConfig, rule: Rule) -> bool:
    """Whether the stage needs no video: what it is given then is known parts of its own output."""
    try:
        rule.output(None, cfg)
    except ConfigError:
        return False
    return True


def check_told(cfg: StageConfig, rule: Rule) -> None:
    """Raises ConfigError for a stage that would not heed what it is given, or cannot in the way that is asked for."""
    if cfg.sampler.strength < 1 and from_text(cfg, rule):
        raise ConfigError(
            f"{cfg.name}: sampler.strength is {cfg.sampler.strength:g}, but it is given no whole video to start from",
            fix=f"{cfg.name}.sampler.strength=1",
        )
    if cfg.pixels_beside:
        low, (_, height, width) = rule.takes(cfg), cfg.codec.inside(cfg.shape)
        if (low.height, low.width) != (height, width):
            raise ConfigError(
                f"{cfg.name}: takes {low.height}x{low.width} pixels, expected {height}x{width}, the size of the "
                "latents that they stand beside",
                fix=f"an input of that size, or {cfg.name}.net.concat_channels=null",
            )
    if rule.KEEPS_KNOWN:
        return
    if not cfg.told and not cfg.sampler.reconstruction:
        raise ConfigError(
            f"{cfg.name}: told is false and sampler.reconstruction 0, so that the incoming video would go unheard",
            fix=f"{cfg.name}.told=true or {cfg.name}.sampler.reconstruction=3",
        )
    if cfg.sampler.reconstruction and cfg.codec.kind is Kind.LATENT:
        raise ConfigError(
            f"{cfg.name}: sampler.reconstruction is {cfg.sampler.reconstruction:g}, but no gradient passes the codec",
            fix=f"{cfg.name}.sampler.reconstruction=0",
        )
