"""Whether what moves is where it should be, and whether what rests stays as it is."""

from __future__ import annotations

import torch
from torch import Tensor

CONTRAST = 0.3  # distance in RGB (range 2) from the border's colour above which a pixel is foreground
LEAST = 0.002  # of the pixels: fewer are no foreground
STILL = 0.02  # change from frame to frame (range 2) below which a pixel of the truth rests
LOST = 1.0  # sides; the error of a frame whose foreground has vanished


def centroids(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Centroids (B, F, 2) of the foreground, (x, y) in shorter sides, and whether a frame has one (B, F).

    Foreground is what differs from the median colour of the frame's border; nothing is assumed about its shape.
    """
    height, width = frames.shape[3:]
    edges = (frames[..., 0, :], frames[..., -1, :], frames[..., :, 0], frames[..., :, -1])
    background = torch.cat(edges, dim=3).median(dim=3).values[..., None, None]
    apart = (frames - background).square().sum(1).sqrt()  # (B, F, H, W)
    weight = (apart - CONTRAST).clamp(0, CONTRAST)
    mass = weight.sum((2, 3))
    x = (weight.sum(2) * (torch.arange(width) + 0.5)).sum(2)
    y = (weight.sum(3) * (torch.arange(height) + 0.5)).sum(2)
    seen = mass > LEAST * height * width * CONTRAST
    return torch.stack([x, y], 2) / mass.clamp(min=1e-6)[..., None] / min(height, width), seen


def judge(frames: Tensor, truth: Tensor, known: Tensor) -> dict[str, Tensor]:
    """Errors against the `truth`, both (B, C, F, H, W), each (B,) and NaN where the truth has nothing to judge by.

    `path`: mean distance of the foreground's centroids, in sides, over the frames that were not given (`known` (B, F)).
    `flicker`: mean change from frame to frame (range 2) where the truth rests, which is motion compensation where the
    motion is none; the truth's own is below STILL.
    """
    (made, there), (true, counts) = centroids(frames), centroids(truth)
    counts = counts & ~known
    apart = (made - true).norm(dim=2).where(there, LOST)
    path = (apart * counts).sum(1) / counts.sum(1)
    rests = truth.diff(dim=2).abs().amax(1, keepdim=True) < STILL
    change = frames.diff(dim=2).abs().mean(1, keepdim=True)
    flicker = (change * rests).sum((1, 2, 3, 4)) / rests.sum((1, 2, 3, 4))
    return {"path": path, "flicker": flicker}  # 0 / 0 is NaN
