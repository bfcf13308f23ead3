"""`cascade plan`: what a chain is and what it costs, said without a weight being loaded (see `count`)."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cascade import checkpoint, codec, store
from cascade.config import locate, plain
from cascade.errors import ConfigError, InputError
from cascade.pipeline import Chain
from cascade.request import take
from cascade.stage import Rule, Stage, StageConfig
from cascade.text import WEIGHTS, Text, TextConfig, known_width, local_file
from cascade.unet import Cond

log = logging.getLogger("cascade")


@dataclass(kw_only=True)
class StagePlan:
    """One denoiser. `flops` and `peak_bytes` are of one evaluation of one clip, all of its windows, in float32."""

    name: str
    frames: int  # of the output, as are height, width and fps
    height: int
    width: int
    fps: float
    params: int
    flops: int  # of products and convolutions: a multiplication with its addition is two
    evaluations: int  # for one clip: sampler steps x guidance branches
    peak_bytes: int  # weights, and activations alive at the same time


@dataclass(kw_only=True)
class Other:
    """What a chain needs beside its denoisers: a text encoder, a store of embeddings, autoencoders."""

    name: str
    kind: str
    params: int | None  # None: not on this machine


@dataclass(kw_only=True)
class Plan:
    """A chain that fits together, in numbers."""

    stages: list[StagePlan]
    others: list[Other]

    def table(self) -> str:
        """The numbers for people: a line a stage, then what the whole clip costs and what else is needed."""
        head = ("stage", "frames", "height", "width", "fps", "parameters", "FLOP", "evaluations", "memory")
        rows = [
            (
                s.name, str(s.frames), str(s.height), str(s.width), f"{s.fps:g}", _short(s.params), _short(s.flops),
                str(s.evaluations), f"{_short(s.peak_bytes)}B",
            )
            for s in self.stages
        ]  # fmt: skip
        work = sum(s.flops * s.evaluations for s in self.stages)
        peak = max(s.peak_bytes for s in self.stages)
        calls = str(sum(s.evaluations for s in self.stages))
        rows.append(("all", "", "", "", "", _short(sum(s.params for s in self.stages)), "", calls, f"{_short(peak)}B"))
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in (head, *rows)]
        lines += ["", f"FLOP and memory: one evaluation of one clip in float32; a video takes {_short(work)}FLOP."]
        for other in self.others:
            size = "not on this machine" if other.params is None else f"{_short(other.params)} parameters"
            lines.append(f"{other.kind}: {other.name}, {size}")
        return "\n".join(line.rstrip() for line in lines)


def plan(chain: Chain) -> Plan:
    """Checks `chain` and measures its denoisers. Raises ConfigError if it cannot work; loads no weights."""
    chain.check()
    try:
        chain.rules[0].output(None, chain.stages[0])
    except ConfigError as error:
        raise ConfigError(
            f"{error.message}, and no stage is before it", fix="begin with a stage that needs no input"
        ) from error
    stages = [measure(cfg, rule, chain.text) for cfg, rule in zip(chain.stages, chain.rules, strict=True)]
    return Plan(stages=stages, others=[_text(chain.text), *_codecs(chain.stages)])


def measure(cfg: StageConfig, rule: Rule, text: TextConfig) -> StagePlan:
    """The numbers of one denoiser."""
    cfg = replace(cfg, w_range=told(cfg))
    params, flops = work(cfg, rule, text.max_tokens)
    return StagePlan(
        name=cfg.name,
        frames=cfg.shape.frames,
        height=cfg.shape.height,
        width=cfg.shape.width,
        fps=cfg.fps,
        params=params,
        flops=flops,
        evaluations=cfg.sampler.evaluations(guided=cfg.w_range is None),
        peak_bytes=held(cfg, rule, text.max_tokens, Host()).peak,
    )


# what else is needed -------------------------------------------------------------------------------------------------


def _text(cfg: TextConfig) -> Other:
    if cfg.store is not None:
        return Other(name=cfg.store, kind="text store", params=0)
    path = local_file(cfg.encoder, WEIGHTS)
    unused = ("decoder.", "lm_head.", "encoder.embed_tokens.")  # the last is shared.weight again
    return Other(name=cfg.encoder, kind="text encoder", params=None if path is None else stored(path, unused))


def _codecs(stages: Sequence[StageConfig]) -> Iterator[Other]:
    for name in dict.fromkeys(stage.codec.weights for stage in stages):
        if name is not None:
            path = locate(name) / codec.WEIGHTS
            yield Other(name=name, kind="autoencoder", params=stored(path) if path.is_file() else None)


def stored(path: Path, without: tuple[str, ...] = ()) -> int:
    """Numbers in a safetensors file, from its header alone; `without` are beginnings of names that do not count."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if not name.startswith(without)]  # noqa: SIM118  no dict
            return sum(prod(file.get_slice(name).get_shape()) for name in names)
    except SafetensorError as error:
        raise InputError(f"{path}: is not a safetensors file: {error}", fix="copy it again") from error


# the verb ------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class PlanConfig:
    """How the plan is shown."""

    format: str = "table"

    def __post_init__(self) -> None:
        if self.format not in ("table", "json"):
            raise ValueError(f"format is {self.format!r}, expected table or json")


def verb(tree: dict[str, Any]) -> None:
    """`cascade plan`: the plan on stdout, remarks on stderr."""
    shown = take(tree, PlanConfig)
    chain = Chain.read(tree, ["format"])
    made = plan(chain)
    if known_width(chain.text) is None:
        log.info("text %s is not on this machine: its width was not checked", chain.text.store or chain.text.encoder)
    print(json.dumps(plain(made), indent=2) if shown.format == "json" else made.table())


def _short(number: float) -> str:
    """Three digits and a prefix: 12.3 M."""
    power = 0
    while number >= 999.5:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}"
