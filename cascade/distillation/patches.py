"""How far the patches of two sets of clips are apart, whatever the clips show and wherever they show it.

A judge says what a clip shows and is blind to how: soft edges, grain, a grid of dots. Patches see nothing else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.errors import ConfigError

SIDE = 5  # pixels
FRAMES = 2  # successive ones that a patch spans, so that flicker counts
DIRECTIONS = 16  # at most, new ones for every batch


def directions(noise: Tensor, channels: int, frames: int) -> Tensor:
    """Unit vectors (DIRECTIONS, C * frames, SIDE, SIDE) made of the first numbers of `noise`; flat patches give 0.

    Of little noise fewer are made. Raises ConfigError if it is not enough for one.
    """
    size = channels * frames * SIDE * SIDE
    count = min(DIRECTIONS, noise.numel() // size)
    if not count:
        raise ConfigError(f"distill.patches: {noise.numel()} values are less than a patch has", fix="distill.patches=0")
    drawn = noise.flatten()[: count * size].view(count, size)
    drawn = F.normalize(drawn - drawn.mean(1, keepdim=True), dim=1)
    return drawn.view(count, channels * frames, SIDE, SIDE)


def projected(clips: Tensor, along: Tensor) -> Tensor:
    """Every patch of clips (B, C, F, H, W) along each of K directions, (K, patches)."""
    channels, count = clips.shape[1:3]
    frames = along.shape[1] // channels
    pairs = torch.cat([clips[:, :, i : count - frames + 1 + i] for i in range(frames)], 1)
    found = F.conv2d(pairs.transpose(1, 2).flatten(0, 1).to(along), along)
    return found.transpose(0, 1).flatten(1)


def distance(real: Tensor, made: Tensor, noise: Tensor) -> Tensor:
    """Sliced Wasserstein-1 distance of the patches of two equally large sets of clips (B, C, F, H, W), a scalar.

    The mean over random directions of the distance of what lies along them, which sorting gives exactly (Rabin et al.
    2011); directions are convolutions (Elnekave & Weiss 2022, GPDM). With a gradient.
    """
    with torch.autocast(made.device.type, enabled=False):
        along = directions(noise, real.shape[1], min(FRAMES, real.shape[2]))
        ours, theirs = (projected(clips, along).sort(1).values for clips in (made, real))
    return (ours - theirs).abs().mean()
