"""Group norm, FiLM and SiLU in one, of channels-last activations: `cascade::group_norm`.

PyTorch's CUDA group norm copies a channels-last input into another layout and hands that on (pytorch issue 111824), and
FiLM and SiLU are passes of their own. Here the activations are written once and read once where an image fits into
registers, else twice, in two launches. Triton on CUDA (`norm_triton`), plain torch on the CPU, where
`cascade.nets.layers` keeps to torch's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.kernels import say_once, unfit

__all__ = ["CHANNELS", "assumed", "group_norm", "native", "refusal", "takes", "wanted"]

CHANNELS = 4096  # a tile holds all channels of a position
IMAGE = 2**31 - 2**20  # numbers: places within an image are counted in 32 bits, and a little beyond its end

_native: ContextVar[bool] = ContextVar("native_norm", default=False)
_assumed: ContextVar[torch.dtype | None] = ContextVar("assumed_norm", default=None)


@contextmanager
def native() -> Iterator[None]:
    """torch's own group norm inside, in this thread: for comparisons."""
    token = _native.set(True)
    try:
        yield
    finally:
        _native.reset(token)


@contextmanager
def assumed(dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, in this thread, tensors without data are taken as on CUDA, under autocast to `dtype`: for counting."""
    token = _assumed.set(dtype)
    try:
        yield
    finally:
        _assumed.reset(token)


def refusal(x: Tensor, groups: int) -> str | None:
    """Why the Triton kernel cannot take x (N, C, H, W), None if it can."""
    if _native.get():
        return "it is switched off"
    if reason := unfit(x):
        return reason
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "the activations are not channels-last"
    if groups & (groups - 1):
        return f"{groups} groups are not a power of two"
    if x.shape[1] > CHANNELS:
        return f"{x.shape[1]} channels are more than {CHANNELS}"
    return f"images of {x.shape[1:].numel()} numbers: more than {IMAGE}" if x.shape[1:].numel() > IMAGE else None


def takes(x: Tensor, groups: int) -> bool:
    """Whether the Triton kernel takes x; if not on CUDA, says why, once."""
    if x.device.type != "cuda":
        return x.is_meta and _assumed.get() is not None
    reason = refusal(x, groups)
    if reason is not None:
        say_once(f"group norm is torch's own, not ours: {reason}")
    return reason is None


def wanted(x: Tensor) -> torch.dtype:
    """The type of what comes after a norm of x: under autocast that of autocast, else x's own."""
    if x.is_meta:
        return _assumed.get() or x.dtype
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None = None,
    *,
    groups: int,
    eps: float = 1e-5,
    silu: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """[silu of] norm(x) (1 + scale) + shift (Wu & He 2018; Perez et al. 2018), each image of the batch by itself.

    x (N, C, H, W) channels-last, weight and bias (C,), film (N, 2 C) = scale and shift -> (N, C, H, W) channels-last in
    `dtype` (None: x's). Statistics in float32. Raises ValueError for shapes that do not fit together.
    """
    channels = x.shape[1]
    if x.ndim != 4 or weight.shape != (channels,) or bias.shape != (channels,) or channels % groups:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, weight, bias))
        raise ValueError(
            f"group norm of x, weight, bias {shapes} in {groups} groups: expected (N, C, H, W), (C,), (C,)"
        )
    if film is not None and film.shape != (len(x), 2 * channels):
        raise ValueError(f"group norm with film {tuple(film.shape)}: expected (N, 2 C) = {(len(x), 2 * channels)}")
    x = x.contiguous(memory_format=torch.channels_last)
    film = film if film is None else film.contiguous()
    y: Tensor = torch.ops.cascade.group_norm(x, weight, bias, film, groups, eps, silu, dtype or x.dtype)[0]
    return y


# the operator --------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "cascade::group_norm",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor? film, int groups, float eps, bool silu, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
)
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(torch.unflatten(wide.flatten(2), 1, (groups, -1)), (2, 3), correction=0)
    rstd = (variance + eps).rsqrt()
    gain, offset, _ = _affine(weight, bias, film, wide)
    u = _normal(wide, mean, rstd) * gain + offset
    y = F.silu(u) if silu else u
    return y.to(dtype).contiguous(memory_format=torch.channels_last), mean, rstd


@_forward.register_kernel("cuda")
def _forward_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    from cascade.kernels import norm_triton

    with torch.cuda.device(x.device):
        return norm_triton.forward(x, weight, bias, film, groups, eps, silu, dtype)


@_forward.register_fake
def _forward_shapes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
    mean, rstd = (x.new_empty((len(x), groups), dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2))
    return y, mean, rstd


@torch.library.custom_op(
    "cascade::group_norm_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor? film, Tensor mean, Tensor rstd, int groups,"
    " bool silu) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide, du = x.to(mean.dtype), grad.to(mean.dtype)
    normal = _normal(wide, mean, rstd)
    gain, offset, one = _affine(weight, bias, film, wide)
    if silu:
        u = normal * gain + offset
        du = du * u.sigmoid() * (1 + u * (1 - u.sigmoid()))
    slopes, sums = (du * normal).sum((2, 3)), du.sum((2, 3))  # (N, C)
    inner = torch.unflatten((du * gain).flatten(2), 1, (groups, -1))  # (N, G, C / G, HW)
    along = torch.unflatten(normal.flatten(2), 1, (groups, -1))
    centred = inner - inner.mean((2, 3), keepdim=True) - along * (inner * along).mean((2, 3), keepdim=True)
    dx = (centred * rstd[:, :, None, None]).reshape(x.shape)
    daffine = torch.stack([(slopes * one[..., 0, 0]).sum(0), (sums * one[..., 0, 0]).sum(0)])
    dfilm = x.new_empty(0)
    if film is not None:
        dfilm = torch.cat([weight * slopes + bias * sums, sums], 1).to(film.dtype)
    return dx.to(x.dtype).contiguous(memory_format=torch.channels_last), daffine, dfilm


@_backward.register_kernel("cuda")
def _backward_cuda(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from cascade.kernels import norm_triton

    with torch.cuda.device(x.device):
        return norm_triton.backward(grad, x, weight, bias, film, mean, rstd, groups, silu)


@_backward.register_fake
def _backward_shapes(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dfilm = x.new_empty(0) if film is None else torch.empty_like(film)
    return dx, mean.new_empty((2, x.shape[1])), dfilm


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, film, ctx.groups, _, ctx.silu, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, film, mean, rstd)


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, film, mean, rstd = ctx.saved_tensors
    grad = grad.contiguous(memory_format=torch.channels_last)
    dx, daffine, dfilm = torch.ops.cascade.group_norm_backward(
        grad, x, weight, bias, film, mean, rstd, ctx.groups, ctx.silu
    )
    dweight, dbias = daffine.to(weight.dtype).unbind(0)
    return dx, dweight, dbias, None if film is None else dfilm, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _normal(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """(x - mean) / deviation of its group, (N, C, H, W)."""
    groups = torch.unflatten(x.flatten(2), 1, (mean.shape[1], -1))
    return ((groups - mean[:, :, None, None]) * rstd[:, :, None, None]).reshape(x.shape)


def _affine(weight: Tensor, bias: Tensor, film: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gain and offset of u = gain x^ + offset, and 1 + scale; each (N | 1, C, 1, 1)."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if film is None:
        return weight[None, :, None, None], bias[None, :, None, None], torch.ones_like(weight)[None, :, None, None]
    scale, shift = film.to(x.dtype)[:, :, None, None].chunk(2, 1)
    one = scale + 1
    return weight[:, None, None] * one, bias[:, None, None] * one + shift, one
