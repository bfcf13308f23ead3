"""Show-1: base, interpolation and both super-resolutions, of its own class `UNet3DConditionModel`.

Where diffusers' class of that name has C / n heads of n channels in time, this one has n heads of C / n (and in space
too, where it has transformers): the tensors are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cascade.importers import Layout
from cascade.importers._fields import Conditioned, read
from cascade.nets.unet3d_config import Heads, Space, Time, UNet3DConfig

COLOURS = 3
ENTRANCE = 64  # size of each of the 8 heads of its first transformer


@dataclass(kw_only=True)
class Config(Conditioned):
    transfromer_in_opt: bool = False  # sic


def network(tree: Mapping[str, Any]) -> UNet3DConfig:
    config = read(tree, Config)
    heads = config.heads()
    pixels = config.space("3D") is Space.ADDED_KV
    if pixels and heads.number is None:
        raise ValueError(f"attention_head_dim is {config.attention_head_dim}, expected one number")
    channels = COLOURS if pixels else config.out_channels
    return UNet3DConfig(
        channels=channels,
        heads=Heads(size=heads.number) if pixels else heads,
        temporal_heads=heads,
        time=Time.BESIDE,
        transformer_in=ENTRANCE if config.transfromer_in_opt else None,
        **config.ports(channels),
        **config.settings("3D"),
    )


LAYOUT = Layout("CC BY-NC 4.0", ("UNet3DConditionModel",), network)
