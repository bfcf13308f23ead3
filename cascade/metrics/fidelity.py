"""How near a clip is to the truth it was degraded from, and to what simple resampling makes of the same input."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cascade.video import resize, spread

RANGE = 2.0  # of pixels in [-1, 1]
SIGMA = 1.5  # pixels, of the Gaussian in which SSIM takes means and deviations
CEILING = 100.0  # dB; equal clips have no finite PSNR


def psnr(frames: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each clip (B, C, F, H, W) in dB, over all its values, at most CEILING: (B,)."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    pairs = zip(frames, truth, strict=True)
    values = [peak_signal_noise_ratio(a, b, data_range=RANGE) for a, b in pairs]
    return torch.stack(values).clamp(max=CEILING)


def ssim(frames: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each clip, the mean over its frames and colours (Wang et al. 2004): (B,).

    Of pixels in [0, 1]: it compares means by their ratio, so it depends on where 0 is.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    flat, true = ((x.transpose(1, 2).flatten(0, 1) + 1) / RANGE for x in (frames, truth))
    values = structural_similarity_index_measure(flat, true, sigma=SIGMA, data_range=1.0, reduction="none")
    assert isinstance(values, Tensor)
    return values.view(len(frames), -1).mean(1)


def baselines(low: Tensor, rate: int, like: Tensor) -> dict[str, Tensor]:
    """What resampling makes of `low` (B, C, f, h, w) at the size of `like` (B, C, F, H, W).

    More frames: every frame shown `rate` times (`repetition`), and linear blends of neighbours (`blending`). Only more
    pixels: `bicubic`.
    """
    frames, height, width = like.shape[2:]
    large = resize(low, height, width)
    if rate == 1:
        return {"bicubic": large}
    blends, _ = spread(large, rate, frames)
    return {"repetition": large[:, :, torch.arange(frames) // rate], "blending": blends}


def judge(frames: Tensor, truth: Tensor, low: Tensor, known: Tensor, rate: int) -> dict[str, Tensor]:
    """PSNR (dB) and SSIM over the frames that were not given, and the PSNR of each baseline, each (B,).

    `known` (B, F) marks the frames that came in with `low`; a clip with no other frame is not judged (NaN).
    """
    rivals = baselines(low, rate, truth)
    names = ["psnr", "ssim", *(f"psnr_{name}" for name in rivals)]
    rows = []
    for i, new in enumerate(~known):
        if not new.any():
            rows.append(dict.fromkeys(names, torch.full((1,), torch.nan)))
            continue
        made, true = frames[i : i + 1, :, new], truth[i : i + 1, :, new]
        row = {"psnr": psnr(made, true), "ssim": ssim(made, true)}
        rows.append(row | {f"psnr_{name}": psnr(rival[i : i + 1, :, new], true) for name, rival in rivals.items()})
    return {name: torch.cat([row[name] for row in rows]) for name in names}


def pooled(values: Tensor) -> float:
    """The PSNR of all clips as one, from the PSNR of each (n,).

    A mean of decibels would be ruled by clips that stand still, which repetition gets right to the last bit.
    """
    return float(-10 * (-values.double() / 10 * math.log(10)).exp().mean().log10())


def total(values: dict[str, Tensor]) -> dict[str, float]:
    """Over all clips: PSNRs, the gain over each baseline (dB) and the share of clips that are nearer than it; SSIM."""
    return {"ssim": float(values["ssim"].mean()), **gains(values)}


def gains(values: dict[str, Tensor]) -> dict[str, float]:
    """The pooled `psnr` and `psnr_<rival>`, how much the first is above each other, and in which share of clips."""
    out = {name: pooled(value) for name, value in values.items() if name.startswith("psnr")}
    for name in [name for name in out if name != "psnr"]:
        rival = name.removeprefix("psnr_")
        out[f"gain_{rival}"] = out["psnr"] - out[name]
        out[f"nearer_than_{rival}"] = float((values["psnr"] > values[name]).double().mean())
    return out


def about() -> dict[str, Any]:
    """What the numbers depend on beside the clips."""
    return {"ssim": f"pixels in [0, 1], each colour alone, Gaussian of sigma {SIGMA}"}
