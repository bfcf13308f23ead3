"""`cascade report`: all evaluations below a directory as one page of results, one JSON and a few pictures.

DIR = {results.md, results.json, results/{manifest.json, *.png}}. The same evaluations give the same bytes, wherever
they lie and in whatever order they were made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cascade import store
from cascade.config import locate, parse
from cascade.errors import ConfigError, InputError
from cascade.results.data import is_results, read_back, results
from cascade.results.gates import Gate, outcome
from cascade.results.page import HEAD, Layout, asked, by_exam, page, pictures, quality_table
from cascade.results.plots import Column
from cascade.results.series import Series, collect, pool

MARKDOWN, DATA, PICTURES = "results.md", "results.json", "results"


@dataclass(kw_only=True)
class ReportConfig:
    """What is collected and how it is shown."""

    runs: Path | None = None  # directory with evaluations, however deep
    kept: Path | None = None  # results.json of evaluations that no longer lie anywhere
    out: Path = Path("docs")
    notes: Path = Path("docs/results-notes.md")  # what still goes wrong, by hand
    cards: Path | None = None  # directory of weights directories that get a MEASURES.md
    stages: list[str] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)
    expected: dict[str, list[int]] = field(default_factory=dict)
    gates: list[Gate] = field(default_factory=list)


def verb(tree: dict[str, Any]) -> Callable[[], None]:
    """`cascade report`: writes the results and prints where the page is."""
    cfg = parse(tree, ReportConfig)
    runs, out, cards = cfg.runs, cfg.out, cfg.cards
    if runs is None and cfg.kept is None:
        raise ConfigError("runs is missing", fix="runs=DIR, where evaluations lie, or kept=docs/results.json")
    if cards is not None and not locate(cards).is_dir():
        raise InputError(f"cards {cards}: is not a directory", fix="cards=checkpoints/tiny")
    check_pages(out)

    def work() -> None:
        kept = [] if cfg.kept is None else read_back(cfg.kept)
        series = pool(kept if runs is None else collect(runs, kept))
        with store.lock(out):
            write(series, cfg, out)
        if cards is not None:
            for path in write_cards(series, cfg.columns, locate(cards)):
                print(path)
        print(out / MARKDOWN)

    return work


def check_pages(out: Path) -> None:
    """Raises InputError where `write` would replace a results.md or results.json that no report wrote."""
    ours: dict[str, Callable[[bytes], bool]] = {MARKDOWN: lambda data: data.startswith(HEAD.encode()), DATA: is_results}
    for name, is_ours in ours.items():
        path = out / name
        if os.path.lexists(path) and not (path.is_file() and is_ours(path.read_bytes())):
            raise InputError(f"cannot write {path}: no report wrote it", fix="choose another out= or move it away")


def write(series: Sequence[Series], cfg: ReportConfig, out: Path) -> None:
    """results.md, results.json and their pictures in `out`."""
    layout = Layout(stages=cfg.stages, columns=cfg.columns, expected=cfg.expected)
    gates = [outcome(gate, series) for gate in cfg.gates]
    shown = pictures(series, layout, {} if cfg.kept is None else pictures_beside(cfg.kept))
    if shown:
        store.commit(out / PICTURES, shown, kind="pictures", replace=True)
    store.write_file(out / DATA, store.canonical(results(series, gates)))
    text = page(series, gates, layout, set(shown), notes(cfg.notes))
    store.write_file(out / MARKDOWN, text.encode())


def pictures_beside(data: Path) -> dict[str, bytes]:
    """The pictures of the page that a results.json belongs to."""
    folder = data.parent / PICTURES
    return dict(store.read(folder, "pictures").files) if folder.is_dir() else {}


def notes(path: Path) -> str:
    """What was written by hand, or nothing if there is no such file."""
    file = locate(path)
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"notes {path}: {error}", fix="notes=FILE in UTF-8") from error


# model cards ---------------------------------------------------------------------------------------------------------


def write_cards(series: Sequence[Series], columns: Sequence[Column], folder: Path) -> list[Path]:
    """MEASURES.md in every weights directory of `folder` whose weights were judged alone; returns the files.

    A manifest's hash is the name of the weights that it describes, and results quote it. So what was found out about
    weights afterwards cannot be in the manifest: it lies beside, and says which weights it is about.
    """
    written = []
    for path in sorted(path.parent for path in folder.glob(f"*/{store.MANIFEST}")):
        if store.manifest(path)["kind"] != "weights":
            continue
        key = store.read(path, "weights").hash
        mine = [s for s in series if s.what == "stage" and s.first.subject.stages[s.last].weights == key]
        if mine:
            written.append(store.write_file(path / store.MEASURES, card(mine, columns, key).encode()))
    return written


def card(mine: Sequence[Series], columns: Sequence[Column], key: str) -> str:
    """The measures of one stage's weights."""
    stage = mine[0].last
    parts = [
        f"# {stage}: measures",
        f"Of the weights whose manifest has the SHA-256 `{key}`, the stage alone. Written by `cascade report`; how to "
        "read it, and what makes each number again, stands in docs/results.md and docs/results.json.",
    ]
    for exam, same in by_exam(mine).items():
        parts += [f"{asked(exam)}:", quality_table(same, stage, columns)]
    return "\n\n".join(parts) + "\n"
