"""LaVie's super-resolution: a checkpoint of PyTorch, and beside it its unet_3d_config.json as config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from cascade.codec import COLOURS
from cascade.importers import Layout
from cascade.importers._fields import Conditioned, read
from cascade.importers.lavie import BUCKETS, ROTARY, averaged
from cascade.nets.unet3d_config import Space, Time, UNet3DConfig

LICENCE = (
    "open for research, commercial use on application (vchitect); its Stable Diffusion x4 upscaler: "
    "CreativeML Open RAIL++-M"
)


@dataclass(kw_only=True)
class Module:
    """`temporal_module_config`: convolutions alone. It names no attention, so what would set that up says nothing."""

    attention_block_types: list[Literal[""]]
    num_attention_layers: Any = None
    num_attention_head: Any = None
    attention_head_dim: Any = None
    attention_dim_div: Any = None
    cross_frame_attention_mode: Any = None
    temporal_shift_fold_div: Any = None
    temporal_shift_direction: Any = None
    use_dcn_warpping: Any = None  # sic
    use_deformable_conv: Any = None
    use_scale_shift: Literal[False] = False


@dataclass(kw_only=True)
class Config(Conditioned):
    """`video_condition` is that of the demo, whatever the file says."""

    in_channels: int = 7
    norm_num_groups: Literal[32] = 32  # some norms have as many whatever it says
    only_cross_attention: list[bool]  # type: ignore[assignment]
    num_class_embeds: Literal[1000]  # type: ignore[assignment]
    class_embed_type: Literal[None] = None
    max_noise_level: int = 350
    down_temporal_idx: list[int]
    mid_temporal: Literal[True]
    up_temporal_idx: list[int]
    temporal_module_config: Module
    video_condition: Literal[False] = False
    use_first_frame: Literal[False] = False
    use_relative_position: Literal[False] = False
    freeze_pretrained_2d_upsampler: Any = None  # in training


def network(tree: Mapping[str, Any]) -> UNet3DConfig:
    config = read(tree, Config)
    if config.space("3D") is not Space.TRANSFORMER:
        raise ValueError(f"down_block_types is {config.down_block_types}, expected CrossAttnDownBlock3D, DownBlock3D")
    every = list(range(len(config.down_block_types)))
    for name in ("down_temporal_idx", "up_temporal_idx"):
        if (given := getattr(config, name)) != every:
            raise ValueError(f"{name} is {given}, expected {every}")
    channels = config.out_channels
    if config.in_channels != channels + COLOURS:
        raise ValueError(f"in_channels is {config.in_channels}, expected {channels + COLOURS}")
    if len(config.only_cross_attention) != len(every):
        raise ValueError(f"only_cross_attention is {config.only_cross_attention}, expected {len(every)} of them")
    settings, heads = config.settings("3D"), config.heads()
    twice = zip(settings["levels"], config.only_cross_attention, strict=True)
    settings["levels"] = [replace(level, own=not (only and level.attention)) for level, only in twice]
    return UNet3DConfig(
        channels=channels, heads=heads, temporal_heads=heads, time=Time.AROUND, shared_norm=True, concat=True,
        concat_channels=COLOURS, noise_label=True, rotary=ROTARY, buckets=BUCKETS, **settings | {"noise_level": True},
    )  # fmt: skip


LAYOUT = Layout(LICENCE, ("UNet3DVSRModel",), network, tensors=averaged)
