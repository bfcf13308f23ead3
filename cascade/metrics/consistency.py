"""Whether a clip, made small again, is the one it was made from."""

from __future__ import annotations

from torch import Tensor

from cascade.metrics.fidelity import pooled, psnr
from cascade.video import resize


def judge(frames: Tensor, low: Tensor, rate: int) -> dict[str, Tensor]:
    """PSNR (dB) between the input `low` (B, C, f, h, w) and every `rate`-th frame of the output at its size: (B,).

    With noise added to its input (conditioning augmentation) a stage is free to differ from it: judge it without.
    """
    again = resize(frames[:, :, ::rate], *low.shape[3:])
    return {"psnr": psnr(again, low)}


def total(values: dict[str, Tensor]) -> dict[str, float]:
    """PSNR (dB) of all clips as one."""
    return {"psnr": pooled(values["psnr"])}
