"""How far a clip's look moves away from its first frame: what goes wrong slowly, as colours and contrast do."""

from __future__ import annotations

import torch
from torch import Tensor

LAST = 4  # the last quarter of the frames is held against the first frame


def look(frames: Tensor) -> Tensor:
    """Mean and standard deviation of each channel of each frame: (B, F, 6), in the range of pixels."""
    flat = frames.transpose(1, 2).flatten(3)  # (B, F, 3, H * W)
    return torch.cat([flat.mean(3), flat.std(3, correction=0)], 2)


def drift(frames: Tensor) -> Tensor:
    """Mean distance of the last frames' look from the first one's (range 2): (B,)."""
    found = look(frames)
    count = max(1, found.shape[1] // LAST)
    return (found[:, -count:] - found[:, :1]).abs().mean((1, 2))


def judge(frames: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """The drift of the clips and of real ones, whose things come and go as well."""
    return {"drift": drift(frames), "truth": drift(truth)}
