"""Pictures of the results: curves of quality against sampler steps, and clips of several samplers side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cascade import media
from cascade.evaluation.exam import REAL
from cascade.results.series import Pooled, Series, largest

COLOURS = {
    "teacher": "black",
    "progressive": "tab:blue",
    "consistency": "tab:orange",
    "straight": "tab:green",
    "reward": "tab:red",
}
OTHERS = ("tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")
MARKERS = "osD^vP*X"
DASHES = ("-", "--", "-.", ":")
ROWS = 6  # samplers in a picture of clips


@dataclass(kw_only=True)
class Column:
    """A measure that tables show, a number for each of `groups`."""

    metric: str
    name: str
    title: str
    better: str = "higher"  # or lower
    unit: str = ""
    groups: list[str] = field(default_factory=lambda: ["all"])
    plot: bool = False  # in the curves as well, over all clips
    chain: bool = False  # in the table of what every stage of a chain shows

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower"):
            raise ValueError(f"better is {self.better!r}, expected higher or lower")

    def number(self, series: Series, stage: str, group: str, condition: str | None = None) -> Pooled | None:
        condition = series.condition(stage) if condition is None else condition
        return series.pooled(stage, self.metric, self.name, condition, group)


def lines(series: Sequence[Series]) -> dict[str, list[Series]]:
    """By name, teachers first, one series for each number of steps: the one of the most clips."""
    known = list(COLOURS)

    def place(name: str) -> tuple[int, str]:
        method = name.split(", ")[0]
        return known.index(method) if method in known else len(known), name

    found: dict[str, list[Series]] = {}
    for name in sorted({s.name for s in series}, key=place):
        mine = [s for s in series if s.name == name]
        for steps in sorted({sum(s.steps) for s in mine}):
            found.setdefault(name, []).append(largest(s for s in mine if sum(s.steps) == steps)[0])
    return found


def curves(series: Sequence[Series], columns: Sequence[Column], title: str) -> bytes | None:
    """A png with a panel for each column that is to be plotted; None if fewer than two points are there.

    The last stage's quality over all clips against steps (log2), a line for each method; bars are the standard
    deviation over seeds. Dots: real clips in place of made ones.
    """
    shown = [c for c in columns if c.plot and any(c.number(s, s.last, "all") for s in series)]
    found = lines(series)
    ticks = sorted({sum(s.steps) for mine in found.values() for s in mine})
    if not shown or len(ticks) < 2:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(shown) + 0.3, 3.1), dpi=100, layout="constrained")
    spare = iter(OTHERS * len(found))
    colours = {name: COLOURS[name] if name in COLOURS else next(spare) for name in found}
    for i, column in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), i + 1)
        for j, (name, mine) in enumerate(found.items()):
            points = [(sum(s.steps), p) for s in mine if (p := column.number(s, s.last, "all")) is not None]
            _line(axes, points, name, color=colours[name], marker=MARKERS[j % len(MARKERS)], linestyle=DASHES[j % 4])
        real = column.number(largest(series)[0], series[0].last, "all", REAL)
        if real is not None:
            axes.axhline(real.mean, color="0.5", linestyle=(0, (1, 2)), linewidth=1.2, label="real clips")
        axes.set_xscale("log", base=2)
        axes.set_xlim(ticks[0] / 2**0.25, ticks[-1] * 2**0.25)
        axes.set_xticks(ticks, [str(step) for step in ticks], fontsize=8)
        axes.set_xticks([], minor=True)
        axes.tick_params(labelsize=8)
        axes.set_xlabel("sampler steps", fontsize=8)
        unit = f", {column.unit}" if column.unit else ""
        axes.set_title(f"{column.title}{unit} ({column.better} is better)", fontsize=9)
        axes.grid(color="0.92")
    handles = {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    names = [name for name in (*found, "real clips") if name in handles]
    figure.suptitle(title, fontsize=10)
    figure.legend([handles[n] for n in names], names, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _line(axes: Any, points: Sequence[tuple[int, Pooled]], name: str, **style: Any) -> None:
    """Steps and numbers joined by a line, with bars where there are several seeds."""
    if not points:
        return
    steps, means = [step for step, _ in points], [p.mean for _, p in points]
    axes.plot(steps, means, markersize=5, linewidth=1.4, label=name, **style)
    bars = [(step, p.mean, p.std) for step, p in points if p.std is not None]
    if bars:
        axes.errorbar(*zip(*bars, strict=True), fmt="none", ecolor=style["color"], capsize=3)


# clips ---------------------------------------------------------------------------------------------------------------


def chosen(series: Sequence[Series]) -> list[Series]:
    """Whose clips are shown: every method at its most and its fewest steps, if asked the same prompts first."""
    ends = [(mine[-1], mine[0]) if len(mine) > 1 else (mine[0],) for mine in lines(series).values()]
    found = [s for pair in ends for s in pair]
    return [s for s in found if prompts(s) == prompts(found[0])][:ROWS]


def prompts(series: Series) -> list[tuple[int, str]]:
    """The seed and the first prompts of a series' first run."""
    seed = series.first.settings.seed
    return [(seed, str(clip["prompt"])) for clip in series.first.clips[:2]]


def clips(series: Sequence[Series], stage: str) -> bytes | None:
    """A png: what the samplers made of each of the first prompts, one below the other, between input and truth."""
    picked = chosen([s for s in series if strips(s, stage, s.condition(stage))])  # not all evaluations keep their clips
    if not picked:
        return None
    rows = [
        (f"{s.name}, {s.steps_text} step{'s' * (s.steps_text != '1')}", strips(s, stage, s.condition(stage)))
        for s in picked
    ]
    rows = [("input", strips(picked[0], stage, "input")), *rows, ("truth", strips(picked[0], stage, "truth"))]
    rows = [(label, made) for label, made in rows if made]
    count = min(len(made) for _, made in rows)
    words = [str(clip["prompt"]) for clip in picked[0].first.clips[:count]]
    videos = [made[k] for k in range(count) for _, made in rows]
    captions = [f"{words[k]}: {label}" if i == 0 else label for k in range(count) for i, (label, _) in enumerate(rows)]
    if any(video.shape != videos[0].shape for video in videos):
        return None
    return media.sheet(torch.stack(videos), captions, scale=max(1, round(64 / videos[0].shape[2])))


def strips(series: Series, stage: str, label: str) -> list[Tensor]:
    """The clips (3, F, h, w) in a strip picture of the first run, or none."""
    path = series.first.strip(label)
    if path is None:
        return []
    image = media.read_image(path)  # (3, K h, F w)
    shape = series.first.subject.stages[stage].settings["shape"]
    height, width = int(shape["height"]), int(shape["width"])
    grid = image.view(3, image.shape[1] // height, height, image.shape[2] // width, width)
    return list(grid.permute(1, 0, 3, 2, 4)[: 3 if height <= 64 else 2])
