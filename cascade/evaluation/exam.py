"""What is asked in an evaluation: prompts and real clips from a seed, and the measures that answer.

A measure is a module of cascade/metrics. Its `judge` says by the names of its parameters what it needs (the fields of
`Case`) and returns a value for each clip, (B,), NaN where it cannot tell; they are averaged, unless the module has a
`total(values)` that makes numbers of the values (n, ...) of all clips. Its `about()`, if any, goes into the report.
One that needs what may not be on this machine has an `absent()`, which says what is missing, or nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cascade.config import package_root, suggest
from cascade.data import captions
from cascade.data.captions import Spec
from cascade.data.scenes import draw_scene, draw_spec, numpy_generator
from cascade.data.shapes import render
from cascade.data.source import Source, World
from cascade.errors import ConfigError
from cascade.video import Shape

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
    given: bool = False  # or what its training gives it: known=1 known_kinds=[half]
    label: dict[str, str] = field(default_factory=dict)  # for `cascade report`: method, gap, ...; changes no answer

    def __post_init__(self) -> None:
        for name, low, high in (("n", 1, 10**6), ("batch", 1, 10**4), ("two", 0, 1), ("seed", 0, 2**62)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {low} to {high}")
        if self.image and self.given:
            raise ValueError("image and given are both true, expected one of them")
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
    mask: Tensor | None = None  # (B, 1, F, 1, 1) or (B, 1, F, H, W), what of `given` has to come out as it is
    known: Tensor | None = None  # (B, F), frames all of which has to
    specs: list[Spec] | None = None  # what the prompts say
    borders: list[int] | None = None  # frames at which a window begins, or before which one ends


ABSENT = {
    "low": "the stage has no video as its input",
    "given": "the stage has no video as its input",
    "mask": "the stage has no video as its input",
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
        raise ConfigError(f"metrics names {name!r}, which is no measure", fix=f"write {suggest(name, measures())}")
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


def known_specs(questions: Sequence[Question]) -> list[Spec] | None:
    """What all of the prompts say, or None if that is not known of one."""
    specs = [question.spec for question in questions if question.spec is not None]
    return specs if len(specs) == len(questions) else None


def about(names: Sequence[str]) -> dict[str, Any]:
    """What the measures that can be asked here say of themselves."""
    return {name: measure(name).about() for name in names if hasattr(measure(name), "about") and not absent(name)}
