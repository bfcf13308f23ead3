"""ModelScope text-to-video and Zeroscope, as diffusers keeps them: `UNet3DConditionModel`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cascade.importers import Layout, same
from cascade.importers._fields import Fields, blocks, read
from cascade.nets.unet3d_config import Act, Heads, Space, Time, UNet3DConfig

CLASS = "UNet3DConditionModel"


@dataclass(kw_only=True)
class Config(Fields):
    """The output's activation is SiLU whatever `act_fn` says, so that must say it too."""

    attention_head_dim: int = 64
    layers_per_block: int = 2
    act_fn: Literal["silu"] = "silu"  # type: ignore[assignment]


def network(tree: Mapping[str, Any]) -> UNet3DConfig:
    config = read(tree, Config)
    if config.space("3D") is not Space.TRANSFORMER:
        raise ValueError(f"down_block_types is {config.down_block_types}, expected CrossAttnDownBlock3D, DownBlock3D")
    head = Heads(size=config.attention_head_dim)  # the size, as it says, in space and in time
    return UNet3DConfig(
        arch="unet3d", levels=config.levels("3D"), channels=config.out_channels, **config.ports(config.out_channels),
        embedding=4 * config.block_out_channels[0], text=config.cross_attention_dim, heads=head, linear=True,
        activation=Act.SILU, middle_scale=config.mid_block_scale_factor, groups=config.norm_num_groups,
        eps=config.norm_eps, time=Time.BESIDE, temporal_heads=head, transformer_in=config.attention_head_dim,
    )  # fmt: skip


def published(cfg: UNet3DConfig) -> dict[str, Any]:
    """The config.json of a network. Raises ConfigError for one that this class of diffusers cannot be."""
    tree = {
        "_class_name": CLASS,
        "in_channels": cfg.channels * (1 + cfg.concat) + cfg.mask,
        "out_channels": cfg.channels,
        **blocks(cfg.levels, Space.TRANSFORMER, "3D"),
        "block_out_channels": [level.channels for level in cfg.levels],
        "layers_per_block": cfg.levels[0].blocks,
        "downsample_padding": 1,
        "mid_block_scale_factor": cfg.middle_scale,
        "act_fn": "silu",
        "norm_num_groups": cfg.groups,
        "norm_eps": cfg.eps,
        "cross_attention_dim": cfg.text,
        "attention_head_dim": cfg.heads.size,
    }
    return same(tree, cfg, network)


LAYOUT = Layout("CC BY-NC 4.0", (CLASS,), network, published)
