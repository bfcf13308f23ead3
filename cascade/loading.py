"""Stages and their weights: loaded strictly, drawn at random, written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade import checkpoint
from cascade.chain import Chain, Device
from cascade.config import fingerprint, plain
from cascade.diffusion import Schedule
from cascade.errors import ConfigError
from cascade.nets.compiled import compiled
from cascade.nets.layers import channels_last, halved
from cascade.nets.unet_config import completed
from cascade.settings import Rule, StageConfig
from cascade.stage import Stage

Loaded = tuple[Stage, str]  # a stage and the hash of its weights
Load = Callable[[StageConfig, Rule, torch.device, torch.dtype], Loaded]  # on that device, to sample in that dtype


def known(cfg: StageConfig) -> tuple[StageConfig, list[str]]:
    """What decides the results of `load_stage`, before it reads any weights: the settings with what stands beside the
    weights, and the hashes of weights and codec."""
    told, name = trained(cfg)
    return told, [name, cfg.codec.hash()]


def trained(cfg: StageConfig) -> tuple[StageConfig, str]:
    """The settings with what stands beside the weights, and what names those, unread. InputError for another stage's,
    ConfigError for guidance that they were not distilled for."""
    if cfg.weights == checkpoint.RANDOM:
        return cfg, _random(cfg)
    directory = checkpoint.locate(cfg.weights, cfg.name, cfg.sampler.steps)
    saved, name = checkpoint.about(directory)
    check_trained(cfg, saved, f"{cfg.name} in {directory}")
    return told_weight(cfg, saved.get("w_range")), name


def check(chain: Chain) -> None:
    """Raises ConfigError or InputError for the first stage whose weights are not there or do not fit; none are read."""
    chain.check_weights()
    for cfg in chain.stages:
        trained(cfg)


def load_stage(cfg: StageConfig, rule: Rule, device: torch.device, dtype: torch.dtype = torch.float32) -> Loaded:
    """The stage with its verified weights, ready to sample under autocast to `dtype`, and the weights' hash."""
    cfg.codec.folder()
    if cfg.weights == checkpoint.RANDOM:
        return untrained(cfg, rule, device, dtype)
    directory = checkpoint.locate(cfg.weights, cfg.name, cfg.sampler.steps)
    weights = checkpoint.load(directory)
    check_trained(cfg, weights.config, f"{cfg.name} in {directory}")
    cfg = told_weight(cfg, weights.config.get("w_range"))
    with torch.device("meta"):
        stage = Stage(cfg, rule)
    checkpoint.apply(stage.net, weights.state, f"{cfg.name}: {directory}")
    return _ready(stage, device, dtype), weights.hash


def check_trained(cfg: StageConfig, saved: Mapping[str, Any], what: str) -> None:
    """Raises InputError unless weights with the card `saved` are of the stage's kind, architecture and diffusion."""
    process = _process(saved.get("diffusion", {}))
    wanted = {"kind": cfg.kind, "net": plain(cfg.net), **{name: plain(cfg.diffusion)[name] for name in process}}
    found = {"kind": saved.get("kind"), "net": completed(saved.get("net", {})), **process}
    checkpoint.compatible(found, wanted, what)


def told_weight(cfg: StageConfig, w_range: list[float] | None) -> StageConfig:
    """The settings with the range of guidance weights that a distilled network is told. ConfigError for one outside."""
    cfg = replace(cfg, w_range=w_range)
    if cfg.w_range is not None:
        low, high = cfg.w_range
        for step in range(cfg.sampler.steps):
            if not low <= (w := cfg.sampler.weight(step)) <= high:
                near = max(low, min(w, high))
                here = f"guidance_scale={{{cfg.name!r}: {1 + near:g}}}"
                raise ConfigError(
                    f"{cfg.name}: sampler.guidance is {w:g}, its weights were distilled for {low:g} to {high:g}",
                    fix=f"{cfg.name}.sampler.guidance={near:g}, in Python {here}",
                )
    return cfg


def _process(diffusion: Mapping[str, Any]) -> dict[str, Any]:
    """What a network cannot do without of the process that its card says it was trained on.

    `shift` is not of it: networks are told the noise level, whatever the schedule that leads there. A table is.
    """
    table = {name: diffusion.get(name) for name in ("schedule", "timesteps", "betas")}
    discrete = table["schedule"] not in (None, Schedule.COSINE.value)
    return {"prediction": diffusion.get("prediction"), **(table if discrete else {})}


def launched(stage: Stage, on: Device) -> Stage:
    """The stage on its device, its network launched as its settings say: once, however often it is asked for."""
    stage.to(on.torch)
    if stage.call is None:
        stage.call = compiled(stage.net, stage.cfg.compile)
    return stage


def untrained(cfg: StageConfig, rule: Rule, device: torch.device, dtype: torch.dtype = torch.float32) -> Loaded:
    """A stage whose weights are drawn at random (`weights=random`), the same ones for equal settings of its network.

    What starts at zero is drawn too: a branch that adds nothing would hide its faults and its cost.
    """
    name = _random(cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(name.split()[1][:12], 16))
        stage = Stage(cfg, rule)
        for parameter in stage.net.parameters():
            if not parameter.detach().any():
                torch.nn.init.uniform_(parameter, -0.035, 0.035)  # standard deviation 0.02
    return _ready(stage, device, dtype), name


def _random(cfg: StageConfig) -> str:
    return f"random {fingerprint(plain(cfg.net))}"


def _ready(stage: Stage, device: torch.device, dtype: torch.dtype) -> Stage:
    stage.net.to(torch.float32).eval().requires_grad_(False)
    channels_last(stage.net)
    halved(stage.net, dtype)  # before weights that are offloaded are noted
    return stage.to(device)


def save_stage(
    directory: Path,
    cfg: StageConfig,
    state: dict[str, Tensor],
    recipe: str,
    dtype: torch.dtype | None = None,
    **extra: Any,
) -> None:
    """Weights (in half precision, if `dtype` says so) with the architecture they belong to and a model card."""
    config = {"kind": cfg.kind, "net": plain(cfg.net), "diffusion": plain(cfg.diffusion), **extra}
    millions = sum(value.numel() for value in state.values()) / 1e6
    card = (
        f"# {cfg.name}\n\n{cfg.kind} stage of Cascade: {cfg.shape} (frames x height x width) at {cfg.fps:g} fps, "
        f"{millions:.2f} M parameters.\n\n{recipe}\n\nLicence: Apache-2.0.\n"
    )
    checkpoint.save(directory, state, config, card=card, dtype=dtype)
