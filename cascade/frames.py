"""Pictures and videos in the forms of diffusers' pipelines, to and from ours.

Theirs are PIL's, arrays (..., H, W, 3) or tensors (..., 3, H, W), uint8 or in [0, 1]; ours (B, 3, F, H, W) in [-1, 1].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cascade import media

if TYPE_CHECKING:
    from PIL.Image import Image

Frames: TypeAlias = "NDArray[np.float32] | Tensor | list[list[Image]]"
OUTPUTS = ("np", "pt", "pil")


def of_images(value: Any, what: str, grey: bool = False) -> Tensor:
    """One picture or several -> (N, 3, H, W) in [-1, 1]. ValueError, with `what` it is, for anything else.

    With `grey` they may be of one colour, (H, W) too, and bool.
    """
    if isinstance(value, list | tuple) and value:
        parts = [of_images(item, what, grey) for item in value]
        if len({part.shape[1:] for part in parts}) > 1:
            raise ValueError(f"{what} holds pictures of several sizes, expected one size")
        return torch.cat(parts)
    if hasattr(value, "convert"):  # PIL's, which is not imported to ask
        value = np.array(value.convert("RGB"))
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value.copy())
        value = value.movedim(-1, -3) if value.ndim in (3, 4) else value
    if grey and isinstance(value, Tensor) and value.ndim in (2, 3, 4):
        value = value[None] if value.ndim == 2 else value
        value = value.float() if value.dtype == torch.bool else value
        value = value.expand(*value.shape[:-3], 3, -1, -1) if value.shape[-3] == 1 else value
    if not isinstance(value, Tensor) or value.ndim not in (3, 4) or value.shape[-3] != 3 or not value.numel():
        found = f"of size {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        colours = "one or three colours" if grey else "three colours"
        raise ValueError(f"{what} is {found}, expected pictures of {colours}: PIL, (H, W, 3) or a tensor (3, H, W)")
    value = (value[None] if value.ndim == 3 else value).cpu()
    if value.dtype == torch.uint8:
        return media.to_float(value.movedim(1, -1)).transpose(0, 1)
    if not value.is_floating_point() or not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError(f"{what} has values outside of [0, 1], expected those, or uint8")
    pixels: Tensor = value.float() * 2 - 1
    return pixels


def of_clips(value: Any) -> Tensor:
    """One clip or several -> (B, 3, F, H, W) in [-1, 1]. ValueError for anything else."""
    if isinstance(value, list | tuple) and value:
        several = isinstance(value[0], list | tuple) or getattr(value[0], "ndim", 0) == 4
    else:
        several = getattr(value, "ndim", 0) == 5
    clips = [of_images(clip, "video").transpose(0, 1) for clip in (value if several else [value])]
    if len({clip.shape for clip in clips}) > 1:
        raise ValueError("video holds clips of several sizes, expected one size")
    return torch.stack(clips)


def to_frames(clips: Tensor, output_type: str) -> Frames:
    """(B, 3, F, H, W) as "np" (B, F, H, W, 3) or "pt" (B, F, 3, H, W), both float32 in [0, 1], or "pil", B lists.

    Pictures hold the pixels that a video file is made of.
    """
    if output_type == "pil":
        from PIL import Image

        return [[Image.fromarray(picture) for picture in media.to_bytes(clip)] for clip in clips]
    pixels = (clips * 0.5 + 0.5).clamp(0, 1).transpose(1, 2)
    if output_type == "pt":
        return pixels
    array: NDArray[np.float32] = pixels.movedim(2, -1).contiguous().numpy()
    return array
