"""Judges a stage alone, or a whole chain, by the measures in cascade/metrics; one JSON and one picture each.

A measure is a module there. Its `judge` says by the names of its parameters what it needs (the fields of `Case`) and
returns a value for each clip, (B,), NaN where it cannot tell; they are averaged, unless the module has a
`total(values)` that makes numbers of the values (n, ...) of all clips. Its `about()`, if any, goes into the report.
One that needs what may not be on this machine has an `absent()`, which says what is missing, or nothing.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cascade import attention, media, store
from cascade.config import fingerprint, locate, package_root, parse, plain, suggest
from cascade.data import captions
from cascade.data.captions import Spec
from cascade.data.shapes import draw_scene, draw_spec, numpy_generator, render
from cascade.data.source import DataConfig, Source, World, open_source
from cascade.errors import ConfigError
from cascade.noise import Noise, generator, sample_id
from cascade.pipeline import VIDEO, Chain, Device, Progress, Runner, load_stage, precision, read_clip
from cascade.request import bars, jobs_of, take
from cascade.stage import Rule, Stage, StageConfig
from cascade.text import Text, text_source
from cascade.video import Shape, Video

if TYPE_CHECKING:
    from cascade.tasks import Request

SPLITS = ("train", "held_out")
WORDINGS = ("plain", "trained", "unseen")
SHOWN = 6  # clips on the contact sheet
MADE, REAL = "made", "real"

Answers = dict[str, Tensor]  # "condition/measure/value" -> a value for each clip; "sheet/..." -> clips to show


@dataclass(kw_only=True)
class EvaluateConfig:
    """What is judged. Every clip and every sample follows from the seed and its number alone."""

    n: int = 64  # clips
    seed: int = 0  # of the clips and of the sampling noise
    metrics: list[str] | None = None  # modules of cascade/metrics; None: those that the kind of stage names
    batch: int = 4  # clips at once in memory
    split: str = "all"  # compositions: train, held_out (kept out of training), or all: both in turn
    two: float = 0.0  # share of clips with two things
    wording: str = "plain"  # of the prompts: plain, trained (any wording of training), unseen (wordings never trained)
    image: bool = False  # a stage that starts from text alone gets the first frame of a real clip as well

    def __post_init__(self) -> None:
        for name, low, high in (("n", 1, 10**6), ("batch", 1, 10**4), ("two", 0, 1), ("seed", 0, 2**62)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {low} to {high}")
        for name, legal in (("split", (*SPLITS, "all")), ("wording", WORDINGS)):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(legal)}")


@dataclass
class Case:
    """What a measure may ask for, by the name of a parameter of its `judge`; None: there is no such thing."""

    frames: Tensor  # (B, 3, F, H, W) in [-1, 1], what is judged
    truth: Tensor  # (B, 3, F, H, W), real clips: those that the input comes from, or others of the same prompts
    rate: int = 1  # output frames for each input frame
    low: Tensor | None = None  # (B, 3, f, h, w), the input
    given: Tensor | None = None  # (B, 3, F, H, W), the input at the size of the output
    known: Tensor | None = None  # (B, F), frames of `given` that have to come out as they are
    specs: list[Spec] | None = None  # what the prompts say
    borders: list[int] | None = None  # frames at which a window begins, or before which one ends


ABSENT = {
    "low": "the stage has no video as its input",
    "given": "the stage has no video as its input",
    "known": "the stage has no video as its input",
    "borders": "the stage works on all frames at once, without windows",
    "specs": "what these clips show is not known, only their captions",
}


# measures ------------------------------------------------------------------------------------------------------------


def measures() -> list[str]:
    """The names of all measures: the modules of cascade/metrics that have a `judge`."""
    files = (package_root() / "cascade" / "metrics").glob("*.py")
    return sorted(file.stem for file in files if "\ndef judge(" in file.read_text(encoding="utf-8"))


def measure(name: str) -> ModuleType:
    """The measure `name`. Raises ConfigError naming those that there are."""
    if name not in measures():
        raise ConfigError(f"metrics names {name!r}, which is no measure", fix=suggest(name, measures(), "metrics="))
    return import_module(f"cascade.metrics.{name}")


def absent(name: str) -> str:
    """What the measure needs and this machine does not have, or nothing."""
    return str(measure(name).absent()) if hasattr(measure(name), "absent") else ""


def lacking(name: str, case: Case) -> str:
    """Why `case` cannot be judged by the measure, or nothing."""
    needs = inspect.signature(measure(name).judge).parameters
    return absent(name) or next((ABSENT[need] for need in needs if getattr(case, need) is None), "")


def judged(name: str, case: Case, condition: str) -> Answers:
    """The answers of one measure on a few clips."""
    judge = measure(name).judge
    values: Answers = judge(**{need: getattr(case, need) for need in inspect.signature(judge).parameters})
    return {f"{condition}/{name}/{value}": answer.float() for value, answer in values.items()}


# what is asked -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A prompt and where it comes from: `group` is one of SPLITS, or `clips` for videos of the user."""

    number: int
    prompt: str
    copy: int
    group: str
    spec: Spec | None


@dataclass(frozen=True)
class Exam:
    """The prompts that a source asks and real clips for each, the same at every size and frame rate."""

    source: Source
    cfg: EvaluateConfig

    def questions(self, shape: Shape, fps: float) -> list[Question]:
        """`n` of them; a prompt that comes again is asked for as another copy."""
        seen: dict[str, int] = {}
        out = []
        for i in range(self.cfg.n):
            prompt, group, spec = self._question(i, shape, fps)
            seen[prompt] = seen.get(prompt, -1) + 1
            out.append(Question(i, prompt, seen[prompt], group, spec))
        return out

    def _question(self, i: int, shape: Shape, fps: float) -> tuple[str, str, Spec | None]:
        cfg = self.cfg
        if not isinstance(self.source, World):
            return self.source.sample(shape, fps, "evaluate", cfg.seed, i)[1], "clips", None
        split = SPLITS[i % 2] if cfg.split == "all" else cfg.split
        rng = numpy_generator("evaluate", cfg.seed, split, i)
        spec = draw_spec(rng, cfg.two, split)
        if cfg.wording == "plain":
            return captions.plain(spec), split, spec
        return captions.say(spec, rng, unseen=cfg.wording == "unseen"), split, spec

    def films(self, questions: Sequence[Question], shape: Shape, fps: float, which: str = "truth") -> Tensor:
        """A real clip (B, 3, F, H, W) of each question; another `which` is another clip."""
        return torch.stack([self._film(question, shape, fps, which) for question in questions])

    def _film(self, question: Question, shape: Shape, fps: float, which: str) -> Tensor:
        key = ("evaluate", self.cfg.seed, question.number)
        if not isinstance(self.source, World) or question.spec is None:
            return self.source.sample(shape, fps, *key, *(() if which == "truth" else (which,)))[0]
        scene = draw_scene(question.spec, numpy_generator(*key, which), self.source.cfg.seconds)
        frames = render(scene, shape.frames, shape.height, shape.width, fps)
        return torch.from_numpy(frames).permute(3, 0, 1, 2).contiguous()


# the report ----------------------------------------------------------------------------------------------------------


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
    """All that was found out about `subject`, and how."""

    subject: dict[str, Any]
    settings: EvaluateConfig
    rows: list[Row]
    skipped: dict[str, str]
    about: dict[str, Any]
    clips: list[dict[str, Any]]
    sheet: bytes = field(repr=False)

    def tree(self) -> dict[str, Any]:
        """As plain data, without the picture."""
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("sheet", "rows", "settings")}
        return {**parts, "settings": plain(self.settings), "rows": [plain(row) for row in self.rows]}


def rows_of(answers: Answers, questions: Sequence[Question], stage: StageConfig, seed: int) -> list[Row]:
    """The numbers of one stage for each group of questions, and for all of them if there are several groups."""
    groups = sorted({question.group for question in questions}, reverse=True)
    found: dict[tuple[str, str], Answers] = {}
    for key, answer in answers.items():
        if not key.startswith("sheet/"):
            condition, metric, name = key.split("/")
            found.setdefault((condition, metric), {})[name] = answer
    rows = []
    for (condition, metric), values in found.items():
        for group in groups if len(groups) == 1 else [*groups, "all"]:
            mine = torch.tensor([group in ("all", question.group) for question in questions])
            for name, value, error, n in numbers(metric, {name: answer[mine] for name, answer in values.items()}):
                rows.append(
                    Row(stage.name, metric, name, condition, group, value, error, n, str(stage.shape), stage.fps, seed)
                )
    return rows


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


def write(report: Report, out: Path) -> None:
    """report.json and report.png in the directory `out`."""
    files = {"report.json": store.canonical(report.tree()), "report.png": picture(report)}
    store.commit_into(out, files, kind="report", meta={"stages": list(report.subject["stages"])})


def table(report: Report) -> str:
    """The report in a few lines of text: the last stage's numbers, and those of every stage if there are several."""
    stages = list(report.subject["stages"])
    last = [row for row in report.rows if row.stage == stages[-1]]
    lines = [f"{stages[-1]}: {last[0].shape} at {last[0].fps:g} fps, seed {last[0].seed}"] if last else []
    lines += pivot(last, lambda row: f"{row.condition}, {row.group}")
    if len(stages) > 1:
        whole = "all" if len({row.group for row in last}) > 1 else last[0].group
        made = [row for row in report.rows if (row.condition, row.group) == (MADE, whole)]
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


# one stage -----------------------------------------------------------------------------------------------------------


def judge_stage(
    stage: Stage,
    source: Source,
    encode: Callable[[list[str]], Text],
    cfg: EvaluateConfig,
    *,
    weights: str = "",
    work: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Judges a stage alone, on real clips that it was not trained on.

    A stage that takes a video gets real clips degraded by its own rule, and is judged without and with its noise
    conditioning augmentation (conditions `augment=...`). A stage that starts from text gets the prompts, and is set
    beside other real clips of the same prompts (condition `real`). `weights` is their hash, for the report; with `work`
    the answers are kept there as they come, and a run that was cut short goes on (one directory, one setting).
    """
    exam, shape, fps = Exam(source, cfg), stage.cfg.shape, stage.cfg.fps
    names = cfg.metrics if cfg.metrics is not None else list(stage.rule.METRICS)
    questions = exam.questions(shape, fps)
    variants = variants_of(stage)
    total = cfg.n * stage.cfg.sampler.steps * len(variants)
    parts: list[Answers] = []
    skipped: dict[str, str] = {}
    for first in range(0, cfg.n, cfg.batch):
        group = questions[first : first + cfg.batch]
        file = None if work is None else work / f"{first:06d}-{len(group)}.safetensors"
        if file is not None and file.is_file() and not store.problems(file, "answers"):
            artefact = store.read(file, "answers")
            parts.append(store.bytes_to_tensors(artefact.files[file.name], str(file)))
            skipped = artefact.meta["skipped"]
            continue
        done = first * stage.cfg.sampler.steps * len(variants)

        def tick(step: int, done: int = done, size: int = len(group)) -> None:
            if progress is not None:
                progress(stage.cfg.name, done + step * size, total)

        answers, skipped = answer(exam, variants, group, encode, names, tick)
        parts.append(answers)
        if file is not None:
            store.commit_file(file, store.tensors_to_bytes(answers), kind="answers", meta={"skipped": skipped})
    found = joined(parts)
    rows = rows_of(found, questions, stage.cfg, cfg.seed)
    subject = {"what": "stage", "stages": {stage.cfg.name: described(stage.cfg, weights)}}
    return Report(subject, cfg, rows, skipped, about(names), clips_of(found, questions), sheet_of(found, questions))


def variants_of(stage: Stage) -> dict[str, Stage]:
    """The stage as it is judged, by condition: without and with noise on its input, if it takes a video."""
    try:
        stage.rule.output(None, stage.cfg)
    except ConfigError:
        levels = sorted({0.0, stage.cfg.augment})
        variants = {f"augment={level:g}": copy(stage) for level in levels}
        for variant, level in zip(variants.values(), levels, strict=True):
            variant.cfg = replace(stage.cfg, augment=level)
        return variants
    return {MADE: stage}


def answer(
    exam: Exam,
    variants: dict[str, Stage],
    questions: Sequence[Question],
    encode: Callable[[list[str]], Text],
    names: Sequence[str],
    tick: Callable[[int], None],
) -> tuple[Answers, dict[str, str]]:
    """The answers of all conditions on a few questions, and which measures could not be asked, and why."""
    stage = next(iter(variants.values()))
    cfg, rule, seed = stage.cfg, stage.rule, exam.cfg.seed
    truth = exam.films(questions, cfg.shape, cfg.fps)
    case = Case(truth, truth, rate=rule.rate(cfg), specs=known_specs(questions), borders=borders(stage.cfg, rule))
    low = None
    if MADE not in variants:
        low = degraded(stage, truth, questions, seed)
        case.low = low.frames
    elif exam.cfg.image:
        first = torch.arange(cfg.shape.frames) < 1
        low = Video(truth[:, :, :1].expand_as(truth), cfg.fps, first.expand(len(truth), -1))
    if low is not None:
        case.given, mask = rule.condition(low, cfg, cfg.shape)
        case.known = (mask[:, 0, :, 0, 0] > 0) & rule.KEEPS_KNOWN
    skipped = {name: why for name in names if (why := lacking(name, case))}
    asked = [name for name in names if name not in skipped]
    shown = [i for i, question in enumerate(questions) if question.number < SHOWN]
    span = slice(None) if case.rate == 1 else slice(0, 8)  # neighbours: of frames far apart all may be given ones
    answers: Answers = {} if case.low is None or case.given is None else {"sheet/input": case.given[shown, :, span]}
    noise = Noise(seed, cfg.name, tuple(sample_id(question.prompt, question.copy) for question in questions))
    text = encode([question.prompt for question in questions])
    for turn, (condition, variant) in enumerate(variants.items()):
        case.frames = variant.sample(low, text, None, noise, partial(_from, tick, turn * cfg.sampler.steps)).frames
        for name in asked:
            answers |= judged(name, case, condition)
        answers[f"sheet/{condition}"] = case.frames[shown, :, span]
    if case.low is None:
        case.frames = exam.films(questions, cfg.shape, cfg.fps, REAL)
        for name in asked:
            answers |= judged(name, case, REAL)
    else:
        answers["sheet/truth"] = truth[shown, :, span]
    return answers, skipped


def degraded(stage: Stage, truth: Tensor, questions: Sequence[Question], seed: int) -> Video:
    """What the stage before would have made of each real clip, whatever clips stand beside it."""
    lows = []
    for clip, question in zip(truth, questions, strict=True):
        rng = generator("degrade", seed, question.number)
        low = stage.rule.degrade(Video(clip[None], stage.cfg.fps), stage.cfg, rng)
        assert low is not None, f"{stage.cfg.kind}: takes a video, but degrade gives none"
        lows.append(low)
    return Video(torch.cat([low.frames for low in lows]), lows[0].fps)


def _from(tick: Callable[[int], None], start: int, step: int) -> None:
    tick(start + step)


def borders(stage: StageConfig, rule: Rule) -> list[int] | None:
    return stage.windows.borders(stage.shape.frames, rule.rate(stage)) or None


def known_specs(questions: Sequence[Question]) -> list[Spec] | None:
    specs = [question.spec for question in questions if question.spec is not None]
    return specs if len(specs) == len(questions) else None


def joined(parts: Sequence[Answers]) -> Answers:
    keys = sorted(parts[0], key=lambda key: key.split("/"))
    return {key: torch.cat([part[key] for part in parts]) for key in keys}


def about(names: Sequence[str]) -> dict[str, Any]:
    """What the measures that can be asked here say of themselves."""
    return {name: measure(name).about() for name in names if hasattr(measure(name), "about") and not absent(name)}


def described(cfg: Any, weights: str) -> dict[str, Any]:
    """A stage in the report: its settings and the hash of its weights."""
    settings = {key: value for key, value in plain(cfg).items() if key not in ("train", "weights")}
    return {"settings": settings, "weights": weights}


def stage_task(ask: Request) -> None:
    """`task=evaluate`: judges the stage; report.json and report.png in `out`, and a table on stdout."""
    cfg = parse({"seed": ask.run.seed, **ask.own.get("evaluate", {})}, EvaluateConfig, "evaluate")
    names = list(cfg.metrics or ask.rule.METRICS)
    for name in names:
        measure(name)
    out = ask.out("evaluate")
    stage, weights = load_stage(ask.cfg, ask.rule, ask.on.torch)
    encoder = text_source(ask.text)
    parts = [plain(part) for part in (stage.cfg, cfg, ask.on, ask.data)]
    for part, name in ((parts[0], "train"), (parts[0], "weights"), (parts[1], "n")):
        del part[name]  # none of them changes an answer
    work = None  # the user's own files may change under the same settings
    if ask.data.clips is None:
        work = out / "answers" / fingerprint([parts, weights, encoder.fingerprint, about(names)])[:16]
    with store.lock(out), bars() as progress, attention.use(ask.on.attention), precision(ask.on):
        source = open_source(ask.data, ask.cfg.shape, ask.cfg.fps, out / "clips")
        report = judge_stage(stage, source, encoder.encode, cfg, weights=weights, work=work, progress=progress)
        write(report, out)
    print(table(report))
    print(out / "report.png")


# a chain -------------------------------------------------------------------------------------------------------------


def judge_chain(runner: Runner, source: Source, cfg: EvaluateConfig, out: Path) -> Report:
    """Judges a whole chain by the measures of its first stage, which starts from text; every stage's clips apart.

    The clips are a chain's ordinary artefacts below `out`/videos, so that a run that was cut short goes on.
    """
    chain, exam = runner.chain, Exam(source, cfg)
    if cfg.image:
        raise ConfigError("image is for a stage alone", fix="python -m stages.base task=evaluate evaluate.image=true")
    last = chain.stages[-1]
    names = cfg.metrics if cfg.metrics is not None else list(chain.rules[0].METRICS)
    stages = {stage.name: described(stage, weights_of(stage)) for stage in chain.stages}
    questions = exam.questions(last.shape, last.fps)
    jobs = jobs_of([question.prompt for question in questions], 1, out / "videos")
    runner.run(jobs, None)
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    for stage, rule in zip(chain.stages, chain.rules, strict=True):
        parts = []
        for first in range(0, cfg.n, cfg.batch):
            group = questions[first : first + cfg.batch]
            files = [jobs[question.number].directory / "stages" / stage.name for question in group]
            frames = torch.cat([read_clip(store.read(f, "stage").files[VIDEO], str(f)).frames for f in files])
            truth = exam.films(group, stage.shape, stage.fps)
            case = Case(frames, truth, rule.rate(stage), specs=known_specs(group), borders=borders(stage, rule))
            skipped = {name: why for name in names if (why := lacking(name, case))}
            answers = {"sheet/made": frames[[i for i, question in enumerate(group) if question.number < SHOWN]]}
            others = replace(case, frames=exam.films(group, stage.shape, stage.fps, REAL))
            for name in [name for name in names if name not in skipped]:
                answers |= judged(name, case, MADE) | judged(name, others, REAL)
            parts.append(answers)
            if runner.progress is not None:
                runner.progress(f"judge {stage.name}", first + len(group), cfg.n)
        found = joined(parts)
        rows += rows_of(found, questions, stage, cfg.seed)
    subject = {"what": "chain", "stages": stages}
    return Report(subject, cfg, rows, skipped, about(names), clips_of(found, questions), sheet_of(found, questions))


def weights_of(stage: StageConfig) -> str:
    """The hash of a stage's weights, whose files are all read for it: before any of them is used."""
    if stage.weights is None:
        raise ConfigError(f"{stage.name} has no weights", fix=f"{stage.name}.weights=DIRECTORY")
    return store.read(locate(stage.weights), "weights").hash


def chain_verb(tree: dict[str, Any]) -> None:
    """`cascade evaluate`: judges a chain; report.json and report.png in `out`, and a table on stdout."""
    cfg, on = take(tree, EvaluateConfig), take(tree, Device)
    data = parse(tree.pop("data", {}), DataConfig, "data")
    given = tree.pop("out", None)
    chain = Chain.read(tree, ["out", "data", *(f.name for cls in (EvaluateConfig, Device) for f in fields(cls))])
    for name in cfg.metrics or chain.rules[0].METRICS:
        measure(name)
    chain.rules[0].output(None, chain.stages[0])
    on.torch  # noqa: B018  no such device: before anything loads
    for stage in chain.stages:
        weights_of(stage)
    parts = [plain(part) for part in (*chain.stages, cfg, on, data, chain.text)]
    out = Path(given) if given else Path("runs") / f"evaluate-{fingerprint(parts)[:12]}"
    last = chain.stages[-1]
    with store.lock(out), bars() as progress:
        runner = Runner(chain, text_source(chain.text), on, cfg.seed, None, progress)
        source = open_source(data, last.shape, last.fps, out / "clips")
        report = judge_chain(runner, source, cfg, out)
        write(report, out)
    print(table(report))
    print(out / "report.png")
