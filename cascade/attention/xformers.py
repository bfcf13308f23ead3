"""xformers' memory_efficient_attention: its CUDA kernels, on the CPU an operator of ours behind the same call, and our
own kernel for attention over frames as an operator of xformers (`temporal_operators`).

The only file that imports xformers, which takes seconds, so only when it is to run.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cascade.kernels import once, temporal

_HALF = (torch.float16, torch.bfloat16)


def available(q: Tensor, bias: Tensor | None = None) -> str | None:
    """Why xformers cannot take these tensors here, None if it can."""
    device = q.device.type
    if device not in ("cpu", "cuda"):
        return f"xformers has kernels for cuda and cpu, not for {device}"
    return reason(device) or (_unfit(q, bias) if device == "cuda" else None)


def reason(device: str | None = None) -> str | None:
    """Why xformers cannot be used on "cpu" or "cuda" (default: cuda if there is one), with the repair, or None."""
    return _reason(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """As `Kernel.run`; once differentiable."""
    from xformers.ops import memory_efficient_attention

    if bias is not None:
        bias = aligned(bias, k.shape[1]).expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        if bias.requires_grad and not (q.requires_grad or k.requires_grad or v.requires_grad):
            # xformers looks at q, k and v alone to decide on a gradient and would drop the bias' silently.
            q = q.detach().requires_grad_()
    # None lets xformers choose among its CUDA kernels; it has no list to put ours on.
    op = operators() if q.device.type == "cpu" else None
    return memory_efficient_attention(q, k, v, attn_bias=bias, op=op)  # type: ignore[no-any-return]


def aligned(bias: Tensor, keys: int) -> Tensor:
    """bias (b, h, m, n) -> (b, h, m, keys) in rows that begin every 16 bytes, which the CUDA kernels insist on."""
    bias = bias.expand(*bias.shape[:-1], keys).contiguous()
    rows = bias.view(-1, keys)  # also renews the strides of dims of size 1, which contiguous() may leave odd
    step = 16 // bias.element_size()
    if torch.compiler.is_compiling() or keys % step or bias.storage_offset() % step:  # no graph knows where it lies
        rows = functional.pad(rows, (0, -keys % step))
    return rows.view(*bias.shape[:-1], -1)[..., :keys]


@once
def _reason(device: str) -> str | None:
    # xformers reports a library that does not load as a log of six lines; ours is one and names the repair.
    log = logging.getLogger("xformers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        importlib.import_module("xformers.ops")
        library = importlib.import_module("xformers._cpp_lib")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # a wheel made for another torch
        return f"xformers does not import ({_first_line(error)}); repair: pip install xformers==0.0.35"
    finally:
        log.setLevel(level)
    if device == "cpu" or library._built_with_cuda:
        return None
    why = _first_line(library._cpp_library_load_exception)
    repair = f"pip install xformers from PyTorch's own index for CUDA {torch.version.cuda}"
    if "libcudart.so.12" in why:
        repair = "pip install nvidia-cuda-runtime-cu12==12.8.90 and put its lib folder on LD_LIBRARY_PATH"
    return f"xformers does not load beside torch {torch.__version__} ({why}); repair: {repair}"


def _first_line(error: BaseException | None) -> str:
    """What the first cause of a chain of exceptions says."""
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0] if error is not None else "it was built without CUDA"


def _unfit(q: Tensor, bias: Tensor | None) -> str | None:
    if q.dtype not in (*_HALF, torch.float32):
        return f"xformers has no CUDA kernel for {q.dtype}"
    capability = torch.cuda.get_device_capability(q.device)
    gpu = "this GPU has compute capability {}.{}".format(*capability)
    if capability < (8, 0) and q.dtype is torch.bfloat16:
        return f"xformers' bfloat16 begins at 8.0, {gpu}"
    if capability > (9, 0) and (bias is not None or q.dtype is torch.float32):
        return f"xformers' kernel for a bias or float32 ends at 9.0, {gpu}"
    step = 16 // q.element_size()
    return f"a head size of {q.shape[-1]} is not a multiple of {step}" if q.shape[-1] % step else None


@functools.cache
def operators() -> tuple[type, type]:
    """The (forward, backward) pair that answers memory_efficient_attention(..., op=operators()) on the CPU."""
    return _forward(), _backward()


class _Cpu:
    """What both operators say of themselves."""

    SUPPORTED_DEVICES = frozenset({"cpu"})
    SUPPORTED_DTYPES = frozenset({*_HALF, torch.float32, torch.float64})
    SUPPORTED_MAX_K = 65536
    SUPPORTED_ATTN_BIAS_TYPES = (type(None), Tensor)
    SUPPORTS_DROPOUT = False
    SUPPORTS_CUSTOM_SCALE = True


def _refusals(reasons: list[str], inp: Any) -> list[str]:
    # The base class thinks of GPUs when it refuses bfloat16; the kernel reads past a tensor whose last stride is not 1.
    reasons = [r for r in reasons if not r.startswith("bf16 is only supported")]
    strided = [n for n in ("query", "key", "value") if getattr(inp, n).stride(-1) > 1]
    return reasons + [f"{n}.stride(-1) > 1" for n in strided]


def _forward() -> type:
    from xformers.ops.fmha.common import AttentionFwOpBase, Context

    class Forward(_Cpu, AttentionFwOpBase):  # type: ignore[misc]
        OPERATOR = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        NAME = "cascadeF-cpu"

        @classmethod
        def not_supported_reasons(cls, d: Any) -> list[str]:
            return _refusals(super().not_supported_reasons(d), d)

        @classmethod
        def apply(cls, inp: Any, needs_gradient: bool) -> tuple[Tensor, Any]:
            q, k, v = (x.transpose(1, 2) for x in (inp.query, inp.key, inp.value))
            mask = None if inp.attn_bias is None else inp.attn_bias.detach()
            out, lse = cls.OPERATOR(q, k, v, 0.0, False, attn_mask=mask, scale=inp.scale_float)
            out = out.transpose(1, 2)
            return out, Context(out=out, lse=lse) if needs_gradient else None

    return Forward


def _backward() -> type:
    from xformers.ops.fmha.common import AttentionBwOpBase, Gradients

    class Backward(_Cpu, AttentionBwOpBase):  # type: ignore[misc]
        OPERATOR = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        NAME = "cascadeB-cpu"
        SUPPORTS_ATTN_BIAS_GRAD = True

        @classmethod
        def not_supported_reasons(cls, d: Any) -> list[str]:
            return _refusals(super().not_supported_reasons(d), d)

        @classmethod
        def apply(cls, ctx: Any, inp: Any, grad: Tensor) -> Any:
            q, k, v, out, grad = (x.transpose(1, 2) for x in (inp.query, inp.key, inp.value, ctx.out, grad))
            bias, scale = inp.attn_bias, inp.scale_float
            mask = None if bias is None else bias.detach()
            grads = cls.OPERATOR(grad, q, k, v, out, ctx.lse, 0.0, False, attn_mask=mask, scale=scale)
            db = None
            if mask is not None and bias.requires_grad:
                db = _bias_gradient(q, k, v, mask, out, ctx.lse, grad, scale)
            return Gradients(*(g.transpose(1, 2) for g in grads), db=db)

    return Backward


@functools.cache
def temporal_operators() -> tuple[type, type]:
    """The pair by which memory_efficient_attention(..., op=temporal_operators()) reaches `cascade.kernels.temporal`.

    For sequences of at most 128 with themselves, on CUDA and the CPU, also where xformers' own library does not load;
    BMHK, or without a gradient (xformers has none for it) BMGHK, of which the G share a bias. `attend` does not come
    this way: xformers wants a bias expanded to all positions and returns its gradient in that size. A dim of the bias
    that was expanded is read and summed once.
    """
    return _temporal_forward(), _temporal_backward()


class _Temporal:
    """What both operators say of themselves."""

    OPERATOR = torch.ops.cascade.temporal_attention
    SUPPORTED_DEVICES = frozenset({"cpu", "cuda"})
    SUPPORTED_DTYPES = frozenset({*_HALF, torch.float32, torch.float64})
    SUPPORTED_MAX_K = temporal.HEAD
    SUPPORTED_ATTN_BIAS_TYPES = (type(None), Tensor)
    SUPPORTS_DROPOUT = False
    SUPPORTS_CUSTOM_SCALE = True
    SUPPORTS_BMGHK = True
    CUDA_MINIMUM_COMPUTE_CAPABILITY = (8, 0)

    @classmethod
    def not_supported_reasons(cls, d: Any) -> list[str]:
        reasons = _refusals(super().not_supported_reasons(d), d)  # type: ignore[misc]
        reasons = [r for r in reasons if not r.startswith("xFormers wasn't build with CUDA")]  # not its kernel
        if d.key.shape[1] != d.query.shape[1]:
            reasons.append("query and key have different lengths")
        elif reason := temporal.refusal(_positions(d)[0]):
            reasons.append(reason)
        bias = d.attn_bias
        if d.query.ndim == 5:
            if bias is not None and (bias.ndim != 5 or (bias.shape[1] > 1 and bias.stride(1))):
                reasons.append("a bias of BMGHK must be (B, 1, H, M, N) expanded to (B, G, H, M, N)")
            if any(x.requires_grad for x in (d.query, d.key, d.value)):
                reasons.append("xFormers has no gradient for BMGHK")
        return reasons


def _positions(inp: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """query, key, value (B, F, S, h, D) and bias (B | 1, h, F, F): heads without a bias of their own are positions."""
    q, k, v = inp.query, inp.key, inp.value
    bias = None if inp.attn_bias is None else inp.attn_bias.detach()
    if q.ndim == 4:
        dim = 3 if bias is None or not bias.stride(1) else 2
        q, k, v = (x.unsqueeze(dim) for x in (q, k, v))
        bias = bias if bias is None or dim == 2 else bias[:, :1]
    elif bias is not None:
        bias = bias[:, 0]
    return q, k, v, bias[:1] if bias is not None and not bias.stride(0) else bias


def _temporal_forward() -> type:
    from xformers.ops.fmha.common import AttentionFwOpBase, Context

    class Forward(_Temporal, AttentionFwOpBase):  # type: ignore[misc]
        NAME = "cascadeF-temporal"

        @classmethod
        def apply(cls, inp: Any, needs_gradient: bool) -> tuple[Tensor, Any]:
            out, lse = cls.OPERATOR(*_positions(inp), inp.scale_float, needs_gradient)
            out = out.view(inp.query.shape)
            if not needs_gradient:
                return out, None
            return out, Context(out=out, lse=lse if inp.query.ndim == 5 else lse.flatten(1, 2))

    return Forward


def _temporal_backward() -> type:
    from xformers.ops.fmha.common import AttentionBwOpBase, Gradients

    class Backward(_Temporal, AttentionBwOpBase):  # type: ignore[misc]
        OPERATOR = torch.ops.cascade.temporal_attention_backward
        NAME = "cascadeB-temporal"
        SUPPORTS_ATTN_BIAS_GRAD = True

        @classmethod
        def apply(cls, ctx: Any, inp: Any, grad: Tensor) -> Any:
            q, k, v, bias = _positions(inp)
            wanted = inp.attn_bias is not None and inp.attn_bias.requires_grad
            grad = grad if grad.stride(-1) == 1 else grad.contiguous()
            *grads, db, _ = cls.OPERATOR(grad.view(q.shape), q, k, v, bias, inp.scale_float, wanted)
            if wanted:  # the copies of an entry that was expanded get equal parts of its gradient
                db = (db / (inp.attn_bias.numel() // db.numel())).to(inp.attn_bias.dtype).expand(inp.attn_bias.shape)
            return Gradients(*(g.view(inp.query.shape) for g in grads), db=db if wanted else None)

    return Backward


def _bias_gradient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor, lse: Tensor, grad: Tensor, scale: float
) -> Tensor:
    """dL/dbias = P (dP - rowsum(dO O)) (Dao et al. 2022, alg. 4, line 20), which aten's operator leaves out.

    q, out, grad (B, h, M, D), k, v (B, h, N, D), lse (B, h, M) -> (B, h, M, N).
    """
    q, k, v, out, grad = (x.to(lse.dtype) for x in (q, k, v, out, grad))
    p = (q @ k.mT * scale + bias - lse.unsqueeze(-1)).exp()
    return (p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))).to(bias.dtype)
