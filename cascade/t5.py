"""The encoder of T5 (Raffel et al. 2020) and T5 v1.1 (Shazeer 2020): its modules and weights named as transformers has
them, its numbers equal to transformers' bit for bit, without the two seconds that transformers takes to import.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gelu(x: Tensor) -> Tensor:
    """The tanh form (Hendrycks & Gimpel 2016), in the order of operations that transformers has."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


Activation = Callable[[Tensor], Tensor]
FEED_FORWARD: dict[str, tuple[Activation, bool]] = {"relu": (F.relu, False), "gated-gelu": (gelu, True)}  # gated or not


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """What T5's config.json says of its encoder; defaults are those of files that leave it out."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    @staticmethod
    def read(tree: Mapping[str, Any]) -> T5Config:
        """From config.json, which also says other things. Raises ValueError naming what is missing or unfit."""
        known = {field.name: field for field in fields(T5Config)}
        given = {name: tree[name] for name in known if name in tree}
        try:
            cfg = T5Config(**given)
        except TypeError as error:
            raise ValueError(str(error).partition("() ")[2]) from error
        for name, field in known.items():
            value = getattr(cfg, name)
            if field.type == "int" and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}, expected a whole number above 0")
        if type(cfg.layer_norm_epsilon) not in (int, float):
            raise ValueError(f"layer_norm_epsilon is {cfg.layer_norm_epsilon!r}, expected a number")
        if cfg.feed_forward_proj not in FEED_FORWARD:
            raise ValueError(f"feed_forward_proj is {cfg.feed_forward_proj!r}, expected {' or '.join(FEED_FORWARD)}")
        return cfg


class Table(nn.Module):
    """nn.Embedding without its initial values: to draw them under the meta device would import torch._dynamo."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)


class Norm(nn.Module):
    """x / rms(x) times a weight, the mean square in float32."""

    def __init__(self, cfg: T5Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(cfg.d_model))
        self.eps = cfg.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        square = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(square + self.eps)).to(self.weight.dtype)


class SelfAttention(nn.Module):
    """Softmax of q k^T + bias, unscaled; the bias of the first layer, by relative position, serves all."""

    def __init__(self, cfg: T5Config, first: bool) -> None:
        super().__init__()
        inner = cfg.num_heads * cfg.d_kv
        self.heads = cfg.num_heads
        self.q, self.k, self.v = (nn.Linear(cfg.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, cfg.d_model, bias=False)
        if first:
            self.relative_attention_bias = Table(cfg.relative_attention_num_buckets, cfg.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, L, D), bias (B or 1, h, L, L) -> (B, L, D)."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        answer: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return answer


class FeedForward(nn.Module):
    def __init__(self, cfg: T5Config) -> None:
        super().__init__()
        self.activation: Activation
        self.activation, gated = FEED_FORWARD[cfg.feed_forward_proj]
        names = ("wi_0", "wi_1") if gated else ("wi",)
        for name in names:
            self.add_module(name, nn.Linear(cfg.d_model, cfg.d_ff, bias=False))
        self.wo = nn.Linear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first, *gate = (part(x) for name, part in self.named_children() if name != "wo")
        inside = self.activation(first)
        out: Tensor = self.wo(inside * gate[0] if gate else inside)
        return out


class Residual(nn.Module):
    """x + part(norm(x)), the part under the name that the weights have for it."""

    def __init__(self, cfg: T5Config, name: str, part: nn.Module) -> None:
        super().__init__()
        self.add_module(name, part)
        self.layer_norm = Norm(cfg)
        self.part = name

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        out: Tensor = x + getattr(self, self.part)(self.layer_norm(x), *more)
        return out


class Layer(nn.Module):
    def __init__(self, cfg: T5Config, first: bool) -> None:
        super().__init__()
        attention = Residual(cfg, "SelfAttention", SelfAttention(cfg, first))
        self.layer = nn.ModuleList([attention, Residual(cfg, "DenseReluDense", FeedForward(cfg))])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, feed_forward = self.layer
        out: Tensor = feed_forward(attention(x, bias))
        return out


class Stack(nn.Module):
    def __init__(self, cfg: T5Config) -> None:
        super().__init__()
        self.embed_tokens = Table(cfg.vocab_size, cfg.d_model)
        self.block = nn.ModuleList([Layer(cfg, first=i == 0) for i in range(cfg.num_layers)])
        self.final_layer_norm = Norm(cfg)


class T5Encoder(nn.Module):
    """Piece ids (B, L) -> their embeddings in context (B, L, D)."""

    def __init__(self, cfg: T5Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.shared = Table(cfg.vocab_size, cfg.d_model)
        self.encoder = Stack(cfg)

    @property
    def device(self) -> torch.device:
        return self.shared.weight.device

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` (B, L) is True where a piece is real; every row has one."""
        bias = self.bias(ids.shape[1])
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None], torch.finfo(bias.dtype).min)
        x = self.encoder.embed_tokens(ids)
        for layer in self.encoder.block:
            x = layer(x, bias)
        out: Tensor = self.encoder.final_layer_norm(x)
        return out

    def bias(self, length: int) -> Tensor:
        """(1, h, L, L): what attention adds for each distance, by bucket."""
        place = torch.arange(length, device=self.device)
        table = self.get_parameter("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        found = F.embedding(self.bucket(place[None] - place[:, None]), table)
        return found.permute(2, 0, 1)[None]

    def bucket(self, distance: Tensor) -> Tensor:
        """Half of the buckets for what comes after, half for what was before: the first half of each for one distance
        each, the others for ranges that grow as powers up to the largest distance (Raffel et al. 2020, sec. 2.1)."""
        half = self.cfg.relative_attention_num_buckets // 2
        exact, far = half // 2, distance.abs()
        growth = torch.log(far.float() / exact) / math.log(self.cfg.relative_attention_max_distance / exact)
        ranges = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
        return (distance > 0) * half + torch.where(far < exact, far, ranges)
