"""The report of one evaluation: its numbers, its pictures, and beside it how long sampling took.

report.json has equal bytes for equal answers, whatever machine made it. Time is not like that, so it has a file of its
own, timing.json, which is no part of the artefact.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from cascade import media, store
from cascade.config import fingerprint, plain
from cascade.evaluation.exam import MADE, SHOWN, Answers, EvaluateConfig, Question, measure
from cascade.settings import StageConfig

JSON, PICTURE, TIMING = "report.json", "report.png", "timing.json"
REPORT = "report"  # kind of the artefact of the first two
STRIPS = "strips"  # pictures of the first clips alone, a file for each label of the contact sheet
LINES, FRAMES = 3, 8  # clips of a strip picture, one below the other, and the most frames of each
ARCHITECTURE = ("kind", "net", "diffusion", "sampler", "identity")  # what weights record that is no fact about them

Laps = dict[str, list[tuple[int, float]]]  # of every call of a sampler, by stage: clips, seconds


@dataclass(frozen=True)
class Row:
    """One number: the mean over `n` clips with its standard error, or a number of all of them (no error)."""

    stage: str
    metric: str
    name: str
    condition: str  # made; augment=0.1; real: other real clips in place of the made ones
    group: str
    value: float
    error: float | None
    n: int
    shape: str
    fps: float
    seed: int


@dataclass
class Report:
    """All that was found out about `subject`, and how; the last four fields are not in report.json."""

    subject: dict[str, Any]
    settings: EvaluateConfig
    rows: list[Row]
    skipped: dict[str, str]
    about: dict[str, Any]
    clips: list[dict[str, Any]]
    command: str = ""  # that makes it again, as it was typed, without `out`
    sheet: bytes = field(default=b"", repr=False)
    strips: dict[str, bytes] = field(default_factory=dict, repr=False)
    laps: Laps = field(default_factory=dict, repr=False)
    machine: str = "cpu"  # a device's name

    def tree(self) -> dict[str, Any]:
        """As plain data, without pictures and times."""
        left = ("settings", "rows", "sheet", "strips", "laps", "machine")
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left}
        return {**parts, "settings": plain(self.settings), "rows": [plain(row) for row in self.rows]}


@dataclass(kw_only=True)
class Timing:
    """How long sampling a clip took on one machine, without loading; nothing where no clip was sampled."""

    subject: str  # fingerprint of what was judged, see `subject_key`
    device: str  # its name
    threads: int  # of the processor
    batch: int  # most clips in a call
    calls: dict[str, int]  # of each stage's sampler
    seconds: dict[str, float]  # a clip, the median over the calls, by stage


def described(cfg: StageConfig, weights: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A stage in the report: settings, network calls for a clip, hash of its weights and what their `config` records.

    `facts`: such as a student's `steps` and `teacher`, and `w_range`, the guidance weights that it is told.
    """
    settings = {key: value for key, value in plain(cfg).items() if key not in ("train", "weights")}
    evaluations = cfg.sampler.evaluations(guided=cfg.w_range is None)
    facts = {key: value for key, value in config.items() if key not in ARCHITECTURE}
    return {"settings": settings, "weights": weights, "evaluations": evaluations, "facts": facts}


def subject_key(subject: Mapping[str, Any]) -> str:
    """What was judged as one hash; a label is only a name for it."""
    return fingerprint({key: value for key, value in subject.items() if key != "label"})


def timing(report: Report) -> Timing:
    """The medians of `report.laps`, to four digits."""
    seconds = {name: median(taken / clips for clips, taken in laps) for name, laps in report.laps.items() if laps}
    return Timing(
        subject=subject_key(report.subject),
        device=report.machine,
        threads=torch.get_num_threads(),
        batch=max((clips for laps in report.laps.values() for clips, _ in laps), default=0),
        calls={name: len(report.laps[name]) for name in seconds},
        seconds={name: float(f"{value:.4g}") for name, value in seconds.items()},
    )


def rows_of(answers: Answers, questions: Sequence[Question], stage: StageConfig, seed: int) -> list[Row]:
    """The numbers of one stage for each group of questions, and for all of them if there are several groups."""
    groups = sorted({question.group for question in questions}, reverse=True)
    rows = []
    for (condition, metric), values in grouped(answers).items():
        for group in groups if len(groups) == 1 else [*groups, "all"]:
            mine = torch.tensor([group in ("all", question.group) for question in questions])
            for name, value, error, n in numbers(metric, {name: answer[mine] for name, answer in values.items()}):
                rows.append(
                    Row(stage.name, metric, name, condition, group, value, error, n, str(stage.shape), stage.fps, seed)
                )
    return rows


def grouped(answers: Answers) -> dict[tuple[str, str], Answers]:
    """The values of each measure under each condition, by (condition, measure)."""
    found: dict[tuple[str, str], Answers] = {}
    for key, answer in answers.items():
        if not key.startswith("sheet/"):
            condition, metric, name = key.split("/")
            found.setdefault((condition, metric), {})[name] = answer
    return found


def numbers(metric: str, values: Answers) -> Iterator[tuple[str, float, float | None, int]]:
    """(name, value, standard error, n) of a group of clips; those that could not be judged do not count."""
    total = getattr(measure(metric), "total", None)
    if total is not None:
        bad = torch.stack([answer.isnan().view(len(answer), -1).any(1) for answer in values.values()]).any(0)
        n = int((~bad).sum())
        if n:
            found = total({name: answer[~bad] for name, answer in values.items()})
            yield from ((name, value, None, n) for name, value in found.items())
        return
    for name, answer in values.items():
        kept = answer[~answer.isnan()].double()
        if len(kept):
            error = float(kept.std() / len(kept) ** 0.5) if len(kept) > 1 else None
            yield name, float(kept.mean()), error, len(kept)


def left_out(metric: str, values: Answers) -> dict[str, Tensor]:
    """Each number of a measure over all n clips, then over all but each one of them, (1 + n,) in float64."""
    n = len(next(iter(values.values())))
    subsets = [torch.ones(n, dtype=torch.bool), *~torch.eye(n, dtype=torch.bool)]
    found = [
        {name: value for name, value, _, _ in numbers(metric, {key: answer[mask] for key, answer in values.items()})}
        for mask in subsets
    ]
    return {name: torch.tensor([one[name] for one in found], dtype=torch.float64) for name in found[0]}


def jackknife(found: Tensor) -> float:
    """The jackknife's standard error of found[0], from those without each clip (Efron & Stein 1981).

    Of a mean it is the usual one exactly; a PSNR of all clips as one, or a Fréchet distance, has no other.
    """
    without = found[1:]
    n = len(without)
    return float(((n - 1) / n * (without - without.mean()).square().sum()).sqrt())


def clips_of(answers: Answers, questions: Sequence[Question]) -> list[dict[str, Any]]:
    """For each clip its prompt and all that is a single number of it."""
    out = []
    for i, question in enumerate(questions):
        single = {key: answer[i] for key, answer in answers.items() if answer.ndim == 1}  # no features, no clips
        values = {key: float(value) for key, value in single.items() if not value.isnan()}
        out.append({"prompt": question.prompt, "copy": question.copy, "group": question.group, "values": values})
    return out


def verdict(answers: Answers, i: int, condition: str) -> str:
    parts = [f"{key.split('/')[2]} {float(answer[i]):.3g}" for key, answer in answers.items()
             if key.startswith(f"{condition}/") and answer.ndim == 1]  # fmt: skip
    return f"{condition}: {', '.join(parts)}" if parts else condition


def sheet_of(answers: Answers, questions: Sequence[Question]) -> bytes:
    """A png of the first clips: the input, what was made of it and the truth, or what was made of the prompt."""
    shown = {key.removeprefix("sheet/"): clips for key, clips in answers.items() if key.startswith("sheet/")}
    rows, words = [], []
    for i in range(min(SHOWN, len(questions))):
        for label, clips in shown.items():
            rows.append(clips[i])
            words.append(f"{questions[i].prompt} [{questions[i].group}]: {verdict(answers, i, label)}")
    return media.sheet(torch.stack(rows), words)


def strips_of(answers: Answers) -> dict[str, bytes]:
    """A png of the first LINES clips, pixel by pixel, for each label of the contact sheet: at most FRAMES frames."""
    out = {}
    for key in [key for key in answers if key.startswith("sheet/")]:
        clips = answers[key][:LINES]  # (K, 3, F, h, w)
        chosen = torch.linspace(0, clips.shape[2] - 1, min(FRAMES, clips.shape[2])).round().long()
        out[key.removeprefix("sheet/")] = media.png(clips[:, :, chosen].permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2))
    return out


def write(report: Report, out: Path) -> None:
    """report.json, report.png and strips/ in the directory `out`, and timing.json beside them.

    If no clip was sampled (all answers were there), a timing.json of the same subject stays as it is.
    """
    files = {JSON: store.canonical(report.tree()), PICTURE: picture(report)}
    files |= {f"{STRIPS}/{label}.png": data for label, data in report.strips.items()}
    store.commit_into(out, files, kind=REPORT, meta={"stages": list(report.subject["stages"])})
    taken = timing(report)
    if taken.seconds or not same_subject(out / TIMING, taken.subject):
        store.write_file(out / TIMING, store.canonical(plain(taken)))


def same_subject(path: Path, subject: str) -> bool:
    """Whether the timing in the file `path` is of that subject."""
    try:
        return bool(json.loads(path.read_bytes())["subject"] == subject)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def table(report: Report) -> str:
    """The report in a few lines of text: the last stage's numbers, and those of every stage if there are several."""
    stages = list(report.subject["stages"])
    last = [row for row in report.rows if row.stage == stages[-1]]
    lines = [f"{stages[-1]}: {last[0].shape} at {last[0].fps:g} fps, seed {last[0].seed}"] if last else []
    lines += pivot(last, lambda row: f"{row.condition}, {row.group}")
    if len(stages) > 1:
        groups = {row.group for row in report.rows}
        made = [row for row in report.rows if row.condition == MADE and (len(groups) == 1 or row.group == "all")]
        lines += ["", *pivot(made, lambda row: row.stage)]
    lines += [f"{name} is left out: {why}" for name, why in report.skipped.items()]
    return "\n".join(lines)


def pivot(rows: Sequence[Row], column: Callable[[Row], str]) -> list[str]:
    """A table with a line for each value and a column for each `column(row)`; cells are value ± error (n)."""
    heads = list(dict.fromkeys(column(row) for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        error = "" if row.error is None else f" ±{row.error:.2g}"
        cells.setdefault(f"{row.metric}.{row.name}", {})[column(row)] = f"{row.value:.4g}{error} ({row.n})"
    grid = [["", *heads], *([name, *(line.get(head, "") for head in heads)] for name, line in cells.items())]
    widths = [max(len(line[i]) for line in grid) for i in range(len(heads) + 1)]
    return ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in grid]


def picture(report: Report) -> bytes:
    """A png: bars for each measure of the last stage, and below them the contact sheet."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    rows = [row for row in report.rows if row.stage == list(report.subject["stages"])[-1]]
    several = len({row.group for row in rows}) > 1
    rows = [row for row in rows if not (several and row.group == "all")]
    metrics = list(dict.fromkeys(row.metric for row in rows))
    sheet = imread(io.BytesIO(report.sheet))
    high, bars = sheet.shape[0], 80 + 14 * max([8, *(sum(row.metric == metric for row in rows) for metric in metrics)])
    wide, dpi = max(sheet.shape[1], 560 * len(metrics)), 100  # pixels
    figure = Figure(figsize=(wide / dpi, (high + bars) / dpi), dpi=dpi)
    figure.figimage(sheet, 0, 0)
    for i, metric in enumerate(metrics):
        box = ((i + 0.53) / len(metrics), (high + 35) / (high + bars), 0.44 / len(metrics), (bars - 65) / (high + bars))
        _bars(figure.add_axes(box), metric, [row for row in rows if row.metric == metric])
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _bars(axes: Any, title: str, rows: Sequence[Row]) -> None:
    """Horizontal bars, one for each row, with its value."""
    places = range(len(rows))
    axes.barh(places, [row.value for row in rows], xerr=[row.error or 0 for row in rows], height=0.8, color="0.75")
    axes.set_yticks(places, [f"{row.name}, {row.condition}, {row.group} ({row.n})" for row in rows])
    for place, row in zip(places, rows, strict=True):
        axes.text(0.02, place, f"{row.value:.4g}", transform=axes.get_yaxis_transform(), va="center", fontsize=7)
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    axes.set_title(title, fontsize=9)
