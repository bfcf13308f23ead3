"""The architecture of a `VideoUNet`, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Mixer(Enum):
    """What mixes frames at a level of the U-Net."""

    NONE = "none"
    CONV = "conv"
    ATTN = "attn"
    BOTH = "conv+attn"
    PSEUDO = "pseudo"  # a convolution along time behind every spatial one: together pseudo-3D (Make-A-Video)
    PSEUDO_ATTN = "pseudo+attn"

    def has(self, part: Mixer) -> bool:
        """Whether `part` is one of the things that mix."""
        return part.value in self.value.split("+")


@dataclass(kw_only=True)
class LevelSpec:
    """One resolution of the U-Net; each level below the first halves height and width.

    It is made smaller before the blocks of the way down and larger after those of the way up, so that they cost least
    (Saharia et al. 2022, Efficient U-Net).
    """

    channels: int
    blocks: int = 1  # on the way down; each leaves a skip connection for one on the way up
    blocks_up: int | None = None  # on the way up; None: as many
    mixer: Mixer = Mixer.CONV
    spatial_attention: bool = False
    text_attention: bool = False

    def __post_init__(self) -> None:
        if self.channels < 8 or self.channels % 8:
            raise ValueError(f"channels is {self.channels}, expected a multiple of 8")
        if self.blocks < 1:
            raise ValueError(f"blocks is {self.blocks}, expected at least 1")
        if self.ups < 1:
            raise ValueError(f"blocks_up is {self.blocks_up}, expected at least 1")

    @property
    def ups(self) -> int:
        """Blocks on the way up."""
        return self.blocks if self.blocks_up is None else self.blocks_up


@dataclass(kw_only=True)
class UNetConfig:
    """Architecture of a `VideoUNet`."""

    levels: list[LevelSpec]
    patch: int = 1  # side of the square of pixels that is one position inside
    embedding: int = 256  # width of the embedding of time, scalars and pooled text
    text: int = 128  # width of the text encoder's embeddings; 0: the network is told no text
    head: int = 64  # channels per attention head
    frame_position: bool = False  # tells every block which frame it sees: fixed-length stages only
    residual: bool = False  # the output starts from the incoming video: for x-prediction
    channels: int = 3
    skip_scale: float = 1.0  # of skip connections: 1 / sqrt(2) in the Efficient U-Net

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("levels is empty, expected at least one level")
        for name, least in (("patch", 1), ("embedding", 2), ("text", 0), ("head", 1), ("channels", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if self.embedding % 2:
            raise ValueError(f"embedding is {self.embedding}, expected an even number: sines and cosines")
        if not 0 < self.skip_scale <= 1:
            raise ValueError(f"skip_scale is {self.skip_scale}, expected a number above 0, at most 1")
        if not self.text and any(level.text_attention for level in self.levels):
            raise ValueError(f"text is {self.text}, expected the width of the embeddings: a level has text_attention")
        for level in self.levels:
            if level.channels % max(1, level.channels // self.head):
                raise ValueError(
                    f"head is {self.head}, which does not divide {level.channels} channels into equal heads"
                )

    @property
    def multiple(self) -> int:
        """Height and width must be multiples of this."""
        return int(self.patch * 2 ** (len(self.levels) - 1))

    @property
    def fully_convolutional(self) -> bool:
        """Without spatial attention it can be trained on crops and run at any size."""
        return not any(level.spatial_attention for level in self.levels)


# Fields that are younger than weights which exist, and the values those were made with.
YOUNG = {"skip_scale": 1.0}
YOUNG_IN_LEVELS = {"blocks_up": None}
YOUNG_3D = {"concat_channels": None, "noise_label": False}  # of a UNet3D
YOUNG_IN_LEVELS_3D = {"own": True}


def completed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """An architecture as it stands beside weights, with the fields that came after them."""
    of_all, of_levels = (YOUNG_3D, YOUNG_IN_LEVELS_3D) if "arch" in saved else (YOUNG, YOUNG_IN_LEVELS)
    return {**of_all, **saved, "levels": [{**of_levels, **level} for level in saved.get("levels", [])]}
