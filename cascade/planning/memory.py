"""`memory=12GB`: what to change about a chain's stages so that none holds more, as `count` predicts it.

First what changes no result but for its last bits, then what costs precision, then what costs context; the first way
that fits is taken, as little of it as will do. What was typed, or set in a file to see fewer frames at once, stays.
"""

from __future__ import annotations

import ctypes
import logging
import math
import re
import shlex
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from cascade.chain import Chain, Device
from cascade.config import fingerprint
from cascade.errors import MemoryLimitError
from cascade.planning.count import Host, encoder, held, on_meta, takes, work
from cascade.settings import Rule, StageConfig
from cascade.text import Precision, TextConfig, told_tokens
from cascade.video import Shape
from cascade.windows import Windows

log = logging.getLogger("cascade")
UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
BLOCK = 64 << 10  # bytes: from here on glibc gives freed blocks back at once


@dataclass(kw_only=True)
class Memory:
    """A limit for what a stage holds on the device, beside the libraries themselves; `command` is what was typed."""

    memory: str | None = None
    command: str | None = None

    def __post_init__(self) -> None:
        if self.memory is not None:
            size(self.memory)

    @property
    def limit(self) -> int | None:
        """In bytes."""
        return None if self.memory is None else size(self.memory)

    @property
    def typed(self) -> set[str]:
        """The settings that were typed."""
        return {word.partition("=")[0].lstrip("+~") for word in shlex.split(self.command or "")}


def size(text: str) -> int:
    """Bytes that `text` says: 12GB, 1.5 GiB. ValueError otherwise."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    unit = {name.lower(): factor for name, factor in UNITS.items()}.get(found[2].lower()) if found else None
    if found is None or unit is None or not 0 < float(found[1]) < math.inf:
        raise ValueError(f"memory is {text!r}, expected a size such as 12GB")
    return int(float(found[1]) * unit)


def short(number: float) -> str:
    """Bytes with three digits: 62.1 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


@dataclass(frozen=True)
class Fitted:
    """A chain that fits into a limit, and for each stage a line that says what was changed for it and why."""

    chain: Chain
    said: list[str]


def within(chain: Chain, on: Device, ask: Memory, given: Shape | None = None) -> Chain:
    """The chain as it fits into `ask.memory` on `on`, for an input of size `given`; says on the log what it chose.

    On the CPU freed memory is given back from here on. Raises MemoryLimitError naming the least that would do.
    """
    if ask.limit is None:
        return chain
    fitted = fitting(chain, on, ask, given)
    for line in fitted.said:
        log.info(line)
    if on.type == "cpu":
        give_back()
    return fitted.chain


def fitting(chain: Chain, on: Device, ask: Memory, given: Shape | None = None) -> Fitted:
    """As `within`, without changing anything about this process."""
    assert ask.limit is not None
    host = Host.of(on)
    beside = sum(map(_encoder, chain.texts)) if host.device == "cpu" else 0
    stages, said, lacking = [], [], []
    low = given or takes(chain.stages[0], chain.rules[0])
    for cfg, rule in zip(chain.stages, chain.rules, strict=True):
        room = Room(cfg, rule, told_tokens(chain.text_of(cfg)), host, low, ask.limit - beside, ask.typed)
        chosen, least = room.choose()
        if chosen is None:
            lacking.append((least, room))
        else:
            stages.append(chosen)
            said.append(f"memory={ask.memory}: {room.words(chosen)}")
        low = rule.output(low, cfg)
    if lacking:
        raise _refusal(ask, beside, *max(lacking, key=lambda pair: pair[0]))
    if beside:
        said.append(f"memory={ask.memory}: {short(beside)} of it are the text's")
    return Fitted(Chain(stages, chain.rules, chain.text), said)


def _encoder(text: TextConfig) -> int:
    """Bytes of a text encoder's weights, and its prior's, which stay in host memory."""
    prior = 0 if text.prior is None or text.store is not None else text.prior.params(text.max_tokens)
    return (encoder(text) or 0) * (4 if text.precision is Precision.FLOAT32 else 2) + 4 * prior


def _refusal(ask: Memory, beside: int, least: int, room: Room) -> MemoryLimitError:
    name = room.cfg.name
    fixed = [key for key in ("frames_at_once", "windows", "dtype", "offload") if room.is_typed(key)]
    leave = f", or leave {' and '.join(fixed)} to be chosen" if fixed else ""
    more = f" beside {short(beside)} for the text" if beside else ""
    return MemoryLimitError(
        f"memory is {ask.memory}, but {name} holds {short(least)} at the least{more}",
        fix=f"memory={math.ceil((least + beside) / 1e6)}MB, or a smaller {name}.shape{leave}",
    )


@dataclass(frozen=True)
class Room:
    """The ways in which one stage, for an input of size `low`, may hold less."""

    cfg: StageConfig
    rule: Rule
    tokens: int
    host: Host
    low: Shape | None
    limit: int
    typed: Collection[str]
    known: dict[str, int] = field(default_factory=dict)  # bytes by settings

    def choose(self) -> tuple[StageConfig | None, int]:
        """The stage as it fits, None if no way does; and the least bytes that were found."""
        least = self.need(self.cfg)
        for make, fewest, most in self.ways():
            least = min(least, self.need(make(most)))
            if least <= self.limit:
                return make(most), least
            least = min(least, self.need(make(fewest)))
            if least <= self.limit:
                return make(largest(fewest, most, partial(self._fits, make))), least
        return None, least

    def _fits(self, make: Callable[[int], StageConfig], frames: int) -> bool:
        return self.need(make(frames)) <= self.limit

    def ways(self) -> Iterator[tuple[Callable[[int], StageConfig], int, int]]:
        """What may be done, best first: settings for n frames at once, the fewest and the most n."""
        total = self.rule.output(self.low, self.cfg).frames
        seen = min(self.cfg.windows.frames or total, total)
        reach = on_meta(self.cfg, self.rule).reach
        for cfg in self.lighter():
            if reach is None or self.cfg.frames_at_once or self.is_typed("frames_at_once"):
                yield partial(_as_it_is, cfg), seen, seen
            else:
                yield partial(_in_parts, cfg, seen), min(seen, 2 * reach + 1), seen
        trained = self.cfg.train.crop if self.cfg.train else None
        if self.cfg.windows.in_turn:
            return
        if trained is not None and not self.is_typed("windows") and not getattr(self.cfg.net, "frame_position", False):
            rate = self.rule.rate(self.cfg)
            extra = self.cfg.shape.frames % rate
            fewest, most = -(-(trained.frames - extra) // rate), (seen - 1 - extra) // rate
            if fewest <= most:
                for cfg in self.lighter():
                    yield partial(_in_windows, cfg, rate, extra), fewest, most

    def lighter(self) -> Iterator[StageConfig]:
        """The stage in the precisions and places that its weights may have, best first."""
        dtypes: list[str | None] = [self.cfg.dtype]
        places = [self.cfg.offload]
        if self.host.device == "cuda":  # most CPUs take four times as long in half precision
            if (self.cfg.dtype or self.host.dtype) == "float32" and not self.is_typed("dtype"):
                dtypes.append("bfloat16")
            if not (self.cfg.offload or self.cfg.bound or self.is_typed("offload")):
                places.append(True)
        for dtype in dtypes:
            for place in places:
                yield replace(self.cfg, dtype=dtype, offload=place)

    def is_typed(self, key: str) -> bool:
        """Whether a setting of the stage, or a part of it, was typed; a single stage's have no name before them."""
        names = (key, f"{self.cfg.name}.{key}")
        return any(word in names or word.startswith(tuple(f"{name}." for name in names)) for word in self.typed)

    def need(self, cfg: StageConfig) -> int:
        """Bytes that the stage holds as `cfg` says, counted once."""
        key = fingerprint(cfg)
        if key not in self.known:
            self.known[key] = held(cfg, self.rule, self.tokens, self.host, self.low).peak
        return self.known[key]

    def words(self, chosen: StageConfig) -> str:
        """What was chosen and what it costs."""
        name, now = self.cfg.name, short(self.need(chosen))
        told, costs = [], []
        if chosen.windows != self.cfg.windows:
            told.append(f"windows.frames={chosen.windows.frames} windows.overlap={chosen.windows.overlap}")
            costs.append("frames further apart do not see each other, so the result changes")
        if chosen.dtype != self.cfg.dtype:
            told.append(f"dtype={chosen.dtype}")
            costs.append("fewer digits, so the result changes a little")
        if chosen.frames_at_once != self.cfg.frames_at_once:
            told.append(f"frames_at_once={chosen.frames_at_once}")
            ratio = work(chosen, self.rule, self.tokens)[1] / work(self.cfg, self.rule, self.tokens)[1]
            costs.append(f"the same result but for its last bits, {ratio:.1f} times the work")
        if chosen.offload != self.cfg.offload:
            told.append("offload=true")
            costs.append("the same result, weights are copied each time they work")
        if not told:
            return f"{name} holds {now} as it is set"
        return f"{name} holds {now} instead of {short(self.need(self.cfg))} with {' '.join(told)}: {'; '.join(costs)}"


def _as_it_is(cfg: StageConfig, frames: int) -> StageConfig:
    return cfg


def _in_parts(cfg: StageConfig, seen: int, frames: int) -> StageConfig:
    return cfg if frames == seen else replace(cfg, frames_at_once=frames)


def _in_windows(cfg: StageConfig, rate: int, extra: int, groups: int) -> StageConfig:
    frames = rate * groups + extra
    return replace(cfg, windows=Windows(frames=frames, overlap=min(frames - 1, max(rate, frames // 4))))


def largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest n that fits, by halving, where all below it do; `low` fits, `high` does not."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def give_back() -> None:
    """Makes glibc give blocks of BLOCK bytes back when they are freed, instead of keeping them for reuse in pieces.

    Twice as much as is alive may be kept otherwise. It costs time: every block's pages are fresh ones.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        log.info("memory: this C library keeps what is freed, so more may be held than was predicted")
        return
    for parameter in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        mallopt(parameter, BLOCK)
