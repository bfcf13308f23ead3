"""What a command asks for: prompts, how many videos of each, where they go; and the progress it shows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cascade.config import parse
from cascade.errors import ConfigError, InputError

MAX_FILE = 64 << 20  # bytes of a prompt file
MOST_SAMPLES = 1_000_000
MOST_SECONDS = 3600


@dataclass(kw_only=True)
class Out:
    """Where what a command makes goes."""

    out: Path | None = None


@dataclass(kw_only=True)
class Prompts(Out):
    """The prompts, one or a file of them."""

    prompt: str | None = None
    prompts: Path | None = None

    def __post_init__(self) -> None:
        if self.prompt is not None and self.prompts is not None:
            raise ConfigError("prompt and prompts are both set", fix="one of them")

    def texts(self) -> list[str]:
        """The prompts, checked. ConfigError without any, InputError for an unreadable file."""
        from cascade.text import check_prompt

        if self.prompts is None:
            if self.prompt is None:
                raise ConfigError(
                    "prompt is missing", fix='prompt="a large red circle moves left on a black background"'
                )
            return [check_prompt(self.prompt)]
        return read_prompts(self.prompts)


@dataclass(kw_only=True)
class Given(Prompts):
    """What to make, how often, and what the first stage is given: files, as they are read in cascade/given.py.

    `input` is a whole video, for a stage that takes one, or, with `mask`, a video with a hole. The others are for a
    stage that starts from text: `image` and `last` its first and last frame, `extend` a clip that goes on, `seconds`
    the length of the video.
    """

    negative_prompt: str | None = None
    seed: int = 0
    samples: int = 1
    input: Path | None = None
    mask: Path | None = None
    image: Path | None = None
    last: Path | None = None
    extend: Path | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.samples <= MOST_SAMPLES:
            raise ValueError(f"samples is {self.samples}, expected 1 to {MOST_SAMPLES}")
        if self.mask is not None and self.input is None:
            raise ConfigError("mask is set, but input, the video that it is for, is not", fix="input=FILE")
        if self.image is not None and self.extend is not None:
            raise ConfigError("image and extend are both set, each says how the video begins", fix="one of them")
        also = [name for name in ("image", "last", "extend", "seconds") if getattr(self, name) is not None]
        if self.input is not None and also:
            raise ConfigError(f"input and {also[0]} are both set", fix="one of them")
        if self.seconds is not None and not 0 < self.seconds <= MOST_SECONDS:
            raise ValueError(f"seconds is {self.seconds:g}, expected more than 0, at most {MOST_SECONDS}")

    @property
    def negative(self) -> str | None:
        """What guidance moves away from, checked."""
        from cascade.text import check_negative

        return None if self.negative_prompt is None else check_negative(self.negative_prompt)


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; blank lines are skipped, faults named with their line."""
    from cascade.text import check_prompt

    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise InputError(f"prompts {path}: is not a file", fix="prompts=FILE, UTF-8, one prompt a line")
        if path.stat().st_size > MAX_FILE:
            raise InputError(f"prompts {path}: larger than 64 MB", fix="several smaller files")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"prompts {path}: {reason}", fix="prompts=FILE, UTF-8, one prompt a line") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(check_prompt(line))
            except ConfigError as error:
                raise ConfigError(f"{path}, line {number}: {error.message}", fix=error.fix) from error
    if not found:
        raise ConfigError(f"prompts {path}: holds no prompt", fix="one prompt a line")
    return found


def take(tree: dict[str, Any], cls: type[Any]) -> Any:
    """The settings of `tree` that belong to `cls`, typed; they leave `tree`."""
    names = [f.name for f in fields(cls)]
    return parse({name: tree.pop(name) for name in names if name in tree}, cls)


@dataclass(frozen=True)
class Job:
    """One video to make: the `copy`-th of `prompt`, in `directory`; with a `seed` of its own, if not the run's."""

    prompt: str
    copy: int
    directory: Path
    seed: int | None = None

    @property
    def sample(self) -> str:
        """What keys this video's noise."""
        from cascade.noise import sample_id

        return sample_id(self.prompt, self.copy)


def jobs_of(texts: Sequence[str], samples: int, out: Path) -> list[Job]:
    """One directory for each prompt and copy; a prompt that stands twice in a file counts on as further copies."""
    seen: dict[str, int] = {}
    jobs: list[Job] = []
    for text in texts:
        for _ in range(samples):
            copy = seen.get(text, 0)
            seen[text] = copy + 1
            jobs.append(Job(text, copy, out / f"{len(jobs):04d}"))
    return [Job(jobs[0].prompt, 0, out)] if len(jobs) == 1 else jobs


class bars:
    """A progress bar a stage on stderr, as `progress(stage, done, total)`."""

    def __enter__(self) -> Callable[[str, int, int], None]:
        self.bar: Any = None
        return self.show

    def show(self, name: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if self.bar is None or self.bar.desc != f"{name:>8}":
            self.close()
            self.bar = tqdm(total=total, desc=f"{name:>8}", unit="step", file=sys.stderr, ncols=80)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def __exit__(self, *_: object) -> None:
        self.close()
