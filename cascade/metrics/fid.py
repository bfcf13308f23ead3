"""Fréchet distance of single frames in the features of our own network (cascade/metrics/features.py).

That network takes clips, so a frame is shown to it as a clip that stands still, of which it has seen many. It tells
wrong pictures from wrong motion: beside `fvd`, which sees both. It is not the FID of the papers (`inception`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cascade.metrics import features
from cascade.metrics.fvd import about as about_features
from cascade.metrics.fvd import frechet

FRAMES = 4  # of a clip, evenly spaced: neighbours are nearly the same picture


def extract(frames: Tensor) -> Tensor:
    """Features (B, FRAMES, d) of frames of clips (B, 3, F, H, W)."""
    stills = features.evenly(frames, FRAMES).transpose(1, 2).flatten(0, 1).unsqueeze(2)  # (B * FRAMES, 3, 1, H, W)
    return torch.unflatten(features.extract(stills), 0, (len(frames), FRAMES))


def judge(frames: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Features (B, FRAMES, d) of the clips' frames and of real ones; they need not be paired."""
    return {"made": extract(frames), "real": extract(truth)}


def total(values: dict[str, Tensor]) -> dict[str, float]:
    """The distance between all frames and all real ones. Without two clips of each there is none."""
    if len(values["made"]) < 2:
        return {}
    made, real = (values[name].flatten(0, 1) for name in ("made", "real"))
    return {"fid": frechet(made, real)}


def about() -> dict[str, Any]:
    """What the number depends on beside the clips."""
    return {**about_features(), "input": f"{FRAMES} frames of a clip, evenly spaced, each as a still clip"}
