"""Attention as the formula says: the answer every other kernel is held to.

Slow and greedy (it stores all scores), but it can be differentiated twice and in forward mode, and shows its weights.
"""

from __future__ import annotations

import torch
from torch import Tensor


def available(q: Tensor, bias: Tensor | None = None) -> str | None:
    """Runs anywhere."""
    return None


def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v, computed in float32 at least, returned in q's dtype (`Kernel.run`)."""
    p = weights(q, k, bias)
    return torch.einsum("bhmn,bnhd->bmhd", p, v.to(p.dtype)).to(q.dtype)


def weights(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """The attention map softmax(q k^T / sqrt(D) + bias), (B, h, M, N), float32 or float64; rows sum to 1."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bmhd,bnhd->bhmn", q.to(wide) * q.shape[-1] ** -0.5, k.to(wide))
    return (scores if bias is None else scores + bias).softmax(-1)
