"""Building blocks of the denoisers.

One activation layout everywhere: (B*F, C, H, W) in channels-last memory, which is also tokens (B*F, H*W, C), the
video (B, F, H*W, C) and, for a convolution along time, the channels-last image (B, C, F, H*W). All are views. Norms see
one frame at a time, so nothing but a temporal mixer ever crosses frames. `segments` (B, F) numbers the clips within a
batch entry: temporal mixers never cross its borders.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.attention import attend
from cascade.kernels import norm
from cascade.text import Text

Layer = TypeVar("Layer", nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass
class Clip:
    """What every block needs to know about the batch beside its activations."""

    batch: int
    frames: int
    embedding: Tensor  # (B*F, E): time, scalars, pooled text, frame position
    segments: Tensor | None  # (B, F) or None = one clip per entry

    def linked(self, offset: int) -> Tensor | None:
        """1 where frame f and frame f + offset belong to one segment, (B, F, 1, 1); None = no borders inside."""
        if self.segments is None:
            return None
        other = torch.roll(self.segments, -offset, 1)
        return (self.segments == other).view(self.batch, self.frames, 1, 1)


def zero(module: Layer) -> Layer:
    """Zero-initialised: a residual branch that ends in it is the identity at the start."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def channels_last(net: nn.Module) -> None:
    """Puts the weights of convolutions into channels-last memory. `Module.to` does so for all of one rank or fails."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in net.parameters():
        if parameter.ndim in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])


def halved(net: nn.Module, dtype: torch.dtype) -> None:
    """Casts the weights of linear maps and convolutions to what autocast casts them to at each call.

    Under autocast to that dtype every result stays equal bit for bit. What autocast leaves alone keeps its digits.
    """
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            module.to(dtype)


def unhalved(weight: Tensor) -> torch.dtype:
    """The dtype of a network whose layer has that weight, `halved` or not."""
    return torch.promote_types(weight.dtype, torch.float32)


def sinusoid(position: Tensor, width: int, longest: float, closed: bool = True) -> Tensor:
    """(N,) -> (N, width): cosines and sines with wavelengths 2 pi to 2 pi `longest` (Vaswani et al. 2017).

    `closed`: the last pair has the longest wavelength; if not, the one after it would (diffusers' freq_shift 0).
    """
    half = width // 2
    steps = max(half - 1, 1) if closed else half
    frequency = torch.exp(-math.log(longest) * torch.arange(half, device=position.device) / steps)
    angle = position.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


class Norm(nn.GroupNorm):
    """Group norm of every frame alone, in `groups` (None: at most 8) of equal size; FiLM and SiLU on top if asked for.

    On CUDA one Triton kernel does it all, where it runs; under autocast its output has the type of what comes next.
    """

    def __init__(self, channels: int, groups: int | None = None, eps: float = 1e-5) -> None:
        super().__init__(max(1, math.gcd(channels, 8)) if groups is None else groups, channels, eps)

    def forward(self, h: Tensor, film: Tensor | None = None, silu: bool = False) -> Tensor:
        """film (N, 2 C): scale and shift."""
        if norm.takes(h, self.num_groups):
            dtype = norm.wanted(h)
            return norm.group_norm(
                h, self.weight, self.bias, film, groups=self.num_groups, eps=self.eps, silu=silu, dtype=dtype
            )
        out = super().forward(h)
        if film is not None:
            scale, shift = film[:, :, None, None].chunk(2, 1)
            out = torch.addcmul(shift, out, scale + 1)
        return F.silu(out, inplace=not torch.is_grad_enabled()) if silu else out


class FiLM(nn.Module):
    """norm(h) (1 + scale) + shift with scale and shift read from the embedding (Perez et al. 2018)."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.affine = zero(nn.Linear(embedding, 2 * channels))

    def forward(self, h: Tensor, clip: Clip, silu: bool = False) -> Tensor:
        out: Tensor = self.norm(h, self.affine(clip.embedding), silu)
        return out


class TemporalConv(nn.Module):
    """Residual convolution along time, kernel 3; zero-initialised, so at first a video is its frames."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.conv = zero(nn.Conv2d(channels, channels, (3, 1), padding=(1, 0)))

    def forward(self, h: Tensor, clip: Clip) -> Tensor:
        height, width = h.shape[2:]
        x = as_video(self.norm(h, silu=True), clip)  # (B, F, HW, C)
        return h + from_video(along_time(self.conv, x, clip), height, width)


class PseudoConv(nn.Module):
    """Convolution along time, kernel 3, right behind a spatial one (Singer et al. 2022, Make-A-Video, sec. 3.2.1).

    It starts as Dirac's delta without a bias, which is the identity to the last bit.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0))
        with torch.no_grad():
            zero(self.conv).weight[:, :, 1, 0] = torch.eye(channels)

    def forward(self, h: Tensor, clip: Clip) -> Tensor:
        height, width = h.shape[2:]
        return from_video(along_time(self.conv, as_video(h, clip), clip), height, width)


class TemporalAttention(nn.Module):
    """Residual self-attention of each position over the frames, with a learned bias per head and frame distance.

    Distances beyond `reach` share the last entry, so that more frames than in training are legal (Ho et al. 2022, VDM).
    """

    def __init__(self, channels: int, head: int, reach: int = 32) -> None:
        super().__init__()
        self.heads, self.reach = max(1, channels // head), reach
        self.norm = Norm(channels)
        self.q, self.k, self.v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.out = zero(nn.Linear(channels, channels))
        self.distance = nn.Parameter(torch.zeros(self.heads, 2 * reach + 1))

    def bias(self, clip: Clip) -> Tensor:
        """(1 or B, heads, F, F): relative distance, minus infinity across segments."""
        frame = torch.arange(clip.frames, device=self.distance.device)
        distance = (frame[None, :] - frame[:, None]).clamp(-self.reach, self.reach) + self.reach
        bias = self.distance[:, distance][None]  # (1, h, F, F)
        if clip.segments is not None:
            other = clip.segments[:, :, None] != clip.segments[:, None, :]
            bias = bias.masked_fill(other[:, None], -math.inf)
        return bias

    def forward(self, h: Tensor, clip: Clip) -> Tensor:
        height, width = h.shape[2:]
        x = as_video(self.norm(h), clip)  # (B, F, HW, C)
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v))  # (B, F, HW, h, D)
        out = attend(q, k, v, bias=self.bias(clip))
        return h + from_video(self.out(out.reshape(x.shape)), height, width)


class SpatialAttention(nn.Module):
    """Residual self-attention over the positions of one frame."""

    def __init__(self, channels: int, head: int) -> None:
        super().__init__()
        self.heads = max(1, channels // head)
        self.norm = Norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, h: Tensor, clip: Clip) -> Tensor:
        x = tokens(self.norm(h))  # (B*F, HW, C)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return h + untokens(self.out(attend(q, k, v).flatten(2)), h)


class TextAttention(nn.Module):
    """Residual cross-attention to the prompt; a learned null token stands first, so dropped text is legal.

    All frames ask together: the keys and values of a prompt are projected once per clip, and once in all the steps of a
    sampling run if the text remembers them (`Text.once`).
    """

    def __init__(self, channels: int, head: int, text: int) -> None:
        super().__init__()
        self.heads = max(1, channels // head)
        self.norm = Norm(channels)
        self.q = nn.Linear(channels, channels, bias=False)
        self.kv = nn.Linear(text, 2 * channels, bias=False)
        # Standard deviation 0.02. randn and normal_ would import torch._dynamo under the meta device: seconds.
        self.null = nn.Parameter(torch.empty(1, 1, text))
        nn.init.uniform_(self.null, -0.035, 0.035)  # in place: diffusers replaces nn.init by what returns nothing
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, h: Tensor, clip: Clip, text: Text) -> Tensor:
        k, v, bias = text.once((self, h.dtype), lambda: self.context(text, h.dtype))
        q = self.q(tokens(self.norm(h))).reshape(clip.batch, -1, self.heads, h.shape[1] // self.heads)
        out = attend(q, k, v, bias=bias)  # (B, F*HW, h, D)
        return h + untokens(self.out(out.reshape(h.shape[0], -1, h.shape[1])), h)

    def context(self, text: Text, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (B, 1 + L, h, D) of null token and prompt; bias (B, 1, 1, 1 + L) that hides padding."""
        told = torch.cat([self.null.expand(len(text), -1, -1), text.tokens.to(dtype)], 1)
        k, v = self.kv(told).unflatten(-1, (2, self.heads, -1)).unbind(2)
        legal = F.pad(text.mask, (1, 0), value=True)[:, None, None]
        return k, v, torch.zeros(legal.shape, dtype=dtype, device=told.device).masked_fill(~legal, -math.inf)


def tokens(h: Tensor) -> Tensor:
    """(N, C, H, W) channels-last -> (N, H*W, C), a view."""
    return h.permute(0, 2, 3, 1).flatten(1, 2)


def untokens(x: Tensor, like: Tensor) -> Tensor:
    """(N, H*W, C) -> (N, C, H, W) channels-last, a view."""
    return torch.unflatten(x, 1, like.shape[2:]).permute(0, 3, 1, 2)


def as_video(h: Tensor, clip: Clip) -> Tensor:
    """(B*F, C, H, W) channels-last -> (B, F, H*W, C), a view."""
    return torch.unflatten(tokens(h), 0, (clip.batch, clip.frames))


def from_video(x: Tensor, height: int, width: int) -> Tensor:
    """(B, F, H*W, C) -> (B*F, C, H, W) channels-last, a view."""
    return torch.unflatten(x.flatten(0, 1), 1, (height, width)).permute(0, 3, 1, 2)


def along_time(conv: nn.Conv2d, x: Tensor, clip: Clip) -> Tensor:
    """`conv`, of kernel (3, 1), over the frames of x (B, F, HW, C); another segment counts as padding."""
    if clip.frames > 1 and clip.segments is None:
        return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # type: ignore[no-any-return]
    before, centre, after = conv.weight[:, :, :, 0].unbind(2)
    out = F.linear(x, centre, conv.bias)
    back, ahead = clip.linked(-1), clip.linked(1)
    if clip.frames > 1 and back is not None and ahead is not None:
        previous = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1) * back
        following = torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1) * ahead
        out = out + F.linear(previous, before) + F.linear(following, after)
    return out
