"""What a stage's denoiser works on: pixels, or the latents of an autoencoder (Rombach et al. 2022).

Latents stay inside their stage: what passes between stages is always pixels. An autoencoder sees one frame at a time
and runs in float32, whatever the denoiser's precision: in float16 that of Stable Diffusion XL overflows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade import foreign
from cascade.errors import InputError, NumericError
from cascade.video import Shape

AUTOENCODER, WHAT = "AutoencoderKL", "autoencoder"
COLOURS = 3  # channels of the videos that autoencoders are made for


class Kind(Enum):
    """Where the denoiser works."""

    PIXEL = "pixel"
    LATENT = "latent"


@dataclass(kw_only=True)
class Codec:
    """Settings of a codec; the other fields belong to `latent`.

    `weights` is a folder with an AutoencoderKL as diffusers saves it. `channels` and `stride` say what its latents
    look like, so that a chain can be checked without it, and are held against it when it is loaded.
    """

    kind: Kind = Kind.PIXEL
    weights: str | None = None
    channels: int = 0  # of a latent
    stride: int = 1  # pixels a side that one position of a latent stands for
    scale: float | None = None  # latents times this have a standard deviation near 1; None: as the weights say
    chunk: int = 8  # frames at once

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}, expected at least 1")
        if self.kind is Kind.PIXEL:
            for name, unset in (("weights", None), ("channels", 0), ("stride", 1), ("scale", None)):
                if getattr(self, name) != unset:
                    raise ValueError(f"{name} is {getattr(self, name)}, but kind is pixel; {name} is for latent")
            return
        for name, valid, expected in (
            ("weights", bool(self.weights), "the folder of an autoencoder"),
            ("channels", self.channels >= 1, "at least 1"),
            ("stride", self.stride >= 2, "at least 2"),
            ("scale", self.scale is None or self.scale > 0, "a number above 0"),
        ):
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {expected} where kind is latent")

    def inside(self, shape: Shape) -> tuple[int, int, int]:
        """Frames, height and width of what the denoiser sees of a clip of `shape`."""
        return shape.frames, shape.height // self.stride, shape.width // self.stride

    def mask(self, mask: Tensor) -> Tensor:
        """`mask` (B, 1, F, H, W) at the size inside: a position is known where all of its pixels are.

        One of (B, 1, F, 1, 1) stays as it is.
        """
        if mask.shape[3:] == (1, 1) or self.stride == 1:
            return mask
        flat = -F.max_pool2d(-mask.flatten(0, 2)[:, None], self.stride)
        return flat.reshape(*mask.shape[:3], *flat.shape[2:])

    def folder(self) -> Path | None:
        """Where the weights are, None for pixels. Raises InputError for a folder that is none of an AutoencoderKL."""
        return None if self.weights is None else foreign.find(self.weights, AUTOENCODER, WHAT)

    def open(self) -> Coder:
        """Loads the autoencoder (on the CPU); see `Autoencoder` for what it raises."""
        folder = self.folder()
        return Pixels() if folder is None else Autoencoder(self, folder)


class Coder(Protocol):
    """From pixels (B, C, F, H, W) in [-1, 1] to what the denoiser works on, and back. Results stay on x's device."""

    hash: str  # of what decides the result beside the settings; empty for pixels

    def to(self, device: torch.device) -> Coder: ...

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, z: Tensor) -> Tensor: ...


class Pixels:
    """The identity: gives the very tensor it is given."""

    hash = ""

    def to(self, device: torch.device) -> Coder:
        return self

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, z: Tensor) -> Tensor:
        return z


class Autoencoder:
    """diffusers' AutoencoderKL, frame by frame: z = scale (mode of q(z | x) - shift).

    Raises InputError for weights that are damaged or do not fit the settings, NumericError for weights that are not
    finite.
    """

    def __init__(self, codec: Codec, folder: Path) -> None:
        self.codec = codec
        self.model = foreign.load(folder, AUTOENCODER, WHAT, "codec.weights")
        made = self.model.config
        found = {"channels": made.latent_channels, "stride": 2 ** (len(made.block_out_channels) - 1)}
        for name, value in found.items():
            if getattr(codec, name) != value:
                raise InputError(
                    f"autoencoder {folder}: has {name} {value}, but codec.{name} is {getattr(codec, name)}",
                    fix=f"codec.{name}={value}",
                )
        if (made.in_channels, made.out_channels) != (COLOURS, COLOURS):
            raise InputError(
                f"autoencoder {folder}: takes {made.in_channels} channels and gives {made.out_channels}, expected "
                f"{COLOURS}",
                fix="another codec.weights",
            )
        self.scale = float(made.scaling_factor) if codec.scale is None else codec.scale
        self.shift = float(made.shift_factor or 0)
        self.hash = foreign.digest(folder)

    def to(self, device: torch.device) -> Coder:
        self.model.to(device)
        return self

    def encode(self, x: Tensor) -> Tensor:
        """(B, 3, F, H, W) -> (B, channels, F, H / stride, W / stride)."""
        return self._each(x, lambda part: (self.model.encode(part).latent_dist.mode() - self.shift) * self.scale)

    def decode(self, z: Tensor) -> Tensor:
        """The inverse, as far as the autoencoder goes, clamped to [-1, 1]. NumericError if it is not finite."""
        x = self._each(z, lambda part: self.model.decode(part / self.scale + self.shift).sample)
        if not torch.isfinite(x).all():
            raise NumericError("the autoencoder's output is not finite", fix="another codec.weights or codec.scale")
        return x.clamp(-1, 1)

    @torch.no_grad()
    def _each(self, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        frames = x.transpose(1, 2).flatten(0, 1).float()
        with torch.autocast(self.model.device.type, enabled=False):
            parts = [run(part.to(self.model.device)).to(x.device) for part in torch.split(frames, self.codec.chunk)]
        out = torch.cat(parts)
        return out.view(x.shape[0], x.shape[2], *out.shape[1:]).transpose(1, 2)
