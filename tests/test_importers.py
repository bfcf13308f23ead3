"""Published weights come in exactly or not at all, and go back as they came."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from cascade import checkpoint, cli, importers, loading, store
from cascade.config import package_root, parse, plain, plugin
from cascade.errors import CascadeError, ConfigError, InputError
from cascade.importers import layout_of
from cascade.nets.unet3d import UNet3D
from cascade.nets.unet3d_config import Level3D, Time, UNet3DConfig
from cascade.noise import generator

SR_SCALE = 1.4142271248762552
FOUR = [320, 640, 1280, 1280]

# config.json as published -----------------------------------------------------------------------------------------

IF: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.17.0", "act_fn": "gelu",
    "addition_embed_type": "text", "addition_embed_type_num_heads": 64, "attention_head_dim": 64,
    "center_input_sample": False, "class_embed_type": None, "class_embeddings_concat": False,
    "conv_in_kernel": 3, "conv_out_kernel": 3,
    "cross_attention_norm": "group_norm", "downsample_padding": 1, "dual_cross_attention": False,
    "encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj", "flip_sin_to_cos": True, "freq_shift": 0,
    "in_channels": 3, "mid_block_only_cross_attention": None, "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "norm_eps": 1e-05, "norm_num_groups": 32,
    "num_class_embeds": None, "only_cross_attention": False, "out_channels": 6,
    "projection_class_embeddings_input_dim": None, "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "scale_shift", "sample_size": 64, "time_cond_proj_dim": None,
    "time_embedding_act_fn": None, "time_embedding_dim": None, "time_embedding_type": "positional",
    "timestep_post_act": None, "upcast_attention": False, "use_linear_projection": False,
}  # fmt: skip
LARGER = {
    "class_embed_type": "timestep", "in_channels": 6, "mid_block_scale_factor": SR_SCALE, "sample_size": 256,
    "resnet_out_scale_factor": SR_SCALE, "resnet_skip_time_act": True, "time_embedding_act_fn": "gelu",
}  # fmt: skip
FIRST = {
    "down_block_types": ["ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3],
    "up_block_types": [*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
    "layers_per_block": 3,
}
SECOND = {
    "down_block_types": [*["ResnetDownsampleBlock2D"] * 3, *["SimpleCrossAttnDownBlock2D"] * 2],
    "up_block_types": [*["SimpleCrossAttnUpBlock2D"] * 2, *["ResnetUpsampleBlock2D"] * 3],
}
MEDIUM = {
    "block_out_channels": [128, 256, 512, 768, 768],
    "layers_per_block": [2, 2, 3, 4, 2],
    "cross_attention_dim": 768,
}
LARGE = {"block_out_channels": [320, 640, 960, 1280], "cross_attention_dim": 1280}
IF_NETS: dict[str, dict[str, Any]] = {
    "i_m": {**IF, **FIRST, "block_out_channels": [192, 384, 576, 768], "cross_attention_dim": 768},
    "i_l": {**IF, **FIRST, **LARGE},
    "i_xl": {**IF, **FIRST, "block_out_channels": [704, 1408, 2112, 2816], "cross_attention_dim": 2816},
    "ii_m": {**IF, **LARGER, **SECOND, **MEDIUM, "time_embedding_dim": 768},
    "ii_l": {
        **IF, **LARGER, **SECOND, "block_out_channels": [160, 320, 640, 960, 1280], "layers_per_block": [2, 2, 3, 5, 5],
        "cross_attention_dim": 1280, "time_embedding_dim": 1280,
    },
}  # fmt: skip
SD: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.2.2", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": FOUR, "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"], "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}  # fmt: skip
MODELSCOPE: dict[str, Any] = {
    "_class_name": "UNet3DConditionModel", "_diffusers_version": "0.15.0.dev0", "act_fn": "silu",
    "attention_head_dim": 64, "block_out_channels": FOUR, "cross_attention_dim": 1024,
    "down_block_types": [*["CrossAttnDownBlock3D"] * 3, "DownBlock3D"], "downsample_padding": 1, "in_channels": 4,
    "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4,
    "sample_size": 32, "up_block_types": ["UpBlock3D", *["CrossAttnUpBlock3D"] * 3],
}  # fmt: skip


VSR: dict[str, Any] = {
    "_class_name": "UNet3DVSRModel", "_diffusers_version": "0.9.0.dev0", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [256, 512, 512, 1024], "center_input_sample": False, "cross_attention_dim": 1024,
    "down_block_types": ["DownBlock3D", *["CrossAttnDownBlock3D"] * 3], "downsample_padding": 1,
    "dual_cross_attention": False, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 7, "layers_per_block": 2,
    "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "num_class_embeds": 1000,
    "only_cross_attention": [True, True, True, False], "out_channels": 4, "sample_size": 128,
    "up_block_types": [*["CrossAttnUpBlock3D"] * 3, "UpBlock3D"], "use_linear_projection": True,
    "down_temporal_idx": [0, 1, 2, 3], "mid_temporal": True, "up_temporal_idx": [0, 1, 2, 3],
    "temporal_module_config": {
        "num_attention_layers": 1, "attention_block_types": ["", ""], "cross_frame_attention_mode": "0_i-1_i",
        "temporal_shift_fold_div": 2, "temporal_shift_direction": "right", "use_dcn_warpping": False,
        "use_deformable_conv": True, "attention_dim_div": 2,
    },
    "use_first_frame": False, "video_condition": False, "freeze_pretrained_2d_upsampler": True,
}  # fmt: skip


def inflated(tree: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Show-1's configuration of an image model's."""
    return {**json.loads(json.dumps(tree).replace("2D", "3D")), "transfromer_in_opt": False, **changes}


PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"if_image/{name}": ("if_image", tree) for name, tree in IF_NETS.items()},
    "show1/base": ("show1", inflated(IF_NETS["i_l"])),
    "show1/interp": ("show1", inflated(IF_NETS["i_l"], in_channels=7)),
    "show1/sr1": ("show1", inflated(IF_NETS["ii_m"])),
    "modelscope": ("modelscope", MODELSCOPE),
    "lavie/base": ("lavie", SD),
    "lavie/interp": ("lavie_interp", SD | {"in_channels": 8}),
    "lavie/vsr": ("lavie_vsr", VSR),
}


def named(name: str) -> UNet3DConfig:
    return parse(yaml.safe_load((package_root() / "conf/net" / f"{name}.yaml").read_text()), UNet3DConfig)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_the_named_network(name: str) -> None:
    layout, tree = PUBLISHED[name]
    assert layout_of(layout).network(tree) == named(name)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith(("if_", "modelscope"))])
def test_names_and_shapes_are_those_of_diffusers(name: str) -> None:
    import diffusers

    tree = PUBLISHED[name][1]
    with torch.device("meta"):
        theirs = getattr(diffusers, tree["_class_name"]).from_config(tree).state_dict()
        ours = UNet3D(named(name)).state_dict()
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: tensor.shape for key, tensor in theirs.items()}


def test_show_1s_misspelt_field_is_read() -> None:
    tree = inflated(IF_NETS["i_l"], transfromer_in_opt=True)
    assert layout_of("show1").network(tree).transformer_in == 64
    with pytest.raises(ConfigError, match="transformer_in_opt: there is no such setting"):
        layout_of("show1").network({**tree, "transformer_in_opt": True})


def test_show_1s_transformers_have_heads_of_a_number_or_of_a_size() -> None:
    tree = inflated(SD) | {"cross_attention_dim": 1024, "use_linear_projection": True}
    number = layout_of("show1").network({**tree, "attention_head_dim": 64})
    assert number.heads.number == number.temporal_heads.number == 64 and number.time is Time.BESIDE
    size = layout_of("show1").network({**tree, "attention_head_dim": [5, 10, 20, 20]})
    assert size.heads.size == size.temporal_heads.size == 64
    with pytest.raises(ValueError, match="attention_head_dim is"):
        layout_of("show1").network({**tree, "attention_head_dim": [5, 10, 20, 10]})


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith(("if_", "modelscope"))])
def test_a_configuration_can_be_written_back(name: str) -> None:
    layout = layout_of(PUBLISHED[name][0])
    assert layout.published is not None
    assert layout.network(layout.published(named(name))) == named(name)


def test_a_network_of_another_family_is_not_written_back() -> None:
    for layout, name in (("modelscope", "lavie/base"), ("modelscope", "if_image/i_m"), ("if_image", "show1/base")):
        back = layout_of(layout).published
        assert back is not None
        with pytest.raises(ConfigError, match="cannot be said in that layout"):
            back(named(name))
    narrow = replace(named("modelscope"), embedding=64)
    with pytest.raises(ConfigError, match="net: embedding cannot"):
        layout_of("modelscope").published(narrow)  # type: ignore[misc]


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("modelscope", {"dropout_rate": 0.1}, "dropout_rate: there is no such setting"),
    ("modelscope", {"act_fn": "gelu"}, "act_fn: 'gelu' is not one of silu"),
    ("modelscope", {"attention_head_dim": [5, 10, 20, 20]}, "attention_head_dim"),
    ("modelscope", {"num_attention_heads": 8}, "num_attention_heads: 8 is not one of None"),
    ("modelscope", {"down_block_types": ["DownBlock2D"] * 4}, "down_block_types is"),
    ("modelscope", {"up_block_types": ["UpBlock3D"] * 4}, "up_block_types is"),
    ("modelscope", {"in_channels": 5}, "in_channels is 5, expected 4 or 8 or 9"),
    ("modelscope", {"layers_per_block": "two"}, "layers_per_block"),
    ("modelscope", {"layers_per_block": 10**6}, "layers_per_block is 1000000, expected 1 to 100"),
    ("modelscope", {"block_out_channels": [2**40] * 4}, "block_out_channels is"),
    ("modelscope", {"cross_attention_dim": 2**62}, "cross_attention_dim is"),
    ("if_image", {"attention_head_dim": []}, "attention_head_dim is [], expected 1 to"),
    ("if_image", {"encoder_hid_dim": -1}, "encoder_hid_dim is -1"),
    ("if_image", {"down_block_types": [], "up_block_types": [], "block_out_channels": []}, "block_out_channels is []"),
    ("lavie", {"attention_head_dim": [0, 8, 8, 8]}, "attention_head_dim is [0, 8, 8, 8], expected 1 to"),
    ("lavie", {"attention_head_dim": [8, 16]}, "different lengths"),
    ("if_image", {"down_block_types": [], "up_block_types": []}, "different lengths"),
    ("if_image", {"only_cross_attention": True}, "only_cross_attention: True is not one of False"),
    ("if_image", {"class_embed_type": "projection"}, "class_embed_type: 'projection' is not one of timestep"),
    ("if_image", {"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type is UNetMidBlock2DCrossAttn"),
    ("if_image", {"cross_attention_norm": None}, "cross_attention_norm is None"),
    ("if_image", {"dropout": 0.1}, "dropout is 0.1"),
    ("if_image", {"out_channels": 4}, "out_channels is 4"),
    ("if_image", {"layers_per_block": [3, 3]}, "different lengths"),
    ("lavie", {"resnet_skip_time_act": True}, "resnet_skip_time_act is True"),
    ("lavie", {"attention_head_dim": 7}, "heads do not fit"),
    ("lavie_vsr", {"in_channels": 8}, "in_channels is 8, expected 7"),
    ("lavie_vsr", {"mid_temporal": False}, "mid_temporal: False is not one of True"),
    ("lavie_vsr", {"up_temporal_idx": [0, 1, 2]}, "up_temporal_idx is [0, 1, 2], expected [0, 1, 2, 3]"),
    ("lavie_vsr", {"only_cross_attention": [True, False]}, "only_cross_attention is [True, False], expected 4"),
    ("lavie_vsr", {"num_class_embeds": 100}, "num_class_embeds: 100 is not one of 1000"),
    ("lavie_vsr", {"video_condition": True}, "video_condition: True is not one of False"),
    ("lavie_vsr", {"norm_num_groups": 16}, "norm_num_groups: 16 is not one of 32"),
    (
        "lavie_vsr",
        {"temporal_module_config": {"attention_block_types": ["", "Temporal"]}},
        "temporal_module_config.attention_block_types[1]: 'Temporal' is not one of",
    ),
    (
        "lavie_vsr",
        {"temporal_module_config": {"attention_block_types": ["", ""], "use_scale_shift": True}},
        "temporal_module_config.use_scale_shift: True is not one of False",
    ),
]


@pytest.mark.parametrize(("layout", "change", "message"), WRONG, ids=[f"{a} {next(iter(b))}" for a, b, _ in WRONG])
def test_a_field_that_cannot_be_built_is_refused_by_name(layout: str, change: dict[str, Any], message: str) -> None:
    tree = {"modelscope": MODELSCOPE, "if_image": IF_NETS["i_l"], "lavie": SD, "lavie_vsr": VSR}[layout]
    with pytest.raises((ConfigError, ValueError)) as error:
        layout_of(layout).network(tree | change)
    assert message in str(error.value)


# files ---------------------------------------------------------------------------------------------------------------

SMALL = {"block_out_channels": [32, 64], "norm_num_groups": 32, "cross_attention_dim": 32, "attention_head_dim": 8}
SMALL_MODELSCOPE = {
    **MODELSCOPE, **SMALL, "layers_per_block": 1, "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D"],
    "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D"],
}  # fmt: skip
SMALL_IF = {
    **IF, **LARGER, **SMALL, "layers_per_block": 1, "encoder_hid_dim": 32, "addition_embed_type_num_heads": 2,
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"], "time_embedding_dim": 64,
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
}  # fmt: skip
SMALL_VSR = {
    **VSR, **SMALL, "attention_head_dim": 2, "layers_per_block": 1, "only_cross_attention": [True, False],
    "down_block_types": ["DownBlock3D", "CrossAttnDownBlock3D"], "up_block_types": ["CrossAttnUpBlock3D", "UpBlock3D"],
    "down_temporal_idx": [0, 1], "up_temporal_idx": [0, 1],
}  # fmt: skip
SMALL_LAVIE = {
    **SD, **SMALL, "attention_head_dim": 1, "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip


def diffusers_model(tree: dict[str, Any]) -> Any:
    import diffusers

    model = getattr(diffusers, tree["_class_name"]).from_config(tree).eval().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        tensor.copy_(
            0.1 * torch.randn(tensor.shape, generator=generator("weights", name)) + name.endswith("norm1.weight")
        )
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small sources as diffusers writes them."""
    root = tmp_path_factory.mktemp("sources")
    diffusers_model(SMALL_MODELSCOPE).save_pretrained(root / "modelscope" / "unet")
    diffusers_model(SMALL_MODELSCOPE).save_pretrained(root / "shards", max_shard_size="500KB")
    diffusers_model(SMALL_IF).save_pretrained(root / "if_image")
    return root


def bring(weights: str, source: Path, out: Path, **changes: Any) -> checkpoint.Weights:
    importers.verb({"weights": weights, "source": str(source), "out": str(out), **changes})()
    return checkpoint.load(out)


def ready(stage_config: Callable[..., Any], folder: Path, kind: str = "base") -> Any:
    """The stage that those weights make, loaded as a chain loads it."""
    from cascade.diffusion import Diffusion, Prediction

    net = parse(checkpoint.load(folder).config["net"], UNet3DConfig)
    cfg = stage_config(kind, net=net, weights=str(folder), diffusion=Diffusion(prediction=Prediction.EPS))
    return loading.load_stage(cfg, plugin(kind), torch.device("cpu"))[0]


def drawn(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator("drawn", name))


TIMES = torch.tensor([7, 900])


def test_modelscope_comes_in_and_computes_the_same(folders: Path, tmp_path: Path) -> None:
    weights = bring("modelscope", folders / "modelscope", tmp_path / "ours")
    theirs = diffusers_model(SMALL_MODELSCOPE)
    net = UNet3D(parse(weights.config["net"], UNet3DConfig)).eval().requires_grad_(False)
    checkpoint.apply(net, weights.state, "ours")
    x, text = drawn("x", 2, 4, 3, 8, 12), drawn("text", 2, 5, 32)
    got, expected = net.run(x, TIMES, text), theirs(x, TIMES, text).sample
    assert expected.std() > 0.05 and (got - expected).abs().max() < 1e-4 * expected.std()
    card = (tmp_path / "ours" / "README.md").read_text()
    digest = weights.config["source"]["files"]["diffusion_pytorch_model.safetensors"]
    assert digest in card and "CC BY-NC 4.0" in card


def test_shards_are_one_file(folders: Path, tmp_path: Path) -> None:
    assert len(list((folders / "shards").glob("*.safetensors"))) > 2
    one = bring("modelscope", folders / "modelscope", tmp_path / "one")
    many = bring("modelscope", folders / "shards", tmp_path / "many")
    assert one.state.keys() == many.state.keys()
    assert all(torch.equal(one.state[name], many.state[name]) for name in one.state)


@pytest.mark.parametrize(("name", "tree"), [("modelscope", SMALL_MODELSCOPE), ("if_image", SMALL_IF)])
def test_the_way_back_is_the_identity(name: str, tree: dict[str, Any], folders: Path, tmp_path: Path) -> None:
    import diffusers

    ours = bring(name, folders / name, tmp_path / "ours")
    importers.verb({"weights": name, "source": str(tmp_path / "ours"), "out": str(tmp_path / "back"), "to": "source"})()
    config = next((folders / name).rglob("config.json")).read_text()
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(config)
    again = getattr(diffusers, tree["_class_name"]).from_pretrained(tmp_path / "back")
    first = diffusers_model(tree).state_dict()
    assert first.keys() == again.state_dict().keys() == ours.state.keys()
    assert all(torch.equal(tensor, first[key]) for key, tensor in again.state_dict().items())


def test_what_was_trained_here_goes_to_diffusers(folders: Path, tmp_path: Path) -> None:
    """Without a source of its own the configuration is said anew."""
    import diffusers

    cfg = layout_of("modelscope").network(SMALL_MODELSCOPE)
    cfg = replace(cfg, levels=[Level3D(channels=64), Level3D(channels=32)], embedding=256)
    net = UNet3D(cfg).eval().requires_grad_(False)
    checkpoint.save(tmp_path / "ours", net.state_dict(), {"kind": "base", "net": plain(cfg)})
    importers.verb(
        {"weights": "modelscope", "source": str(tmp_path / "ours"), "out": str(tmp_path / "back"), "to": "source"}
    )()
    theirs = diffusers.UNet3DConditionModel.from_pretrained(tmp_path / "back").eval()
    x, text = drawn("x", 2, 4, 3, 8, 12), drawn("text", 2, 5, 32)
    assert (theirs(x, TIMES, text).sample - net.run(x, TIMES, text)).abs().max() < 1e-5


def test_imported_weights_serve_a_stage(folders: Path, tmp_path: Path, stage_config: Any, encode: Any) -> None:
    from cascade.noise import Noise
    from cascade.video import Video

    bring("if_image", folders / "if_image", tmp_path / "ours", kind="ssr")
    stage = ready(stage_config, tmp_path / "ours", "ssr")
    text = encode(["a red circle"])
    text.tokens = torch.nn.functional.pad(text.tokens, (0, 32 - text.tokens.shape[2]))
    low = Video(torch.zeros(1, 3, 4, 4, 4), 8.0)
    assert torch.isfinite(stage.sample(low, text, None, Noise(0, "ssr", ("a",))).frames).all()


def small_show1(folder: Path, **changes: Any) -> dict[str, Tensor]:
    """A source of Show-1's layout, from our own network."""
    from safetensors.torch import save_file

    tree = inflated(SMALL_IF, **changes)
    state = {
        name: tensor.contiguous() for name, tensor in UNet3D(layout_of("show1").network(tree)).state_dict().items()
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tree))
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    return state


def test_show_1_comes_in_with_its_heads(tmp_path: Path) -> None:
    state = small_show1(tmp_path / "source", transfromer_in_opt=True)
    weights = bring("show1", tmp_path / "source", tmp_path / "ours")
    cfg = parse(weights.config["net"], UNet3DConfig)
    assert (cfg.heads.size, cfg.temporal_heads.number, cfg.transformer_in) == (8, 8, 64)
    assert state.keys() == weights.state.keys()


@pytest.mark.parametrize("inside", ["ema", None])
@pytest.mark.parametrize(("layout", "tree"), [("lavie", SMALL_LAVIE), ("lavie_vsr", SMALL_VSR)], ids=["base", "vsr"])
def test_lavie_comes_out_of_a_checkpoint(layout: str, tree: dict[str, Any], inside: str | None, tmp_path: Path) -> None:
    net = UNet3D(layout_of(layout).network(tree))
    (tmp_path / "source").mkdir()
    (tmp_path / "source/config.json").write_text(json.dumps(tree))
    others = {"opt": {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}}
    saved = net.state_dict() if inside is None else {inside: net.state_dict(), **others}
    torch.save(saved, tmp_path / "source/weights.pt")
    weights = bring(layout, tmp_path / "source", tmp_path / "ours")
    assert weights.state.keys() == net.state_dict().keys()
    assert all(torch.equal(tensor, weights.state[name]) for name, tensor in net.state_dict().items())


# refusals ------------------------------------------------------------------------------------------------------------


def test_a_table_shows_all_that_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    state = small_show1(tmp_path / "source")
    lost = state.pop("conv_out.bias")
    state |= {"conv_in.weight": torch.zeros(32, 3, 3, 3), "extra": torch.zeros(())}
    save_file(state, tmp_path / "source/diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match=r"3 tensors differ .* conv_in\.weight"):
        bring("show1", tmp_path / "source", tmp_path / "ours")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["tensor", "source", "network"],
        ["conv_in.weight", "32x3x3x3", "32x6x3x3"],
        ["conv_out.bias", "-", f"{len(lost)}"],
        ["extra", "a", "number", "-"],
    ]
    assert not (tmp_path / "ours").exists()


class Trap:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_what_is_of_another_kind_is_named_before_the_source_is_read(tmp_path: Path) -> None:
    store.commit(tmp_path / "ours", {"a": b"1"}, kind="text")
    for way, kind in (("cascade", "weights"), ("source", "published")):
        with pytest.raises(InputError, match=f"ours: it holds 'text', not '{kind}'"):
            bring("modelscope", tmp_path / "absent", tmp_path / "ours", to=way)


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/config.json").write_text(json.dumps(SMALL_LAVIE))
    torch.save({"ema": {"conv_in.weight": torch.zeros(1), "trap": Trap(tmp_path / "sprung")}}, tmp_path / "source/x.pt")
    with pytest.raises(InputError, match="differ"):
        bring("lavie", tmp_path / "source", tmp_path / "ours")
    assert not (tmp_path / "sprung").exists()


def test_a_source_that_is_not_whole_is_refused(folders: Path, tmp_path: Path) -> None:
    import shutil

    def spoil(name: str, what: Callable[[Path], None]) -> CascadeError:
        source = tmp_path / name
        shutil.copytree(folders / "shards", source)
        what(source)
        with pytest.raises(InputError) as error:
            bring("modelscope", source, tmp_path / "ours")
        assert not (tmp_path / "ours").exists()
        return error.value

    def changed(source: Path, **fields: Any) -> None:
        tree = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(tree | fields))

    shard = "diffusion_pytorch_model-00001-of-"
    assert "not there" in str(spoil("shard", lambda s: next(s.glob(f"{shard}*")).unlink()))
    assert "several weights" in str(spoil("index", lambda s: next(s.glob("*.index.json")).unlink()))
    assert "has no config.json" in str(spoil("config", lambda s: (s / "config.json").unlink()))
    assert "_class_name is 'UNet2DModel'" in str(spoil("class", lambda s: changed(s, _class_name="UNet2DModel")))
    assert "wide: there is no such setting" in str(spoil("field", lambda s: changed(s, wide=1)))
    assert "is not a safetensors file" in str(spoil("cut", lambda s: os.truncate(next(s.glob(f"{shard}*")), 1000)))
    assert "pickle or an archive" in str(spoil("tar", lambda s: next(s.glob(f"{shard}*")).write_bytes(b"\x80\x02c")))
    for number, tree in enumerate(({}, {"weight_map": None}, {"weight_map": ["a"]}, {"weight_map": {"a": ["x"]}})):
        error = spoil(f"map {number}", lambda s, tree=tree: next(s.glob("*.index.json")).write_text(json.dumps(tree)))  # type: ignore[misc]
        assert "index.json: its weight_map does not name files" in str(error)
    nothing = spoil("nothing", lambda s: [path.unlink() for path in s.glob("*model*")] and None)
    assert "holds no weights" in str(nothing)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["weights=modelscope", "source=none", "out=x"], 3, "source none: has no config.json"),
        (["weights=sora", "source=none", "out=x"], 2, "weights is 'sora', expected one of"),
        (["source=none", "out=x"], 2, "weights is missing"),
        (["weights=show1", "source=none", "out=x", "to=source"], 2, "show1 cannot be written back"),
        (["weights=show1", "source=none", "out=x", "kind=none"], 2, "kind is 'none'"),
        (["weights=show1", "source=none", "out=x", "prediction=noise"], 2, "prediction"),
        (["weights=show1", "source=none", "out=x", "sauce=none"], 2, "sauce"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        cli.run_main(["import", *words], cli.command, "cascade")
    said = capsys.readouterr().err.splitlines()
    assert not list(tmp_path.iterdir())
    assert exit_.value.code == code and len(said) == 1 and said[0].startswith("error:") and message in said[0]
