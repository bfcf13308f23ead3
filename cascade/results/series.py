"""Evaluations read back and pooled: those that differ in nothing but the seed are one series.

What the measures say of themselves (`about`: whose features, which pixels) is no part of what was asked, so that an
evaluation by today's measures takes the place of an earlier one; but numbers of different measures are never pooled.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from cascade import store
from cascade.config import fingerprint, parse, plain
from cascade.errors import ConfigError, InputError
from cascade.evaluation.exam import MADE, EvaluateConfig
from cascade.evaluation.marks import JSON, STRIPS, TIMING, Row, Timing, subject_key
from cascade.request import take
from cascade.video import Shape

log = logging.getLogger("cascade")


# as written by `cascade evaluate` ------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class StageSubject:
    """A stage that was judged, see `cascade.evaluation.marks.described`."""

    settings: dict[str, Any]
    weights: str
    evaluations: int
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        take(take(dict(self.settings), _Shown).sampler, _Sampler)


@dataclass(kw_only=True)
class _Sampler:
    steps: int
    rule: str
    guidance: float


@dataclass(kw_only=True)
class _Shown:
    """What a page shows of a stage's settings."""

    shape: Shape
    fps: float
    augment: float
    sampler: dict[str, Any]


@dataclass(kw_only=True)
class Subject:
    """What was judged: a stage alone or a chain."""

    what: str
    stages: dict[str, StageSubject]
    label: dict[str, str]
    device: str
    dtype: str


@dataclass(kw_only=True)
class Evaluation:
    """One report.json, and what lies beside it."""

    subject: Subject
    settings: EvaluateConfig
    rows: list[Row]
    skipped: dict[str, str]
    about: dict[str, Any]
    clips: list[dict[str, Any]]
    command: str
    order: list[str] = field(init=False, default_factory=list)  # of the stages in the chain
    hash: str = field(init=False, default="")  # of its manifest
    folder: Path | None = field(init=False, default=None)
    timing: Timing | None = field(init=False, default=None)

    @property
    def key(self) -> str:
        """What all seeds of a series share. `batch` changes no result."""
        settings = {key: value for key, value in plain(self.settings).items() if key not in ("seed", "batch")}
        return fingerprint([plain(self.subject), self.order, settings])

    def strip(self, label: str) -> Path | None:
        """The picture of its first clips: made, truth, ... or None."""
        path = None if self.folder is None else self.folder / STRIPS / f"{label}.png"
        return path if path is not None and path.is_file() else None


def read(folder: Path) -> Evaluation:
    """The evaluation in a directory. InputError if it is damaged, or of another version of Cascade."""
    artefact = store.read(folder, "report")
    if JSON not in artefact.files:
        raise InputError(f"{folder}: has no {JSON}", fix="evaluate again")
    tree = store.from_json(artefact.files[JSON], folder / JSON)
    try:
        found = parse(tree, Evaluation)
        found.order = parse({"stages": artefact.meta.get("stages")}, _Order).stages
    except ConfigError as error:
        raise InputError(
            f"{folder / JSON}: is not a report of this Cascade: {error.message}", "evaluate again"
        ) from error
    if sorted(found.order) != sorted(found.subject.stages) or not found.order:
        raise InputError(f"{folder / JSON}: does not hold the stages of its manifest", fix="evaluate again")
    found.hash, found.folder = artefact.hash, folder
    found.timing = read_timing(folder / TIMING, subject_key(tree["subject"]))
    return found


@dataclass(kw_only=True)
class _Order:
    stages: list[str]


def read_timing(path: Path, subject: str) -> Timing | None:
    """How long it took, or None if that is not known: no file, no clip sampled, or another subject."""
    if not path.is_file():
        return None
    try:
        found = parse(store.from_json(path.read_bytes(), path), Timing)
    except ConfigError as error:
        raise InputError(f"{path}: {error.message}", fix="delete it") from error
    return found if found.subject == subject and found.seconds else None


def collect(root: Path, kept: Sequence[Evaluation] = ()) -> list[Evaluation]:
    """Every evaluation below `root`, in an order that does not depend on where they lie. InputError if there is none.

    One that was made twice counts once. Two of one seed that differ are told in a warning, and the first stays. Of
    those that were `kept`, the ones that are not made anew are added.
    """
    if not root.is_dir():
        raise InputError(f"runs {root}: is not a directory", fix="runs=DIR")
    folders = sorted(path.parent for path in root.rglob(JSON))
    found = [read(folder) for folder in folders if not folder.name.startswith(".")]
    if not found:
        raise InputError(f"runs {root}: holds no evaluation", fix="cascade evaluate out=DIR, then runs=DIR")
    found.sort(key=lambda e: (e.key, e.settings.seed, e.timing is None, e.hash, fingerprint([e.timing])))
    first: dict[tuple[str, int], Evaluation] = {}
    for evaluation in found:
        there = first.setdefault((evaluation.key, evaluation.settings.seed), evaluation)
        if there.rows != evaluation.rows:
            log.warning(
                "%s and %s: the same evaluation, other numbers; the first is kept", there.folder, evaluation.folder
            )
    for evaluation in kept:
        first.setdefault((evaluation.key, evaluation.settings.seed), evaluation)
    return list(first.values())


# pooled over seeds ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pooled:
    """A number over seeds: mean and standard deviation (of a sample; None for a single seed)."""

    mean: float
    std: float | None
    n: int  # clips of each seed, the fewest of all
    values: tuple[float, ...]  # a seed each

    @staticmethod
    def of(rows: Sequence[Row]) -> Pooled:
        values = [row.value for row in rows]
        std = stdev(values) if len(values) > 1 else None
        return Pooled(fmean(values), std, min(row.n for row in rows), tuple(values))


@dataclass(frozen=True)
class Series:
    """Evaluations that differ in the seed alone, by seed."""

    runs: list[Evaluation]

    @property
    def first(self) -> Evaluation:
        return self.runs[0]

    @property
    def what(self) -> str:
        return self.first.subject.what

    @property
    def stages(self) -> list[str]:
        return self.first.order

    @property
    def last(self) -> str:
        return self.stages[-1]

    @property
    def seeds(self) -> list[int]:
        return [run.settings.seed for run in self.runs]

    @property
    def settings(self) -> EvaluateConfig:
        return self.first.settings

    @property
    def label(self) -> dict[str, str]:
        return self.first.subject.label

    @property
    def steps(self) -> list[int]:
        """Of each stage's sampler."""
        return [int(self.first.subject.stages[name].settings["sampler"]["steps"]) for name in self.stages]

    @property
    def steps_text(self) -> str:
        return "+".join(map(str, self.steps))

    @property
    def evaluations(self) -> int:
        """Network calls for a clip, of all stages."""
        return sum(stage.evaluations for stage in self.first.subject.stages.values())

    @property
    def method(self) -> str:
        """How its weights came about: as labelled, else as they record it.

        Weights that name a teacher but no method are a `student`, weights that name none a `teacher`.
        """
        if "method" in self.label:
            return self.label["method"]
        facts = [self.first.subject.stages[name].facts for name in self.stages]
        found = {str(f.get("method") or ("student" if "teacher" in f else "teacher")) for f in facts}
        return found.pop() if len(found) == 1 else "mixed"

    @property
    def name(self) -> str:
        """The method and all other labels."""
        return ", ".join([self.method, *(f"{k} {v}" for k, v in sorted(self.label.items()) if k != "method")])

    @property
    def exam(self) -> tuple[str, float, str, bool]:
        """What kind of questions were asked: wording, share of two things, split, a part of the video given."""
        cfg = self.settings
        return cfg.wording, cfg.two, cfg.split, cfg.image or cfg.given

    def condition(self, stage: str) -> str:
        """The condition in which the stage is used: what it made, at its own augmentation level."""
        if any(row.condition == MADE for row in self.first.rows):
            return MADE
        return f"augment={self.first.subject.stages[stage].settings['augment']:g}"

    def pooled(self, stage: str, metric: str, name: str, condition: str, group: str) -> Pooled | None:
        """A number over all seeds, or None if a seed lacks it. `all` is also the one group of a split."""
        key = (stage, metric, name, condition)
        picked = []
        for run in self.runs:
            rows = [row for row in run.rows if (row.stage, row.metric, row.name, row.condition) == key]
            exact = [row for row in rows if row.group == group or (group == "all" and len(rows) == 1)]
            if len(exact) != 1:
                return None
            picked.append(exact[0])
        return Pooled.of(picked)

    def seconds(self, stages: Sequence[str] | None = None) -> dict[str, float]:
        """Sampling time of a clip by device, the median over seeds, of those runs that timed all of the stages."""
        wanted = self.stages if stages is None else stages
        taken: dict[str, list[float]] = {}
        for run in self.runs:
            timing = run.timing
            if timing is not None and set(wanted) <= set(timing.seconds):
                threads = f", {timing.threads} thread{'s' * (timing.threads > 1)}" if timing.device == "cpu" else ""
                taken.setdefault(timing.device + threads, []).append(sum(timing.seconds[name] for name in wanted))
        return {device: median(values) for device, values in sorted(taken.items())}


def pool(evaluations: Iterable[Evaluation]) -> list[Series]:
    """Series in the order of a table: what, stage, kind of questions, method, steps falling, most clips first."""
    ordered = sorted(evaluations, key=lambda e: (e.key, fingerprint(e.about), e.settings.seed))
    series = [Series(list(runs)) for _, runs in groupby(ordered, key=lambda e: (e.key, fingerprint(e.about)))]
    return sorted(
        series,
        key=lambda s: (
            s.what, s.stages, s.exam, s.name, [-n for n in s.steps], -s.settings.n * len(s.runs), s.first.key,
            fingerprint(s.first.about),
        ),
    )  # fmt: skip


def largest(series: Iterable[Series]) -> list[Series]:
    """Those of the most clips over all seeds."""
    found = list(series)
    most = max((s.settings.n * len(s.runs) for s in found), default=0)
    return [s for s in found if s.settings.n * len(s.runs) == most]
