"""Whether what a stage was given of its output comes out as it came in."""

from __future__ import annotations

import torch
from torch import Tensor


def judge(frames: Tensor, given: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The largest difference (of a range of 2) where `mask` (B, 1, F, 1, 1) or (B, 1, F, H, W) is true: (B,).

    `given` (B, C, F, H, W) is the input at the size of the output. NaN where nothing was given.
    """
    worst = (frames - given).abs().where(mask, -torch.inf).flatten(1).amax(1)
    return {"error": worst.where(mask.flatten(1).any(1), torch.nan)}


def total(values: dict[str, Tensor]) -> dict[str, float]:
    """The largest of all clips."""
    return {"error": float(values["error"].max())}
