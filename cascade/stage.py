"""A stage: a config, a denoiser and a conditioning rule.

What distinguishes the kinds of stage is their rule, a module `stages/<kind>.py`; everything else they share stands
here. Sampling conditions on `low` from the stage before, training on `degrade(video)`, through the same `condition`, so
that the two cannot drift apart and every stage trains alone, from clean video.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from cascade.codec import Coder
from cascade.cond import Cond
from cascade.diffusion import Diffusion
from cascade.errors import ConfigError
from cascade.making import Run, make
from cascade.nets.compiled import Graphed
from cascade.nets.offload import offload
from cascade.nets.unet import VideoUNet
from cascade.nets.unet3d import UNet3D
from cascade.nets.unet3d_config import UNet3DConfig
from cascade.nets.unet_config import UNetConfig
from cascade.noise import Draw, Stream
from cascade.sampling.sampler import After
from cascade.settings import Rule, StageConfig, check_told, from_text
from cascade.text import Text
from cascade.video import Shape, Video
from cascade.windows import Windows, in_parts, windowed

ELEMENTS = 2**31  # kernels count in 32 bits: cuDNN takes a slow one for a tensor as large, or fails
AUGMENTATION = Diffusion()  # noise levels are times of the plain cosine schedule unless a stage says otherwise


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
    """One diffusion model of a cascade. `net` may be any module with `VideoUNet`'s signature.

    `call` is `net` launched in another way (`loading.launched`), asked in its place when sampling; None: `net` itself.
    """

    def __init__(self, cfg: StageConfig, rule: Rule, net: torch.nn.Module | None = None) -> None:
        check_told(cfg, rule)
        self.cfg, self.rule = cfg, rule
        self.net = denoiser(cfg.net) if net is None else net
        self.call: Callable[..., Tensor] | None = None
        self._visits: torch.device | None = None  # where offloaded weights work

    @property
    def device(self) -> torch.device:
        parameter = next(self.net.parameters(), None)
        return self._visits or (torch.device("cpu") if parameter is None else parameter.device)

    def to(self, device: torch.device) -> Stage:
        """Works there from now on; with cfg.offload the weights stay where they are and visit."""
        if not self.cfg.offload:
            before = self.device
            self.net.to(device)
            if isinstance(self.call, Graphed) and self.device != before:
                self.call.graphs.clear()  # they read the weights where those were
            return self
        if self._visits is None:
            offload(self.net, lambda: self.device)
        self._visits = device
        return self

    @property
    def keeps(self) -> bool:
        """Whether what is known of a video comes out as it came in."""
        return self.rule.KEEPS_KNOWN and self.cfg.keep_known

    @cached_property
    def coder(self) -> Coder:
        """From pixels to what the denoiser works on; loaded when it is first asked for."""
        return self.cfg.codec.open()

    def encode(self, x: Tensor) -> Tensor:
        """Pixels (B, C, F, H, W) as the denoiser sees them."""
        return self.coder.to(self.device).encode(x)

    def condition(
        self, low: Video | None, shape: Shape, text: Text, fps: float, level: Tensor, eps: Tensor | None
    ) -> Cond:
        """What the denoiser is told: `low` at size `shape`, encoded, noised to `level` (B,) with `eps` of its size.

        Without `eps` no level may be above 0. The level of a clip of which nothing is known is 0.
        """
        batch = len(text.mask)
        rate = torch.full((batch,), fps, device=level.device)
        if low is None or not self.cfg.told:
            blank = torch.zeros(batch, *self.cfg.incoming(shape), device=level.device)
            return Cond(blank, blank[:, :1, :, :1, :1], torch.zeros_like(level), rate, text)
        concat, mask = self._incoming(low, shape)
        level = torch.where((mask > 0).flatten(1).any(1), level, 0)
        if eps is not None and bool((level > 0).any()):
            noised = (self.cfg.noising or AUGMENTATION).noised(concat, eps, level)
            clean = level.view(-1, 1, 1, 1, 1) == 0
            known = mask > 0 if self.rule.KEEPS_KNOWN and not self.cfg.augment_known else clean
            concat = torch.where(clean | known, concat, noised)
        return Cond(concat, mask, level, rate, text)

    def _incoming(self, low: Video, shape: Shape) -> tuple[Tensor, Tensor]:
        """`low` as it stands beside z, encoded or in pixels of that size, and its mask."""
        if self.cfg.pixels_beside:
            frames, height, width = self.cfg.codec.inside(shape)
            return self.rule.condition(low, self.cfg, Shape(frames=frames, height=height, width=width))
        concat, mask = self.rule.condition(low, self.cfg, shape)
        return self.encode(concat), self.cfg.codec.mask(mask)

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
        eps = torch.randn(len(x), *self.cfg.incoming(video.shape), generator=rng, device=rng.device)
        return x, self.condition(low, video.shape, text, video.fps, level, eps)

    def imitate(
        self,
        video: Video,
        text: Text,
        rng: torch.Generator,
        strength: float,
        before: Callable[[Video], Video] | None = None,
    ) -> Video:
        """What this stage makes of its own input to `video` (B, C, F, H, W), of any size; noise is drawn from `rng`.

        `before` turns that input, a degraded clip, into what comes in. A stage whose input is text alone goes on from
        `video` noised to the time `strength`.
        """
        if video.shape != self.cfg.shape:
            part = Stage(self.sized(video.shape), self.rule, self.net)
            part.coder = self.coder
            return part.imitate(video, text, rng, strength, before)

        noise = Stream(rng)
        if from_text(self.cfg, self.rule):
            return self.sample(None, text, None, noise, start=(video, strength))
        low = self.rule.degrade(video, self.cfg, rng)
        assert low is not None, f"a stage of kind {self.cfg.kind} starts from a video"
        return self.sample(low if before is None else before(low), text, None, noise)

    def sized(self, shape: Shape) -> StageConfig:
        """The settings of this stage for clips of another size. ValueError if it cannot make them."""
        return replace(self.cfg, shape=shape, windows=Windows(), train=None)

    def loss(self, batch: Batch, net: Callable[..., Tensor] | None = None) -> Tensor:
        """Mean squared error of what the network says, v, eps or x, (B,)."""
        diffusion = self.cfg.diffusion
        far = diffusion.far(batch.eps, batch.cond.concat)
        z = diffusion.noised(batch.x, far, batch.t)
        out = (self.net if net is None else net)(z, diffusion.level(batch.t), batch.cond)[:, : z.shape[1]]
        return (out - diffusion.target(batch.x, far, batch.t)).square().mean((1, 2, 3, 4))

    def denoise(self, z: Tensor, t: Tensor, cond: Cond, w: float | None = None) -> Tensor:
        """x_hat of shape (B, C, F, H, W); `w` is for a guidance-distilled network. Long clips go in windows.

        Where the sampler takes a learned variance the network's word on it follows on the channels.
        """
        weight = None if w is None else torch.full_like(t, w)
        diffusion, level = self.cfg.diffusion, self.cfg.diffusion.level(t)
        call = self.net if self.call is None else self.call

        def whole(z: Tensor, cond: Cond) -> Tensor:
            out, channels = call(z, level, cond, weight), z.shape[1]
            x = diffusion.clean(z, out[:, :channels], t)
            return torch.cat([x, out[:, channels:]], 1) if self.cfg.sampler.learned else x

        def parts(z: Tensor, cond: Cond) -> Tensor:
            return in_parts(whole, z, cond, self.at_once(z), self.reach or 0)

        return windowed(parts, z, cond, self.cfg.windows, self.rule.rate(self.cfg))

    @cached_property
    def reach(self) -> int | None:
        """How far a frame of the network's answer looks, in frames; None: at all of them (or nobody knows)."""
        found: int | None = getattr(self.net, "reach", None)
        return found

    def at_once(self, z: Tensor) -> int:
        """Frames of z (B, C, F, H, W) that the network sees at once: as set, or as few as keep tensors below ELEMENTS.

        The second only where that at most doubles the work. Raises ConfigError for fewer than give an exact answer.
        """
        batch, _, frames, height, width = z.shape
        most = self.cfg.frames_at_once or frames
        if most >= frames and self.reach is None:
            return frames
        if self.reach is None:
            raise ConfigError(
                f"frames_at_once is {most}, but a frame depends on all others: the network has attention over frames",
                fix=f"{self.cfg.name}.frames_at_once=0 {self.cfg.name}.windows.frames={most}",
            )
        if most < frames and most <= 2 * self.reach:
            raise ConfigError(
                f"frames_at_once is {most}, but a frame depends on {self.reach} on each side",
                fix=f"{self.cfg.name}.frames_at_once={2 * self.reach + 1}",
            )
        small = (ELEMENTS - 1) // (batch * self.net.elements(height, width))  # type: ignore[operator]
        return min(most, int(small)) if small > 4 * self.reach else most

    def made(self, low: Video | None) -> Shape:
        """Size of the output. A clip that says which of its frames are known is as long as the output already."""
        if low is not None and low.known is not None and self.rule.rate(self.cfg) > 1:
            return low.shape
        return self.rule.output(None if low is None else low.shape, self.cfg)

    def sample(
        self,
        low: Video | None,
        text: Text,
        negative: Text | None,
        noise: Draw,
        progress: Callable[[int], None] | None = None,
        start: tuple[Video, float] | None = None,
        after: After | None = None,
    ) -> Video:
        """A video from the one before (None: from text alone), on the CPU.

        `noise` says what its randomness depends on (see `Noise`). With `start`, a video and a time, sampling goes on
        from that video noised to that time, on as fine a grid. `after` sees, and may replace, what each step made. What
        `low` knows comes out exactly.
        """
        return make(self, low, Run(text, negative, noise, progress, start, after))
