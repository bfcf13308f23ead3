"""How near a clip is to the truth where it was not given: after its first frames, between its ends, in a hole."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade.metrics.fidelity import gains, psnr


def judge(frames: Tensor, truth: Tensor, given: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """PSNR (dB) over the pixels that were not given, of the clip and of each of `fills`, each (B,).

    `given` (B, C, F, H, W) counts where `mask` (B, 1, F, 1, 1) or (B, 1, F, H, W) is true. A clip that was given whole
    is not judged (NaN).
    """
    mask = mask.expand(-1, -1, -1, *truth.shape[3:])
    rivals = {"": frames} | {f"_{name}": rival for name, rival in fills(given, mask).items()}
    out: dict[str, list[Tensor]] = {f"psnr{name}": [] for name in rivals}
    for i, new in enumerate(~mask[:, 0]):
        for name, rival in rivals.items():
            pair = rival[i, :, new][None], truth[i, :, new][None]
            out[f"psnr{name}"].append(psnr(*pair) if new.any() else torch.full((1,), torch.nan))
    return {name: torch.cat(values) for name, values in out.items()}


def fills(given: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What fills the rest without knowing anything, pixel by pixel, (B, C, F, H, W) each.

    `repetition`: what was given last (before the first: what is given first); `blending`: linear in time between the
    two. A pixel that is never given takes the median colour of all that are.
    """
    total = given.shape[2]
    at = torch.arange(total, device=given.device).view(1, 1, -1, 1, 1)
    before = torch.where(mask, at, -1).cummax(2).values
    after = torch.where(mask, at, total).flip(2).cummin(2).values.flip(2)
    a, b = (given.gather(2, i.clamp(0, total - 1).expand_as(given)) for i in (before, after))
    a, b = torch.where(before < 0, b, a), torch.where(after == total, a, b)
    weight = (at - before) / (after - before).clamp(min=1)
    never = (before < 0) & (after == total)
    middle = [
        clip[:, there].median(1).values if there.any() else clip.new_zeros(len(clip))
        for clip, there in zip(given, mask[:, 0], strict=True)
    ]
    colour = torch.stack(middle)[:, :, None, None, None]
    made = {"repetition": a, "blending": torch.lerp(a, b, weight.to(given.dtype))}
    return {name: torch.where(never, colour, fill) for name, fill in made.items()}


def total(values: dict[str, Tensor]) -> dict[str, float]:
    """Over all clips: PSNRs, the gain over each fill (dB) and the share of clips that are nearer than it."""
    return gains(values)
