"""Whether the frames that a stage was given come out as they came in."""

from __future__ import annotations

import torch
from torch import Tensor


def judge(frames: Tensor, given: Tensor, known: Tensor) -> dict[str, Tensor]:
    """The largest difference (of a range of 2) on the frames that `known` (B, F) marks: (B,); NaN where there is none.

    `given` (B, C, F, H, W) is the input at the size of the output.
    """
    worst = (frames - given).abs().amax((1, 3, 4)).where(known, -torch.inf).amax(1)
    return {"error": worst.where(known.any(1), torch.nan)}


def total(values: dict[str, Tensor]) -> dict[str, float]:
    """The largest of all clips."""
    return {"error": float(values["error"].max())}
