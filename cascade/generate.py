"""`cascade generate`: prompts to videos through a chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cascade import loading, media, store
from cascade.chain import Chain, Device
from cascade.config import fingerprint, plain
from cascade.errors import ConfigError, InputError
from cascade.given import given
from cascade.pipeline import Runner, check_outputs, finish
from cascade.planning.memory import Memory, within
from cascade.request import Given, Job, bars, jobs_of, take
from cascade.text import text_source


@dataclass(kw_only=True)
class Generate(Given):
    """What a chain is asked for: `format`s of the video file, shown at `fps` (its own if null); a `start` later on."""

    start: str | None = None
    format: list[str] = field(default_factory=lambda: ["mp4"])
    fps: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.format or not set(self.format) <= {"mp4", "gif", "webm"}:
            raise ConfigError(f"format is [{','.join(self.format)}]", fix="format=[mp4], of mp4, gif and webm")
        if self.start is not None and (self.input is None or self.mask is not None):
            why = "start and input belong together: the stage to begin with and the whole video it gets"
            raise ConfigError(why, fix="start=STAGE input=FILE, without mask")
        if self.input is not None and self.start is None and self.mask is None:
            why = "input is set, but neither start, the stage it is for, nor mask, the hole in it"
            raise ConfigError(why, fix="start=STAGE or mask=FILE")


def check_places(out: Path, jobs: Sequence[Job], chain: Chain, formats: Sequence[str]) -> None:
    """Raises HostError where the videos of `jobs` cannot be written, InputError where something else would be lost."""
    store.check_place(out)
    for job in (job for job in jobs if job.directory.exists()):
        store.check_place(job.directory / "stages" / chain.stages[0].name)
        for stage in chain.stages:
            store.check_ours(job.directory / "stages" / stage.name, "stage")
        if (kind := store.kind_of(job.directory)) is not None:
            raise InputError(f"cannot write {job.directory}: it holds {kind!r}", fix="choose another out=")
        check_outputs(job, formats)


def verb(tree: dict[str, Any]) -> Callable[[], None]:
    """Prompt to video through a chain; the video's path on stdout, or how many there are."""
    run, on, memory = take(tree, Generate), take(tree, Device), take(tree, Memory)
    chain = Chain.read(tree, [f.name for cls in (Generate, Device, Memory) for f in fields(cls)]).since(run.start)
    texts = run.texts()
    out = run.out or Path("runs") / fingerprint(
        [plain(stage) for stage in chain.stages] + [plain(run), plain(on), plain(chain.text), memory.memory]
    )[:16]  # fmt: skip
    first = given(run, chain.stages[0], chain.rules[0])
    for suffix in run.format:
        media.check_rate(f".{suffix}", chain.fps(first) if run.fps is None else run.fps)
    loading.check(chain)
    chain.runs_on(on)
    chain = within(chain, on, memory, None if first is None else first.shape)
    jobs = jobs_of(texts, run.samples, out)
    check_places(out, jobs, chain, run.format)

    def work() -> None:
        with store.lock(out), bars() as progress:
            for job in jobs:
                store.sweep(job.directory)
                store.sweep(job.directory / "stages")
            runner = Runner(chain, text_source(chain.text), on, run.seed, run.negative, progress)
            videos = runner.run(jobs, first)
            meta = {"seed": run.seed, "negative_prompt": run.negative_prompt}
            meta["stages"] = [stage.name for stage in chain.stages]
            for job in jobs:
                finish(job, videos[job.directory], run.format, run.fps, meta)
        print(jobs[0].directory / f"video.{run.format[0]}" if len(jobs) == 1 else f"{out}: {len(jobs)} videos")

    return work
