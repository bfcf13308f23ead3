"""`UNet3D`, the denoiser that the public weights belong to: Stable Diffusion's and DeepFloyd IF's U-Nets and the video
models inflated from them (ModelScope and Zeroscope, Show-1, LaVie).

Its state dict has the published names and shapes, so that a strict load says that the network is the same, and writing
it back is the identity. What shapes do not show stands in the configuration, above all which way channels are cut into
heads: Show-1's temporal attention has 64 heads of C / 64 channels where ModelScope's has C / 64 heads of 64, from the
same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cascade.attention import attend
from cascade.cond import Cond
from cascade.errors import ConfigError
from cascade.nets.layers import Norm, channels_last, sinusoid, unhalved
from cascade.nets.unet import recomputed
from cascade.nets.unet3d_around import FramesThenSpace, Shift
from cascade.nets.unet3d_attention import AddedKV, Rotary, SpatialTransformer, TemporalTransformer
from cascade.nets.unet3d_blocks import Double, Halve, Resample, Resnet, TemporalConvs, Told, normed
from cascade.nets.unet3d_config import Act, Space, Time, UNet3DConfig

TIMESTEPS = 1000  # of the discrete training of all these networks


class Stack(nn.Module):
    """Residual blocks of one resolution, each followed by what mixes frames, by attention, and by that over frames.

    The last thing may be to halve or double the resolution.
    """

    def __init__(
        self,
        cfg: UNet3DConfig,
        widths: list[int],
        c: int,
        attentions: int,
        scale: float,
        resample: Resample = Resample.NONE,
        own: bool = True,
    ) -> None:
        """`widths`: the channels that come into each residual block; `attentions`: how many of them have one."""
        super().__init__()
        beside, added = cfg.time is Time.BESIDE, cfg.space is Space.ADDED_KV
        heads = cfg.temporal_heads.of(c)
        self.resnets = nn.ModuleList(Resnet(cin, c, cfg, scale) for cin in widths)
        self.temp_convs = nn.ModuleList(TemporalConvs(c, cfg) for _ in widths if beside)
        self.attentions = nn.ModuleList(_attention(c, cfg, own) for _ in range(attentions))
        self.temp_attentions = nn.ModuleList(
            TemporalTransformer(c, heads, c, cfg.groups) for _ in range(attentions) if beside
        )
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        if resample is Resample.HALVE:
            self.downsamplers.append(Resnet(c, c, cfg, scale, resample) if added else Halve(c))
        if resample is Resample.DOUBLE:
            self.upsamplers.append(Resnet(c, c, cfg, scale, resample) if added else Double(c))

    def step(self, i: int, h: Tensor, told: Told) -> Tensor:
        """The i-th residual block and what follows it."""
        for modules in (self.resnets, self.temp_convs, self.attentions, self.temp_attentions):
            if i < len(modules):
                h = modules[i](h, told)
        return h


def _attention(c: int, cfg: UNet3DConfig, own: bool) -> nn.Module:
    if cfg.space is Space.ADDED_KV:
        return AddedKV(c, cfg)
    return (FramesThenSpace if cfg.time is Time.AROUND else SpatialTransformer)(c, cfg, own)


class TimestepEmbedding(nn.Module):
    """Cosines and sines of a timestep through two linear maps."""

    def __init__(self, waves: int, embedding: int, activation: Act) -> None:
        super().__init__()
        self.waves, self.activation = waves, activation
        self.linear_1 = nn.Linear(waves, embedding)
        self.linear_2 = nn.Linear(embedding, embedding)

    def forward(self, timestep: Tensor) -> Tensor:
        """(B,) -> (B, E)."""
        waves = sinusoid(timestep, self.waves, 1e4, closed=False).to(unhalved(self.linear_1.weight))
        out: Tensor = self.linear_2(self.activation(self.linear_1(waves)))
        return out


class LevelTable(nn.Embedding):
    """An embedding for each of the 1000 noise levels; one between two of them is told as the nearer."""

    def __init__(self, embedding: int) -> None:
        super().__init__(TIMESTEPS, embedding)

    def forward(self, level: Tensor) -> Tensor:
        """(B,) -> (B, E)."""
        return super().forward(level.round().long())


class AttentionPool(nn.Module):
    """Attention of the mean token to itself and all tokens, padding too."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(nn.init.uniform_(torch.empty(1, width), -1, 1) / width**0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, D)."""
        mean = x.mean(1, keepdim=True) + self.positional_embedding
        x = torch.cat([mean, x], 1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (self.q_proj(mean), self.k_proj(x), self.v_proj(x)))
        return attend(q, k, v).flatten(1)


class PooledText(nn.Module):
    """The text as one vector that joins the time embedding."""

    def __init__(self, width: int, embedding: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.pool = AttentionPool(width, heads)
        self.proj = nn.Linear(width, embedding)
        self.norm2 = nn.LayerNorm(embedding)

    def forward(self, text: Tensor) -> Tensor:
        """(B, N, D) -> (B, E)."""
        out: Tensor = self.norm2(self.proj(self.pool(self.norm1(text))))
        return out


class UNet3D(nn.Module):
    """Denoiser: what a stage calls is `forward`, what the authors' code calls is `run`.

    With `checkpointing` the backward pass computes every block again instead of keeping its activations.
    """

    checkpointing = False

    def __init__(self, cfg: UNet3DConfig) -> None:
        super().__init__()
        self.cfg = cfg
        first, c = cfg.levels[0].channels, cfg.channels
        self.conv_in = nn.Conv2d(c + cfg.concat * cfg.incoming + cfg.mask, first, 3, padding=1)
        self.time_embedding = TimestepEmbedding(first, cfg.embedding, cfg.activation)
        self.class_embedding = _level_embedding(cfg) if cfg.noise_level else None
        self.encoder_hid_proj = None if cfg.context is None else nn.Linear(cfg.text, cfg.context)
        self.add_embedding = None if cfg.pool is None else PooledText(cfg.text, cfg.embedding, cfg.pool)
        size = cfg.transformer_in
        self.transformer_in = None if size is None else TemporalTransformer(first, 8, 8 * size, cfg.groups)
        self.down_blocks = nn.ModuleList(_down(cfg))
        middle = cfg.levels[-1].channels
        self.mid_block = Stack(cfg, [middle, middle], middle, 1, cfg.middle_scale)
        self.up_blocks = nn.ModuleList(_up(cfg))
        around = cfg.levels if cfg.time is Time.AROUND else []
        self.down_temporal_blocks = nn.ModuleList(Shift(level.channels, cfg) for level in around)
        self.mid_temporal_block = Shift(middle, cfg) if around else None
        self.up_temporal_blocks = nn.ModuleList(Shift(level.channels, cfg) for level in reversed(around))
        # published once more by itself; every attention over frames has its own
        self.temporal_rotary_emb = Rotary(cfg.rotary) if around and cfg.rotary else None
        self.conv_norm_out = Norm(first, cfg.groups, cfg.eps)
        self.conv_out = nn.Conv2d(first, c * (1 + cfg.variance), 3, padding=1)
        channels_last(self)

    def forward(self, z: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
        """z (B, C, F, H, W) and t (B,) as `Diffusion.level` says -> eps or v (B, C, F, H, W), and where the network has
        it the variance on C more channels.

        Under guidance the variance of the branch with text is the one to take; DPM-Solver++ takes none.
        """
        if w is not None:
            raise ConfigError("this network is not told a guidance weight", fix="w_range=null")
        if cond.segments is not None:
            raise ConfigError(
                "this network's norms see all frames of a clip, so clips cannot share one", fix="train.images=0"
            )
        height, width = z.shape[3:]
        seen = [z]
        if self.cfg.concat:
            seen.append(cond.concat)
        if self.cfg.mask:
            seen.append(cond.mask.expand(-1, -1, z.shape[2], height, width))
        level = timestep(cond.level) if self.cfg.noise_level else None
        return self.run(torch.cat(seen, 1), timestep(t), cond.text.tokens, level)

    def run(self, x: Tensor, timestep: Tensor, text: Tensor, level: Tensor | None = None) -> Tensor:
        """x (B, Cin, F, H, W), timestep and level (B,) from 0 to 999, text (B, N, D) -> (B, Cout, F, H, W).

        All N tokens are attended, padding too: none of these networks was trained with a mask.
        """
        batch, _, frames = x.shape[:3]
        told = self._told(batch, frames, timestep, text.to(unhalved(self.conv_in.weight)), level)
        h = x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        h = self.conv_in(h)
        if self.transformer_in is not None:
            h = self.transformer_in(h, told)
        skips = [h]
        for block, shift in _stacks(self.down_blocks, self.down_temporal_blocks):
            for i in range(len(block.resnets)):
                h = self._run(block.step, i, h, told)
                skips.append(h)
            for halve in block.downsamplers:
                h = halve(h, told)
                skips.append(h)
            h = h if shift is None else self._run(shift, h, told)
        for i in range(len(self.mid_block.resnets)):
            h = self._run(self.mid_block.step, i, h, told)
        h = h if self.mid_temporal_block is None else self._run(self.mid_temporal_block, h, told)
        for block, shift in _stacks(self.up_blocks, self.up_temporal_blocks):
            for i in range(len(block.resnets)):
                h = self._run(block.step, i, torch.cat([h, skips.pop()], 1), told)
            for double in block.upsamplers:
                h = double(h, told)
            h = h if shift is None else self._run(shift, h, told)
        h = self.conv_out(normed(self.cfg, self.conv_norm_out, h, told))
        return torch.unflatten(h, 0, (batch, frames)).transpose(1, 2)

    def _told(self, batch: int, frames: int, timestep: Tensor, text: Tensor, level: Tensor | None) -> Told:
        embedding = self.time_embedding(timestep)
        if self.class_embedding is not None:
            assert level is not None, "the network is told a noise level"
            embedding = embedding + self.class_embedding(level)
        if self.add_embedding is not None:
            embedding = embedding + self.add_embedding(text)
        if self.cfg.time_act is not None:
            embedding = self.cfg.time_act(embedding)
        context = text if self.encoder_hid_proj is None else self.encoder_hid_proj(text)
        return Told(batch, frames, embedding.repeat_interleave(frames, 0), None, context)

    def _run(self, part: Callable[..., Tensor], *given: Any) -> Tensor:
        out: Tensor = recomputed(part, *given) if self.checkpointing else part(*given)
        return out


def timestep(t: Tensor) -> Tensor:
    """A time in [0, 1] as a step of discrete training, whose steps 0, 1, ..., 999 stand at 0.001, 0.002, ..., 1."""
    # rounded: in float32 0.95 would be told as step 948.99998
    return (TIMESTEPS * t.double() - 1).round(decimals=3).clamp(min=0).float()


def _level_embedding(cfg: UNet3DConfig) -> nn.Module:
    if cfg.noise_label:
        return LevelTable(cfg.embedding)
    return TimestepEmbedding(cfg.levels[0].channels, cfg.embedding, cfg.activation)


def _stacks(blocks: nn.ModuleList, shifts: nn.ModuleList) -> Iterator[tuple[Stack, nn.Module | None]]:
    """Blocks, each with what corrects its result, if anything does."""
    for i, block in enumerate(blocks):
        assert isinstance(block, Stack)
        yield block, shifts[i] if i < len(shifts) else None


def _down(cfg: UNet3DConfig) -> Iterator[Stack]:
    c = cfg.levels[0].channels
    for i, level in enumerate(cfg.levels):
        widths = [c] + [level.channels] * (level.blocks - 1)
        c = level.channels
        resample = Resample.NONE if i == len(cfg.levels) - 1 else Resample.HALVE
        yield Stack(cfg, widths, c, level.blocks * level.attention, cfg.scale, resample, level.own)


def _up(cfg: UNet3DConfig) -> Iterator[Stack]:
    """Each residual block also takes what the way down left: that of its own level, at last that of the level above."""
    c = cfg.levels[-1].channels
    for i, level in reversed(list(enumerate(cfg.levels))):
        skips = [level.channels] * level.blocks + [cfg.levels[max(i - 1, 0)].channels]
        come = [c] + [level.channels] * level.blocks
        c = level.channels
        widths = [a + b for a, b in zip(come, skips, strict=True)]
        resample = Resample.DOUBLE if i else Resample.NONE
        yield Stack(cfg, widths, c, len(widths) * level.attention, cfg.scale, resample, level.own)
