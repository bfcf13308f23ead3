"""The chains of the founding papers run: from a prompt to a video, from their YAML alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cascade.chain import Chain, chain_settings
from cascade.cli import command, stage_command
from cascade.clipfiles import VIDEO, read_clip
from cascade.errors import ConfigError
from cascade.media import png, read_image, read_video
from cascade.nets.unet_config import LevelSpec
from cascade.settings import StageConfig


def tree(name: str) -> dict[str, Any]:
    return chain_settings(name)


def level_words(cfg: StageConfig) -> tuple[list[LevelSpec], int]:
    """The deepest levels that an eighth of the size bears, narrow, and their patch."""
    height, width = cfg.shape.height // 8, cfg.shape.width // 8
    patch = cfg.net.patch if height % (2 * cfg.net.patch) == 0 and width % (2 * cfg.net.patch) == 0 else 1
    count = 2 if height % (2 * patch) == 0 and width % (2 * patch) == 0 else 1
    return cfg.net.levels[-count:], patch


def shrunk(cfg: StageConfig) -> list[str]:
    """Words of a command: an eighth of height and width, two steps, narrow networks with weights drawn at random."""
    levels, patch = level_words(cfg)
    said = ",".join(
        f"{{channels:8,mixer:{level.mixer.value},spatial_attention:{level.spatial_attention},"
        f"text_attention:{level.text_attention}}}"
        for level in levels
    )
    settings = {
        "shape.height": cfg.shape.height // 8, "shape.width": cfg.shape.width // 8, "sampler.steps": 2,
        "net.levels": f"[{said}]", "net.embedding": 16, "net.patch": patch, "net.head": 4,
        "net.text": 128 if cfg.net.text else 0, "train": "null", "weights": "random",
    }  # fmt: skip
    return [f"{cfg.name}.{key}={value}" for key, value in settings.items()]


@pytest.mark.parametrize("name", ["imagen_video", "imagen_video_8", "make_a_video", "vdm"])
def test_a_paper_runs_from_a_prompt_to_a_video(name: str, tmp_path: Path) -> None:
    words = ["generate", f"chain={name}", "prompt=a red circle moves left", f"out={tmp_path / 'made'}", "device=cpu"]
    words += ["text.encoder=tiny/text", "text.max_tokens=16", "text.precision=float32"]
    if "prior" in tree(name)["text"]:
        words += [f"text.prior.{key}" for key in ("width=128", "layers=1", "heads=2", "head=8", "weights=random")]
        words += ["text.prior.sampler.steps=2"]
    chain = Chain.read(tree(name))
    for cfg in chain.stages:
        words += shrunk(cfg)
    command(words)
    made, last = tmp_path / "made", chain.stages[-1]
    video = read_video(made / "video.mp4")
    assert video.frames.shape[2:] == (last.shape.frames, last.shape.height // 8, last.shape.width // 8)
    assert video.fps == last.fps
    clips = [read_clip((made / "stages" / cfg.name / VIDEO).read_bytes(), cfg.name) for cfg in chain.stages]
    for before, after, cfg, rule in zip(clips, clips[1:], chain.stages[1:], chain.rules[1:], strict=False):
        assert after.fps == cfg.fps
        if rule.KEEPS_KNOWN:
            assert torch.equal(after.frames[:, :, :: rule.rate(cfg)], before.frames)


def test_an_interpolator_animates_a_picture_by_itself(tmp_path: Path) -> None:
    """Make-A-Video, sec. 3.3: the same weights, from one picture."""
    (tmp_path / "first.png").write_bytes(png(torch.linspace(-1, 1, 3 * 8 * 8).view(3, 8, 8)))
    (cfg,) = (cfg for cfg in Chain.read(tree("make_a_video")).stages if cfg.name == "interp")
    words = [word.removeprefix("interp.") for word in shrunk(cfg)]
    words += ["stage=make_a_video/interp", "reads=null", "prompt=a red circle", f"image={tmp_path / 'first.png'}"]
    stage_command("interp", [*words, f"out={tmp_path / 'made.safetensors'}", "device=cpu"])
    made = read_clip((tmp_path / "made.safetensors").read_bytes(), "made")
    first = read_image(tmp_path / "first.png")
    assert made.fps == 30 and made.frames.shape == (1, 3, 76, 8, 8)
    assert torch.equal(made.frames[0, :, 0], first) and (made.frames[0, :, 1] - first).abs().max() > 0.01


def test_a_stage_whose_text_is_another_is_refused_before_it_loads(tmp_path: Path) -> None:
    words = ["stage=vdm/base", "reads.encoder=tiny/text", "prompt=a red circle", f"out={tmp_path / 'made.safetensors'}"]
    with pytest.raises(ConfigError, match=r"net\.text is 1024, but the embeddings of tiny/text are 128 wide"):
        stage_command("base", words)
