"""What several tests say alike."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade.noise import generator


def near(got: Tensor, expected: Tensor, atol: float) -> None:
    """Not torch.testing, whose first comparison imports torch.distributed for seconds."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert (got - expected).abs().max() <= atol


def draw(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(name))
