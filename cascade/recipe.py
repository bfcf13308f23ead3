"""A recipe: every training that made a chain's weights, as steps that need one another; `cascade train recipe=tiny`.

A step is a command of one stage, or the fit of a network that belongs to no stage, in a folder of its own below `out`.
`@name` in its words stands for the weights of the step `name`, `@name/08` for those of a round of a distillation. A
step that is done is not done again while its words and what they refer to are the same; one that was cut short goes on,
as its command does when it is given again.
"""

from __future__ import annotations

import logging
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from cascade import checkpoint, store
from cascade.compose import compose, split_prompts
from cascade.config import fingerprint, parse, suggest
from cascade.errors import CascadeError, ConfigError
from cascade.tasks import asked

log = logging.getLogger("cascade")
FITS = ("text", "features", "judge", "merge")  # what is no task of a stage, see cascade/fit.py
PROFILES = ("cpu", "gpu")
JUDGING = ("evaluate", "tune", "sample")  # tasks that make no weights
REFERENCE = re.compile(r"@([\w-]+)((?:/\w+)?)")


@dataclass(kw_only=True)
class Step:
    """One training or evaluation: of `stage` (a name in conf/stage), or the `fit` of one of FITS.

    `set` are the words of its command, `cpu` or `gpu` those that only this profile adds. With `each`, the step stands
    for one of every value, which is appended to its name and replaces {} in its words. `minutes` say what it cost.
    A step that is `like` another one takes over what it does not say itself, word by word (of a `fit`, all of them).
    """

    like: str | None = None
    stage: str | None = None
    task: str | None = None  # of a stage; None: train
    fit: str | None = None
    set: list[str] = field(default_factory=list)
    cpu: list[str] = field(default_factory=list)
    gpu: list[str] = field(default_factory=list)
    each: list[int] = field(default_factory=list)
    minutes: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.like is None and (self.stage is None) == (self.fit is None):
            raise ValueError(f"stage and fit are {self.stage} and {self.fit}, expected one of them")
        if self.fit is not None and self.fit not in FITS:
            raise ValueError(f"fit is {self.fit}, expected one of {', '.join(FITS)}")


@dataclass(kw_only=True)
class Recipe:
    """`steps` in any order, words of `every` stage's command, and what each part of the chain `ships` with.

    `only` names steps that are wanted; what they need comes along. `jobs` steps run at the same time, their output in
    <out>/<step>.log if there are several.
    """

    steps: dict[str, Step]
    every: list[str] = field(default_factory=list)
    ships: dict[str, str] = field(default_factory=dict)
    out: Path = Path("runs/train")
    profile: str = "auto"
    jobs: int = 1
    only: list[str] | None = None
    config_dir: Path | None = None  # the folder of --config-dir, which every step is given too

    def __post_init__(self) -> None:
        if self.profile not in (*PROFILES, "auto"):
            raise ValueError(f"profile is {self.profile}, expected cpu, gpu or auto")
        for name in self.steps:
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"steps names {name!r}, expected letters, digits, _ and -: it becomes a folder")
        if self.jobs < 1:
            raise ValueError(f"jobs is {self.jobs}, expected at least 1")


@dataclass(frozen=True)
class Task:
    """A step as it runs: its words with references still in them, what it waits for, and its cost if known."""

    name: str
    step: Step
    words: tuple[str, ...]
    minutes: float

    @property
    def needs(self) -> set[str]:
        return {name for word in self.words for name, _ in REFERENCE.findall(word)}


def tasks_of(recipe: Recipe, profile: str) -> dict[str, Task]:
    """All tasks in an order in which each follows what it needs. ConfigError for a reference to nothing or a circle."""
    steps = {name: whole(name, recipe.steps) for name in recipe.steps}
    tasks = [task for name, step in steps.items() for task in expanded(name, step, profile, recipe.every)]
    known = {task.name: task for task in tasks}
    ordered: dict[str, Task] = {}

    def add(name: str, path: tuple[str, ...]) -> None:
        if name not in known:
            raise ConfigError(f"recipe: there is no step {name}", fix=suggest(name, known))
        if name in path:
            raise ConfigError(f"recipe: {' needs '.join((*path, name))}", fix="steps that do not need themselves")
        for need in sorted(known[name].needs):
            add(need, (*path, name))
            if known[need].step.task in JUDGING:
                raise ConfigError(f"recipe: {name} needs @{need}, which makes no weights", fix="a step that trains")
        ordered.setdefault(name, known[name])

    for name in known if recipe.only is None else recipe.only:
        each = steps[name].each if name in steps else []
        for wanted in [f"{name}-{n}" for n in each] or [name]:
            add(wanted, ())
    return ordered


def whole(name: str, steps: Mapping[str, Step], path: tuple[str, ...] = ()) -> Step:
    """A step with what it takes over. ConfigError for one that is like nothing, or like itself."""
    step = steps[name]
    if step.like is None:
        return step
    if step.like not in steps or step.like in (name, *path):
        raise ConfigError(f"recipe: {name} is like {step.like}", fix="like: a step before it")
    base = whole(step.like, steps, (name, *path))
    if (step.stage or base.stage) and (step.fit or base.fit):
        raise ConfigError(f"recipe: {name} is a {'fit' if step.fit else 'stage'}, {step.like} is none", fix="no `like`")
    own = {f.name: getattr(step, f.name) or getattr(base, f.name) for f in fields(Step) if f.name != "like"}
    if base.fit is None:
        parts = {part: getattr(base, part) for part in ("set", *PROFILES)}
        said = {key(word) for word in step.set}  # which also overrules what the other one says of a profile
        for profile in PROFILES:
            parts[profile] = [word for word in parts[profile] if key(word) not in said]
        own |= {part: merged(words, getattr(step, part)) for part, words in parts.items()}
    return Step(**own)


def merged(before: list[str], own: list[str]) -> list[str]:
    """Words, of those that set the same thing the last."""
    return list({key(word): word for word in (*before, *own)}.values())


def key(word: str) -> str:
    return word.partition("=")[0]


def expanded(name: str, step: Step, profile: str, every: list[str]) -> list[Task]:
    """The step, or one for each of its values; in a reference a number has two digits, as a distillation's folders."""
    words: list[str] = [*(every if step.stage else []), *step.set, *getattr(step, profile)]
    cost = step.minutes.get(profile, 0.0)
    if not step.each:
        return [Task(name, step, tuple(words), cost)]
    return [
        Task(f"{name}-{n}", step, tuple(w.replace("{}", f"{n:02d}" if "@" in w else str(n)) for w in words), cost)
        for n in step.each
    ]


def resolve(word: str, out: Path, said: Callable[[str], str] = str) -> str:
    """References as directories below `out`, each as `said` writes it."""
    root = str(out) if out.is_absolute() else f"./{out}"
    return REFERENCE.sub(lambda m: said(f"{root}/{m[1]}{m[2]}/weights"), word)


def quoted(path: str) -> str:
    """A path as Hydra reads it: in quotes unless it is plain, where backslashes count before a quote alone."""
    if re.fullmatch(r"[\w.-]*/[\w./-]*", path, re.ASCII):
        return path
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: 2 * m[1] + (m[2] and rf"\{m[2]}"), path) + "'"


def command(task: Task, out: Path, config_dir: Path | None = None) -> list[str]:
    """The command line of a step. Raises ConfigError for settings that it would refuse."""
    step = task.step
    if step.stage is None:
        words = [resolve(word, out) for word in task.words]
        return [sys.executable, "-m", "cascade.fit", str(step.fit), str(out / task.name / "weights"), *words]
    words = [f"stage={step.stage}", f"task={step.task or 'train'}", f"out={quoted(str(out / task.name))}"]
    words += [resolve(word, out, quoted) for word in task.words]
    texts, settings = split_prompts(words)
    try:
        tree = {**compose("stage", settings, config_dir), **texts, "command": shlex.join(settings)}
        kind = str(tree.get("kind"))
        asked(kind, tree)
    except CascadeError as error:
        raise type(error)(f"recipe step {task.name}: {error.message}", error.fix) from error
    options = [] if config_dir is None else ["--config-dir", str(config_dir)]
    return [sys.executable, "-m", f"stages.{kind}", *words, *options]


def record(task: Task, out: Path) -> dict[str, Any]:
    """What a step that is done was made of, and what it made: its words, and manifests by their hash."""
    parts = {f"@{name}{part}" for word in task.words for name, part in REFERENCE.findall(word)} | {f"@{task.name}"}
    manifests = {part: Path(resolve(part, out)) / store.MANIFEST for part in sorted(parts)}
    if task.step.task in JUDGING:
        manifests |= {path.relative_to(out).as_posix(): path for path in (out / task.name).glob(f"*{store.MANIFEST}")}
    hashes = {
        part: fingerprint(path.read_text("utf-8", "replace")) for part, path in manifests.items() if path.is_file()
    }
    return {"words": list(task.words), "weights": hashes}


def is_done(task: Task, out: Path) -> bool:
    """Whether the step was finished with the same words, of the same weights, and what it made is there and whole.

    Raises InputError for a mark that is damaged.
    """
    mark, made = out / f"{task.name}.done", out / task.name
    if not mark.is_file() or store.from_json(mark.read_bytes(), mark) != record(task, out) or not made.is_dir():
        return False
    return not any(store.problems(path) for path in (*made.glob("weights"), *made.glob("*/weights")))


class Run:
    """The tasks of a recipe at work, `jobs` at a time."""

    def __init__(
        self,
        tasks: Mapping[str, Task],
        out: Path,
        jobs: int,
        say: Callable[[str], None],
        config_dir: Path | None = None,
    ) -> None:
        self.out, self.jobs, self.say = out, jobs, say
        self.tasks = dict(tasks)
        self.commands = {name: command(task, out, config_dir) for name, task in tasks.items()}  # all, or none is run
        self.left: dict[str, Task] = {}
        for name, task in tasks.items():  # each after what it needs
            if task.needs & self.left.keys() or not is_done(task, out):
                self.left[name] = task
        self.ready = tasks.keys() - self.left.keys()
        self.busy: dict[str, tuple[subprocess.Popen[bytes], float]] = {}

    def __call__(self) -> None:
        """Raises CascadeError with the exit code of a step that failed, once the others that run have ended.

        SystemExit with that code if the step has already said why on the terminal.
        """
        try:
            while self.left or self.busy:
                for name in [n for n, t in self.left.items() if t.needs <= self.ready][: self.jobs - len(self.busy)]:
                    self.start(self.left[name])
                time.sleep(0.2)
                for name, (process, since) in list(self.busy.items()):
                    if process.poll() is not None:
                        self.finish(name, process.returncode, since)
        except KeyboardInterrupt:
            self.stop(signal.SIGINT)
            raise
        except SystemExit:
            self.stop(signal.SIGTERM)
            raise
        finally:
            for name, (process, since) in list(self.busy.items()):  # they save what they have, or end what they do
                if process.wait() == 0:
                    self.finish(name, 0, since)

    def stop(self, number: int) -> None:
        """Steps hear a signal from here alone, and once: a second one would not let them save what they have."""
        for process, _ in self.busy.values():
            process.send_signal(number)

    def start(self, task: Task) -> None:
        cost = sum(other.minutes for other in self.left.values())
        number = len(self.tasks) - len(self.left) + 1
        self.say(f"[{number}/{len(self.tasks)}] {task.name}" + (f", about {cost:.0f} min left in all" if cost else ""))
        del self.left[task.name]
        words = self.commands[task.name]
        if self.jobs == 1:
            process = subprocess.Popen(words, start_new_session=True)
        else:
            with store.growing(self.out / f"{task.name}.log") as file:
                process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        self.busy[task.name] = process, time.monotonic()

    def finish(self, name: str, code: int, since: float) -> None:
        del self.busy[name]
        if code in (130, 143, -2, -15):
            raise KeyboardInterrupt
        if code:
            fix = f"mend it, or delete {self.out / name} if what it is made from changed; then the same command again"
            if self.jobs == 1 and code > 1:  # the step has said why, in its own line
                self.say(f"      {name} failed: {fix}")
                sys.exit(code)
            where = f", see {self.out / name}.log" if self.jobs > 1 else ""
            error = CascadeError(f"recipe step {name} failed{where}", fix)
            error.code = max(code, 1)
            raise error
        store.write_file(self.out / f"{name}.done", store.canonical(record(self.tasks[name], self.out)))
        self.ready |= {name}
        self.say(f"      {name} done in {(time.monotonic() - since) / 60:.1f} min")


def ship(ships: Mapping[str, str], out: Path) -> list[Path]:
    """Half-precision copies of the weights that the chain ships with, as <out>/checkpoints/<name>."""
    made = []
    for name, reference in ships.items():
        source, target = Path(resolve(reference, out)), out / "checkpoints" / name
        if source.is_dir():  # not every step need have been asked for
            halved(source, target)
            made.append(target)
    return made


def halved(source: Path, target: Path) -> None:
    """A weights directory in float16; whatever else it says stays."""
    artefact = store.read(source)
    files = dict(artefact.files)
    state = {key: value.to(torch.float16) if value.is_floating_point() else value
             for key, value in store.bytes_to_tensors(files[checkpoint.MODEL]).items()}  # fmt: skip
    files[checkpoint.MODEL] = store.tensors_to_bytes(state)
    store.commit(target, files, kind=artefact.kind, meta=artefact.meta, replace=True)


def verb(tree: dict[str, Any]) -> Callable[[], None]:
    """`cascade train`: runs a recipe; prints where the weights are."""
    recipe = parse(tree, Recipe)
    profile = recipe.profile if recipe.profile != "auto" else ("gpu" if torch.cuda.is_available() else "cpu")
    tasks, out = tasks_of(recipe, profile), recipe.out
    known = tasks_of(replace(recipe, only=None), profile)
    for part, reference in recipe.ships.items():
        for name, _ in REFERENCE.findall(reference):
            if name not in known:
                raise ConfigError(f"recipe: {part} ships {reference}, which is no step", fix=suggest(name, known, "@"))

    def work() -> None:
        with store.lock(out):
            Run(tasks, out, recipe.jobs, log.info, recipe.config_dir)()
            for target in ship(recipe.ships, out):
                print(target)

    return work
