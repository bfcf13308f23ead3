"""The one door to attention: `attend(q, k, v)`, answered by one of the kernels that lie beside this file.

A kernel is a file here with two functions (`Kernel`); adding the file is all it takes. `reference` defines the answer,
the others are held to it. q is (B, M, h, D), k and v are (B, N, h, D): xformers' BMHK layout, batch, tokens, heads,
head size, so a projection packed as (B, M, 3, h, D) is used through views. Attention over frames has one dim more, of
the positions S that each attend by themselves: (B, M, S, h, D), xformers' BMGHK.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from cascade.errors import ConfigError
from cascade.kernels import known, say_once

__all__ = ["AUTO", "Kernel", "attend", "check", "kernels", "record", "select", "use"]

AUTO = "auto"

_default: ContextVar[str] = ContextVar("attention", default=AUTO)
_records: ContextVar[tuple[list[str], ...]] = ContextVar("attention_records", default=())


class Kernel(Protocol):
    """What a file in this folder provides.

    `POSITIONS = True` beside it asks for tensors with positions as they are, (B, M, S, h, D), and the bias in its type.
    """

    def available(self, q: Tensor, bias: Tensor | None = None) -> str | None:
        """Why this kernel cannot run for these tensors here, None if it can."""

    def run(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """q (B, M, h, D), k and v (B, N, h, D) -> (B, M, h, D); bias has four dims, each full or 1, and q's dtype."""


def _find(folders: Iterable[str]) -> dict[str, Kernel]:
    names = sorted(module.name for module in pkgutil.iter_modules(folders))
    return {name: cast(Kernel, importlib.import_module(f"{__name__}.{name}")) for name in names}


_kernels = _find(__path__)  # all at once: code that is being compiled cannot import


def attend(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, kernel: str | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v (Vaswani et al. 2017, eq. 1).

    q (B, M, h, D), k and v (B, N, h, D) -> (B, M, h, D). Any strides whose last is 1: nothing is copied to get here.
    Or all three (B, M, S, h, D) -> (B, M, S, h, D): self-attention at each of S positions, which share the bias.
    bias broadcasts to (B, h, M, N), is added to the scores (-inf hides a key) and may require a gradient; leave
    broadcast dims at 1, an expanded bias costs what a full one does. Every query must see a key: kernels disagree on a
    row that is all -inf (zeros or NaN). This is checked on the CPU only, a GPU would have to wait for the answer.
    kernel: a name of `kernels()`, "auto", or None for the one set with `use`.
    Raises ValueError for tensors that do not fit together, ConfigError for a kernel that is unknown or cannot run.
    """
    _check(q, k, v)
    if bias is not None:
        bias = _four_dims(bias, q, k)
    name = select(_preferred() if kernel is None else kernel, q, bias)
    if not torch.compiler.is_compiling():
        for names in _records.get():
            names.append(name)
    chosen = _kernels[name]
    if q.ndim == 4:
        return _in_launches(chosen, q, k, v, bias if bias is None else bias.to(q.dtype))
    if getattr(chosen, "POSITIONS", False):
        return chosen.run(q, k, v, bias)
    return _folded(chosen, q, k, v, bias)


@contextmanager
def use(kernel: str) -> Iterator[None]:
    """Make `kernel` the default of `attend` inside, in this thread.

    Autograd runs the backward of CUDA tensors in threads of its own, which do not see this: a block recomputed there
    (activation checkpointing) has to pass `kernel` itself. Raises ConfigError for an unknown name.
    """
    check(kernel)
    token = _default.set(kernel)
    try:
        yield
    finally:
        _default.reset(token)


@contextmanager
def record() -> Iterator[list[str]]:
    """Collect the name of the kernel that answers each `attend` inside, in order, in this thread."""
    names: list[str] = []
    token = _records.set((*_records.get(), names))
    try:
        yield names
    finally:
        _records.reset(token)


def kernels() -> tuple[str, ...]:
    """The kernels there are: the files of this folder."""
    return tuple(_kernels)


def select(kernel: str, q: Tensor, bias: Tensor | None = None) -> str:
    """The kernel that answers: `kernel` itself, or "auto": on CUDA the first that runs of temporal (attention with
    positions), xformers and sdpa, elsewhere sdpa.

    On the CPU even short sequences gain nothing from plain products (numbers in sdpa.py), and xformers, which takes
    seconds to import, is not touched. Raises ConfigError for a kernel that is unknown or cannot run here.
    """
    check(kernel)
    if kernel == AUTO:
        if q.device.type != "cuda":
            return "sdpa"
        for name in ("temporal", "xformers") if q.ndim == 5 else ("xformers",):
            reason = _kernels[name].available(q, bias)
            if reason is None:
                return name
            say_once(f"attention=auto does not use {name}: {reason}")
        return "sdpa"
    if reason := _kernels[kernel].available(q, bias):
        raise ConfigError(f"attention {kernel!r} cannot run here: {reason}", fix="attention=auto")
    return kernel


def check(kernel: str) -> None:
    """Raises ConfigError for an unknown name."""
    if kernel != AUTO and kernel not in kernels():
        names = ", ".join((AUTO, *kernels()))
        raise ConfigError(f"attention is {kernel!r}, expected one of {names}", fix="attention=auto")


@known
def _preferred() -> str:
    return _default.get()


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = q.ndim == k.ndim == 4 and k.shape == (q.shape[0], k.shape[1], *q.shape[2:])
    if not (fits or (q.ndim == 5 and k.shape == q.shape)) or v.shape != k.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        expected = "(B, M, h, D), (B, N, h, D), (B, N, h, D) or three times (B, M, S, h, D)"
        raise ValueError(f"attention of q, k, v {shapes}: expected {expected}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention of q, k, v {q.dtype}, {k.dtype}, {v.dtype}: expected one dtype")
    # The fused CPU kernel reads past such a tensor instead of refusing it.
    if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in (q, k, v)):
        raise ValueError("attention: the last stride of q, k and v must be 1, call .contiguous() first")


def _four_dims(bias: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """bias as (B | 1, h | 1, M | 1, N | 1)."""
    full = (q.shape[0], q.shape[-2], q.shape[1], k.shape[1])
    shape = (1,) * (4 - bias.ndim) + tuple(bias.shape)
    if len(shape) != 4 or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
        raise ValueError(f"attention bias {tuple(bias.shape)} does not broadcast to (B, h, M, N) = {full}")
    if not bias.is_floating_point():
        raise ValueError(f"attention bias is {bias.dtype}, expected numbers to add (0 and -inf, not True and False)")
    # Subclasses (fake tensors) and graphs being traced have no values to look at.
    readable = bias.device.type == "cpu" and type(bias) in (Tensor, Parameter) and not torch.compiler.is_compiling()
    if readable and bias.detach().amax(-1).amin() == -torch.inf:
        raise ValueError("attention bias hides every key from some query, which leaves it without an answer")
    return bias.reshape(shape)


def _launch_limit(q: Tensor, k: Tensor) -> int:
    """How much batch one CUDA launch bears.

    Flash and cutlass kernels put the batch in a grid dim of at most 65535 (xformers issue 845, pytorch issue 142228),
    and flash's backward counts elements, padded to 128 tokens, in int32.
    """
    padded = -(-max(q.shape[1], k.shape[1]) // 128) * 128 * q.shape[2] * max(q.shape[3], 32)
    return max(1, min(65535, 2**31 // padded))


def _folded(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Positions and heads as the heads of a kernel that knows no positions: a view if S and h lie side by side."""
    positions, heads = q.shape[2:4]
    step = max(1, 65535 // heads) if q.device.type == "cuda" else positions  # heads are a grid dim as well

    def part(i: slice) -> Tensor:
        some = slice(None), slice(None), i
        few = q[some].flatten(2, 3), k[some].flatten(2, 3), v[some].flatten(2, 3)
        each = bias
        if bias is not None and bias.shape[1] > 1:  # one of a single head is broadcast as it is
            each = bias[:, None].expand(-1, few[0].shape[2] // heads, -1, -1, -1).flatten(1, 2)
        each = each if each is None else each.to(q.dtype)  # last: the positions' gradients add up in the bias' type
        return torch.unflatten(_in_launches(kernel, *few, each), 2, (-1, heads))

    if positions <= step:
        return part(slice(None))
    return torch.cat([part(slice(i, i + step)) for i in range(0, positions, step)], 2)


def _in_launches(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, step: int | None = None
) -> Tensor:
    """`kernel.run` on at most `step` of the batch at a time (None: what one launch bears)."""
    if step is None:
        step = _launch_limit(q, k) if q.device.type == "cuda" else len(q)
    if len(q) <= step:
        return kernel.run(q, k, v, bias)

    def part(i: slice) -> Tensor:
        return kernel.run(q[i], k[i], v[i], bias if bias is None or len(bias) == 1 else bias[i])

    return torch.cat([part(slice(i, i + step)) for i in range(0, len(q), step)])
