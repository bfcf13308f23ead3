"""results.json: everything that was measured, as plain data; read back, it takes the place of the evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade import store
from cascade.config import parse, plain
from cascade.errors import ConfigError, InputError
from cascade.evaluation.exam import EvaluateConfig
from cascade.evaluation.marks import Row, Timing, subject_key
from cascade.results.gates import Outcome
from cascade.results.series import Evaluation, Series, StageSubject, Subject
from cascade.video import Shape

FORMAT = 2


# written -------------------------------------------------------------------------------------------------------------


def results(series: Sequence[Series], gates: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "gates": [plain(found) for found in gates],
        "series": [series_tree(s) for s in series],
    }


def series_tree(series: Series) -> dict[str, Any]:
    """What its evaluations share, what each was and took, and every number pooled over the seeds."""
    settings = {key: value for key, value in plain(series.settings).items() if key not in ("seed", "batch", "label")}
    subject = plain(series.first.subject)
    stages = subject.pop("stages")
    return {
        **subject,
        "method": series.method,
        "questions": settings,
        "order": series.stages,
        "stages": {name: stages[name] | measured(series, name) for name in series.stages},
        "seeds": series.seeds,
        "runs": [run_tree(run) for run in series.runs],
        "skipped": series.first.skipped,
        "about": series.first.about,
    }


def measured(series: Series, stage: str) -> dict[str, Any]:
    return {"seconds": series.seconds([stage]) or None, "numbers": list(number_trees(series, stage))}


def number_trees(series: Series, stage: str) -> Iterator[dict[str, Any]]:
    """One for each measure, condition and group, in the order of the first evaluation."""
    for row in series.first.rows:
        if row.stage == stage:
            found = [next((r for r in run.rows if key_of(r) == key_of(row)), None) for run in series.runs]
            pooled = series.pooled(stage, row.metric, row.name, row.condition, row.group)
            yield {
                "metric": row.metric,
                "name": row.name,
                "condition": row.condition,
                "group": row.group,
                "mean": None if pooled is None else pooled.mean,
                "std": None if pooled is None else pooled.std,
                "values": [
                    {"seed": r.seed, "n": r.n, "value": r.value, "error": r.error} for r in found if r is not None
                ],
            }


def key_of(row: Row) -> tuple[str, str, str, str, str]:
    return row.stage, row.metric, row.name, row.condition, row.group


def run_tree(run: Evaluation) -> dict[str, Any]:
    """One evaluation: the command that makes it again, and what it took."""
    timing = None
    if run.timing is not None:
        timing = {key: value for key, value in plain(run.timing).items() if key != "subject"}
    return {"seed": run.settings.seed, "command": run.command, "report": run.hash, "timing": timing}


# read back -----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Value:
    seed: int
    n: int
    value: float
    error: float | None


@dataclass(kw_only=True)
class _Number:
    metric: str
    name: str
    condition: str
    group: str
    mean: float | None
    std: float | None
    values: list[_Value]


@dataclass(kw_only=True)
class _Stage(StageSubject):
    seconds: dict[str, float] | None
    numbers: list[_Number]


@dataclass(kw_only=True)
class _Run:
    seed: int
    command: str
    report: str
    timing: dict[str, Any] | None


@dataclass(kw_only=True)
class _Series:
    what: str
    label: dict[str, str]
    device: str
    dtype: str
    method: str
    questions: dict[str, Any]
    order: list[str]
    stages: dict[str, _Stage]
    seeds: list[int]
    runs: list[_Run]
    skipped: dict[str, str]
    about: dict[str, Any]


@dataclass(kw_only=True)
class _Results:
    format: int
    gates: list[dict[str, Any]]
    series: list[_Series]


def is_results(data: bytes) -> bool:
    """Whether a file is a results.json, of whatever format."""
    try:
        return {"format", "series"} <= store.from_json(data, Path("results.json")).keys()
    except InputError:
        return False


def read_back(path: Path) -> list[Evaluation]:
    """The evaluations that a results.json is of, without their clips. InputError if it is none or of another format."""
    try:
        tree = store.from_json(path.read_bytes(), path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", fix="kept=FILE, a results.json") from error
    if tree.get("format") != FORMAT:
        raise InputError(f"{path}: format is {tree.get('format')!r}, this Cascade reads {FORMAT}", fix="evaluate again")
    try:
        found = parse(tree, _Results)
        return [_evaluation(series, run) for series in found.series for run in series.runs]
    except ConfigError as error:
        raise InputError(f"{path}: is no results.json of this Cascade: {error.message}", "evaluate again") from error


def _evaluation(series: _Series, run: _Run) -> Evaluation:
    stages = {
        name: StageSubject(settings=s.settings, weights=s.weights, evaluations=s.evaluations, facts=s.facts)
        for name, s in series.stages.items()
    }
    subject = Subject(what=series.what, stages=stages, label=series.label, device=series.device, dtype=series.dtype)
    found = Evaluation(
        subject=subject,
        settings=parse(series.questions | {"seed": run.seed, "label": series.label}, EvaluateConfig),
        rows=[row for name in series.order for row in _rows(name, series.stages[name], run.seed)],
        skipped=series.skipped,
        about=series.about,
        clips=[],
        command=run.command,
    )
    found.order, found.hash = series.order, run.report
    if run.timing is not None:
        found.timing = parse(run.timing | {"subject": subject_key(plain(subject))}, Timing)
    return found


def _rows(name: str, stage: _Stage, seed: int) -> Iterator[Row]:
    shape, fps = str(parse(stage.settings["shape"], Shape)), float(stage.settings["fps"])
    for number in stage.numbers:
        for v in number.values:
            if v.seed == seed:
                yield Row(
                    name, number.metric, number.name, number.condition, number.group, v.value, v.error, v.n, shape, fps,
                    seed,
                )  # fmt: skip
