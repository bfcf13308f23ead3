"""The U-Nets of the public weights: their sizes, parity with diffusers and published numbers, identity at the start.

Weights are drawn with a standard deviation of 0.1: at the usual 0.02 heads cut the wrong way hardly show.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade import checkpoint
from cascade.compose import compose
from cascade.cond import Cond
from cascade.config import package_root, parse, plain
from cascade.errors import ConfigError, InputError
from cascade.nets.layers import Clip, channels_last
from cascade.nets.unet3d import UNet3D, timestep
from cascade.nets.unet3d_attention import RelativeBias, Rotary, SparseAttention, TemporalAttention, TemporalTransformer
from cascade.nets.unet3d_blocks import FrameConv, TemporalConvs, Told
from cascade.nets.unet3d_config import Act, Heads, Level3D, Space, Time, UNet3DConfig
from cascade.nets.unet_config import YOUNG_3D, YOUNG_IN_LEVELS_3D, completed
from cascade.text import Text

BATCH, FRAMES, TOKENS, WIDTH = 2, 3, 7, 32
SR_SCALE = 1.4142271248762552
TIMES = torch.tensor([10, 500])
LEVELS = torch.tensor([250, 40])
NETS = sorted(
    path.relative_to(package_root() / "conf/net").with_suffix("").as_posix()
    for path in (package_root() / "conf/net").rglob("*.yaml")
)


def uniform(key: int, *shape: int) -> Tensor:
    """Numbers in [-1, 1) that depend on `key` and the place alone, as those behind the published ones."""
    word = 2**32 - 1
    h = (torch.arange(math.prod(shape)) * 2654435761 + key * 40503 + 1) & word
    h = ((h ^ (h >> 15)) * 2246822519) & word
    h = ((h ^ (h >> 13)) * 3266489917) & word
    return (2 * (h ^ (h >> 16)).double() / 2**32 - 1).view(shape)


def weighted(module: nn.Module, *, std: float = 0.1) -> Any:
    """`module` in float64 with such numbers, around 1 where a norm multiplies."""
    module = module.double().eval().requires_grad_(False)
    for key, (name, tensor) in enumerate(sorted(module.state_dict().items())):
        if not name.endswith("freqs"):
            one = tensor.ndim == 1 and name.endswith("weight")
            tensor.copy_(std * 3**0.5 * uniform(key, *tensor.shape) + one)
    return module


def pixels(**changes: Any) -> UNet3DConfig:
    """Show-1's base, tiny: 32 and 96 channels, so that 8 heads and heads of 8 channels differ."""
    settings: dict[str, Any] = {
        "arch": "unet3d", "levels": [Level3D(channels=32, blocks=1, attention=False), Level3D(channels=96, blocks=1)],
        "channels": 3, "embedding": 128, "text": WIDTH, "context": WIDTH, "pool": 2, "space": Space.ADDED_KV,
        "heads": Heads(size=8), "activation": Act.GELU, "scale_shift": True, "variance": True, "time": Time.BESIDE,
        "temporal_heads": Heads(number=8),
    }  # fmt: skip
    return UNet3DConfig(**(settings | changes))


def larger(**changes: Any) -> UNet3DConfig:
    """Show-1's first super-resolution, tiny."""
    levels = [Level3D(channels=32, blocks=1, attention=False), Level3D(channels=96, blocks=2)]
    settings: dict[str, Any] = {
        "levels": levels, "concat": True, "noise_level": True, "scale": SR_SCALE, "middle_scale": SR_SCALE,
        "skip_time_act": True, "time_act": Act.GELU, "embedding": 96,
    }  # fmt: skip
    return pixels(**(settings | changes))


def latents(**changes: Any) -> UNet3DConfig:
    """ModelScope's, tiny."""
    settings: dict[str, Any] = {
        "arch": "unet3d", "levels": [Level3D(channels=32, blocks=1), Level3D(channels=96, blocks=1, attention=False)],
        "channels": 4, "embedding": 128, "text": WIDTH, "heads": Heads(size=8), "linear": True, "time": Time.BESIDE,
        "temporal_heads": Heads(size=8), "transformer_in": 8,
    }  # fmt: skip
    return UNet3DConfig(**(settings | changes))


def lavie(**changes: Any) -> UNet3DConfig:
    """LaVie's base, tiny."""
    heads = {"heads": Heads(number=4), "temporal_heads": Heads(number=4)}
    settings = {"linear": False, "transformer_in": None, "time": Time.INSIDE, "shared_norm": True, "buckets": 32}
    return latents(**({**settings, **heads, "rotary": 4} | changes))


def vsr(**changes: Any) -> UNet3DConfig:
    """LaVie's super-resolution, tiny: a level without attention, one that attends to the text alone, one with all."""
    levels = [Level3D(channels=c, blocks=1, attention=c > 32, own=c != 64) for c in (32, 64, 96)]
    ports = {"concat": True, "concat_channels": 3, "noise_level": True, "noise_label": True}
    heads = {"heads": Heads(number=2), "temporal_heads": Heads(number=2)}
    settings = {"levels": levels, "linear": True, "time": Time.AROUND, "rotary": 32}
    return lavie(**({**settings, **ports, **heads} | changes))


def inputs(cfg: UNet3DConfig, frames: int = FRAMES) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    channels = cfg.channels + cfg.concat * cfg.incoming + cfg.mask
    x, text = uniform(1001, BATCH, channels, frames, 8, 12), uniform(1002, BATCH, TOKENS, WIDTH)
    return x, TIMES, text, LEVELS if cfg.noise_level else None


def near(got: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    assert got.shape == expected.shape and expected.std() > 0.1
    assert (got - expected).abs().max() <= atol


# sizes ---------------------------------------------------------------------------------------------------------------

COUNTS: dict[str, tuple[int | None, int, int]] = {  # tensors, parameters, and how many digits of those are published
    "if_image/i_m": (None, 371_600_000, 4),
    "if_image/i_l": (None, 935_400_000, 4),
    "if_image/i_xl": (None, 4_305_000_000, 4),
    "if_image/ii_m": (None, 461_100_000, 4),
    "if_image/ii_l": (None, 1_243_000_000, 4),
    "show1/base": (1827, 1_726_848_390, 10),
    "show1/interp": (1827, 1_726_859_910, 10),
    "show1/sr1": (1639, 796_343_046, 9),
    "modelscope": (1480, 1_411_233_860, 10),
    "lavie/base": (830, 909_100_000, 4),
    "lavie/vsr": (1158, 691_036_420, 9),  # as its authors' code has them
}


def named(name: str) -> UNet3DConfig:
    import yaml

    tree = yaml.safe_load((package_root() / "conf/net" / f"{name}.yaml").read_text())
    return parse(tree, UNet3DConfig)


def on_meta(cfg: UNet3DConfig) -> UNet3D:
    with torch.device("meta"):
        return UNet3D(cfg)


def size(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_the_networks_have_as_many_tensors_and_parameters_as_published(name: str) -> None:
    tensors, parameters, digits = COUNTS[name]
    net = on_meta(named(name))
    assert tensors in (None, len(net.state_dict()))
    assert round(size(net), digits - len(str(parameters))) == parameters


@pytest.mark.parametrize("name", NETS)
def test_every_named_network_can_be_built(name: str) -> None:
    assert named(name).multiple in (8, 16)
    assert name in COUNTS or size(on_meta(named(name))) > 0


def test_shapes_follow_the_skips() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in on_meta(named("show1/base")).state_dict().items()}
    for name, shape in {
        "conv_in.weight": (320, 3, 3, 3),
        "time_embedding.linear_1.weight": (1280, 320),
        "encoder_hid_proj.weight": (1280, 4096),
        "add_embedding.pool.positional_embedding": (1, 4096),
        "down_blocks.0.downsamplers.0.conv2.weight": (320, 320, 3, 3),
        "down_blocks.3.temp_convs.2.conv4.3.weight": (1280, 1280, 3, 1, 1),
        "mid_block.attentions.0.add_k_proj.weight": (1280, 1280),
        "up_blocks.0.resnets.0.conv1.weight": (1280, 2560, 3, 3),
        "up_blocks.0.resnets.3.conv1.weight": (1280, 2240, 3, 3),
        "up_blocks.0.temp_attentions.3.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
        "up_blocks.3.resnets.3.conv1.weight": (320, 640, 3, 3),
        "conv_out.weight": (6, 320, 3, 3),
    }.items():
        assert shapes[name] == shape, name
    assert "up_blocks.3.upsamplers.0.conv1.weight" not in shapes


def test_what_video_adds_is_of_the_published_size() -> None:
    """Show-1's two halves, its optional first transformer, LaVie's 144 tensors."""
    base = named("show1/base")
    assert round(size(on_meta(replace(base, time=Time.NONE))) / 1e6) == 935
    net = on_meta(replace(base, transformer_in=64))
    assert (size(net), len(net.state_dict())) == (1_732_429_126, 1853)
    state = on_meta(named("lavie/base")).state_dict()
    added = {name: tensor for name, tensor in state.items() if "_temp" in name}
    assert len(added) == 144 and round(sum(tensor.numel() for tensor in added.values()) / 1e6, 1) == 49.6


def test_a_stage_is_made_of_a_named_network(tmp_path: Any) -> None:
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage/mine.yaml").write_text(
        "# @package _global_\ndefaults: [/shared@_here_, /net@net: show1/sr1, _self_]\nname: mine\nkind: ssr\n"
    )
    assert parse(compose("stage", ["stage=mine"], tmp_path)["net"], UNet3DConfig) == named("show1/sr1")


# parity with diffusers -----------------------------------------------------------------------------------------------


def image_model(cfg: UNet3DConfig) -> Any:
    """diffusers' image model of that configuration."""
    from diffusers import UNet2DConditionModel

    added = cfg.space is Space.ADDED_KV
    plain, attending = (
        ("Resnet{}sampleBlock2D", "SimpleCrossAttn{}Block2D") if added else ("{}Block2D", "CrossAttn{}Block2D")
    )
    names = [attending if level.attention else plain for level in cfg.levels]
    only_added: dict[str, Any] = {
        "encoder_hid_dim": cfg.text, "encoder_hid_dim_type": "text_proj", "addition_embed_type": "text",
        "addition_embed_type_num_heads": cfg.pool, "cross_attention_norm": "group_norm",
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    }  # fmt: skip
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=cfg.channels + cfg.concat * cfg.incoming + cfg.mask,
        out_channels=cfg.channels * (1 + cfg.variance),
        block_out_channels=[level.channels for level in cfg.levels],
        layers_per_block=[level.blocks for level in cfg.levels],
        down_block_types=[name.format("Down") for name in names],
        up_block_types=[name.format("Up") for name in reversed(names)],
        cross_attention_dim=cfg.width,
        attention_head_dim=cfg.heads.size or cfg.heads.number,
        act_fn=cfg.activation.value,
        use_linear_projection=cfg.linear,
        only_cross_attention=[not level.own for level in cfg.levels],
        class_embed_type="timestep" if cfg.noise_level and not cfg.noise_label else None,
        num_class_embeds=1000 if cfg.noise_label else None,
        time_embedding_dim=cfg.embedding,
        time_embedding_act_fn=cfg.time_act and cfg.time_act.value,
        resnet_skip_time_act=cfg.skip_time_act,
        resnet_out_scale_factor=cfg.scale,
        mid_block_scale_factor=cfg.middle_scale,
        resnet_time_scale_shift="scale_shift" if cfg.scale_shift else "default",
        **(only_added if added else {}),
    )


def by_frame(model: Any, x: Tensor, t: Tensor, text: Tensor, level: Tensor | None) -> Tensor:
    outs = [model(frame, t, text, class_labels=level).sample for frame in x.unbind(2)]
    return torch.stack(outs, 2)


IMAGES = {
    "if-i": pixels(time=Time.NONE),
    "if-ii": larger(time=Time.NONE),
    "stable diffusion": lavie(time=Time.NONE, shared_norm=False, rotary=0, buckets=0),
    "stable diffusion's x4 upscaler": vsr(time=Time.NONE, shared_norm=False, rotary=0, buckets=0),
}


@pytest.mark.parametrize("cfg", IMAGES.values(), ids=IMAGES)
def test_an_image_model_equals_that_of_diffusers(cfg: UNet3DConfig) -> None:
    net = weighted(UNet3D(cfg))
    theirs = image_model(cfg).double().eval()
    theirs.load_state_dict(net.state_dict())
    near(net.run(*inputs(cfg)), by_frame(theirs, *inputs(cfg)).detach())


@pytest.mark.parametrize("cfg", [pixels(), larger()], ids=["base", "sr"])
def test_show_1_without_its_temporal_half_is_the_image_model_of_diffusers(cfg: UNet3DConfig) -> None:
    net = weighted(UNet3D(cfg))
    for name, tensor in net.state_dict().items():
        if ("temp_convs" in name and ".conv4." in name) or ("temp_attentions" in name and ".proj_out." in name):
            tensor.zero_()
    theirs = image_model(cfg).double().eval()
    theirs.load_state_dict({name: tensor for name, tensor in net.state_dict().items() if "temp_" not in name})
    near(net.run(*inputs(cfg)), by_frame(theirs, *inputs(cfg)).detach())


def video_model(cfg: UNet3DConfig) -> Any:
    """diffusers' video model of that configuration."""
    from diffusers import UNet3DConditionModel

    names = ["CrossAttn{}Block3D" if level.attention else "{}Block3D" for level in cfg.levels]
    return UNet3DConditionModel(
        sample_size=32,
        block_out_channels=[level.channels for level in cfg.levels],
        layers_per_block=cfg.levels[0].blocks,
        down_block_types=[name.format("Down") for name in names],
        up_block_types=[name.format("Up") for name in reversed(names)],
        cross_attention_dim=cfg.text,
        attention_head_dim=cfg.heads.size,
    )


def test_modelscope_equals_the_video_model_of_diffusers() -> None:
    cfg = latents(levels=[Level3D(channels=32), Level3D(channels=96, attention=False)])
    net = weighted(UNet3D(cfg))
    theirs = video_model(cfg).double().eval()
    theirs.load_state_dict(net.state_dict())
    x, t, text, _ = inputs(cfg)
    near(net.run(x, t, text), theirs(x, t, text).sample.detach())
    wrong = weighted(UNet3D(replace(cfg, temporal_heads=Heads(number=8))))
    assert (wrong.run(x, t, text) - net.run(x, t, text)).abs().max() > 1e-2


@pytest.mark.parametrize("heads", [Heads(number=8), Heads(size=8)], ids=["8 heads", "heads of 8"])
def test_temporal_blocks_alone_equal_those_of_diffusers(heads: Heads) -> None:
    from diffusers.models.resnet import TemporalConvLayer
    from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel

    c, number = 96, heads.of(96)
    h = uniform(7, BATCH * FRAMES, c, 4, 5)
    told = Told(BATCH, FRAMES, torch.empty(0), None, torch.empty(0))
    ours = weighted(TemporalTransformer(c, number, c, 32))
    theirs = TransformerTemporalModel(number, c // number, c).double().eval()
    theirs.load_state_dict(ours.state_dict())
    near(ours(h, told) - h, theirs(h, num_frames=FRAMES).sample.detach() - h)
    convs, layer = weighted(TemporalConvs(c, pixels())), TemporalConvLayer(c, c, dropout=0.1).double().eval()
    layer.load_state_dict(convs.state_dict())
    near(convs(h, told) - h, layer(h, num_frames=FRAMES).detach() - h)


# published numbers ---------------------------------------------------------------------------------------------------

GOLDEN = {  # tensors, parameters; mean, std, first and last number that the authors' code gives
    "base": (pixels(), 431, 3_011_142, (-0.06030061, 0.95908172, 0.46292284, 0.21851566)),
    "base, heads cut the wrong way": (
        pixels(temporal_heads=Heads(size=8)), 431, 3_011_142, (-0.06026760, 0.95874711, 0.42340192, 0.24708124)
    ),
    "sr": (larger(), 573, 4_162_598, (0.29193675, 1.15832633, 0.54380414, -0.15819371)),
}  # fmt: skip


def test_the_numbers_behind_the_published_ones() -> None:
    expected = torch.tensor([-0.68230484, -0.90996659, 0.02952195, 0.56162610])
    assert torch.allclose(uniform(1001, 4).float(), expected, atol=1e-8)


@pytest.mark.parametrize("form", GOLDEN)
def test_show_1_gives_the_numbers_of_its_authors(form: str) -> None:
    cfg, tensors, parameters, expected = GOLDEN[form]
    net = weighted(UNet3D(cfg))
    assert (len(net.state_dict()), size(net)) == (tensors, parameters)
    x = uniform(1001, 2, 6 if cfg.concat else 3, 5, 16, 24)
    out = net.run(x, TIMES, uniform(1002, 2, 7, 32), torch.tensor([250, 250]) if cfg.noise_level else None)
    got = (out.mean(), out.std(), out.flatten()[0], out.flatten()[-1])
    assert [float(number) for number in got] == pytest.approx(expected, abs=1e-5)


# LaVie ---------------------------------------------------------------------------------------------------------------


def bucket(ahead: int) -> int:
    """T5's buckets for 32 of them and a largest distance of 32 frames, by hand; `ahead`: key's frame - query's."""
    side, n = (16, ahead) if ahead > 0 else (0, -ahead)
    return side + (n if n < 8 else min(15, 8 + int(math.log(n / 8) / math.log(32 / 8) * 8 + 1e-6)))


def dense(module: TemporalAttention, x: Tensor, rotary: int, buckets: bool) -> Tensor:
    """The same attention with complex numbers, written out for each position and head; x (B, F, S, C)."""
    q, k, v = (f(x) for f in (module.to_q, module.to_k, module.to_v))
    out, d, frames = torch.zeros_like(x), x.shape[-1] // module.heads, x.shape[1]
    rates = torch.tensor([10000 ** (-2 * i / rotary) for i in range(rotary // 2)], dtype=torch.float64)
    turn = torch.exp(1j * torch.arange(frames)[:, None] * rates)  # (F, pairs)

    def turned(y: Tensor) -> Tensor:
        pairs = torch.view_as_complex(y[:, :rotary].reshape(frames, -1, 2).contiguous()) * turn
        return torch.cat([torch.view_as_real(pairs).flatten(1), y[:, rotary:]], 1)

    table = module.time_rel_pos_bias.relative_attention_bias.weight if buckets else torch.zeros(32, module.heads)
    for b in range(x.shape[0]):
        for s in range(x.shape[2]):
            for h in range(module.heads):
                part = slice(h * d, (h + 1) * d)
                a, c = (turned(y[b, :, s, part]) if rotary else y[b, :, s, part] for y in (q, k))
                bias = torch.tensor([[float(table[bucket(j - i), h]) for j in range(frames)] for i in range(frames)])
                out[b, :, s, part] = torch.softmax(a @ c.T / d**0.5 + bias, -1) @ v[b, :, s, part]
    return module.to_out[0](out)


@pytest.mark.parametrize(("rotary", "buckets"), [(8, 32), (0, 0), (8, 0), (0, 32)])
def test_attention_over_frames_with_lavies_positions(rotary: int, buckets: int) -> None:
    module = weighted(TemporalAttention(48, lavie(rotary=rotary, buckets=buckets)), std=0.3)
    x = uniform(3, 2, 6, 2, 48)
    near(module(x), dense(module, x, rotary, bool(buckets)), 1e-7)


def test_relative_positions_fall_into_t5s_buckets() -> None:
    bias = RelativeBias(32, 1)
    bias.relative_attention_bias.weight.data = torch.arange(32.0)[:, None]
    got = bias(40)[0, 0]
    assert got.tolist() == [[bucket(j - i) for j in range(40)] for i in range(40)]
    assert set(got.flatten().tolist()) == set(range(32)) - {16.0}  # no key is ahead by nothing


def test_turning_in_half_precision_rounds_the_result_alone() -> None:
    rotary, x = Rotary(8), uniform(1, 1, 61, 1, 1, 8).bfloat16()
    assert (rotary(x).double() - rotary(x.double())).abs().max() < 0.02


def test_turning_sees_distances_alone() -> None:
    rotary = Rotary(8).double()
    q, k = (uniform(i, 1, 1, 1, 1, 12).expand(1, 9, 1, 1, 12) for i in (1, 2))
    scores = torch.einsum("fd,gd->fg", rotary(q)[0, :, 0, 0], rotary(k)[0, :, 0, 0])
    for offset in range(-8, 9):
        line = scores.diagonal(offset)
        assert (line - line[0]).abs().max() < 1e-6
    assert scores[0].std() > 1e-2


def test_sparse_attention_sees_the_first_frame_and_the_one_before() -> None:
    module = weighted(SparseAttention(24, 3), std=0.3)
    told, x = Told(2, 4, torch.empty(0), None, torch.empty(0)), uniform(5, 8, 6, 24)
    got = torch.unflatten(module.within(x, told), 0, (2, 4))
    video = torch.unflatten(x, 0, (2, 4))
    for f in range(4):
        seen = torch.cat([video[:, 0], video[:, max(f - 1, 0)]], 1)
        near(got[:, f], module(video[:, f], seen), 1e-9)


class SharedNorm(nn.GroupNorm):
    """Of (B*F, C, H, W), over all frames of a clip."""

    def forward(self, h: Tensor) -> Tensor:
        video = h.unflatten(0, (-1, FRAMES)).transpose(1, 2)
        return super().forward(video).transpose(1, 2).flatten(0, 1)


class Inside(nn.Module):
    """In place of a transformer block's feed-forward: it and attention over frames, in LaVie's two orders."""

    def __init__(self, ours: Any, cfg: UNet3DConfig, ff: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.ours, self.cfg, self.ff, self.norm = ours, cfg, ff, norm

    def time(self, x: Tensor) -> Tensor:
        video = self.ours.norm_temp(x).unflatten(0, (-1, FRAMES))
        return dense(self.ours.attn_temp, video, self.cfg.rotary, bool(self.cfg.buckets)).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (lambda y: self.ff(self.norm(y))), self.time
        if not self.cfg.temporal_last:
            first, second = second, first
        moved = first(x)
        return moved + second(x + moved)


@pytest.mark.parametrize(
    "cfg", [lavie(), lavie(temporal_last=True, rotary=0, buckets=0)], ids=["base", "interpolation"]
)
def test_lavie_is_the_image_model_of_diffusers_with_time_inside(cfg: UNet3DConfig) -> None:
    net, theirs = weighted(UNet3D(cfg)), image_model(cfg).double().eval()
    theirs.load_state_dict({name: tensor for name, tensor in net.state_dict().items() if "_temp" not in name})
    for name, module in theirs.named_modules():
        if isinstance(module, nn.GroupNorm) and "attentions" not in name:
            module.__class__ = SharedNorm
        if name.endswith("transformer_blocks.0"):
            module.ff = Inside(net.get_submodule(name), cfg, module.ff, module.norm3)
            module.norm3 = nn.Identity()
    x, t, text, _ = inputs(cfg)
    out = theirs(x.transpose(1, 2).flatten(0, 1), t.repeat_interleave(FRAMES), text.repeat_interleave(FRAMES, 0)).sample
    near(net.run(x, t, text), out.detach().unflatten(0, (-1, FRAMES)).transpose(1, 2))


# identity ------------------------------------------------------------------------------------------------------------

INFLATED = {
    "show-1 base": pixels(),
    "show-1 sr": larger(),
    "show-1 with its first transformer": pixels(transformer_in=8),
    "modelscope": latents(),
    "lavie": lavie(),
    "lavie interpolation": lavie(rotary=0, buckets=0, temporal_last=True, concat=True),
    "lavie super-resolution": vsr(),
}


def of_image(cfg: UNet3DConfig) -> UNet3DConfig:
    inside = {"rotary": 0, "buckets": 0, "temporal_last": False, "transformer_in": None}
    return replace(cfg, time=Time.NONE, **inside)


@pytest.mark.parametrize("cfg", INFLATED.values(), ids=INFLATED)
def test_a_new_video_model_is_its_image_model_exactly(cfg: UNet3DConfig, one_thread: None) -> None:
    image, video = weighted(UNet3D(of_image(cfg))).float(), UNet3D(cfg).eval()
    own = {name: tensor for name, tensor in video.state_dict().items() if name not in image.state_dict()}
    assert own and all("temp" in name or "transformer_in" in name for name in own)
    video.load_state_dict(own | image.state_dict())
    x, *rest = inputs(cfg)
    out = video.run(x.float(), *rest).detach()
    assert out.std() > 0.1 and torch.equal(out, image.run(x.float(), *rest))
    if cfg.shared_norm:  # LaVie's norms see all frames from the start
        return
    # One frame alone is another shape of matrix to some kernels, so the last bits may differ.
    alone = [video.double().run(x[:, :, f : f + 1], *rest) for f in range(FRAMES)]
    near(torch.cat(alone, 2).detach(), video.run(x, *rest).detach(), 1e-9)


def test_lavies_norms_see_the_whole_clip() -> None:
    net = weighted(UNet3D(of_image(lavie())))
    x, *rest = inputs(lavie())
    still = x[:, :, :1].expand(-1, -1, FRAMES, -1, -1)
    near(net.run(still, *rest)[:, :, :1], net.run(x[:, :, :1], *rest), 1e-9)
    assert (net.run(x, *rest)[:, :, :1] - net.run(x[:, :, :1], *rest)).abs().max() > 1e-3


def test_a_convolution_over_frames_is_the_published_one() -> None:
    conv = FrameConv(6).double()
    channels_last(conv)
    x = uniform(1, 2, 6, 5, 12)
    near(conv(x), F.conv3d(x[..., None], conv.weight, conv.bias, padding=(1, 0, 0))[..., 0], 1e-12)


@pytest.mark.parametrize("cfg", [latents(), larger(), lavie(), vsr()], ids=["modelscope", "sr", "lavie", "vsr"])
def test_activations_stay_channels_last(cfg: UNet3DConfig) -> None:
    """In front of every norm and convolution: else each would copy what it gets."""
    net, seen = weighted(UNet3D(cfg)).float(), []
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.GroupNorm) and "norm_cross" not in name:
            module.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    x, *rest = inputs(cfg)
    net.run(x.float(), *rest)
    assert len(seen) > 20 and all(h.is_contiguous(memory_format=torch.channels_last) for h in seen)


def test_recomputed_activations_give_the_same_gradients(one_thread: None) -> None:
    cfg = latents()
    gradients = []
    for again in (False, True):
        net = weighted(UNet3D(cfg)).requires_grad_(True)
        net.checkpointing = again
        net.run(*inputs(cfg)).square().mean().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_weights_that_are_older_than_a_setting_fit_where_it_is_off() -> None:
    old = plain(lavie(concat=True))
    for name in YOUNG_3D:
        del old[name]
    for level in old["levels"]:
        for name in YOUNG_IN_LEVELS_3D:
            del level[name]
    checkpoint.compatible(completed(old), plain(lavie(concat=True)), "w")
    with pytest.raises(InputError, match="concat_channels is None in the weights"):
        checkpoint.compatible(completed(old), plain(lavie(concat=True, concat_channels=3)), "w")


# in a stage ----------------------------------------------------------------------------------------------------------


class Heard(UNet3D):
    """Keeps what it was called with, and answers with the channels' numbers."""

    def run(self, x: Tensor, timestep: Tensor, text: Tensor, level: Tensor | None = None) -> Tensor:
        self.heard = x, timestep, text, level
        out = torch.arange(self.cfg.channels * (1 + self.cfg.variance)).float()
        return out.view(1, -1, 1, 1, 1).expand(len(x), -1, *x.shape[2:])


def told_to(**changes: Any) -> Cond:
    frame = torch.zeros(BATCH, 1, FRAMES, 1, 1)
    frame[:, :, 0] = 1
    text = Text(uniform(1, BATCH, TOKENS, WIDTH), torch.ones(BATCH, TOKENS, dtype=torch.bool))
    concat = uniform(2, BATCH, 3, FRAMES, 8, 8)
    settings = {"concat": concat, "mask": frame, "level": torch.tensor([0.251, 0.0]), "fps": torch.ones(BATCH)}
    return Cond(**(settings | {"text": text} | changes))


def test_channels_come_in_the_published_order_and_the_variance_comes_last() -> None:
    net = Heard(pixels(concat=True, mask=True, noise_level=True))
    z, cond = uniform(3, BATCH, 3, FRAMES, 8, 8), told_to()
    out = net(z, torch.tensor([1.0, 0.001]), cond)
    x, t, text, level = net.heard
    assert torch.equal(x[:, :3], z) and torch.equal(x[:, 3:6], cond.concat) and x.shape[1] == 7
    assert x[:, 6, 0].eq(1).all() and not x[:, 6, 1:].any()
    assert torch.equal(text, cond.text.tokens)
    assert t.tolist() == pytest.approx([999, 0], abs=1e-4) and level.tolist() == pytest.approx([250, 0], abs=1e-4)
    assert out[0, :, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_base_is_given_z_alone() -> None:
    net = Heard(pixels())
    z = uniform(3, BATCH, 3, FRAMES, 8, 8)
    net(z, torch.ones(BATCH), told_to())
    assert torch.equal(net.heard[0], z) and net.heard[3] is None


def test_what_the_network_cannot_be_told_is_refused() -> None:
    net, z, t = Heard(pixels()), torch.zeros(BATCH, 3, FRAMES, 8, 8), torch.ones(BATCH)
    with pytest.raises(ConfigError, match="guidance weight"):
        net(z, t, told_to(), t)
    with pytest.raises(ConfigError, match="clips cannot share"):
        net(z, t, told_to(segments=torch.zeros(BATCH, FRAMES)))


def test_a_stage_does_not_tell_it_a_guidance_weight(stage_config: Any) -> None:
    with pytest.raises(ValueError, match="w_range is"):
        stage_config("base", net=pixels(text=6, pool=2), w_range=[0.0, 4.0])


def test_steps_of_training_stand_at_thousandths() -> None:
    assert timestep(torch.tensor([0.0, 0.001, 0.5, 1.0])).tolist() == pytest.approx([0, 0, 499, 999], abs=1e-4)


@pytest.mark.parametrize("kind", ["base", "ssr"])
def test_a_stage_samples_and_trains_with_it(kind: str, stage_config: Any, encode: Any) -> None:
    from cascade.config import plugin
    from cascade.noise import Noise, generator
    from cascade.stage import Stage
    from cascade.video import Video

    levels = [Level3D(channels=8, blocks=1, attention=False), Level3D(channels=16, blocks=1)]
    small = {"levels": levels, "groups": 8, "text": 6, "context": 32, "embedding": 16}
    cfg = stage_config(kind, net=pixels(**small, concat=kind == "ssr", noise_level=kind == "ssr"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stage = Stage(cfg, plugin(kind))
    text = encode(["a red circle"])
    low = None if kind == "base" else Video(torch.zeros(1, 3, 4, 4, 4), 8.0)
    video = stage.sample(low, text, None, Noise(0, kind, ["sample"]))
    assert video.frames.shape == (1, 3, 4, 8, 8) and torch.isfinite(video.frames).all()
    x, cond = stage.example(video, text, generator("example"))
    stage.net.train()
    out = stage.net(x, torch.tensor([0.5]), cond)
    out.square().mean().backward()
    assert stage.net.conv_in.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("cfg", [latents(), lavie()], ids=["modelscope", "lavie"])
def test_a_plan_measures_it(cfg: UNet3DConfig, stage_config: Any) -> None:
    from cascade.config import plugin
    from cascade.planning.plan import measure
    from cascade.sampling.sampler import Sampler
    from cascade.text import TextConfig

    stage = stage_config("base", net=replace(cfg, channels=3), sampler=Sampler(steps=3, guidance=1.0))
    found = measure(stage, plugin("base"), TextConfig(encoder="none"))
    assert found.params == size(UNet3D(replace(cfg, channels=3))) and found.evaluations == 6
    assert found.flops > 2 * found.params and found.peak_bytes > 4 * found.params


# settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": []}, "levels is empty"),
        ({"groups": 5}, "groups is 5"),
        ({"mask": True}, "mask is true"),
        ({"heads": Heads(size=7)}, "heads do not fit"),
        ({"temporal_heads": Heads(number=5)}, "temporal_heads do not fit"),
        ({"pool": 5}, "pool is 5"),
        ({"rotary": 8}, "time is beside"),
        ({"time": Time.INSIDE}, "time is inside"),
        ({"shared_norm": True}, "shared_norm is true"),
        ({"embedding": 0}, "embedding is 0"),
        ({"concat_channels": 3}, "concat_channels is 3, expected 1 or more, null without concat"),
        ({"noise_label": True}, "noise_label is true"),
        ({"levels": [Level3D(channels=96, own=False)]}, "levels have own false"),
        ({"time": Time.AROUND}, "time is around"),
    ],
)
def test_an_architecture_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pixels(**changes)


def test_rotary_channels_fit_into_a_head() -> None:
    with pytest.raises(ValueError, match="rotary is 16"):
        lavie(rotary=16)


def test_a_level_without_attention_has_none_to_leave_out() -> None:
    with pytest.raises(ValueError, match="own is false, expected true"):
        Level3D(channels=32, attention=False, own=False)


@pytest.mark.parametrize("changes", [{}, {"size": 8, "number": 8}, {"size": 0}, {"number": -1}])
def test_heads_are_of_a_size_or_of_a_number(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected one of them"):
        Heads(**changes)


def test_a_clip_tells_every_frame_the_same() -> None:
    told = Told(2, 3, torch.empty(6, 4), None, torch.empty(2, 7, 5))
    assert isinstance(told, Clip) and told.context.shape[0] * told.frames == len(told.embedding)
