"""PyTorch's scaled_dot_product_attention: the default on the CPU, and on CUDA where xformers does not run.

Attention over 8 to 32 frames on one thread (AVX2, torch 2.13, float32, D = 32 or 64), against plain products and
softmax (`reference`): without a gradient 1 to 2.3 times as fast; in training between 0.8 and 1.2 times for D = 64 and
about 0.8 times for D = 32. So "auto" needs no rule for short sequences.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def available(q: Tensor, bias: Tensor | None = None) -> str | None:
    """Runs anywhere."""
    return None


def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """As `Kernel.run`, without a copy. A bias of three dims would drop to the slow path; `attend` makes it four."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
