"""Whole pipelines of diffusers and our chains, from the same files and the same noise, from a prompt to pixels.

All of it in float32: where noise prediction is divided by a small alpha and guided, rounding grows to 1e-3 in places.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cascade import checkpoint, cli
from cascade.chain import Chain, chain_settings
from cascade.clipfiles import read_clip, video_bytes
from cascade.config import parse, plain
from cascade.noise import Noise, generator, sample_id
from cascade.text import TextConfig, text_source
from cascade.video import Video

PROMPT = "ab a c"
PIECES = ["!", "a", "b", "c", "a</w>", "b</w>", "c</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"]


def filled(module: Any) -> Any:
    """Every parameter from noise large enough (0.1) that a wrong head layout would show; norms stay near 1."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator("fill", name)))
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter += 1
    return module.eval()


def noise_of(stage: str) -> Noise:
    """What a chain draws for `PROMPT` at seed 3."""
    return Noise(3, stage, (sample_id(PROMPT),))


@pytest.fixture(scope="module")
def modelscope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small TextToVideoSD pipeline as diffusers saves it."""
    from diffusers import AutoencoderKL, DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    root = tmp_path_factory.mktemp("modelscope")
    (root / "words").mkdir()
    (root / "words" / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(PIECES)}))
    (root / "words" / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    (root / "words" / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    tokenizer = CLIPTokenizer.from_pretrained(str(root / "words"), local_files_only=True, model_max_length=12)
    sizes = {"vocab_size": 10, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    places = {"num_attention_heads": 2, "max_position_embeddings": 12, "bos_token_id": 8, "eos_token_id": 9}
    text = CLIPTextModel(CLIPTextConfig(**sizes, **places))
    unet = UNet3DConditionModel(
        sample_size=8, block_out_channels=(32, 96), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    blocks = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    vae = AutoencoderKL(3, 3, *blocks, block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4)
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1,
        set_alpha_to_one=False,
    )  # fmt: skip
    parts = {"vae": filled(vae), "text_encoder": filled(text), "unet": filled(unet)}
    with torch.no_grad():  # no variance: what it draws of an image is the mode
        vae.quant_conv.weight[4:], vae.quant_conv.bias[4:] = 0, -30
    TextToVideoSDPipeline(**parts, tokenizer=tokenizer, scheduler=scheduler).save_pretrained(root / "pipeline")
    return root / "pipeline"


def imported(source: Path, out: Path, stage: str, *words: str) -> list[str]:
    """Overrides that give `stage` the weights in `source`, and the network that they belong to."""
    cli.command(["import", *words, f"source={source}", f"out={out}"])
    net = json.loads((out / "config.json").read_text())["net"]
    own = [f"{stage}.net.{name}={json.dumps(value)}".replace('"', "") for name, value in net.items()]
    return [f"{stage}.weights={out}", f"{stage}.train=null", f"{stage}.sampler.steps=4", *own]


def made(out: Path, stage: str, words: list[str]) -> Tensor:
    """What the chain makes of `PROMPT` at seed 3, (F, C, H, W) in [-1, 1]."""
    cli.command(["generate", *words, f"prompt={PROMPT}", "seed=3", f"out={out}"])
    frames = read_clip((out / "stages" / stage / "video.safetensors").read_bytes(), stage).frames[0].transpose(0, 1)
    assert frames.std() > 0.1
    return frames


def test_modelscope_makes_the_video_that_diffusers_makes(modelscope: Path, tmp_path: Path) -> None:
    from diffusers import TextToVideoSDPipeline

    words = [
        "chain=modelscope", *imported(modelscope / "unet", tmp_path / "weights", "base", "weights=modelscope"),
        "base.shape.frames=3", "base.shape.height=16", "base.shape.width=24",
        f"base.codec.weights={modelscope / 'vae'}", "base.codec.stride=2",
        f"text.encoder={modelscope / 'text_encoder'}", "text.max_tokens=12",
    ]  # fmt: skip
    ours = made(tmp_path / "out", "base", words)
    pipeline = TextToVideoSDPipeline.from_pretrained(modelscope)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPT, num_frames=3, height=16, width=24, num_inference_steps=4, guidance_scale=9.0,
        latents=noise_of("base")((1, 4, 3, 8, 12), 0, "start"), output_type="pt",
    ).frames[0]  # fmt: skip
    assert (ours * 0.5 + 0.5 - theirs).abs().max() <= 1e-4


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers, numpy 2
def test_a_refined_video_is_the_one_that_diffusers_makes_of_it(modelscope: Path, tmp_path: Path) -> None:
    """Zeroscope's second stage by itself: video to video, the last 3 of 5 steps of DPM-Solver++."""
    from diffusers import DPMSolverMultistepScheduler, VideoToVideoSDPipeline
    from diffusers.pipelines.deprecated.text_to_video_synthesis import pipeline_text_to_video_synth_img2img as module

    given = torch.rand(1, 3, 3, 16, 24, generator=generator("given")) * 2 - 1
    (tmp_path / "given.safetensors").write_bytes(video_bytes(Video(given, 8.0)))
    net = imported(modelscope / "unet", tmp_path / "weights", "xl", "weights=modelscope", "kind=refine")
    words = [
        "stage=zeroscope/xl", *(word.removeprefix("xl.") for word in net),
        "shape.frames=3", "shape.height=16", "shape.width=24", "from_height=16", "from_width=24", "sampler.steps=3",
        f"codec.weights={modelscope / 'vae'}", "codec.stride=2", f"reads.encoder={modelscope / 'text_encoder'}",
        "reads.max_tokens=12", f"input={tmp_path / 'given.safetensors'}", f"out={tmp_path / 'made.safetensors'}",
    ]  # fmt: skip
    cli.stage_command("refine", [*words, f"prompt={PROMPT}", "seed=3"])
    ours = read_clip((tmp_path / "made.safetensors").read_bytes(), "made").frames[0].transpose(0, 1)
    pipeline = VideoToVideoSDPipeline.from_pretrained(modelscope)
    settings: dict[str, Any] = {"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"}
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **settings)
    pipeline.set_progress_bar_config(disable=True)
    start = noise_of("xl")((1, 4, 3, 8, 12), 0, "start")[0].transpose(0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda *_, **__: start)
        theirs = pipeline(
            PROMPT, video=[given[0].transpose(0, 1) * 0.5 + 0.5], strength=0.6, num_inference_steps=5,
            guidance_scale=15.0, output_type="pt",
        ).frames[0]  # fmt: skip
    assert (ours - given[0].transpose(0, 1)).square().mean() > 0.01
    assert (ours * 0.5 + 0.5 - theirs).abs().max() <= 1e-3


IF: dict[str, Any] = {
    "sample_size": 8, "out_channels": 6, "block_out_channels": (32, 96), "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), "act_fn": "gelu",
    "encoder_hid_dim": 128, "encoder_hid_dim_type": "text_proj", "cross_attention_dim": 32, "attention_head_dim": 8,
    "addition_embed_type": "text", "addition_embed_type_num_heads": 2, "cross_attention_norm": "group_norm",
    "resnet_time_scale_shift": "scale_shift",
}  # fmt: skip
LARGER: dict[str, Any] = {
    "in_channels": 6, "class_embed_type": "timestep", "resnet_skip_time_act": True, "time_embedding_act_fn": "gelu",
    "resnet_out_scale_factor": 1.4142271248762552, "mid_block_scale_factor": 1.4142271248762552,
}  # fmt: skip


def if_pipelines(folder: Path) -> tuple[Any, Any]:
    """Both stages of a small DeepFloyd IF; their networks are saved as diffusers does it."""
    from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel

    nets = {"base": UNet2DConditionModel(in_channels=3, **IF), "sr": UNet2DConditionModel(**IF, **LARGER)}
    for name, net in nets.items():
        filled(net).save_pretrained(folder / name)
    settings: dict[str, Any] = {
        "beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range", "thresholding": True,
        "dynamic_thresholding_ratio": 0.95,
    }  # fmt: skip
    none = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
    first = IFPipeline(
        unet=nets["base"], scheduler=DDPMScheduler(**settings, sample_max_value=1.5), **none,
        requires_safety_checker=False,
    )  # fmt: skip
    second = IFSuperResolutionPipeline(
        unet=nets["sr"], scheduler=DDPMScheduler(**settings, sample_max_value=1.0), **none,
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"), requires_safety_checker=False,
    )  # fmt: skip
    for pipeline in (first, second):
        pipeline.set_progress_bar_config(disable=True)
    return first, second


@contextmanager
def drawn(module: str, noise: Noise, *purposes: str) -> Iterator[None]:
    """What a pipeline of diffusers draws, and then its scheduler step by step, is ours."""
    asked = iter([(purpose, 0) for purpose in purposes] + [("step", step) for step in range(9)])

    def draw(shape: tuple[int, ...], **_: Any) -> Tensor:
        purpose, step = next(asked)
        return noise((shape[0], 3, 1, *shape[2:]), step, purpose)[:, :, 0]

    with pytest.MonkeyPatch.context() as patch:
        for name in (f"diffusers.pipelines.deepfloyd_if.{module}", "diffusers.schedulers.scheduling_ddpm"):
            patch.setattr(f"{name}.randn_tensor", draw)
        yield


def test_both_stages_of_if_make_the_images_that_diffusers_makes(tmp_path: Path) -> None:
    first, second = if_pipelines(tmp_path)
    read = ["text.encoder=tiny/text", "text.max_tokens=12"]
    words = [
        "chain=if_image", *read,
        *imported(tmp_path / "base", tmp_path / "1", "base", "weights=if_image"),
        *imported(tmp_path / "sr", tmp_path / "2", "sr", "weights=if_image", "kind=ssr"),
        "base.shape.height=8", "base.shape.width=8", "sr.shape.height=32", "sr.shape.width=32",
    ]  # fmt: skip
    small, large = (made(tmp_path / "out", stage, words) for stage in ("base", "sr"))
    text = text_source(parse({"encoder": "tiny/text", "max_tokens": 12, "pad": True, "lower": True}, TextConfig))
    embeds = {"prompt_embeds": text.encode([PROMPT]).tokens, "negative_prompt_embeds": text.encode([""]).tokens}
    common: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt", **embeds}
    with drawn("pipeline_if", noise_of("base"), "start"):
        image = first(height=8, width=8, guidance_scale=7.0, **common).images
    assert (image - small).abs().max() <= 1e-3 and (image - small).square().mean() <= 1e-8
    other = made(tmp_path / "other", "base", [*words, "stages=[base]", "base.sampler.learned=false"])
    assert (other - small).square().mean() >= 1e-2, "the variance would not be seen"
    with drawn("pipeline_if_superresolution", noise_of("sr"), "start", "augment"):
        image = second(image=small, height=32, width=32, guidance_scale=4.0, noise_level=250, **common).images
    assert (image - large).abs().max() <= 5e-3 and (image - large).square().mean() <= 1e-8


def upscaler(folder: Path) -> Any:
    """A small Stable Diffusion x4 upscaler whose sampler has LaVie's linear betas; its autoencoder is saved."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DDPMScheduler,
        StableDiffusionUpscalePipeline,
        UNet2DConditionModel,
    )

    unet = UNet2DConditionModel(
        sample_size=8, in_channels=7, block_out_channels=(32, 64, 96), layers_per_block=1, cross_attention_dim=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        only_cross_attention=(True, True, False), num_class_embeds=1000,
    )  # fmt: skip
    blocks = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
    vae = AutoencoderKL(
        3, 3, *blocks, block_out_channels=(8, 8, 8), latent_channels=4, norm_num_groups=4, scaling_factor=0.08333
    )
    filled(vae).save_pretrained(folder / "vae")
    betas: dict[str, Any] = {"beta_start": 0.0001, "beta_end": 0.02}
    scheduler = DDIMScheduler(
        **betas, beta_schedule="linear", prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    none = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
    pipeline = StableDiffusionUpscalePipeline(
        vae=vae, unet=filled(unet), scheduler=scheduler,
        low_res_scheduler=DDPMScheduler(**betas, beta_schedule="scaled_linear"), **none,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_lavie_super_resolution_of_single_frames_is_the_x4_upscaler_of_diffusers(tmp_path: Path) -> None:
    """Its image model alone, so that each frame of the clip is one of their images."""
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_upscale as module

    pipeline = upscaler(tmp_path)
    net = {
        "levels": "[{channels: 32, blocks: 1, attention: false},{channels: 64, blocks: 1, own: false},"
        "{channels: 96, blocks: 1}]",
        "embedding": 128, "text": 128, "heads": "{number: 2}", "shared_norm": "false", "time": "none", "rotary": 0,
        "buckets": 0,
    }  # fmt: skip
    words = [
        "stages=[vsr]", *(f"vsr.net.{name}={value}" for name, value in net.items()), "vsr.train=null",
        "vsr.sampler.steps=4", "vsr.shape.frames=2", "vsr.shape.height=32", "vsr.shape.width=48",
        f"vsr.codec.weights={tmp_path / 'vae'}", "vsr.reads.encoder=tiny/text", "vsr.reads.max_tokens=12",
    ]  # fmt: skip
    cfg = Chain.read(chain_settings("lavie", words)).stages[0]
    card = {"kind": "ssr", "net": plain(cfg.net), "diffusion": plain(cfg.diffusion)}
    checkpoint.save(tmp_path / "weights", pipeline.unet.state_dict(), card)
    given = torch.rand(1, 3, 2, 8, 12, generator=generator("given")) * 2 - 1
    (tmp_path / "given.safetensors").write_bytes(video_bytes(Video(given, 24.0)))
    files = ["start=vsr", f"input={tmp_path / 'given.safetensors'}", f"vsr.weights={tmp_path / 'weights'}"]
    ours = made(tmp_path / "out", "vsr", ["chain=lavie", "text.encoder=tiny/text", *words, *files])
    assert cfg.reads is not None
    text, noise, asked = text_source(cfg.reads), noise_of("vsr"), iter(("augment", "start"))
    embeds = [text.encode([words]).tokens.expand(2, -1, -1) for words in (PROMPT, cfg.reads.negative)]

    def draw(shape: tuple[int, ...], **_: Any) -> Tensor:
        return noise((1, shape[1], 2, *shape[2:]), 0, next(asked))[0].transpose(0, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", draw)
        theirs = pipeline(
            image=given[0].transpose(0, 1) * 0.5 + 0.5, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1],
            num_inference_steps=4, guidance_scale=5.0, noise_level=50, output_type="pt",
        ).images  # fmt: skip
    assert ours.std() > 0.1 and (ours * 0.5 + 0.5 - theirs).abs().max() <= 1e-4
