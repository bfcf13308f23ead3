"""LaVie's base: a checkpoint of PyTorch. Its configuration is Stable Diffusion 1.4's, unet/config.json, beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cascade.importers import Layout
from cascade.importers._fields import Conditioned, read
from cascade.nets.unet3d_config import Space, Time, UNet3DConfig

ROTARY, BUCKETS = 32, 32
LICENCE = (
    "open for research, commercial use on application (vchitect); its Stable Diffusion 1.4: CreativeML Open RAIL-M"
)


def inflated(tree: Mapping[str, Any], **changes: Any) -> UNet3DConfig:
    """The network of an image model's configuration; `changes` are what that does not say."""
    config = read(tree, Conditioned)
    if config.space("2D") is not Space.TRANSFORMER:
        raise ValueError(f"down_block_types is {config.down_block_types}, expected CrossAttnDownBlock2D, DownBlock2D")
    heads, channels = config.heads(), config.out_channels
    settings = config.settings("2D") | config.ports(channels) | changes
    return UNet3DConfig(
        channels=channels, heads=heads, temporal_heads=heads, time=Time.INSIDE, shared_norm=True, **settings
    )


def network(tree: Mapping[str, Any]) -> UNet3DConfig:
    return inflated(tree, rotary=ROTARY, buckets=BUCKETS)


def averaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The averaged weights, where a checkpoint of the training has them beside others."""
    average = {name.removeprefix("ema."): tensor for name, tensor in state.items() if name.startswith("ema.")}
    return average or state


LAYOUT = Layout(LICENCE, ("UNet2DConditionModel", "UNet3DConditionModel"), network, tensors=averaged)
