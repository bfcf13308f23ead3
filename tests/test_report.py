"""Evaluations become one page: on small reports made by hand, and once on real ones."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import torch

from cascade import checkpoint, cli, media, store
from cascade.ask import Request
from cascade.chain import Device
from cascade.compose import compose
from cascade.config import parse, plain, plugin
from cascade.data.source import DataConfig
from cascade.errors import ConfigError, InputError
from cascade.evaluation import evaluate
from cascade.evaluation.exam import EvaluateConfig, measures
from cascade.evaluation.marks import Row, Timing, subject_key
from cascade.request import Given
from cascade.results import plots
from cascade.results.gates import Gate, outcome
from cascade.results.page import Layout, apart, gap_table, missing, page
from cascade.results.plots import Column
from cascade.results.report import ReportConfig, write_cards
from cascade.results.series import collect, pool
from cascade.sampling.sampler import Sampler
from cascade.text import TextConfig
from cascade.video import Shape

SHAPE = {"frames": 8, "height": 16, "width": 16}
FVD = Column(metric="fvd", name="fvd", title="FVD", better="lower", plot=True, chain=True)
LAYOUT = Layout(stages=["base"], columns=[FVD], expected={"teacher": [64, 8], "progressive": [8]})
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a report of base with one number for each (condition, group), as `cascade evaluate` would."""

    def make(
        name: str, value: float = 1.0, *, steps: int = 8, seed: int = 0, n: int = 16, what: str = "stage",
        label: dict[str, str] | None = None, facts: dict[str, Any] | None = None,
        numbers: dict[tuple[str, str], float] | None = None,
        stages: tuple[str, ...] = ("base",), seconds: float | None = None, root: str = "runs",
        kept: bool = True, about: dict[str, Any] | None = None, **settings: Any,
    ) -> Path:  # fmt: skip
        sampler = {"steps": steps, "rule": "ddim", "guidance": 2.0}
        stage = {
            "settings": {"sampler": sampler, "shape": SHAPE, "fps": 4.0, "augment": 0.0},
            "weights": "ab" * 32, "evaluations": 2 * steps, "facts": facts or {},
        }  # fmt: skip
        label = label or {}
        cfg = EvaluateConfig(n=n, seed=seed, label=label, **settings)
        subject = {
            "what": what, "label": label, "device": "cpu", "dtype": "float32",
            "stages": dict.fromkeys(stages, stage),
        }  # fmt: skip
        rows = [
            Row(s, "fvd", "fvd", condition, group, number, None, n, "8x16x16", 4.0, seed)
            for s in stages
            for (condition, group), number in (numbers or {("made", "all"): value}).items()
        ]
        tree = {
            "subject": subject, "settings": plain(cfg), "rows": [plain(row) for row in rows],
            "skipped": {}, "about": about or {}, "clips": [{"prompt": f"clip {seed} {i}"} for i in range(2)],
            "command": f"cascade evaluate seed={seed} n={n}",
        }  # fmt: skip
        clip = media.png(torch.full((3, 2 * 16, 8 * 16), value / 10))
        files = {"report.json": store.canonical(tree), "report.png": b""} | ({"strips/made.png": clip} if kept else {})
        store.commit_into(tmp_path / root / name, files, kind="report", meta={"stages": list(stages)})
        if seconds is not None:
            time = Timing(
                subject=subject_key(subject), device="cpu", threads=2, batch=4, calls=dict.fromkeys(stages, 1),
                seconds=dict.fromkeys(stages, seconds),
            )  # fmt: skip
            store.write_file(tmp_path / root / name / "timing.json", store.canonical(plain(time)))
        return tmp_path / root / name

    return make


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, bytes]]:
    """Runs `cascade report` on a directory with evaluations; returns what it wrote."""
    monkeypatch.chdir(tmp_path)

    def report(*words: str, runs: str = "runs", out: str = "out") -> dict[str, bytes]:
        cli.command(["report", f"runs={runs}", f"out={out}", "notes=notes.md", *words])
        return {path.relative_to(out).as_posix(): path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}

    return report


def gate(**changes: Any) -> Gate:
    settings = {"label": "a gate", "stage": "base", "metric": "fvd", "name": "fvd", "relation": "<=", "target": 1.05}
    return parse(settings | changes, Gate)


# collecting ----------------------------------------------------------------------------------------------------------


def test_the_same_reports_in_any_order_and_place_give_the_same_bytes(make: Make, report: Any, tmp_path: Path) -> None:
    def some(root: str, names: list[str]) -> None:
        for i, name in enumerate(names):
            k = int(name.split("-")[-1])
            make(
                name,
                1.5 + k,
                root=root,
                steps=2 ** (k % 3),
                seed=k // 3,
                label={"method": "progressive"},
                seconds=k + 1.0,
            )
            shutil.copytree(tmp_path / root / name, tmp_path / root / f"again-{i}")  # made twice counts once

    some("runs", [f"a-{k}" for k in range(6)])
    some("other/deep", [f"z/{9 - k}-{k}" for k in (3, 5, 0, 2, 4, 1)])
    first, second = report(), report(runs="other", out="second")
    assert first == second
    assert {"results.md", "results.json", "results/base-curves.png", "results/base-clips.png"} <= set(first)
    assert report() == first  # and over itself


def test_seeds_are_pooled_and_nothing_else(make: Make, report: Any) -> None:
    for seed, value in enumerate((1.0, 2.0, 4.0)):
        make(f"seed{seed}", value, seed=seed, batch=1 + seed)
    make("steps", 9.0, steps=4)
    make("label", 9.0, seed=3, label={"gap": "with"})
    make("n", 9.0, seed=4, n=8)
    make("wording", 9.0, seed=5, wording="unseen")
    tree = json.loads(report()["results.json"])
    assert [s["seeds"] for s in tree["series"]].count([0, 1, 2]) == 1 and len(tree["series"]) == 5
    mine = next(s for s in tree["series"] if s["seeds"] == [0, 1, 2])
    (number,) = mine["stages"]["base"]["numbers"]
    assert number["mean"] == pytest.approx(7 / 3) and number["std"] == pytest.approx(stdev([1, 2, 4]))
    assert number["values"][1] == {"seed": 1, "n": 16, "value": 2.0, "error": None}
    assert [run["command"] for run in mine["runs"]] == [f"cascade evaluate seed={k} n=16" for k in range(3)]
    stage = mine["stages"]["base"]
    assert stage["settings"]["sampler"] == {"steps": 8, "rule": "ddim", "guidance": 2.0}
    assert (stage["settings"]["shape"], stage["evaluations"], stage["weights"]) == (SHAPE, 16, "ab" * 32)
    assert "2.33 ±1.5" in report()["results.md"].decode()


def test_one_seed_has_no_spread(make: Make) -> None:
    make("one", 3.0)
    (series,) = pool(collect(make("two", 3.0).parent))
    found = series.pooled("base", "fvd", "fvd", "made", "all")
    assert found is not None and (found.mean, found.std, found.n) == (3.0, None, 16)


def test_the_same_evaluation_with_other_numbers_is_told(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    root = make("a", 1.0).parent
    make("b", 2.0)
    assert len(collect(root)) == 1
    assert "the same evaluation, other numbers" in caplog.text


def test_a_broken_report_is_one_error_line(make: Make, report: Any, tmp_path: Path) -> None:
    file = make("good") / "report.json"
    file.write_bytes(file.read_bytes().replace(b"16", b"17"))
    with pytest.raises(InputError) as error:
        report()
    assert "report.json: is damaged" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    shutil.rmtree(file.parent)
    tree = {"subject": {}, "rows": []}
    store.commit_into(
        tmp_path / "runs/old", {"report.json": store.canonical(tree)}, kind="report", meta={"stages": ["a"]}
    )
    with pytest.raises(InputError, match="is not a report of this Cascade"):
        report()


@pytest.mark.parametrize("path", ["sampler", "sampler/steps", "shape", "fps", "augment"])
def test_settings_that_a_page_shows_are_there(make: Make, report: Any, path: str, tmp_path: Path) -> None:
    tree = json.loads((make("good") / "report.json").read_bytes())
    *folders, key = path.split("/")
    part = tree["subject"]["stages"]["base"]["settings"]
    for folder in folders:
        part = part[folder]
    part[key] = None
    files = {"report.json": store.canonical(tree)}
    store.commit_into(tmp_path / "bad/one", files, kind="report", meta={"stages": ["base"]})
    with pytest.raises(InputError, match=f"is not a report of this Cascade: .*{key}"):
        report(runs="bad")


@pytest.mark.parametrize(
    ("name", "data"),
    [("results.md", "# Results\n\nof my own"), ("results.json", '{"format": 1}'), ("results.json", "years of work")],
)
def test_a_page_that_is_not_ours_is_kept(make: Make, report: Any, name: str, data: str) -> None:
    make("a", 1.5)
    Path("out").mkdir()
    Path("out", name).write_text(data)
    with pytest.raises(InputError, match=f"out/{name}: no report wrote it"):
        report()
    assert [path.read_text() for path in Path("out").iterdir()] == [data]


def test_a_directory_without_evaluations_is_refused(report: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a directory"):
        report()
    (tmp_path / "runs").mkdir()
    with pytest.raises(InputError, match="holds no evaluation"):
        report()
    with pytest.raises(ConfigError, match="runs is missing"):
        cli.command(["report"])


def test_time_that_was_not_measured_is_not_guessed(make: Make) -> None:
    make("fast", steps=4, seconds=0.5)
    make("none", steps=8)
    other = make("other", steps=16, seconds=7.0)
    shutil.copy(other / "timing.json", other.parent / "none" / "timing.json")  # of another subject
    taken = {s.steps[0]: s.seconds() for s in pool(collect(other.parent))}
    assert taken == {4: {"cpu, 2 threads": 0.5}, 8: {}, 16: {"cpu, 2 threads": 7.0}}


def test_a_method_is_as_labelled_or_as_the_weights_record_it(make: Make) -> None:
    make("a", steps=1, facts={"teacher": "x"})
    make("b", steps=2, facts={"teacher": "x", "method": "straight"})
    make("c", steps=3)
    root = make("d", steps=4, facts={"teacher": "x"}, label={"method": "consistency", "gap": "with"}).parent
    names = {s.steps[0]: s.name for s in pool(collect(root))}
    assert names == {1: "student", 2: "straight", 3: "teacher", 4: "consistency, gap with"}


def test_an_evaluation_that_kept_no_clips_takes_no_place_in_their_picture(make: Make) -> None:
    """More of them than there are rows, all by name before the ones that did."""
    shown = [make("seen", 2.0, steps=9, label={"method": "z"}), make("also", 3.0, steps=8, label={"method": "y"})]
    expected = plots.clips(pool(collect(shown[0].parent)), "base")
    for number in range(plots.ROWS + 1):
        make(f"blank {number}", steps=number + 1, label={"method": f"a{number}"}, kept=False)
    found = pool(collect(shown[0].parent))
    assert len(found) == plots.ROWS + 3 and expected is not None
    assert plots.clips(found, "base") == expected


# evaluations that no longer lie anywhere ------------------------------------------------------------------------------


def several(make: Make) -> None:
    """Seeds, stages, groups, labels and times."""
    for seed in (0, 1):
        make(
            f"s{seed}", 1.0 + seed, seed=seed, seconds=0.5, numbers={("made", "all"): 1.0 + seed, ("real", "all"): 0.1}
        )
    make("few", 3.0, steps=4, label={"method": "progressive", "gap": "with"}, facts={"teacher": "x"}, wording="unseen")
    make("chain", 4.0, what="chain", stages=("base", "tsr"), seconds=2.0)


def test_results_read_back_are_those_that_were_written(make: Make, report: Any, tmp_path: Path) -> None:
    several(make)
    there = report("stages=[base]")
    shutil.rmtree(tmp_path / "runs")
    cli.command(["report", "kept=out/results.json", "out=again", "notes=notes.md", "stages=[base]"])
    again = {path.relative_to("again").as_posix(): path.read_bytes() for path in Path("again").rglob("*.*")}
    assert again == {name: data for name, data in there.items() if "." in name}


def test_what_is_measured_anew_replaces_what_was_kept_and_a_new_seed_joins_it(make: Make, report: Any) -> None:
    several(make)
    report()
    make("s1", 7.0, seed=1, root="new")
    make("s2", 9.0, seed=2, root="new", numbers={("made", "all"): 9.0, ("real", "all"): 0.1})
    tree = json.loads(report("kept=out/results.json", runs="new")["results.json"])
    (mine,) = [s for s in tree["series"] if s["seeds"] == [0, 1, 2]]
    made = next(n for n in mine["stages"]["base"]["numbers"] if n["condition"] == "made")
    assert [v["value"] for v in made["values"]] == [1.0, 7.0, 9.0] and len(tree["series"]) == 3


def test_a_picture_of_clips_that_are_gone_stays_as_it_was_until_several_methods_are_there(
    make: Make, report: Any, tmp_path: Path
) -> None:
    make("gone", 1.0)
    before = report()["results/base-clips.png"]
    shutil.rmtree(tmp_path / "runs")
    make("new", 9.0, steps=4, label={"method": "straight"})
    assert report("kept=out/results.json")["results/base-clips.png"] == before
    make("newer", 8.0, steps=2, label={"method": "reward"})
    assert report("kept=out/results.json")["results/base-clips.png"] != before
    shutil.rmtree(tmp_path / "runs/newer")
    assert report()["results/base-clips.png"] != before


def test_what_is_no_results_is_one_error_line(make: Make, report: Any, tmp_path: Path) -> None:
    make("good")
    data = report()["results.json"]
    for text, why in (
        (re.sub(rb'"format": ?2', b'"format": 1', data), "format is 1"),
        (b"[]", "is not a JSON object"),
        (data.replace(b'"fps"', b'"fqs"'), "is no results"),
        (None, "No such file"),
    ):
        (tmp_path / "bad.json").unlink(missing_ok=True)
        if text is not None:
            (tmp_path / "bad.json").write_bytes(text)
        with pytest.raises(InputError, match=why) as error:
            report("kept=bad.json")
        assert "\n" not in str(error.value)


# gates ---------------------------------------------------------------------------------------------------------------


def test_numbers_of_another_measure_are_neither_pooled_nor_compared_but_replaced(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a measure says of itself tells two of one name apart: features of other weights, other pixels."""
    monkeypatch.chdir(tmp_path)
    one, other = ({"fvd": {"features": name}} for name in ("one", "other"))
    make("first", 1.0, seed=0, about=one)
    make("second", 3.0, seed=1, about=other)
    make("teacher", 2.0, seed=0, steps=64, about=one)
    series = pool(collect(Path("runs")))
    assert [(s.seeds, s.first.about) for s in sorted(series, key=lambda s: s.seeds) if s.steps == [8]] == [
        ([0], one),
        ([1], other),
    ]
    students = {str(s.first.about): [s] for s in series if s.steps == [8]}
    teacher = [s for s in series if s.steps == [64]]
    wanted = gate(steps=8, reference={"steps": 64})
    assert outcome(wanted, students[str(one)] + teacher).value == 0.5
    make("again", 1.5, seed=0, about=other, root="new")
    (now,) = [s for s in pool(collect(Path("new"), collect(Path("runs")))) if s.steps == [8]]
    assert (now.seeds, [run.rows[0].value for run in now.runs]) == ([0, 1], [1.5, 3.0])
    alone = pool(collect(Path("new")))
    assert outcome(wanted, alone + teacher).why == "reference not measured"


def test_a_gate_that_was_not_measured_says_so(make: Make, report: Any) -> None:
    make("teacher", 2.0, steps=64)
    series = pool(collect(Path("runs")))
    others: list[dict[str, Any]] = [
        {"stage": "tsr"}, {"steps": 8}, {"method": "straight"}, {"condition": "real"}, {"group": "train"},
        {"wording": "unseen"}, {"two": 1.0}, {"n": 17}, {"what": "chain"}, {"labels": {"gap": "with"}},
    ]  # fmt: skip
    for wrong in others:
        found = outcome(gate(**wrong), series)
        assert (found.value, found.met, found.why) == (None, None, "not measured"), wrong
    found = outcome(gate(reference={"steps": 8}), series)
    assert (found.value, found.met, found.why) == (None, None, "reference not measured")
    files = report()
    assert {g["met"] for g in json.loads(files["results.json"])["gates"]} == {None}
    assert "| <= 1.05 | not measured |  | open |" in files["results.md"].decode()


@pytest.mark.parametrize(("value", "said"), [(1.0, "1"), (1.0004, "1.0004"), (0.99999, "0.99999"), (1.45, "1.45")])
def test_a_number_stands_on_the_side_of_its_target(value: float, said: str) -> None:
    assert apart(value, 1.0) == said


def test_a_ratio_gate_divides_the_right_rows(make: Make) -> None:
    groups = {("made", "all"): 2.0, ("made", "train"): 50.0, ("real", "all"): 70.0}
    make("teacher64", steps=64, numbers=groups)
    make("teacher8", 4.0, steps=8)
    make("student", steps=8, numbers={**groups, ("made", "all"): 2.08}, label={"method": "progressive"})
    make("unseen", 100.0, steps=64, wording="unseen")
    root = make("rival", 1.0, steps=8, label={"method": "straight"}).parent
    series = pool(collect(root))
    student = gate(method="progressive", steps=8, reference={"method": "teacher", "steps": 64})
    found = outcome(student, series)
    assert found.value == pytest.approx(1.04) and found.met is True
    assert (found.n, found.seeds) == (16, (0,))
    assert outcome(gate(method="teacher", steps=8, reference={"steps": 64}), series).met is False
    vague = gate(method="progressive", steps=8, reference={"method": "teacher", "steps": None})
    assert outcome(vague, series).why == "several measured: teacher, 64 steps; teacher, 8 steps"
    near = gate(method="progressive", steps=8, against="difference", reference={"method": "teacher"})
    assert outcome(near, series).value == pytest.approx(2.08 - 4)
    real = outcome(gate(method="teacher", steps=64, reference={"condition": "real"}), series)
    assert real.value == pytest.approx(2 / 70)


def test_a_reference_is_of_the_same_seeds_and_as_many_clips(make: Make) -> None:
    for seed, (mine, other) in enumerate(((2.0, 1.0), (3.0, 2.0))):
        make(f"s{seed}", mine, seed=seed, label={"method": "progressive"})
        root = make(f"t{seed}", other, seed=seed).parent
    student = gate(method="progressive", reference={"method": "teacher"}, target=2)
    found = outcome(student, pool(collect(root)))
    assert found.value == pytest.approx(2.5 / 1.5) and found.std == pytest.approx(stdev([2.0, 1.5])) and found.met
    make("s2", 9.0, seed=2, label={"method": "progressive"})
    assert outcome(student, pool(collect(root))).why == "reference not measured"
    make("t2", 9.0, seed=2, n=32)
    assert outcome(student, pool(collect(root))).why == "reference not measured"


def test_of_several_evaluations_that_of_the_most_clips_decides(make: Make) -> None:
    make("few", 9.0, n=4)
    root = make("many", 1.0, n=64).parent
    assert outcome(gate(), pool(collect(root))).value == 1.0
    make("as many", 2.0, n=64, label={"method": "straight"})
    found = outcome(gate(), pool(collect(root)))
    assert found.met is None and "straight, 8 steps" in found.why


@pytest.mark.parametrize("wrong", [{"relation": "<"}, {"against": "sum"}, {"reference": {"stepz": 3}}, {"steps": "x"}])
def test_gates_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        gate(**wrong)


def test_the_gates_and_columns_of_the_project_name_measures_and_stages_that_there_are() -> None:
    cfg = parse(compose("report", []), ReportConfig)
    assert cfg.gates and cfg.columns and set(cfg.expected) >= {"teacher", "progressive"}
    for named in (*cfg.gates, *cfg.columns):
        assert named.metric in measures()
    assert {found.stage for found in cfg.gates} <= set(cfg.stages)


# the page ------------------------------------------------------------------------------------------------------------


def test_the_page_says_what_is_lacking_and_holds_the_notes_as_they_are(make: Make, report: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("- Rings | break\n\n  <b>often</b>.\n", encoding="utf-8")
    make("teacher", steps=8, seconds=0.25)
    text = report("stages=[base,tsr]", "expected.progressive=[8]")["results.md"].decode()
    assert "Not measured: teacher at 64, 32, 16, 4; progressive at 8; consistency at 8, 4, 2, 1;" in text
    assert "| teacher | 8 | 16 | 1 | 0.25 (cpu, 2 threads) | 16 | `abababab` |" in text
    assert "## tsr\n\nNot measured." in text and "## The whole chain\n\nNot measured." in text
    assert "## What still goes wrong\n\n- Rings | break\n\n  <b>often</b>.\n\n## Commands" in text
    assert "cascade evaluate seed=0 n=16" in text


def test_gap_training_has_a_table_of_its_own(make: Make) -> None:
    root = make("chain", 5.0, what="chain", stages=("base", "tsr"), label={"gap": "with"}).parent
    make("plain", 4.0, what="chain", stages=("base", "tsr"))
    assert gap_table([s for s in pool(collect(root)) if not s.label], LAYOUT) == "Not measured."
    make("without", 6.0, what="chain", stages=("base", "tsr"), label={"gap": "without"})
    lines = gap_table(pool(collect(root)), LAYOUT).splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| tsr in the chain", "with"], ["| tsr in the chain", "without"],
    ]  # fmt: skip
    text = page(pool(collect(root)), [], LAYOUT, set(), "")
    assert "base → tsr" in text
    assert "| method | steps | FVD ↓, base | FVD ↓, tsr | n |" in text and "| teacher | 8+8 | 4 | 4 | 16 |" in text


def test_two_compositions_stand_apart_and_one_stands_alone(make: Make) -> None:
    column = Column(metric="fvd", name="fvd", title="FVD", groups=["train", "held_out"])
    make("both", numbers={("made", "train"): 1.0, ("made", "held_out"): 2.0, ("made", "all"): 1.5})
    root = make("one", numbers={("made", "train"): 3.0}, split="train").parent
    text = page(pool(collect(root)), [], Layout(stages=["base"], columns=[column]), set(), "")
    assert "| 1 / 2 |" in text and "| 3 / not measured |" in text
    assert missing([], Layout(stages=[], columns=[])) == ""


# real evaluations ----------------------------------------------------------------------------------------------------


def test_real_evaluations_become_a_page_and_measures_beside_the_card(
    make_stage: Any, source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Any
) -> None:
    monkeypatch.setattr(evaluate, "text_source", lambda cfg: source)
    stage = make_stage("ssr", std=0.1, shape=Shape(frames=4, height=16, width=16), train=None)
    folder = tmp_path / "weights" / "ssr"
    config = {"kind": "ssr", "net": plain(stage.cfg.net), "diffusion": plain(stage.cfg.diffusion), "method": "straight"}
    checkpoint.save(folder, stage.net.state_dict(), config, card="# ssr\n")
    for steps in (1, 2):
        for seed in (0, 1):
            cfg = stage.cfg
            cfg.weights, cfg.sampler = str(folder), Sampler(steps=steps)
            run = Given(out=tmp_path / f"runs/{steps}-{seed}", seed=seed)
            own, on, said = {"evaluate": {"n": 4}}, Device(device="cpu"), f"typed {steps} {seed}"
            evaluate.stage_task(Request(cfg, plugin("ssr"), run, on, TextConfig(encoder="x"), DataConfig(), own, said))  # type: ignore[arg-type]
    before = checkpoint.load(folder).hash
    files = report("cards=weights")
    text, tree = files["results.md"].decode(), json.loads(files["results.json"])
    assert "typed 2 1" in text and "results/ssr-curves.png" in text and "| straight | 2 | 2 |" in text
    assert files["results/ssr-clips.png"][:4] == files["results/ssr-curves.png"][:4] == b"\x89PNG"
    assert store.problems(Path("out/results"), "pictures") == []
    found = json.loads((tmp_path / "runs/2-1/report.json").read_bytes())
    mine = next(s for s in tree["series"] if s["stages"]["ssr"]["settings"]["sampler"]["steps"] == 2)
    values = {
        (number["metric"], number["name"], number["condition"], number["group"]): number["values"][1]["value"]
        for number in mine["stages"]["ssr"]["numbers"]
    }
    assert values == {(r["metric"], r["name"], r["condition"], r["group"]): r["value"] for r in found["rows"]}
    assert all(run["timing"]["seconds"]["ssr"] > 0 for run in mine["runs"])
    card = (folder / "MEASURES.md").read_text()
    assert before in card and "| straight | 1 |" in card and "gain" in card
    assert checkpoint.load(folder).hash == before  # the weights keep their name
    assert write_cards([], [], tmp_path / "weights") == []
