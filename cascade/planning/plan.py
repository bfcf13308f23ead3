"""`cascade plan`: what a chain is and what it costs, said without a weight being loaded (see `count`)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cascade import foreign
from cascade.chain import Chain, Device
from cascade.config import locate, plain
from cascade.errors import ConfigError
from cascade.planning.count import Host, encoder, held, stored, told, work
from cascade.planning.memory import Memory, fitting
from cascade.request import take
from cascade.settings import Rule, StageConfig
from cascade.text import TextConfig, known_width, told_tokens
from cascade.windows import Join

log = logging.getLogger("cascade")


@dataclass(kw_only=True)
class StagePlan:
    """One denoiser. `flops` are of one evaluation of one clip, all of its windows."""

    name: str
    frames: int  # of the output, as are height, width and fps
    height: int
    width: int
    fps: float
    params: int
    flops: int  # of products and convolutions: a multiplication with its addition is two
    evaluations: int  # for one clip: sampler steps x guidance branches
    peak_bytes: int  # the most that is held while clips are sampled: weights, activations, the sampler's state


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
    host: Host = field(default_factory=Host)
    said: list[str] = field(default_factory=list)  # what was changed so that it fits into memory

    def data(self) -> dict[str, Any]:
        """The numbers for programs."""
        tree = plain(self)
        return {key: tree[key] for key in ("stages", "others")} | ({"memory": self.said} if self.said else {})

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
        flops = sum(s.flops * s.evaluations for s in self.stages)
        peak = max(s.peak_bytes for s in self.stages)
        calls = str(sum(s.evaluations for s in self.stages))
        rows.append(("all", "", "", "", "", _short(sum(s.params for s in self.stages)), "", calls, f"{_short(peak)}B"))
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in (head, *rows)]
        host = self.host
        lines += [
            "",
            f"FLOP: one evaluation of one clip; a video takes {_short(flops)}FLOP.",
            f"memory: the most a stage holds while it samples{'' if host.clips == 1 else f' {host.clips} clips'} on "
            f"{host.device} in {host.dtype}.",
        ]
        lines += self.said
        for other in self.others:
            size = "not on this machine" if other.params is None else f"{_short(other.params)} parameters"
            lines.append(f"{other.kind}: {other.name}, {size}")
        return "\n".join(line.rstrip() for line in lines)


def plan(chain: Chain, on: Device | None = None, ask: Memory | None = None) -> Plan:
    """Checks `chain` and measures its denoisers on a device (None: the CPU). Loads no weights.

    Raises ConfigError if it cannot work, MemoryLimitError if it cannot fit into the memory that is asked for.
    """
    on, said = on or Device(device="cpu"), []
    chain.check()
    try:
        chain.rules[0].output(None, chain.stages[0])
    except ConfigError as error:
        raise ConfigError(
            f"{error.message}, and no stage is before it", fix="begin with a stage that needs no input"
        ) from error
    if (first := chain.stages[0]).windows.in_turn and first.windows.rule is not Join.EXTEND:
        raise ConfigError(
            f"{first.name}: windows.rule is {first.windows.rule.value}, which needs an incoming video",
            fix=f"{first.name}.windows.rule=blend",
        )
    if ask is not None and ask.memory is not None:
        fitted = fitting(chain, on, ask)
        chain, said = fitted.chain, fitted.said
    host = Host.of(on)
    stages = [measure(cfg, rule, chain.text_of(cfg), host) for cfg, rule in zip(chain.stages, chain.rules, strict=True)]
    priors = [other for text in chain.texts for other in _prior(text)]
    others = [*map(_text, chain.texts), *priors, *_codecs(chain.stages)]
    return Plan(stages=stages, others=others, host=host, said=said)


def measure(cfg: StageConfig, rule: Rule, text: TextConfig, host: Host | None = None) -> StagePlan:
    """The numbers of one denoiser."""
    cfg = replace(cfg, w_range=told(cfg))
    params, flops = work(cfg, rule, told_tokens(text))
    return StagePlan(
        name=cfg.name,
        frames=cfg.shape.frames,
        height=cfg.shape.height,
        width=cfg.shape.width,
        fps=cfg.fps,
        params=params,
        flops=flops,
        evaluations=cfg.sampler.evaluations(guided=cfg.w_range is None),
        peak_bytes=held(cfg, rule, told_tokens(text), host or Host()).peak,
    )


# what else is needed -------------------------------------------------------------------------------------------------


def _text(cfg: TextConfig) -> Other:
    if cfg.store is not None:
        return Other(name=cfg.store, kind="text store", params=0)
    return Other(name=cfg.encoder, kind="text encoder", params=encoder(cfg))


def _prior(cfg: TextConfig) -> Iterator[Other]:
    if cfg.prior is not None and cfg.store is None:
        yield Other(name="text.prior", kind="prior", params=cfg.prior.params(cfg.max_tokens))


def _codecs(stages: Sequence[StageConfig]) -> Iterator[Other]:
    for name in dict.fromkeys(stage.codec.weights for stage in stages):
        if name is not None:
            path = locate(name) / foreign.WEIGHTS
            yield Other(name=name, kind="autoencoder", params=stored(path) if path.is_file() else None)


# the verb ------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class PlanConfig:
    """How the plan is shown."""

    format: str = "table"

    def __post_init__(self) -> None:
        if self.format not in ("table", "json"):
            raise ValueError(f"format is {self.format!r}, expected table or json")


def verb(tree: dict[str, Any]) -> Callable[[], None]:
    """`cascade plan`: the plan on stdout, remarks on stderr."""
    shown, on, ask = take(tree, PlanConfig), take(tree, Device), take(tree, Memory)
    chain = Chain.read(tree, ["format", "device", "dtype", "micro_batch", "memory"])
    made = plan(chain, on, ask)
    for text in chain.texts:
        if known_width(text) is None:
            log.info("text %s is not on this machine: its width was not checked", text.store or text.encoder)

    def work() -> None:
        print(json.dumps(made.data(), indent=2) if shown.format == "json" else made.table())

    return work


def _short(number: float) -> str:
    """Three digits and a prefix: 12.3 M."""
    power = 0
    while number >= 999.5:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}"
