"""Architecture of the U-Nets that the public weights belong to, as data (`cascade.nets.unet3d` builds it)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import torch.nn.functional as F
from torch import Tensor


class Act(Enum):
    """The activation after a norm."""

    SILU = "silu"
    GELU = "gelu"

    def __call__(self, h: Tensor) -> Tensor:
        return F.silu(h) if self is Act.SILU else F.gelu(h)


class Space(Enum):
    """Attention within a frame, and what changes the resolution."""

    ADDED_KV = "added_kv"  # text and own positions in one softmax; residual blocks halve and double (IF, Show-1)
    TRANSFORMER = "transformer"  # self, text, feed-forward; plain convolutions halve and double (Stable Diffusion)


class Time(Enum):
    """What mixes frames."""

    NONE = "none"  # an image model
    BESIDE = "beside"  # four convolutions after each residual block, a transformer after each attention (ModelScope)
    INSIDE = "inside"  # attention over frames inside each spatial transformer (LaVie)
    AROUND = "around"  # that, a residual block along time before it, and a correction after each level (LaVie's VSR)


@dataclass(kw_only=True)
class Heads:
    """How channels are cut into attention heads: heads of `size` channels, or `number` heads."""

    size: int | None = None
    number: int | None = None

    def __post_init__(self) -> None:
        if (self.size is None) == (self.number is None) or (self.size or self.number or 0) < 1:
            raise ValueError(f"size and number are {self.size} and {self.number}, expected one of them, at least 1")

    def of(self, channels: int) -> int:
        """Heads of so many channels."""
        return self.number if self.number is not None else channels // (self.size or channels)

    def fit(self, channels: int) -> bool:
        return channels % (self.number or self.size or 1) == 0


@dataclass(kw_only=True)
class Level3D:
    """One resolution; each level below the first halves height and width. On the way up it has a block more."""

    channels: int
    blocks: int = 2
    attention: bool = True
    own: bool = True  # positions attend to one another, then to the text; false: twice to the text

    def __post_init__(self) -> None:
        if self.channels < 1 or self.blocks < 1:
            raise ValueError(f"channels and blocks are {self.channels} and {self.blocks}, expected at least 1")
        if not (self.own or self.attention):
            raise ValueError("own is false, expected true where attention is false")


@dataclass(kw_only=True)
class UNet3DConfig:
    """Architecture of a `UNet3D`. Defaults are Stable Diffusion's, without what a field would add."""

    arch: Literal["unet3d"]
    levels: list[Level3D]
    channels: int  # of z; the output has as many, or twice
    embedding: int  # width of the embedding of time
    text: int  # width of the text encoder's embeddings
    context: int | None = None  # they are projected to this width for attention; None: read as they are
    pool: int | None = None  # heads of the attention that pools the text into the time embedding; None: it does not
    concat: bool = False  # the incoming video follows z on the channels
    concat_channels: int | None = None  # of it, where it stays in pixels beside z, which is latents; None: those of z
    mask: bool = False  # and its mask follows that
    noise_level: bool = False  # the incoming video's noise level is embedded as well
    noise_label: bool = False  # that by a table of 1000 levels, not by waves
    variance: bool = False  # the output's second half is the variance (learned range, Nichol & Dhariwal 2021)
    space: Space = Space.TRANSFORMER
    heads: Heads = field(default_factory=lambda: Heads(number=8))
    linear: bool = False  # transformers are entered and left by linear maps, not by 1x1 convolutions
    sparse: bool = False  # self-attention of a frame sees the first frame and the one before, not the frame itself
    activation: Act = Act.SILU
    scale_shift: bool = False  # the embedding scales and shifts after the second norm; else it is added before it
    skip_time_act: bool = False  # residual blocks take the embedding without an activation
    time_act: Act | None = None  # one activation of the embedding for all of them
    scale: float = 1.0  # residual blocks are divided by it
    middle_scale: float = 1.0
    groups: int = 32
    eps: float = 1e-5
    shared_norm: bool = False  # norms of residual blocks and of the output see all frames of a clip at once
    time: Time = Time.NONE
    temporal_heads: Heads = field(default_factory=lambda: Heads(number=8))
    transformer_in: int | None = None  # size of the 8 heads of a temporal transformer right after the first convolution
    temporal_last: bool = False  # inside: after the feed-forward, not before it
    rotary: int = 0  # inside: channels of each head turned by the frame's number
    buckets: int = 0  # inside: of relative frame positions, a bias for each head

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("levels is empty, expected at least one level")
        for name, least in (
            ("channels", 1),
            ("embedding", 1),
            ("text", 1),
            ("groups", 1),
            ("rotary", 0),
            ("buckets", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if self.levels[0].channels % 2:
            raise ValueError(
                f"levels[0].channels is {self.levels[0].channels}, expected an even number: sines and cosines"
            )
        if self.pool is not None and (self.pool < 1 or self.text % self.pool):
            raise ValueError(f"pool is {self.pool}, expected a divisor of text, {self.text}")
        if self.mask and not self.concat:
            raise ValueError("mask is true, expected false where concat is")
        if self.concat_channels is not None and (self.concat_channels < 1 or not self.concat):
            raise ValueError(f"concat_channels is {self.concat_channels}, expected 1 or more, null without concat")
        if self.noise_label and not self.noise_level:
            raise ValueError("noise_label is true, expected false where noise_level is")
        if self.shared_norm and self.scale_shift:
            raise ValueError("shared_norm is true, expected false where scale_shift is true")
        if self.inside and self.space is not Space.TRANSFORMER:
            raise ValueError(f"time is {self.time.value}, expected beside or none: attention is {self.space.value}")
        if self.space is not Space.TRANSFORMER and not all(level.own for level in self.levels):
            raise ValueError(f"levels have own false, expected true where space is {self.space.value}")
        if (self.rotary or self.buckets or self.temporal_last) and not self.inside:
            raise ValueError(
                f"time is {self.time.value}, expected inside or around: rotary, buckets, temporal_last belong to them"
            )
        if self.rotary % 2 or self.buckets % 4:
            raise ValueError(f"rotary and buckets are {self.rotary} and {self.buckets}, expected multiples of 2 and 4")
        self._check_levels()

    def _check_levels(self) -> None:
        for i, level in enumerate(self.levels):
            attends = level.attention or i == len(self.levels) - 1  # the middle always does
            if level.channels % self.groups:
                raise ValueError(f"groups is {self.groups}, expected a divisor of {level.channels} channels")
            for name, used in (("heads", True), ("temporal_heads", self.time is not Time.NONE)):
                heads = getattr(self, name)
                if attends and used and not heads.fit(level.channels):
                    raise ValueError(f"{name} do not fit, expected a divisor of {level.channels} channels")
            if attends and self.rotary > level.channels // self.temporal_heads.of(level.channels):
                raise ValueError(f"rotary is {self.rotary}, expected at most the size of a temporal head")

    @property
    def inside(self) -> bool:
        """Whether spatial transformers attend over frames."""
        return self.time in (Time.INSIDE, Time.AROUND)

    @property
    def incoming(self) -> int:
        """Channels of the incoming video, heard or not."""
        return self.channels if self.concat_channels is None else self.concat_channels

    @property
    def width(self) -> int:
        """Of the embedded text where attention reads it."""
        return self.text if self.context is None else self.context

    @property
    def patch(self) -> int:
        """Side of the square of pixels that is one position inside."""
        return 1

    @property
    def fully_convolutional(self) -> bool:
        """Never: the middle attends."""
        return False

    @property
    def multiple(self) -> int:
        """Height and width must be multiples of this."""
        return int(2 ** (len(self.levels) - 1))
