"""Every public system from prompt to mp4, from its YAML alone, with random weights in smaller networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade import cli, foreign, media, pipeline
from cascade.chain import Chain, chain_settings
from cascade.compose import compose
from cascade.cond import Cond
from cascade.loading import untrained
from cascade.settings import StageConfig
from cascade.stage import Stage
from cascade.text import Text

LATENTS = {"show1": ["sr2"], "modelscope": ["base"], "zeroscope": ["base", "xl"], "lavie": ["base", "interp", "vsr"]}
SIZES = {  # about an eighth of the height and width
    "show1": {"base": (8, 8), "interp": (8, 8), "first": (32, 32), "sr1": (32, 32), "sr2": (48, 80)},
    "if_image": {"base": (8, 8), "sr": (32, 32)},
    "modelscope": {"base": (32, 32)},
    "zeroscope": {"base": (48, 80), "xl": (80, 128)},
    "lavie": {"base": (32, 64), "interp": (32, 64), "vsr": (128, 256)},
}
WIDTH = {"lavie": 32}  # of the networks, where it is not 64: 61 frames are many
OWN = {
    "show1": ["sr2.from_height=32", "sr2.from_width=32", "sr2.reads.encoder=tiny/text", "sr2.reads.max_tokens=8"],
    "lavie": [f"{stage}.reads.{word}" for stage in ("interp", "vsr") for word in ("encoder=tiny/text", "max_tokens=8")],
    "zeroscope": ["xl.from_height=48", "xl.from_width=80"],
}


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of four channels, in folders named by their stride."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae")
    for levels in (3, 4):
        torch.manual_seed(0)
        blocks = ("DownEncoderBlock2D",) * levels, ("UpDecoderBlock2D",) * levels
        model = AutoencoderKL(3, 3, *blocks, block_out_channels=(8,) * levels, latent_channels=4, norm_num_groups=4)
        model.save_pretrained(folder / str(2 ** (levels - 1)))
    return folder


def overrides(name: str, autoencoders: Path) -> list[str]:
    """Weights, widths, sizes and steps; everything else as the YAML says."""
    words = [f"chain={name}", "text.encoder=tiny/text", "text.max_tokens=8", *OWN.get(name, [])]
    tree = compose("plan", words)
    for stage, (height, width) in SIZES[name].items():
        net = tree[stage]["net"]
        level = f"channels: {WIDTH.get(name, 64)}, blocks: 1"
        small = {
            "levels": f"[{{{level}, attention: false}},{{{level}}}]",
            "embedding": 32,
            "text": 128,
        }
        small |= {"heads": "{size: 32}"} if net.get("space") == "added_kv" else {}  # type: ignore[dict-item]
        small |= {"rotary": 4} if net.get("rotary") else {}
        small |= {key: size for key, size in (("context", 32), ("pool", 4), ("transformer_in", 8)) if net.get(key)}
        words += [f"{stage}.net.{key}={value}" for key, value in small.items()]
        words += [f"{stage}.shape.height={height}", f"{stage}.shape.width={width}", f"{stage}.train=null"]
        words += [f"{stage}.sampler.steps=2", f"{stage}.weights=random"]
    for stage in LATENTS.get(name, []):
        words += [f"{stage}.codec.weights={autoencoders / str(tree[stage]['codec']['stride'])}"]
    return words


@pytest.mark.parametrize("name", SIZES)
def test_from_a_prompt_to_an_mp4(name: str, autoencoders: Path, tmp_path: Path) -> None:
    words = overrides(name, autoencoders)
    chain = Chain.read(chain_settings(name, words[1:]))
    cli.command(["generate", *words, "prompt=a dog runs", f"out={tmp_path / 'out'}"])
    last = chain.stages[-1]
    video = media.read_video(tmp_path / "out" / "video.mp4")
    assert video.shape == last.shape and video.fps == pytest.approx(last.fps)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["stages"] == [cfg.name for cfg in chain.stages]
    assert sorted(path.name for path in (tmp_path / "out" / "stages").iterdir()) == sorted(manifest["stages"])


def test_a_codec_is_loaded_before_the_next_stage_is_built(
    autoencoders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside each other, the stage would be built of what diffusers has for modules of its own: without data."""
    events: list[str] = []
    build, load = pipeline.load_stage, foreign.load

    def built(cfg: StageConfig, *args: Any) -> tuple[Stage, str]:
        events.append(cfg.name)
        return build(cfg, *args)

    def loaded(*where: Any) -> Any:
        events.append("codec")
        return load(*where)

    monkeypatch.setattr(pipeline, "load_stage", built)
    monkeypatch.setattr(foreign, "load", loaded)
    words = overrides("zeroscope", autoencoders)
    cli.command(["generate", *words, "prompt=a dog runs", f"out={tmp_path / 'out'}"])
    assert events == ["base", "codec", "xl", "codec"]


@pytest.mark.parametrize("name", SIZES)
def test_weights_are_cast_once_to_what_autocast_makes_of_them_at_each_call(name: str, autoencoders: Path) -> None:
    chain, half = Chain.read(chain_settings(name, overrides(name, autoencoders)[1:])), torch.bfloat16
    for cfg, rule in zip(chain.stages, chain.rules, strict=True):
        full, cast = (untrained(cfg, rule, torch.device("cpu"), dtype)[0].net for dtype in (torch.float32, half))
        size = (3, *cfg.codec.inside(cfg.shape)[1:])
        text = Text(torch.rand(1, 8, cfg.net.text), torch.ones(1, 8, dtype=torch.bool))
        z, concat = (torch.rand(1, channels, *size) for channels in (cfg.net.channels, cfg.incoming(cfg.shape)[0]))
        t, fps = torch.full((1,), 0.5), torch.full((1,), cfg.fps)
        with torch.no_grad(), torch.autocast("cpu", half):
            made = [net(z, t, Cond(concat, concat[:, :1, :, :1, :1], t, fps, text)) for net in (full, cast)]
        assert torch.equal(*made)
        weights, kept = (sum(parameter.nbytes for parameter in net.parameters()) for net in (full, cast))
        assert kept < 0.6 * weights
