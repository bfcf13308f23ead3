"""Fields of config.json as diffusers' U-Nets have them: what we can build of each, and the network that comes of it.

A `Literal` is the only value that we can build. A field that stands in no class here is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from cascade.config import parse
from cascade.nets.unet3d_config import Act, Heads, Level3D, Space

F = TypeVar("F", bound="Fields")

PLAIN = {Space.ADDED_KV: "Resnet{}sampleBlock{}", Space.TRANSFORMER: "{}Block{}"}
ATTENDING = {Space.ADDED_KV: "SimpleCrossAttn{}Block{}", Space.TRANSFORMER: "CrossAttn{}Block{}"}
WIDTHS = (
    "in_channels", "out_channels", "block_out_channels", "cross_attention_dim", "attention_head_dim",
    "encoder_hid_dim", "time_embedding_dim", "addition_embed_type_num_heads",
)  # fmt: skip
MOST = {**dict.fromkeys(WIDTHS, 1 << 16), "layers_per_block": 100}  # far beyond any network
MIDDLE = {Space.ADDED_KV: "UNetMidBlock{}SimpleCrossAttn", Space.TRANSFORMER: "UNetMidBlock{}CrossAttn"}


@dataclass(kw_only=True)
class Fields:
    """Of every U-Net; defaults are diffusers'."""

    sample_size: Any = None
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: list[str]
    up_block_types: list[str]
    block_out_channels: list[int]
    layers_per_block: int | list[int] = 2
    downsample_padding: Literal[1] = 1
    mid_block_scale_factor: float = 1.0
    act_fn: Act = Act.SILU
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int
    attention_head_dim: int | list[int]
    num_attention_heads: Literal[None] = None
    time_cond_proj_dim: Literal[None] = None

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            given = getattr(self, name, None)
            numbers = given if isinstance(given, list) else [1 if given is None else given]
            if not numbers or not all(1 <= number <= most for number in numbers):
                raise ValueError(f"{name} is {given}, expected 1 to {most}")

    @property
    def layers(self) -> list[int]:
        given = self.layers_per_block
        return [given] * len(self.block_out_channels) if isinstance(given, int) else given

    def space(self, dims: str) -> Space:
        """Which family of blocks it is made of; `dims`, 2D or 3D, ends their names."""
        for space in Space:
            if set(self.down_block_types) <= {names[space].format("Down", dims) for names in (PLAIN, ATTENDING)}:
                return space
        known = ", ".join(names[space].format("Down", dims) for space in Space for names in (PLAIN, ATTENDING))
        raise ValueError(f"down_block_types is {self.down_block_types}, expected {known}, of one family")

    def levels(self, dims: str) -> list[Level3D]:
        space = self.space(dims)
        attend = [name == ATTENDING[space].format("Down", dims) for name in self.down_block_types]
        mirrored = [(ATTENDING if a else PLAIN)[space].format("Up", dims) for a in reversed(attend)]
        if self.up_block_types != mirrored:
            raise ValueError(f"up_block_types is {self.up_block_types}, expected {mirrored}, as on the way down")
        if not len(self.block_out_channels) == len(self.layers) == len(self.numbers()) == len(attend):
            raise ValueError(
                "block_out_channels, layers_per_block, attention_head_dim and down_block_types are of different lengths"
            )
        levels = zip(self.block_out_channels, self.layers, attend, strict=True)
        return [Level3D(channels=c, blocks=n, attention=a) for c, n, a in levels]

    def ports(self, channels: int) -> dict[str, Any]:
        """What stands on the channels beside z: the incoming video, its mask, and in the output the variance."""
        ins = {channels: (False, False), 2 * channels: (True, False), 2 * channels + 1: (True, True)}
        if self.in_channels not in ins:
            raise ValueError(f"in_channels is {self.in_channels}, expected {' or '.join(map(str, ins))}")
        if self.out_channels not in (channels, 2 * channels):
            raise ValueError(f"out_channels is {self.out_channels}, expected {channels} or {2 * channels}")
        concat, mask = ins[self.in_channels]
        return {"concat": concat, "mask": mask, "variance": self.out_channels == 2 * channels}

    def numbers(self) -> list[int]:
        """`attention_head_dim` at each level."""
        given = self.attention_head_dim
        return [given] * len(self.block_out_channels) if isinstance(given, int) else given

    def heads(self) -> Heads:
        """Where `attention_head_dim` is, against its name, the number of heads at each level."""
        numbers = self.numbers()
        if len(set(numbers)) == 1:
            return Heads(number=numbers[0])
        sizes = {c // number for c, number in zip(self.block_out_channels, numbers, strict=False)}  # see `levels`
        if len(sizes) > 1:
            raise ValueError(f"attention_head_dim is {numbers}, expected heads of one number or of one size")
        return Heads(size=sizes.pop())


@dataclass(kw_only=True)
class Conditioned(Fields):
    """Of `UNet2DConditionModel` and what was made of it."""

    attention_head_dim: int | list[int] = 8
    center_input_sample: Literal[False] = False
    flip_sin_to_cos: Literal[True] = True
    freq_shift: Literal[0] = 0
    mid_block_type: str | None = None
    only_cross_attention: Literal[False] = False
    dropout: float = 0.0
    transformer_layers_per_block: Literal[1] = 1
    reverse_transformer_layers_per_block: Literal[None] = None
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: Literal["text_proj"] | None = None
    dual_cross_attention: Literal[False] = False
    use_linear_projection: bool = False
    class_embed_type: Literal["timestep"] | None = None
    addition_embed_type: Literal["text"] | None = None
    addition_embed_type_num_heads: int = 64
    addition_time_embed_dim: Literal[None] = None
    num_class_embeds: Literal[None] = None
    upcast_attention: bool = False  # of half precision alone, which our softmax has in float32 anyway
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_type: Literal["positional"] = "positional"
    time_embedding_dim: int | None = None
    time_embedding_act_fn: Act | None = None
    timestep_post_act: Literal[None] = None
    conv_in_kernel: Literal[3] = 3
    conv_out_kernel: Literal[3] = 3
    projection_class_embeddings_input_dim: Literal[None] = None
    attention_type: Literal["default"] = "default"
    class_embeddings_concat: Literal[False] = False
    mid_block_only_cross_attention: Literal[False] | None = None
    cross_attention_norm: Literal["group_norm"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout:
            raise ValueError(f"dropout is {self.dropout}, expected 0")

    def settings(self, dims: str) -> dict[str, Any]:
        """Fields of `UNet3DConfig`, without channels, heads and what mixes frames."""
        space, levels = self.space(dims), self.levels(dims)
        added = space is Space.ADDED_KV
        for name, given, wanted in (
            (
                "mid_block_type",
                self.mid_block_type or MIDDLE[Space.TRANSFORMER].format(dims),
                MIDDLE[space].format(dims),
            ),
            ("cross_attention_norm", self.cross_attention_norm, "group_norm" if added else None),
            ("resnet_skip_time_act", self.resnet_skip_time_act, self.resnet_skip_time_act and added),
            ("resnet_out_scale_factor", self.resnet_out_scale_factor, self.resnet_out_scale_factor if added else 1.0),
        ):
            if given != wanted:
                raise ValueError(f"{name} is {given}, expected {wanted} with {self.down_block_types[-1]}")
        return {
            "arch": "unet3d",
            "levels": levels,
            "embedding": self.time_embedding_dim or 4 * self.block_out_channels[0],
            "text": self.encoder_hid_dim or self.cross_attention_dim,
            "context": self.cross_attention_dim if self.encoder_hid_dim else None,
            "pool": self.addition_embed_type_num_heads if self.addition_embed_type else None,
            "noise_level": self.class_embed_type is not None,
            "space": space,
            "linear": self.use_linear_projection,
            "activation": self.act_fn,
            "scale_shift": self.resnet_time_scale_shift == "scale_shift",
            "skip_time_act": self.resnet_skip_time_act,
            "time_act": self.time_embedding_act_fn,
            "scale": self.resnet_out_scale_factor,
            "middle_scale": self.mid_block_scale_factor,
            "groups": self.norm_num_groups,
            "eps": self.norm_eps,
        }


def read(tree: Mapping[str, Any], cls: type[F]) -> F:
    """Strictly; names that begin with an underscore are diffusers' notes. Raises ConfigError naming the field."""
    return parse({name: value for name, value in tree.items() if not name.startswith("_")}, cls)


def blocks(levels: list[Level3D], space: Space, dims: str) -> dict[str, list[str]]:
    """The inverse of `Fields.levels`, as far as names go."""
    names = [(ATTENDING if level.attention else PLAIN)[space] for level in levels]
    return {
        "down_block_types": [name.format("Down", dims) for name in names],
        "up_block_types": [name.format("Up", dims) for name in reversed(names)],
    }
