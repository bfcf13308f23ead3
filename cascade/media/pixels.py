"""What all of `media` shares: pixels as bytes and as numbers, sizes, limits, the one error of files that are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cascade.errors import InputError, NumericError

if TYPE_CHECKING:
    from torch import Tensor

Bytes = NDArray[np.uint8]
MAX_FRAMES = 2**19  # a guard against files that promise frames without end; 6 hours at 24 fps
MAX_PIXELS = 2**23  # of one frame; a 4k frame has 0.99 of it
MAX_BYTES = 2**31  # of all frames that are kept
RATES = (0.01, 1000.0)  # frames a second


class Unreadable(InputError):
    """A file that is no intact video or image; `reason` says why without naming the file."""

    def __init__(self, path: Path, reason: str, what: str = "video", fix: str = "") -> None:
        legal = "png, jpeg, webp" if what == "image" else "mp4, webm, mkv, mov, avi, gif, or an image"
        super().__init__(f"{what} {path}: {reason}", fix=fix or f"an intact {what} file ({legal})")
        self.reason = reason


def to_bytes(frames: Tensor) -> Bytes:
    """(3, F, H, W) in [-1, 1] -> (F, H, W, 3) uint8, rounded to the nearest. NumericError if a value is not finite."""
    assert frames.ndim == 4 and frames.shape[0] == 3 and frames.numel(), tuple(frames.shape)
    frames = frames.detach().float().cpu()
    if not bool(frames.isfinite().all()):
        raise NumericError("video: some pixels are not finite", fix="make it again, with dtype=float32")
    pixels: Bytes = ((frames + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).contiguous().numpy()
    return pixels


def to_float(pixels: Tensor) -> Tensor:
    """(F, H, W, 3) uint8 -> (3, F, H, W) float32 in [-1, 1], the inverse of `to_bytes`."""
    return (pixels.permute(3, 0, 1, 2).float() / 127.5 - 1).contiguous()


def fit(frames: Tensor, height: int, width: int, at: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """(A, B, H, W) in [-1, 1] -> (A, B, height, width): resized to cover (anti-aliased), then cropped.

    `at` places the crop: (0, 0) at the upper left, (0.5, 0.5) in the centre, (1, 1) at the lower right.
    """
    from cascade.video import resize

    tall, wide = covering(frames.shape[2], frames.shape[3], height, width)
    out = resize(frames[None], tall, wide)[0]
    top, left = round((tall - height) * at[0]), round((wide - width) * at[1])
    return out[:, :, top : top + height, left : left + width].contiguous()


def covering(height: int, width: int, to_height: int, to_width: int) -> tuple[int, int]:
    """The smallest size with the aspect of height x width that covers to_height x to_width."""
    scale = max(to_height / height, to_width / width)
    return max(to_height, round(height * scale)), max(to_width, round(width * scale))
