"""The project's gates: a number that was measured, or its ratio or distance to another one, against a target."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from statistics import stdev
from typing import Any

from cascade.config import parse, plain
from cascade.results.series import Pooled, Series, largest

RELATIONS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}
AGAINST = ("ratio", "difference")
NOT_MEASURED = "not measured"


@dataclass(kw_only=True)
class Pick:
    """Which number of which evaluations; null and {} leave open."""

    stage: str  # whose clips
    metric: str
    name: str
    what: str = "stage"  # stage: judged alone, chain: judged in a chain
    group: str = "all"
    condition: str = "made"
    split: str = "all"
    wording: str = "plain"
    two: float = 0.0
    image: bool = False
    steps: int | None = None  # of the stage's sampler
    method: str | None = None  # teacher, progressive, ...
    labels: dict[str, str] = field(default_factory=dict)
    n: int = 1  # fewest clips a seed

    def fits(self, series: Series) -> bool:
        """Whether the number is one of the series'."""
        cfg = series.settings
        if series.what != self.what or self.stage not in series.stages:
            return False
        steps = series.steps[series.stages.index(self.stage)]
        return (
            (cfg.wording, cfg.two, cfg.image or cfg.given, cfg.split)
            == (self.wording, self.two, self.image, self.split)
            and self.steps in (None, steps)
            and self.method in (None, series.method)
            and all(series.label.get(key) == value for key, value in self.labels.items())
        )

    def number(self, series: Series) -> Pooled | None:
        """It, over all seeds, or None if there is none of enough clips."""
        found = series.pooled(self.stage, self.metric, self.name, self.condition, self.group)
        return found if found is not None and found.n >= self.n else None


@dataclass(kw_only=True)
class Gate(Pick):
    """A target. With `reference`, what changes in the choice of the number that it is compared with."""

    label: str
    relation: str
    target: float
    reference: dict[str, Any] | None = None
    against: str = "ratio"  # to the reference, or difference

    def __post_init__(self) -> None:
        for name, legal in (("relation", RELATIONS), ("against", AGAINST)):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(legal)}")
        if self.reference is not None:
            self.other()

    def other(self) -> Pick:
        """The number that this one is compared with."""
        own = {f.name: plain(self)[f.name] for f in fields(Pick)}
        return parse({**own, **(self.reference or {})}, Pick, "reference")


@dataclass(frozen=True)
class Outcome:
    """What became of a gate; `met` is None, and `why` says so, if it was not measured."""

    gate: Gate
    value: float | None = None
    std: float | None = None  # over seeds
    n: int = 0  # clips of a seed
    seeds: tuple[int, ...] = ()
    met: bool | None = None
    why: str = ""


def outcome(gate: Gate, series: Sequence[Series]) -> Outcome:
    """The gate against what was measured. Of several fitting evaluations the one of the most clips decides.

    A reference is of as many clips, the same seeds and the same measure: Fréchet distances of unequal n, or in the
    features of different networks, do not compare.
    """
    mine = largest(s for s in series if gate.fits(s) and gate.number(s) is not None)
    if len(mine) != 1:
        return Outcome(gate, why=several(mine) if mine else NOT_MEASURED)
    number = gate.number(mine[0])
    assert number is not None
    seeds = tuple(mine[0].seeds)
    if gate.reference is None:
        return judged(gate, number.mean, number.std, number.n, seeds)
    pick = gate.other()
    pairs = [(s, found) for s in series if pick.fits(s) and (found := pick.number(s)) is not None]
    pairs = [(s, found) for s, found in pairs if found.n == number.n and tuple(s.seeds) == seeds]
    if pick.metric == gate.metric:
        own = mine[0].first.about.get(gate.metric)
        pairs = [(s, found) for s, found in pairs if s.first.about.get(gate.metric) == own]
    if len(pairs) != 1:
        return Outcome(gate, why=several([s for s, _ in pairs]) if pairs else f"reference {NOT_MEASURED}")
    return compared(gate, number, pairs[0][1], seeds)


def compared(gate: Gate, number: Pooled, other: Pooled, seeds: tuple[int, ...]) -> Outcome:
    """Means are compared; the spread is that of the seeds' own ratios or differences."""
    if gate.against == "ratio" and 0.0 in (other.mean, *other.values):
        return Outcome(gate, why="reference is 0")
    pairs = list(zip(number.values, other.values, strict=True))
    if gate.against == "ratio":
        value, each = number.mean / other.mean, [a / b for a, b in pairs]
    else:
        value, each = number.mean - other.mean, [a - b for a, b in pairs]
    return judged(gate, value, stdev(each) if len(each) > 1 else None, number.n, seeds)


def judged(gate: Gate, value: float, std: float | None, n: int, seeds: tuple[int, ...]) -> Outcome:
    return Outcome(gate, value, std, n, seeds, met=RELATIONS[gate.relation](value, gate.target))


def several(series: Sequence[Series]) -> str:
    """Why nothing is said: the gate does not tell which of these it means."""
    names = dict.fromkeys(f"{s.name}, {s.steps_text} steps" for s in series)
    return f"several measured: {'; '.join(names)}"
