"""`cascade plan`: what a chain is and what it costs, said without a weight being loaded.

The denoisers run once on PyTorch's meta device, where tensors have shapes and no data: operations are counted as they
would be, and so is the memory that is alive at a time.
"""

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

from cascade import checkpoint, foreign, store
from cascade.config import locate, plain
from cascade.encoders import WEIGHTS
from cascade.errors import ConfigError, InputError
from cascade.pipeline import Chain
from cascade.request import take
from cascade.stage import Rule, Stage, StageConfig
from cascade.text import Text, TextConfig, known_width, local_file, told_tokens
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
    """What a chain needs beside its denoisers: a text encoder, a store of embeddings, a prior, autoencoders."""

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
    if (first := chain.stages[0]).windows.in_turn:
        raise ConfigError(
            f"{first.name}: windows.rule is {first.windows.rule.value}, which needs an incoming video",
            fix=f"{first.name}.windows.rule=blend",
        )
    stages = [measure(cfg, rule, chain.text_of(cfg)) for cfg, rule in zip(chain.stages, chain.rules, strict=True)]
    priors = [other for text in chain.texts for other in _prior(text)]
    return Plan(stages=stages, others=[*map(_text, chain.texts), *priors, *_codecs(chain.stages)])


def measure(cfg: StageConfig, rule: Rule, text: TextConfig) -> StagePlan:
    """The numbers of one denoiser."""
    cfg = replace(cfg, w_range=_told(cfg))
    with torch.device("meta"):
        stage = Stage(cfg, rule)
    count = Count()
    with torch.no_grad(), count.running(stage.net):
        size = (1, cfg.net.channels, *cfg.codec.inside(cfg.shape))
        z, t = torch.empty(size, device="meta"), torch.empty(1, device="meta")
        cond = _blank(size, told_tokens(text), cfg.net.text)
        spans = cfg.windows.spans(cfg.shape.frames, rule.rate(cfg))  # all of one length
        first, end = spans[0]
        stage.denoise(z[:, :, first:end], t, cond.frames(first, end), None if cfg.w_range is None else 0.0)
    return StagePlan(
        name=cfg.name,
        frames=cfg.shape.frames,
        height=cfg.shape.height,
        width=cfg.shape.width,
        fps=cfg.fps,
        params=sum(parameter.numel() for parameter in stage.net.parameters()),
        flops=count.flops * len(spans),
        evaluations=cfg.sampler.evaluations(guided=cfg.w_range is None),
        peak_bytes=count.peak,
    )


def _blank(size: Sequence[int], tokens: int, width: int) -> Cond:
    with torch.device("meta"):
        text = Text(torch.empty(1, tokens, width), torch.empty(1, tokens, dtype=torch.bool))
        return Cond(torch.empty(*size), torch.empty(1, 1, size[2], 1, 1), torch.empty(1), torch.empty(1), text)


def _told(cfg: StageConfig) -> list[float] | None:
    """The range of w that a guidance-distilled network is told: as set, or as recorded beside its weights."""
    path = (
        None
        if cfg.weights in (None, checkpoint.RANDOM)
        else checkpoint.locate(cfg.weights, cfg.name, cfg.sampler.steps) / "config.json"
    )
    if cfg.w_range is not None or path is None or not path.is_file():
        return cfg.w_range
    return store.from_json(path.read_bytes(), path).get("w_range")


# counting ------------------------------------------------------------------------------------------------------------


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations, and the greatest number of bytes alive at once, of what runs on the meta device inside `running`.

    A storage counts from the operation that makes it until it is collected. What a kernel allocates and frees by
    itself does not show; attention is answered as fused kernels do it, which never hold all scores at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops, self.peak, self._alive = 0, 0, 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    @contextmanager
    def running(self, module: torch.nn.Module) -> Iterator[None]:
        """Counts what is done inside; the parameters of `module` are alive all the time."""
        for parameter in module.parameters():
            self._add(parameter)
        with self, FlopCounterMode(display=False) as counter, Fused() as attention:
            yield
        self.flops += counter.get_total_flops() + attention.flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen.add(storage)
            weakref.finalize(storage, self._free, storage.nbytes())
            self._alive += storage.nbytes()
            self.peak = max(self.peak, self._alive)

    def _free(self, size: int) -> None:
        self._alive -= size


class Fused(TorchFunctionMode):
    """Answers by tensors of the right shape scaled_dot_product_attention, 2 products of M N D for every head, and group
    norm, no products, which the meta device would take apart: half of the time of a plan."""

    flops = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.group_norm:
            return torch.empty_like(args[0])
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]  # (B, h, M, D), (B, h, N, D)
        self.flops += 2 * prod(q.shape[:3]) * k.shape[2] * (q.shape[3] + v.shape[3])
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


# what else is needed -------------------------------------------------------------------------------------------------


def _text(cfg: TextConfig) -> Other:
    if cfg.store is not None:
        return Other(name=cfg.store, kind="text store", params=0)
    path = local_file(cfg.encoder, WEIGHTS)
    unused = ("decoder.", "lm_head.", "encoder.embed_tokens.", "vision_model.")  # the third is shared.weight again
    return Other(name=cfg.encoder, kind="text encoder", params=None if path is None else stored(path, unused))


def _prior(cfg: TextConfig) -> Iterator[Other]:
    if cfg.prior is not None and cfg.store is None:
        yield Other(name="text.prior", kind="prior", params=cfg.prior.params(cfg.max_tokens))


def _codecs(stages: Sequence[StageConfig]) -> Iterator[Other]:
    for name in dict.fromkeys(stage.codec.weights for stage in stages):
        if name is not None:
            path = locate(name) / foreign.WEIGHTS
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
    for text in chain.texts:
        if known_width(text) is None:
            log.info("text %s is not on this machine: its width was not checked", text.store or text.encoder)
    print(json.dumps(plain(made), indent=2) if shown.format == "json" else made.table())


def _short(number: float) -> str:
    """Three digits and a prefix: 12.3 M."""
    power = 0
    while number >= 999.5:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}"
