"""Stages of the founding papers train from their YAML alone, and load what they have trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_papers_run import shrunk, tree

from cascade import checkpoint
from cascade.chain import Chain, chain_settings
from cascade.cli import stage_command
from cascade.loading import load_stage


@pytest.mark.parametrize(
    ("paper", "name", "extra"),
    [
        ("imagen_video", "base", ["train.images=1"]),
        ("imagen_video", "ssr3", []),
        ("make_a_video", "decoder", []),
        ("make_a_video", "interp", ["known=0.5"]),
        ("vdm", "infill", []),
    ],
)
def test_a_stage_of_a_paper_trains(paper: str, name: str, extra: list[str], tmp_path: Path) -> None:
    chain = Chain.read(tree(paper))
    cfg, rule = next((c, r) for c, r in zip(chain.stages, chain.rules, strict=True) if c.name == name)
    drop = (f"{name}.train=", f"{name}.weights=")
    words = [word.removeprefix(f"{name}.") for word in shrunk(cfg) if not word.startswith(drop)]
    # The world of shapes in place of videos, long enough; two steps of two clips, in float32.
    words += [f"stage={paper}/{name}", "task=train", f"out={tmp_path}", "device=cpu", "data.shapes.seconds=6"]
    words += ["reads=null", "train.precision='no'", "train.steps=2", "train.batch=2", "train.warmup=0"]
    words += ["train.sample_every=0", *extra]
    if cfg.train is not None and cfg.train.crop is not None:
        side = {side: min(getattr(cfg.train.crop, side), getattr(cfg.shape, side) // 8) for side in ("height", "width")}
        frames = cfg.train.crop.frames
        words.append(f"train.crop={{frames:{frames},height:{side['height']},width:{side['width']}}}")
    stage_command(cfg.kind, words)
    weights = checkpoint.load(tmp_path / "weights")
    assert weights.state["conv_out.weight"].any(), "it starts at zero"
    made = Chain.read(small(paper, name, tmp_path / "weights")).stages[0]
    assert load_stage(made, rule, torch.device("cpu"))[1] == weights.hash


def small(paper: str, name: str, weights: Path) -> dict[str, object]:
    """The settings of that stage alone, with the network that was trained."""
    chain = Chain.read(tree(paper))
    (cfg,) = (cfg for cfg in chain.stages if cfg.name == name)
    words = [word for word in shrunk(cfg) if not word.startswith(f"{name}.weights=")]
    settings = chain_settings(paper, [*words, f"{name}.weights={weights}", "text.encoder=tiny/text"])
    if "prior" in settings["text"]:
        settings["text"]["prior"] = None
    return {key: value for key, value in settings.items() if key in (name, "text")} | {"stages": [name]}
