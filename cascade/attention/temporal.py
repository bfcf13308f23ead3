"""Our kernel for attention over the frames (`cascade.kernels.temporal`), which copies nothing and has no grid limit.

For the layout with positions alone. "auto" takes it on CUDA; on the CPU it is plain torch and there for tests.
"""

from __future__ import annotations

from torch import Tensor

from cascade.kernels import temporal

POSITIONS = True  # takes (B, M, S, h, D) as it is


def available(q: Tensor, bias: Tensor | None = None) -> str | None:
    """Why the kernel cannot take these tensors here, None if it can."""
    if q.ndim != 5:
        return "it is for attention at many positions, q of shape (B, F, S, h, D)"
    return temporal.refusal(q)


def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """As `Kernel.run`, with positions; once differentiable."""
    return temporal.attention(q, k, v, bias)
