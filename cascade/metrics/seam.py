"""Whether a long video shows where its windows meet (cascade/windows.py)."""

from __future__ import annotations

import torch
from torch import Tensor


def judge(frames: Tensor, truth: Tensor, borders: list[int], rate: int) -> dict[str, Tensor]:
    """Mean change (range 2) from frame to frame over the `borders` and elsewhere, and the truth's, each (B,).

    A border is the step to the frame it names. Where a stage keeps every `rate`-th frame, steps to a kept frame and
    to a new one differ anyhow: elsewhere means other steps of the same phase. NaN where there are none.
    """
    at = torch.zeros(frames.shape[2] - 1, dtype=torch.bool)
    at[[border - 1 for border in borders]] = True
    phases = torch.tensor(sorted({(border - 1) % rate for border in borders}))
    elsewhere = torch.isin(torch.arange(len(at)) % rate, phases) & ~at
    values: dict[str, Tensor] = {}
    for prefix, clip in (("", frames), ("truth_", truth)):
        step = clip.diff(dim=2).abs().mean((1, 3, 4))  # (B, F - 1)
        values |= {f"{prefix}border": step[:, at].mean(1), f"{prefix}interior": step[:, elsewhere].mean(1)}
    return values


def total(values: dict[str, Tensor]) -> dict[str, float]:
    """`seam`: the change at borders over that elsewhere, of all clips; 1 is none, and `truth` what real clips have."""
    mean = {name: float(value.double().mean()) for name, value in values.items()}
    pairs = (("seam", ""), ("truth", "truth_"))
    return {name: mean[f"{p}border"] / mean[f"{p}interior"] for name, p in pairs if mean[f"{p}interior"] > 0}
