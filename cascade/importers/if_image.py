"""DeepFloyd IF, stages I and II, as diffusers keeps them: `UNet2DConditionModel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cascade.importers import Layout, same
from cascade.importers._fields import MIDDLE, Conditioned, blocks, read
from cascade.nets.unet3d_config import Heads, Space, UNet3DConfig

CLASS = "UNet2DConditionModel"
COLOURS = 3


def network(tree: Mapping[str, Any]) -> UNet3DConfig:
    config = read(tree, Conditioned)
    if config.space("2D") is not Space.ADDED_KV:
        raise ValueError(f"down_block_types is {config.down_block_types}, expected SimpleCrossAttnDownBlock2D")
    sizes = set(config.numbers())  # the size of a head, as it says
    if len(sizes) > 1:
        raise ValueError(f"attention_head_dim is {config.attention_head_dim}, expected one number")
    return UNet3DConfig(
        channels=COLOURS, heads=Heads(size=sizes.pop()), **config.ports(COLOURS), **config.settings("2D")
    )


def published(cfg: UNet3DConfig) -> dict[str, Any]:
    """The config.json of a network. Raises ConfigError for one that this class of diffusers cannot be."""
    tree = {
        "_class_name": CLASS,
        "in_channels": cfg.channels * (1 + cfg.concat) + cfg.mask,
        "out_channels": cfg.channels * (1 + cfg.variance),
        **blocks(cfg.levels, Space.ADDED_KV, "2D"),
        "mid_block_type": MIDDLE[Space.ADDED_KV].format("2D"),
        "block_out_channels": [level.channels for level in cfg.levels],
        "layers_per_block": [level.blocks for level in cfg.levels],
        "mid_block_scale_factor": cfg.middle_scale,
        "act_fn": cfg.activation.value,
        "norm_num_groups": cfg.groups,
        "norm_eps": cfg.eps,
        "cross_attention_dim": cfg.width,
        "cross_attention_norm": "group_norm",
        "attention_head_dim": cfg.heads.size,
        "encoder_hid_dim": None if cfg.context is None else cfg.text,
        "encoder_hid_dim_type": None if cfg.context is None else "text_proj",
        "class_embed_type": "timestep" if cfg.noise_level else None,
        "addition_embed_type": None if cfg.pool is None else "text",
        "addition_embed_type_num_heads": cfg.pool or 64,
        "resnet_time_scale_shift": "scale_shift" if cfg.scale_shift else "default",
        "resnet_skip_time_act": cfg.skip_time_act,
        "resnet_out_scale_factor": cfg.scale,
        "time_embedding_dim": cfg.embedding,
        "time_embedding_act_fn": None if cfg.time_act is None else cfg.time_act.value,
    }
    return same(tree, cfg, network)


LAYOUT = Layout("DeepFloyd IF License (research, not commercial)", (CLASS,), network, published)
