"""Attention within frames, to the text and over frames, and the transformers made of it, of `UNet3D`.

Conventions as in `cascade.nets.unet3d_blocks`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.attention import attend
from cascade.nets.layers import Norm, from_video, tokens, untokens, zero
from cascade.nets.unet3d_blocks import Told, frames_first
from cascade.nets.unet3d_config import UNet3DConfig

TRANSFORMER_EPS = 1e-6  # of the norm in front of a transformer; all others have `UNet3DConfig.eps`
DISTANCE = 32  # frames: LaVie's relative positions beyond it share their last bucket


class AddedKV(nn.Module):
    """Residual attention of a frame's positions to the text and to one another, in one softmax (GLIDE, IF)."""

    def __init__(self, c: int, cfg: UNet3DConfig) -> None:
        super().__init__()
        self.heads = cfg.heads.of(c)
        self.group_norm = Norm(c, cfg.groups)
        self.norm_cross = nn.GroupNorm(32, cfg.width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(c, c) for _ in range(3))
        self.add_k_proj, self.add_v_proj = (nn.Linear(cfg.width, c) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, h: Tensor, told: Told) -> Tensor:
        text = self.norm_cross(told.context.transpose(1, 2)).transpose(1, 2)
        x = tokens(self.group_norm(h))  # (B*F, HW, C)

        def with_text(own: nn.Linear, added: nn.Linear) -> Tensor:
            both = torch.cat([added(text).repeat_interleave(told.frames, 0), own(x)], 1)
            return torch.unflatten(both, -1, (self.heads, -1))

        q = self.to_q(x).unflatten(-1, (self.heads, -1))
        out = attend(q, with_text(self.to_k, self.add_k_proj), with_text(self.to_v, self.add_v_proj))
        return h + untokens(self.to_out[0](out.flatten(2)), h)


class Attention(nn.Module):
    """Attention to `context`, or to the tokens themselves."""

    def __init__(self, c: int, heads: int, width: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(c, c, bias=False)
        self.to_k, self.to_v = (nn.Linear(width or c, c, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def project(self, x: Tensor, context: Tensor) -> list[Tensor]:
        """q of x, k and v of `context`, each (..., C) -> (..., h, D)."""
        pairs = (self.to_q, x), (self.to_k, context), (self.to_v, context)
        return [f(part).unflatten(-1, (self.heads, -1)) for f, part in pairs]

    def out(self, x: Tensor) -> Tensor:
        """(..., h, D) -> (..., C)."""
        out: Tensor = self.to_out[0](x.flatten(-2))
        return out

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, M, C) and context (B, N, D), or x (B, F, S, C): each of S positions attends to its own frames."""
        return self.out(attend(*self.project(x, x if context is None else context)))

    def within(self, x: Tensor, told: Told) -> Tensor:
        """Of the positions of each frame, x (B*F, HW, C)."""
        return self(x)  # type: ignore[no-any-return]


class SparseAttention(Attention):
    """Each frame attends to the first frame and to the one before it (Wu et al. 2022, Tune-A-Video)."""

    def within(self, x: Tensor, told: Told) -> Tensor:
        q, *both = self.project(x, x)
        k, v = (self._seen(part, told) for part in both)
        return self.out(attend(q, k, v))

    def _seen(self, part: Tensor, told: Told) -> Tensor:
        video = torch.unflatten(part, 0, (told.batch, told.frames))
        first = video[:, :1].expand_as(video)
        before = torch.cat([video[:, :1], video[:, :-1]], 1)
        return torch.cat([first, before], 2).flatten(0, 1)


class Rotary(nn.Module):
    """Turns the first channels of each head, in pairs, by angles that grow with the frame (Su et al. 2021, eq. 34)."""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 10000.0 ** -(torch.arange(0, channels, 2) / channels))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, F, S, h, D)."""
        rates = self.freqs.to(torch.promote_types(x.dtype, torch.float32))  # half an angle's digits would not do
        angle = (torch.arange(x.shape[1], device=x.device)[:, None] * rates)[:, None, None]  # (F, 1, 1, pairs)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        turned, rest = x.tensor_split([2 * len(self.freqs)], -1)
        a, b = torch.unflatten(turned, -1, (-1, 2)).unbind(-1)
        pairs = torch.stack([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.cat([pairs.flatten(-2), rest], -1)


class RelativeBias(nn.Module):
    """A number for each head and bucket of frame distances: single ones, then logarithmic ones (Raffel et al. 2020)."""

    def __init__(self, buckets: int, heads: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.relative_attention_bias = nn.Embedding(buckets, heads)

    def forward(self, frames: int) -> Tensor:
        """(1, h, F, F)."""
        frame = torch.arange(frames, device=self.relative_attention_bias.weight.device)
        ahead = frame[None, :] - frame[:, None]  # key's frame less the query's
        half, exact = self.buckets // 2, self.buckets // 4
        distance = ahead.abs()
        grown = torch.log(distance.clamp(min=exact).float() / exact) / math.log(DISTANCE / exact) * (half - exact)
        far = (exact + grown.long()).clamp(max=half - 1)
        bucket = torch.where(distance < exact, distance, far) + half * (ahead > 0)
        out: Tensor = self.relative_attention_bias(bucket)
        return out.permute(2, 0, 1)[None]


class TemporalAttention(Attention):
    """LaVie's attention over frames inside a spatial transformer, with or without its two kinds of position."""

    def __init__(self, c: int, cfg: UNet3DConfig) -> None:
        super().__init__(c, cfg.temporal_heads.of(c))
        self.rotary_emb = Rotary(cfg.rotary) if cfg.rotary else None
        self.time_rel_pos_bias = RelativeBias(cfg.buckets, self.heads) if cfg.buckets else None
        zero(self.to_out[0])  # type: ignore[type-var]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, F, S, C)."""
        q, k, v = self.project(x, x)
        if self.rotary_emb is not None:
            q, k = self.rotary_emb(q), self.rotary_emb(k)
        bias = None if self.time_rel_pos_bias is None else self.time_rel_pos_bias(x.shape[1]).to(x.dtype)
        return self.out(attend(q, k, v, bias=bias))


class Gated(nn.Module):
    """a gelu(b) (Shazeer 2020)."""

    def __init__(self, c: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(c, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.proj(x).chunk(2, -1)
        out: Tensor = a * F.gelu(b)
        return out


class FeedForward(nn.Module):
    """Four times as wide inside."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.net = nn.Sequential(Gated(c, 4 * c), nn.Identity(), nn.Linear(4 * c, c))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class FrameBlock(nn.Module):
    """Twice self-attention of a position over its frames, then a feed-forward."""

    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(c) for _ in range(3))
        self.attn1, self.attn2 = (Attention(c, heads) for _ in range(2))
        self.ff = FeedForward(c)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, F, S, C)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x))
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class TemporalTransformer(nn.Module):
    """Residual transformer over the frames of every position; the projection out of it starts at zero."""

    def __init__(self, c: int, heads: int, inner: int, groups: int) -> None:
        super().__init__()
        self.norm = Norm(c, groups, TRANSFORMER_EPS)
        self.proj_in = nn.Linear(c, inner)
        self.transformer_blocks = nn.ModuleList([FrameBlock(inner, heads)])
        self.proj_out = zero(nn.Linear(inner, c))

    def forward(self, h: Tensor, told: Told) -> Tensor:
        x = self.norm(frames_first(h, told)).permute(0, 2, 3, 1)  # (B, F, HW, C)
        x = self.proj_out(self.transformer_blocks[0](self.proj_in(x)))
        return h + from_video(x, *h.shape[2:])


class TextBlock(nn.Module):
    """Self-attention of a frame's positions, attention to the text, a feed-forward; LaVie's also over the frames.

    Without `own` the first attention is to the text as well.
    """

    TIME = "temp"  # ends the published names of what attends over frames

    def __init__(self, c: int, cfg: UNet3DConfig, own: bool = True) -> None:
        super().__init__()
        self.own, self.inside, self.late = own, cfg.inside, cfg.temporal_last
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(c) for _ in range(3))
        heads = cfg.heads.of(c)
        self.attn1 = (SparseAttention if cfg.sparse else Attention)(c, heads) if own else Attention(c, heads, cfg.width)
        self.attn2 = Attention(c, heads, cfg.width)
        self.ff = FeedForward(c)
        if cfg.inside:
            self.add_module(f"norm_{self.TIME}", nn.LayerNorm(c))
            self.add_module(f"attn_{self.TIME}", TemporalAttention(c, cfg))

    def forward(self, x: Tensor, told: Told) -> Tensor:
        """x (B*F, HW, C)."""
        seen = self.norm1(x)
        x = x + (self.attn1.within(seen, told) if self.own else self._text(self.attn1, seen, told))
        x = x + self._text(self.attn2, self.norm2(x), told)
        x = x if self.late else self._time(x, told)
        x = x + self.ff(self.norm3(x))
        return self._time(x, told) if self.late else x

    def _text(self, attention: Attention, x: Tensor, told: Told) -> Tensor:
        clip = torch.unflatten(x, 0, (told.batch, -1)).flatten(1, 2)  # the text's k and v once per clip
        out: Tensor = attention(clip, told.context)
        return out.view_as(x)

    def _time(self, x: Tensor, told: Told) -> Tensor:
        if not self.inside:
            return x
        norm, attention = getattr(self, f"norm_{self.TIME}"), getattr(self, f"attn_{self.TIME}")
        video = torch.unflatten(norm(x), 0, (told.batch, told.frames))
        out: Tensor = x + attention(video).flatten(0, 1)
        return out


class SpatialTransformer(nn.Module):
    """Residual transformer over the positions of each frame (Rombach et al. 2022)."""

    BLOCK = TextBlock

    def __init__(self, c: int, cfg: UNet3DConfig, own: bool = True) -> None:
        super().__init__()
        self.norm = Norm(c, cfg.groups, TRANSFORMER_EPS)
        # Published as 1x1 convolutions by some, as linear maps by others: the same numbers in the same order.
        self.proj_in, self.proj_out = (nn.Linear(c, c) if cfg.linear else nn.Conv2d(c, c, 1) for _ in range(2))
        self.transformer_blocks = nn.ModuleList([self.BLOCK(c, cfg, own)])

    def forward(self, h: Tensor, told: Told) -> Tensor:
        x = _project(self.proj_in, tokens(self.norm(h)))
        x = self.transformer_blocks[0](x, told)
        return h + untokens(_project(self.proj_out, x), h)


def _project(module: nn.Module, x: Tensor) -> Tensor:
    """x (..., C) through a linear map or a 1x1 convolution."""
    weight = module.weight
    assert isinstance(weight, Tensor) and isinstance(module.bias, Tensor)
    return F.linear(x, weight.flatten(1), module.bias)
