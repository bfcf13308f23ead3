"""`VideoUNet`, the space-time denoiser that all stages share.

It never knows which stage it serves: a stage is what stands in `Cond`. Time and space are factorised (Ho et al. 2022):
every block works on single frames, and what mixes frames starts as the identity, so that at initialisation the video
model equals its image model frame by frame.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cascade.cond import Cond
from cascade.nets.layers import (
    Clip,
    FiLM,
    Norm,
    PseudoConv,
    SpatialAttention,
    TemporalAttention,
    TemporalConv,
    TextAttention,
    sinusoid,
    unhalved,
    zero,
)
from cascade.nets.unet_config import LevelSpec, Mixer, UNetConfig
from cascade.text import Text


class Block(nn.Module):
    """Residual block with FiLM, then the level's mixers: space, text, time."""

    def __init__(self, cin: int, level: LevelSpec, cfg: UNetConfig) -> None:
        super().__init__()
        c, mixer = level.channels, level.mixer
        self.norm = Norm(cin)
        self.conv1 = nn.Conv2d(cin, c, 3, padding=1)
        self.film = FiLM(c, cfg.embedding)
        self.conv2 = zero(nn.Conv2d(c, c, 3, padding=1))
        self.skip = nn.Conv2d(cin, c, 1) if cin != c else nn.Identity()
        self.time_conv1 = PseudoConv(c) if mixer.has(Mixer.PSEUDO) else None
        self.time_conv2 = PseudoConv(c) if mixer.has(Mixer.PSEUDO) else None
        self.time_conv = TemporalConv(c) if mixer.has(Mixer.CONV) else None
        self.space = SpatialAttention(c, cfg.head) if level.spatial_attention else None
        self.text = TextAttention(c, cfg.head, cfg.text) if level.text_attention else None
        self.time_attention = TemporalAttention(c, cfg.head) if mixer.has(Mixer.ATTN) else None

    def forward(self, h: Tensor, clip: Clip, text: Text) -> Tensor:
        out = self.conv1(self.norm(h, silu=True))
        if self.time_conv1 is not None:
            out = self.time_conv1(out, clip)
        out = self.conv2(self.film(out, clip, silu=True))
        if self.time_conv2 is not None:
            out = self.time_conv2(out, clip)
        h = self.skip(h) + out
        if self.time_conv is not None:
            h = self.time_conv(h, clip)
        if self.space is not None:
            h = self.space(h, clip)
        if self.text is not None:
            h = self.text(h, clip, text)
        if self.time_attention is not None:
            h = self.time_attention(h, clip)
        return h


class VideoUNet(nn.Module):
    """Denoiser: (z_t, t, cond) -> v, eps or x as the stage's `Diffusion` says.

    With `checkpointing` the backward pass computes every block again instead of keeping its activations.
    """

    checkpointing = False

    def __init__(self, cfg: UNetConfig) -> None:
        super().__init__()
        self.cfg = cfg
        c, e, pixels = cfg.levels[0].channels, cfg.embedding, cfg.patch**2
        self.conv_in = nn.Conv2d((2 * cfg.channels + 1) * pixels, c, 3, padding=1)
        self.embed = Embedding(cfg)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        self.shrink = nn.ModuleList()
        self.grow = nn.ModuleList()
        self.time_after = nn.ModuleDict()  # pseudo-3D parts of the three kinds of convolution here
        if cfg.levels[0].mixer.has(Mixer.PSEUDO):
            self.time_after["in"] = PseudoConv(c)
        for i, level in enumerate(cfg.levels):
            if i:
                self.shrink.append(nn.Conv2d(c, level.channels, 3, stride=2, padding=1))
                c = level.channels
                if level.mixer.has(Mixer.PSEUDO):
                    self.time_after[f"shrink{i}"] = PseudoConv(c)
            stack = nn.ModuleList()
            for _ in range(level.blocks):
                stack.append(Block(c, level, cfg))
                c = level.channels
            self.down.append(stack)
        self.middle = Block(c, cfg.levels[-1], cfg)
        for i, level in reversed(list(enumerate(cfg.levels))):
            stack = nn.ModuleList()
            for number in range(level.ups):
                stack.append(Block(2 * c if number < level.blocks else c, level, cfg))
            self.up.append(stack)
            if i:
                self.grow.append(nn.Conv2d(c, cfg.levels[i - 1].channels, 3, padding=1))
                c = cfg.levels[i - 1].channels
                if cfg.levels[i - 1].mixer.has(Mixer.PSEUDO):
                    self.time_after[f"grow{i}"] = PseudoConv(c)
        self.norm_out = FiLM(c, e)
        self.conv_out = zero(nn.Conv2d(c, cfg.channels * pixels, 3, padding=1))
        self.through = zero(nn.Linear(e, 2 * cfg.channels))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def reach(self) -> int | None:
        """A frame of the output depends on no other that is further away; None: on all of them."""
        if self.cfg.frame_position or any(isinstance(module, TemporalAttention) for module in self.modules()):
            return None
        convs = (module for module in self.modules() if isinstance(module, nn.Conv2d))
        return sum(conv.kernel_size[0] // 2 for conv in convs if conv.kernel_size[1] < conv.kernel_size[0])

    def elements(self, height: int, width: int) -> int:
        """Of the largest tensor, for each frame of height x width pixels."""
        cfg = self.cfg
        sizes = [(2 * cfg.channels + 1) * height * width]
        for i, level in enumerate(cfg.levels):
            below = cfg.levels[min(i + 1, len(cfg.levels) - 1)].channels  # made larger before it is made narrower
            wide = max((3 if level.spatial_attention else 2) * level.channels, below)
            sizes.append(wide * height * width // (cfg.patch * 2**i) ** 2)
        return max(sizes)

    def forward(self, z: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
        """z (B, C, F, H, W), t (B,) in [0, 1], w (B,) the guidance weight of a guidance-distilled model."""
        batch, _, frames, height, width = z.shape
        embedding = self.embed(t, cond, w, frames)
        clip = Clip(batch, frames, embedding, cond.segments)
        seen = torch.cat([z, cond.concat, cond.mask.expand(-1, -1, -1, height, width)], 1)
        seen = seen.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        h = self.conv_in(F.pixel_unshuffle(seen, self.cfg.patch).contiguous(memory_format=torch.channels_last))
        h = self._after("in", h, clip)
        skips: list[list[Tensor]] = []  # of each level
        for i, stack in enumerate(self.down):
            if i:
                h = self._after(f"shrink{i}", self.shrink[i - 1](h), clip)
            skips.append([])
            for block in stack:  # type: ignore[attr-defined]
                h = self._block(block, h, clip, cond.text)
                skips[-1].append(h)
        h = self._block(self.middle, h, clip, cond.text)
        for i, stack in enumerate(self.up):
            own = skips.pop()
            for block in stack:  # type: ignore[attr-defined]
                h = self._block(block, torch.cat([h, self._scaled(own.pop())], 1) if own else h, clip, cond.text)
            if i < len(self.grow):
                h = self.grow[i](F.interpolate(h, scale_factor=2, mode="nearest"))
                h = self._after(f"grow{len(self.grow) - i}", h, clip)
        out = self.conv_out(self.norm_out(h, clip, silu=True))
        out = F.pixel_shuffle(out, self.cfg.patch)
        # Pixels also pass straight through, weighted by the embedding: noise need not squeeze through the patches.
        gain_z, gain_low = self.through(embedding)[:, :, None, None].chunk(2, 1)
        c = self.cfg.channels
        out = out + gain_z * seen[:, :c] + (gain_low + self.cfg.residual) * seen[:, c : 2 * c]
        return torch.unflatten(out, 0, (batch, frames)).transpose(1, 2)

    def _after(self, name: str, h: Tensor, clip: Clip) -> Tensor:
        return self.time_after[name](h, clip) if name in self.time_after else h

    def _scaled(self, skip: Tensor) -> Tensor:
        return skip if self.cfg.skip_scale == 1 else skip * self.cfg.skip_scale

    def _block(self, block: nn.Module, h: Tensor, clip: Clip, text: Text) -> Tensor:
        return recomputed(block, h, clip, text) if self.checkpointing else block(h, clip, text)  # type: ignore[no-any-return]


def recomputed(block: Callable[..., Any], *args: Any) -> Any:
    """`block(*args)`, computed again in the backward pass instead of kept."""
    if not torch.is_grad_enabled():
        return block(*args)
    # On CUDA the backward pass has threads of its own, which do not see this one's choice of attention kernel.
    again = partial(copy_context().run, block)
    return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False)


class Embedding(nn.Module):
    """Time, augmentation level, frame rate, guidance weight, pooled text and frame position, one vector per frame."""

    def __init__(self, cfg: UNetConfig) -> None:
        super().__init__()
        e = cfg.embedding
        self.cfg = cfg
        self.time = nn.Linear(e, e)
        self.level = nn.Linear(e, e)
        self.fps = zero(nn.Linear(e, e))
        self.guidance = zero(nn.Linear(e, e))
        self.text = nn.Linear(cfg.text, e) if cfg.text else None
        self.frame = zero(nn.Linear(e, e)) if cfg.frame_position else None
        self.out = nn.Sequential(nn.SiLU(), nn.Linear(e, e), nn.SiLU())

    def forward(self, t: Tensor, cond: Cond, w: Tensor | None, frames: int) -> Tensor:
        """(B*F, E)."""
        e = self.cfg.embedding

        def waves(value: Tensor) -> Tensor:
            return sinusoid(value.float(), e, 1e4)

        dtype = unhalved(self.time.weight)
        out = self.time(waves(1000 * t).to(dtype)) + self.level(waves(1000 * cond.level).to(dtype))
        out = out + self.fps(waves(10 * cond.fps).to(dtype))
        if self.text is not None:
            out = out + self.text(cond.text.pooled().to(dtype))
        if w is not None:
            out = out + self.guidance(waves(10 * w).to(dtype))
        out = out[:, None].expand(-1, frames, -1)  # (B, F, E)
        if self.frame is not None:
            out = out + self.frame(waves(10 * self._position(cond, frames)).to(dtype)).view(len(t), frames, e)
        told: Tensor = self.out(out)
        return told.flatten(0, 1)

    def _position(self, cond: Cond, frames: int) -> Tensor:
        """Seconds since the first frame of the segment, (B*F,)."""
        index = torch.arange(frames, device=cond.fps.device).expand(len(cond.fps), -1)
        if cond.segments is not None:
            same = cond.segments[:, :, None] == cond.segments[:, None, :]
            index = (same & (index[:, None, :] < index[:, :, None])).sum(-1)
        return (index / cond.fps[:, None]).flatten()
