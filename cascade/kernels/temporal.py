"""Attention of each position over the frames, read and written where the activations lie: (B, F, S, h, D), no copies.

One operator with its gradient, `cascade::temporal_attention`: Triton on CUDA (`temporal_triton`), plain torch on the
CPU, shapes alone for `torch.compile` and the meta device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cascade.kernels import EPS, unfit

__all__ = ["FRAMES", "FRAMES_FLOAT32", "HEAD", "angles", "attention", "precision", "refusal"]

FRAMES, HEAD = 128, 128  # the largest tile that a multiprocessor holds
FRAMES_FLOAT32 = 64  # half of it with gains or rotary


def refusal(q: Tensor, prepared: bool = False) -> str | None:
    """Why this kernel cannot take q (B, F, S, h, D), None if it can; `prepared`: with gains or rotary."""
    if q.device.type not in ("cpu", "cuda"):
        return f"it has kernels for cuda and cpu, not for {q.device.type}"
    if q.shape[1] > FRAMES:
        return f"{q.shape[1]} frames are more than {FRAMES}"
    if q.shape[-1] > HEAD:
        return f"a head size of {q.shape[-1]} is more than {HEAD}"
    if q.device.type == "cpu":
        return None
    most = FRAMES_FLOAT32 // 2 if prepared else FRAMES_FLOAT32
    if q.shape[1] > most and q.dtype is torch.float32:
        return f"{q.shape[1]} frames in float32 are more than {most}"
    return unfit(q)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    gains: Tensor | None = None,
    rotary: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T + bias) v over the frames of every position, and nothing else.

    q, k, v (B, F, S, h, D), any strides whose last is 1 -> (B, F, S, h, D) contiguous. bias (B | 1, h | 1, F | 1,
    F | 1) is shared by the positions and gets a gradient. scale defaults to D ** -0.5.
    gains (2, D): q and k are first divided by their root mean square and multiplied by them (Henry et al. 2020; Zhang &
    Sennrich 2019); they get a gradient. rotary (2, F, D / 2), float32: cosines and sines of the angles by which each
    frame's pairs of neighbouring channels of q and k are then turned (Su et al. 2021), see `angles`.
    Raises ValueError for tensors that do not fit together or that no kernel takes (`refusal`).
    """
    _check(q, k, v, bias, gains is not None or rotary is not None)
    frames, head = q.shape[1], q.shape[-1]
    if gains is not None and gains.shape != (2, head):
        raise ValueError(f"temporal attention with gains {tuple(gains.shape)}: expected (2, D) = {(2, head)}")
    if rotary is not None and (rotary.shape != (2, frames, head / 2) or rotary.dtype is torch.float16):
        raise ValueError(f"temporal attention with rotary {tuple(rotary.shape)}: expected (2, F, D / 2) in float32")
    gains, rotary = (x if x is None else x.contiguous() for x in (gains, rotary))
    scale = head**-0.5 if scale is None else scale
    out: Tensor = torch.ops.cascade.temporal_attention(q, k, v, bias, scale, False, gains, rotary)[0]
    return out


def angles(frames: int, head: int, longest: float = 1e4, device: torch.device | None = None) -> Tensor:
    """Cosines and sines for `rotary`, (2, F, D / 2): wavelengths of 2 pi to nearly 2 pi `longest` frames."""
    frequency = longest ** -(torch.arange(0, head, 2, device=device) / head)
    angle = torch.arange(frames, device=device)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()])


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, prepared: bool) -> None:
    shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
    if q.ndim != 5 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(f"temporal attention of q, k, v {shapes}: expected one shape (B, F, S, h, D)")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"temporal attention of q, k, v {q.dtype}, {k.dtype}, {v.dtype}: expected one dtype")
    if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in (q, k, v)):
        raise ValueError("temporal attention: the last stride of q, k and v must be 1, call .contiguous() first")
    full = (q.shape[0], q.shape[3], q.shape[1], q.shape[1])
    if bias is not None and (bias.ndim != 4 or any(n not in (1, m) for n, m in zip(bias.shape, full, strict=True))):
        raise ValueError(f"temporal attention bias {tuple(bias.shape)} does not broadcast to (B, h, F, F) = {full}")
    if q.device.type in ("cpu", "cuda") and (reason := refusal(q, prepared)):
        raise ValueError(f"temporal attention of {shapes}: {reason}")


def precision() -> str:
    """How products of float32 are made: as torch's own."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


# the operator --------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "cascade::temporal_attention",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor q, Tensor k, Tensor v, Tensor? bias, float scale, bool lse, Tensor? gains=None,"
    " Tensor? rotary=None) -> (Tensor, Tensor)",
)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    lse: bool,
    gains: Tensor | None = None,
    rotary: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    a = _scores(_prepare(q, gains, 0, rotary), _prepare(k, gains, 1, rotary), bias, scale)
    out = torch.einsum("bshmn,bnshd->bmshd", a.softmax(-1), v.to(a.dtype)).to(q.dtype).contiguous()
    return out, a.logsumexp(-1).contiguous() if lse else a.new_empty(0)


@_forward.register_kernel("cuda")
def _forward_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    lse: bool,
    gains: Tensor | None = None,
    rotary: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from cascade.kernels import temporal_triton

    with torch.cuda.device(q.device):
        return temporal_triton.forward(q, k, v, bias, scale, lse, precision(), None, gains, rotary)


@_forward.register_fake
def _forward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    lse: bool,
    gains: Tensor | None = None,
    rotary: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, frames, positions, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((batch, positions, heads, frames) if lse else (0,), dtype=wide)


@torch.library.custom_op(
    "cascade::temporal_attention_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? bias, float scale, bool bias_gradient,"
    " Tensor? gains=None, Tensor? rotary=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    bias_gradient: bool,
    gains: Tensor | None = None,
    rotary: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide_q, wide_k = _prepare(q, gains, 0, rotary), _prepare(k, gains, 1, rotary)
    p = _scores(wide_q, wide_k, bias, scale).softmax(-1)
    grad, wide_v = grad.to(p.dtype), v.to(p.dtype)
    dv = torch.einsum("bshmn,bmshd->bnshd", p, grad)
    da = torch.einsum("bmshd,bnshd->bshmn", grad, wide_v)
    da = p * (da - (p * da).sum(-1, keepdim=True))
    dq, dk = torch.einsum("bshmn,bnshd->bmshd", da, wide_k), torch.einsum("bshmn,bmshd->bnshd", da, wide_q)
    dbias = p.new_empty(0)
    if bias is not None and bias_gradient:
        dbias = (da.sum(1) if bias.shape[0] > 1 else da.sum((0, 1))[None]).contiguous()
    dq, dgain_q = _unprepare(dq * scale, q, gains, 0, rotary)
    dk, dgain_k = _unprepare(dk * scale, k, gains, 1, rotary)
    dgains = p.new_empty(0) if gains is None else torch.stack([dgain_q, dgain_k])
    dq, dk, dv = (x.to(q.dtype).contiguous() for x in (dq, dk, dv))
    return dq, dk, dv, dbias, dgains


@_backward.register_kernel("cuda")
def _backward_cuda(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    bias_gradient: bool,
    gains: Tensor | None = None,
    rotary: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from cascade.kernels import temporal_triton

    with torch.cuda.device(q.device):
        return temporal_triton.backward(grad, q, k, v, bias, scale, bias_gradient, precision(), None, gains, rotary)


@_backward.register_fake
def _backward_shapes(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    bias_gradient: bool,
    gains: Tensor | None = None,
    rotary: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    shape = (0,) if bias is None or not bias_gradient else (bias.shape[0], q.shape[3], q.shape[1], q.shape[1])
    dbias, dgains = (q.new_empty(x, dtype=wide) for x in (shape, (0,) if gains is None else (2, q.shape[-1])))
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape), dbias, dgains


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, ctx.scale, _, gains, rotary = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, bias, gains, rotary)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, bias, gains, rotary = ctx.saved_tensors
    wanted = bias is not None and ctx.needs_input_grad[3]
    if grad.stride(-1) != 1:  # a gradient that was expanded
        grad = grad.contiguous()
    dq, dk, dv, dbias, dgains = torch.ops.cascade.temporal_attention_backward(
        grad, q, k, v, bias, ctx.scale, wanted, gains, rotary
    )
    dbias = dbias.sum_to_size(bias.shape).to(bias.dtype) if wanted else None
    return dq, dk, dv, dbias, None, None, None if gains is None else dgains.to(gains.dtype), None


_forward.register_autograd(_differentiate, setup_context=_save)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """scale q k^T + bias, (B, S, h, F, F), in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    a = torch.einsum("bmshd,bnshd->bshmn", q.to(wide) * scale, k.to(wide))
    return a if bias is None else a + bias.to(wide)[:, None]


def _prepare(x: Tensor, gains: Tensor | None, which: int, rotary: Tensor | None) -> Tensor:
    """What the scores are made of, in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if gains is not None:
        x = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * gains[which]
    return x if rotary is None else _turn(x, *rotary.to(x.dtype))


def _unprepare(dy: Tensor, x: Tensor, gains: Tensor | None, which: int, rotary: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of x and of its gain from that of `_prepare`'s answer."""
    if rotary is not None:
        cos, sin = rotary.to(dy.dtype)
        dy = _turn(dy, cos, -sin)
    if gains is None:
        return dy, dy.new_empty(0)
    x = x.to(dy.dtype)
    rms = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    dgain, dy = (dy * x * rms).sum((0, 1, 2, 3)), dy * gains[which]
    return rms * (dy - x * rms * (dy * x * rms).mean(-1, keepdim=True)), dgain


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring channels of x (B, F, S, h, D) as a pair, turned by the angle of their frame, (F, D / 2)."""
    one, two = x[..., ::2], x[..., 1::2]
    cos, sin = cos[:, None, None], sin[:, None, None]
    return torch.stack([one * cos - two * sin, one * sin + two * cos], -1).flatten(-2)
