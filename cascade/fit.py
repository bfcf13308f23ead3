"""Networks that belong to no stage: `python -m cascade.fit text|features|judge|merge DIRECTORY [words]`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from cascade import checkpoint, store
from cascade.cli import run_main
from cascade.config import suggest
from cascade.errors import ConfigError

N = TypeVar("N", int, float)


def text(out: Path) -> None:
    """The text encoder of the procedural world."""
    from cascade import textfit

    textfit.fit(out)


def features(out: Path, seed: str = "0") -> None:
    """The network in whose features clips are compared."""
    from cascade.metrics import features

    features.fit(out, seed=number(seed, int))


def judge(out: Path, seed: str = "1") -> None:
    """A judge of students."""
    from cascade import judge

    judge.fit(out, seed=number(seed, int))


def merge(out: Path, tuned: str, student: str, teacher: str, share: str = "1") -> None:
    """The weights `student` and a share of what `tuned` learned since `teacher`."""
    from cascade.merge import merge

    merge(out, Path(tuned), Path(student), Path(teacher), number(share, float))


FITS = {made.__name__: made for made in (text, features, judge, merge)}


def number(word: str, kind: Callable[[str], N]) -> N:
    """ConfigError for what is none."""
    try:
        return kind(word)
    except ValueError as error:
        raise ConfigError(f"{word!r}: is no number", fix="such as 1") from error


def command(argv: Sequence[str]) -> None:
    """Fits what the first word names into the directory that the second does, and prints that."""
    if not argv or argv[0] not in FITS:
        name = argv[0] if argv else ""
        raise ConfigError(f"fit {name!r}: expected one of {', '.join(FITS)}", fix=suggest(name, FITS))
    fit, words = FITS[argv[0]], argv[1:]
    parameters = inspect.signature(fit).parameters.values()
    least = sum(parameter.default is parameter.empty for parameter in parameters)
    if not least <= len(words) <= len(parameters):
        shown = " ".join(p.name.upper() if p.default is p.empty else f"[{p.name.upper()}]" for p in parameters)
        raise ConfigError(f"fit {argv[0]}: {len(words)} words, expected {shown}", fix=f"{argv[0]} {shown}")
    out = Path(words[0])
    store.check_place(out)
    store.check_ours(out, "text" if fit is text else checkpoint.KIND)
    fit(out, *words[1:])
    print(words[0])


if __name__ == "__main__":
    run_main(sys.argv[1:], command, "python -m cascade.fit")
