"""Pictures and contact sheets: imageio and Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cascade.media.pixels import MAX_PIXELS, Bytes, Unreadable, to_bytes, to_float

if TYPE_CHECKING:
    from torch import Tensor

_IMAGES = {b"\x89PNG\r\n\x1a\n": ".png", b"\xff\xd8\xff": ".jpg"}


def read_image(path: Path) -> Tensor:
    """A png, jpeg or webp file as (3, H, W) in [-1, 1]; transparent parts become white. Raises Unreadable."""
    import torch

    return to_float(torch.from_numpy(image_pixels(path, MAX_PIXELS)))[:, 0]


def image_kind(path: Path) -> str:
    """.png, .jpg or .webp by the first bytes of the file, else nothing. Pillow would also run scripts (eps).

    Raises Unreadable for a file that cannot be read.
    """
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            head = file.read(12)
    except OSError as error:
        raise Unreadable(path, f"unreadable ({error.strerror})") from error
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return ".webp"
    return next((kind for magic, kind in _IMAGES.items() if head.startswith(magic)), "")


def image_pixels(path: Path, max_pixels: int) -> Bytes:
    """An image file as (1, H, W, 3) uint8, upright, on white."""
    import imageio.v3 as iio
    from PIL.Image import DecompressionBombError, DecompressionBombWarning

    kind = image_kind(path)
    if not kind:
        raise Unreadable(path, "not a png, jpeg or webp file" if path.is_file() else "no such file", "image")
    try:
        found = iio.improps(path, plugin="pillow", extension=kind, index=0)
        if math.prod(found.shape[:2]) > max_pixels:
            raise Unreadable(path, f"more than {max_pixels} pixels", "image")
        deep = found.dtype == np.uint16
        mode = None if deep else "RGBA"  # Pillow's own conversion of 16-bit grey clips it
        rgba = iio.imread(path, plugin="pillow", extension=kind, index=0, rotate=True, mode=mode)
    except (OSError, SyntaxError, ValueError, DecompressionBombError, DecompressionBombWarning) as error:
        raise Unreadable(path, f"unreadable ({error})", "image") from error
    if deep:
        return np.ascontiguousarray(np.repeat((rgba / 257).round().astype(np.uint8)[None, :, :, None], 3, axis=3))
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return (rgba[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)[None]


def png(image: Tensor) -> bytes:
    """(3, H, W) in [-1, 1] -> a png file."""
    return _png(to_bytes(image[:, None])[0])


def sheet(videos: Tensor, captions: Sequence[str] | None = None, columns: int = 8, scale: int | None = None) -> bytes:
    """A png with one row for each of `videos` (B, 3, F, H, W): its caption, below it `columns` frames, evenly spaced.

    Pixels are repeated `scale` times (default: frames are shown about 128 pixels high), so that tiny clips stay sharp.
    """
    from PIL import Image, ImageDraw, ImageFont

    assert captions is None or len(captions) == len(videos), f"{len(videos)} videos, {captions} captions"
    scale = scale or max(1, round(128 / videos.shape[3]))
    strips = [_strip(to_bytes(video), columns, scale) for video in videos]
    width, gap, line = strips[0].shape[1], 4, 16
    font = ImageFont.load_default(12)
    texts = [_wrapped(caption, font.getlength, width) for caption in captions] if captions else [[] for _ in strips]
    height = sum(len(text) * line + strip.shape[0] + gap for text, strip in zip(texts, strips, strict=True))
    page = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(page), 0
    for text, strip in zip(texts, strips, strict=True):
        for words in text:
            draw.text((0, top), words, fill="black", font=font)
            top += line
        page.paste(Image.fromarray(strip), (0, top))
        top += strip.shape[0] + gap
    return _png(np.asarray(page))


def _strip(pixels: Bytes, columns: int, scale: int) -> Bytes:
    """(F, H, W, 3) -> one row of evenly spaced frames, each enlarged `scale` times, two white pixels between."""
    chosen = np.linspace(0, len(pixels) - 1, min(columns, len(pixels))).round().astype(int)
    large = pixels[chosen].repeat(scale, axis=1).repeat(scale, axis=2)
    spaced = np.pad(large, ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=255)
    return np.concatenate(list(spaced), axis=1)[:, :-2]


def _wrapped(text: str, measure: Any, width: int) -> list[str]:
    """`text` in lines that fit into `width` pixels, by words (a word that is too long stands alone)."""
    words = text.split()
    ends = [0]
    for end in range(1, len(words) + 1):
        if end - ends[-1] > 1 and measure(" ".join(words[ends[-1] : end])) > width:
            ends.append(end - 1)
    return [" ".join(words[a:b]) for a, b in pairwise([*ends, len(words)])]


def _png(pixels: Bytes) -> bytes:
    import imageio.v3 as iio

    data = iio.imwrite("<bytes>", pixels, extension=".png", plugin="pillow")
    assert isinstance(data, bytes)
    return data
