"""results.md: the results of all evaluations for people. Nothing is said that was not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cascade.evaluation.exam import REAL, SPLITS
from cascade.results.gates import NOT_MEASURED, Outcome
from cascade.results.plots import Column, clips, curves, lines
from cascade.results.series import Pooled, Series, largest

Exam = tuple[str, float, str, bool]
PLAIN: Exam = ("plain", 0.0, "all", False)  # the kind of questions that curves and clips are of
CHAIN = "chain"
GAP = "gap"  # the label of evaluations with and without training for the gap between a cascade's stages
ARROWS = {"higher": "↑", "lower": "↓"}
HEAD = "# Results\n\nWritten by `cascade report`"  # which tells a page of ours
INTRODUCTION = f"""\
{HEAD} from the evaluations whose commands stand at the end. Every number with all that it depends
on is in [results.json](results.json). "±" is the standard deviation over seeds; one seed has none. "a / b" are
compositions of attributes that training has seen, and others. Steps are the sampler's, calls the network evaluations of
a clip (steps x guidance branches). Seconds are sampling alone, a clip, without loading. A Fréchet distance (FVD) is
biased by n: compare those of equal n only.
"""


@dataclass(kw_only=True)
class Layout:
    """What the page shows, and in which order."""

    stages: list[str]
    columns: list[Column]
    expected: dict[str, list[int]] = field(default_factory=dict)  # steps of each method that should be measured


# sections ------------------------------------------------------------------------------------------------------------


def page(series: Sequence[Series], gates: Sequence[Outcome], layout: Layout, shown: set[str], notes: str) -> str:
    """The whole page; `shown` names the pictures that there are."""
    parts = [INTRODUCTION, "## Gates", gate_table(gates)]
    for stage in stage_names(series, layout):
        parts += [f"## {stage}", *section(alone(series, stage), stage, layout, shown, stage)]
    parts += ["## The whole chain"]
    chains = chain_groups(series)
    parts += [] if chains else [f"{NOT_MEASURED.capitalize()}."]
    for slug, mine in chains.items():
        parts.append(f"{' → '.join(mine[0].stages)}; what the last stage shows:")
        parts += section(mine, mine[0].last, layout, shown, slug)
        for exam, same in by_exam(mine).items():
            parts += [f"After every stage of the chain. {asked(exam)}:", stage_table(same, layout)]
    parts += ["## With and without cascade-gap training", gap_table(series, layout)]
    parts += ["## What still goes wrong", notes.strip() or "Nothing is written yet."]
    parts += ["## Commands", commands(series)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def pictures(series: Sequence[Series], layout: Layout, before: Mapping[str, bytes]) -> dict[str, bytes]:
    """Curves and clips of every stage and chain, by file name.

    Clips of evaluations that no longer lie anywhere cannot be shown anew: their picture stays as it was `before`,
    unless those of several methods are at hand.
    """
    groups = {stage: (alone(series, stage), stage) for stage in stage_names(series, layout)}
    groups |= {slug: (mine, mine[0].last) for slug, mine in chain_groups(series).items()}
    out = {}
    for slug, (mine, stage) in groups.items():
        usual = [s for s in mine if s.exam == PLAIN]
        title = f"{stage} alone" if slug == stage else "the whole chain"
        gone, there = ({s.name for s in usual for run in s.runs if (run.folder is None) is no} for no in (True, False))
        shown = before.get(f"{slug}-clips.png") if gone and len(there) < 2 else None
        for name, data in (("curves", curves(usual, layout.columns, title)), ("clips", shown or clips(usual, stage))):
            if data is not None:
                out[f"{slug}-{name}.png"] = data
    return out


def stage_names(series: Sequence[Series], layout: Layout) -> list[str]:
    found = {s.last for s in series if s.what != CHAIN}
    return [*layout.stages, *sorted(found - set(layout.stages))]


def alone(series: Sequence[Series], stage: str) -> list[Series]:
    return [s for s in series if s.what != CHAIN and s.last == stage]


def chain_groups(series: Sequence[Series]) -> dict[str, list[Series]]:
    """The evaluations of each chain by a name for its pictures; chains of the same stages stand together."""
    groups: dict[str, list[Series]] = {}
    for s in series:
        if s.what == CHAIN:
            groups.setdefault(f"{CHAIN}-{'-'.join(s.stages)}", []).append(s)
    return {CHAIN: next(iter(groups.values()))} if len(groups) == 1 else groups


def section(mine: Sequence[Series], stage: str, layout: Layout, shown: set[str], slug: str) -> list[str]:
    """Tables, one for each kind of questions, then the pictures."""
    if not mine:
        return [f"{NOT_MEASURED.capitalize()}."]
    parts = []
    for exam, same in by_exam(mine).items():
        parts += [f"{asked(exam)}:", quality_table(same, stage, layout.columns)]
    if slug == stage:
        parts.append(missing([s for s in mine if s.exam == PLAIN], layout))
    for name, alt in (("curves", "quality against steps"), ("clips", "clips of the same prompts")):
        if f"{slug}-{name}.png" in shown:
            parts.append(f"![{slug}: {alt}](results/{slug}-{name}.png)")
    return [part for part in parts if part]


def by_exam(mine: Sequence[Series]) -> dict[Exam, list[Series]]:
    """By the kind of questions, the plain ones first."""
    exams = sorted({s.exam for s in mine}, key=lambda exam: (exam != PLAIN, exam))
    return {exam: [s for s in mine if s.exam == exam] for exam in exams}


def asked(exam: Exam) -> str:
    """The kind of questions in words."""
    wording, two, split, given = exam
    things = "one thing a clip" if two == 0 else f"two things in {two:.0%} of the clips"
    compositions = {"all": "seen and unseen compositions", "train": "seen compositions"}.get(
        split, "unseen compositions"
    )
    return f"{wording.capitalize()} wording, {things}, {compositions}{', a part of the video given' if given else ''}"


def missing(mine: Sequence[Series], layout: Layout) -> str:
    """What the table should hold and does not."""
    there = {(s.method, sum(s.steps)) for s in mine}
    words = []
    for method, steps in layout.expected.items():
        lacking = [str(step) for step in steps if (method, step) not in there]
        words += [f"{method} at {', '.join(lacking)}"] if lacking else []
    return f"{NOT_MEASURED.capitalize()}: {'; '.join(words)} steps." if words else ""


# tables --------------------------------------------------------------------------------------------------------------


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def said(number: Pooled | None) -> str:
    if number is None:
        return NOT_MEASURED
    return f"{number.mean:.3g}" + ("" if number.std is None else f" ±{number.std:.2g}")


def cell(column: Column, series: Series, stage: str, condition: str | None = None) -> str:
    """The numbers of all groups of a column; one where the questions are all of one group."""
    found = [column.number(series, stage, group, condition) for group in column.groups]
    if not any(found):
        found = [column.number(series, stage, "all", condition)]
    return " / ".join(said(number) for number in found)


def useful(columns: Sequence[Column], pairs: Sequence[tuple[Series, str]]) -> list[Column]:
    """The columns in which at least one number stands."""
    return [c for c in columns if any(c.number(s, stage, g) for s, stage in pairs for g in (*c.groups, "all", *SPLITS))]


def heads(columns: Sequence[Column]) -> list[str]:
    return [f"{c.title}{f', {c.unit}' if c.unit else ''} {ARROWS[c.better]}" for c in columns]


def quality_table(mine: Sequence[Series], stage: str, columns: Sequence[Column]) -> str:
    """A line for each method and number of steps, the most steps first; then real clips in place of made ones."""
    columns = useful(columns, [(s, stage) for s in mine])
    head = ["method", "steps", "calls", *heads(columns), "s / clip", "n", "weights"]
    rows = []
    for name in lines(mine):
        for s in (s for s in mine if s.name == name):
            numbers = [cell(c, s, stage) for c in columns]
            rows.append([name, s.steps_text, str(s.evaluations), *numbers, pace(s), clip_count(s), weights(s)])
    for n in sorted({s.settings.n for s in mine}):  # a Fréchet distance of real clips is as biased by n as any other
        best = largest(s for s in mine if s.settings.n == n)[0]
        if any(row.condition == REAL for row in best.first.rows):
            numbers = [cell(c, best, stage, REAL) for c in columns]
            rows.append(["real clips", "", "", *numbers, "", clip_count(best), ""])
    return grid(head, rows)


def pace(series: Series, stages: Sequence[str] | None = None) -> str:
    """Seconds a clip on each device."""
    return "; ".join(f"{taken:.3g} ({device})" for device, taken in series.seconds(stages).items()) or NOT_MEASURED


def clip_count(series: Series) -> str:
    return f"{series.settings.n}" + (f" x {len(series.runs)} seeds" if len(series.runs) > 1 else "")


def weights(series: Series) -> str:
    return " ".join(f"`{series.first.subject.stages[name].weights[:8]}`" for name in series.stages)


def stage_table(mine: Sequence[Series], layout: Layout) -> str:
    """What the clips of every stage of a chain show: a line for each evaluation, a column for each stage."""
    stages = mine[0].stages
    columns = useful([c for c in layout.columns if c.chain], [(s, stage) for s in mine for stage in stages])
    head = ["method", "steps", *(f"{c.title} {ARROWS[c.better]}, {stage}" for c in columns for stage in stages), "n"]
    rows = [
        [s.name, s.steps_text, *(cell(c, s, stage) for c in columns for stage in stages), clip_count(s)] for s in mine
    ]
    return grid(head, rows)


def gap_table(series: Sequence[Series], layout: Layout) -> str:
    """Evaluations labelled `gap`, those of one stage, or of the chains that end with it, together."""
    mine = sorted((s for s in series if GAP in s.label), key=lambda s: (s.what, s.stages, s.steps, s.label[GAP]))
    if not mine:
        return f"{NOT_MEASURED.capitalize()}."
    columns = useful(layout.columns, [(s, s.last) for s in mine])
    rows = []
    for s in mine:
        where = f"{s.last} in the chain" if s.what == CHAIN else s.last
        numbers = [cell(c, s, s.last) for c in columns]
        rows.append([where, s.label[GAP], s.method, s.steps_text, asked(s.exam), *numbers, clip_count(s)])
    return grid(["stage", "gap training", "method", "steps", "prompts", *heads(columns), "n"], rows)


def gate_table(gates: Sequence[Outcome]) -> str:
    """Target, measured value, met or not."""
    if not gates:
        return "None is set."
    rows = []
    for found in gates:
        measured = found.why
        if found.value is not None:
            measured = apart(found.value, found.gate.target) + ("" if found.std is None else f" ±{found.std:.2g}")
        count = f"{found.n}" + (f" x {len(found.seeds)} seeds" if len(found.seeds) > 1 else "") if found.n else ""
        words: Mapping[bool | None, str] = {True: "met", False: "**not met**", None: "open"}
        target = f"{found.gate.relation} {found.gate.target:g}"
        rows.append([found.gate.label, target, measured, count, words[found.met]])
    return grid(["gate", "target", "measured", "n", ""], rows)


def apart(value: float, target: float) -> str:
    """The number with as many digits as it takes to see on which side of the target it is."""
    said = (f"{value:.{digits}g}" for digits in range(3, 17))
    return next((text for text in said if value == target or float(text) != target), str(value))


def commands(series: Sequence[Series]) -> str:
    """What makes each evaluation again."""
    typed = dict.fromkeys(run.command or "(not recorded)" for s in series for run in s.runs)
    return "```\n" + "\n".join(typed) + "\n```"
