"""Laws of recipes: order, references, resuming, failure."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade import checkpoint, recipe, store
from cascade.compose import compose
from cascade.config import parse
from cascade.errors import CascadeError, ConfigError, InputError
from cascade.recipe import Recipe, Run, Step, Task, is_done, resolve, ship, tasks_of

STEPS = {
    "students": {"stage": "tiny/base", "task": "distill", "set": ["distill.teacher=@base"]},
    "judge": {"stage": "tiny/base", "task": "evaluate", "each": [8, 4], "set": ["weights=@students/{}", "steps={}"]},
    "base": {"stage": "tiny/base", "set": ["text.encoder=@text"], "gpu": ["train.batch=9"], "minutes": {"gpu": 3}},
    "text": {"fit": "text"},
}


def read(**changes: Any) -> Recipe:
    made: Recipe = parse({"steps": STEPS, **changes}, Recipe)
    return made


def test_every_step_follows_what_it_needs() -> None:
    tasks = tasks_of(read(), "gpu")
    order = list(tasks)
    assert sorted(order) == ["base", "judge-4", "judge-8", "students", "text"]
    assert all(order.index(need) < order.index(name) for name, task in tasks.items() for need in task.needs)
    assert tasks["judge-8"].words == ("weights=@students/08", "steps=8")


def test_a_profile_adds_its_words_alone() -> None:
    assert "train.batch=9" in tasks_of(read(), "gpu")["base"].words
    assert "train.batch=9" not in tasks_of(read(), "cpu")["base"].words


def test_a_step_takes_over_what_it_does_not_say() -> None:
    steps = {
        "b": {"like": "a", "set": ["x=3", "z=4"], "minutes": {"cpu": 7}},
        "a": {"stage": "s", "task": "distill", "set": ["x=1", "y=2"], "cpu": ["n=1"], "minutes": {"cpu": 5}},
        "c": {"like": "b", "stage": "t", "cpu": ["n=2"]},
    }
    tasks = tasks_of(parse({"steps": steps}, Recipe), "cpu")
    assert tasks["b"].words == ("x=3", "y=2", "z=4", "n=1") and tasks["b"].step.task == "distill"
    assert tasks["c"].words == ("x=3", "y=2", "z=4", "n=2") and tasks["c"].step.stage == "t"
    assert [tasks[name].minutes for name in "abc"] == [5, 7, 7]


def test_the_readme_says_what_the_recipe_takes() -> None:
    tree = compose("train", ["recipe=tiny"])
    own: Recipe = parse({name: tree[name] for name in ("steps", "every", "ships")}, Recipe)
    cpu, gpu = (tasks_of(own, profile).values() for profile in ("cpu", "gpu"))
    hours = [sum(task.minutes for task in tasks) / 60 for tasks in (cpu, gpu)]
    there = sum(task.minutes for task in gpu if task.step.gpu)
    said = (
        f"{hours[0]:.0f} hours on two CPU cores, {hours[1]:.1f} on a machine with one H200, {there:.0f} minutes of them"
    )
    assert said in (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_what_a_step_says_itself_overrules_a_profile_of_another(tmp_path: Path) -> None:
    steps = {"a": {"stage": "s", "cpu": ["n=1", "m=2"]}, "b": {"like": "a", "set": ["n=3"]}}
    assert tasks_of(parse({"steps": steps}, Recipe), "cpu")["b"].words == ("n=3", "m=2")


def test_a_fit_takes_over_all_words_or_none() -> None:
    steps = {
        "a": {"fit": "merge", "set": ["p", "q", "q", "0.5"]},
        "b": {"like": "a", "minutes": {"cpu": 1}},
        "c": {"like": "a", "set": ["r", "q", "q"]},
    }
    tasks = tasks_of(parse({"steps": steps}, Recipe), "cpu")
    assert tasks["b"].words == ("p", "q", "q", "0.5") and tasks["c"].words == ("r", "q", "q")


def test_only_brings_what_is_needed() -> None:
    assert list(tasks_of(read(only=["base"]), "cpu")) == ["text", "base"]
    assert {"judge-8", "judge-4"} < tasks_of(read(only=["judge"]), "cpu").keys()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"a": {"stage": "x", "set": ["@b"]}}, "there is no step b"),
        ({"a": {"stage": "x", "set": ["@b"]}, "b": {"stage": "x", "set": ["@a"]}}, "a needs b needs a"),
        ({"a": {"like": "b"}}, "a is like b"),
        ({"a": {"like": "b"}, "b": {"like": "a"}}, "b is like a"),
        ({"a": {"like": "b", "fit": "text"}, "b": {"stage": "x"}}, "a is a fit, b is none"),
        ({"a": {"stage": "x", "fit": "text"}}, "stage and fit are x and text"),
        ({"a": {"fit": "nothing"}}, "fit is nothing, expected one of text, features, judge, merge"),
        ({"a": {"fit": "text", "set": ["@b"]}, "b": {"stage": "x", "task": "evaluate"}}, "@b, which makes no weights"),
        ({"../a": {"fit": "text"}}, r"steps names '\.\./a'"),
    ],
)
def test_what_cannot_run_is_refused(steps: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tasks_of(parse({"steps": steps}, Recipe), "cpu")


def test_references_become_folders(tmp_path: Path) -> None:
    assert resolve("a=@base", Path("runs/x")) == "a=./runs/x/base/weights"
    assert resolve("a=@base-d/08", tmp_path) == f"a={tmp_path}/base-d/08/weights"
    assert resolve("lr=1e-3", tmp_path) == "lr=1e-3"


@pytest.mark.parametrize("folder", ["plain", "two words, (one)=[x]", "it's \\", "{a: b}"])
def test_a_folder_of_any_name_is_told_to_a_step(folder: str, tmp_path: Path) -> None:
    out = tmp_path / folder
    task = Task("a", Step(stage="tiny/base"), ("train.init=@base", "train.steps=3"), 0.0)
    words = recipe.command(task, out)
    tree = compose("stage", words[3:])
    assert words[:3] == [sys.executable, "-m", "stages.base"]
    assert tree["out"] == str(out / "a") and tree["train"]["init"] == str(out / "base/weights")


@pytest.mark.parametrize(
    ("stage", "task", "word", "said"),
    [
        ("tiny/nothing", None, "seed=1", "nothing"),
        ("tiny/base", None, "train.stepz=3", "steps"),
        ("tiny/base", None, "train.steps=three", "steps"),
        ("tiny/base", "learn", "seed=1", "task is 'learn'"),
        ("tiny/base", "distill", "distill.steps=[16,9]", "steps is"),
        ("tiny/base", "evaluate", "evaluate.nn=3", "evaluate.n"),
        ("tiny/base", "evaluate", "evaluate.metrics=[beauty]", "beauty"),
        ("tiny/base", "tune", "seed=1", "starts from text"),
        ("tiny/base", None, "distill.steps=[16]", "task=train does not read distill"),
        ("tiny/base", None, "prompt=a circle, moving", "task=train does not read prompt"),
        ("tiny/ssr1", None, "train.pool=9 train.gap={stage: tiny/base, share: 1}", "train.gap.stage is tiny/base"),
        ("tiny/ssr1", "distill", "train.pool=9 train.gap={stage: tiny/base, share: 1}", "train.gap.stage is tiny/base"),
        ("tiny/ssr1", "tune", "tune.before={stage: tiny/base}", "tune.before.stage is tiny/base"),
        ("tiny/base", "distill", "distill.method=reward distill.steps=[4] distill.judge=null", "judge is missing"),
        ("tiny/base", "distill", "distill.method=reward distill.steps=[4] distill.truth=1", "truth=0"),
        ("tiny/base", "distill", "sampler.strength=0.5", "sampler.strength"),
        ("tiny/base", "distill", "sampler.guidance=9", "the student would know w from 0 to 4"),
    ],
)
def test_a_step_that_would_be_refused_stops_the_recipe_before_it_begins(
    stage: str, task: str | None, word: str, said: str, tmp_path: Path
) -> None:
    words = tuple(re.split(r" (?=[a-z.]+=)", word))
    steps = {"a": Task("a", Step(fit="text"), (), 0.0), "b": Task("b", Step(stage=stage, task=task), words, 0.0)}
    with pytest.raises(ConfigError, match=r"^recipe step b: ") as error:
        Run(steps, tmp_path, 1, lambda _: None)
    assert said in str(error.value) and not list(tmp_path.iterdir())


def test_a_prompt_is_free_text_to_a_recipe_too(tmp_path: Path) -> None:
    task = Task("a", Step(stage="tiny/base", task="sample"), ("prompt=it's a circle, moving left",), 0.0)
    assert recipe.command(task, tmp_path)[-1] == "prompt=it's a circle, moving left"


def script(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Every step runs `body`, which finds its name in sys.argv[1] and `out` in sys.argv[2]."""
    line = lambda task, out, config_dir=None: [sys.executable, "-c", body, task.name, str(out)]  # noqa: E731
    monkeypatch.setattr(recipe, "command", line)


def tasks(*names: str) -> dict[str, Task]:
    return {n: Task(n, Step(stage="x"), (f"@{names[i - 1]}",) if i else (), 0.0) for i, n in enumerate(names)}


def test_a_step_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, MAKES)
    (tmp_path / "as").write_text("1")
    said: list[str] = []
    Run(tasks("a", "b"), tmp_path, 1, said.append)()
    Run(tasks("a", "b", "c"), tmp_path, 1, said.append)()
    assert (tmp_path / "ran").read_text() == "abc" and said[-2].startswith("[3/3] c")


def test_other_words_are_another_step(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a.done").write_text(json.dumps({"words": ["x=1"], "weights": {}}))
    assert is_done(Task("a", Step(stage="x"), ("x=1",), 0.0), tmp_path)
    assert not is_done(Task("a", Step(stage="x"), ("x=2",), 0.0), tmp_path)


def test_a_damaged_mark_is_named(tmp_path: Path) -> None:
    for broken in (b"", b"{", b"[1]", b"\xff"):
        (tmp_path / "a.done").write_bytes(broken)
        with pytest.raises(InputError, match=r"a\.done: is not"):
            is_done(tasks("a")["a"], tmp_path)


MAKES = """
import sys
from pathlib import Path
from cascade import store
out = Path(sys.argv[2])
store.commit(out / sys.argv[1] / "weights", {"x": (out / "as").read_bytes()}, kind="x", replace=True)
open(sys.argv[2] + "/ran", "a").write(sys.argv[1])
"""


def test_a_step_is_done_again_when_what_it_was_made_of_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, MAKES)
    (tmp_path / "as").write_text("1")
    for words, ran in ((("x=1",), "ab"), (("x=1",), "ab"), (("x=2",), "abab")):
        (tmp_path / "as").write_text(words[0])
        mine = tasks("a", "b") | {"a": Task("a", Step(stage="x"), words, 0.0)}
        Run(mine, tmp_path, 1, lambda _: None)()
        assert (tmp_path / "ran").read_text() == ran
    for name, data in (("x", b""), ("manifest.json", b"\xff")):
        (tmp_path / "ran").unlink()
        (tmp_path / "a/weights" / name).write_bytes(data)
        Run(mine, tmp_path, 1, lambda _: None)()
        assert (tmp_path / "ran").read_text() == "ab"


JUDGES = """
import sys
from pathlib import Path
from cascade import store
out = Path(sys.argv[2])
store.commit_into(out / sys.argv[1], {"report.json": b"{}"}, kind="report", meta={"ran": (out / "ran").exists()})
open(out / "ran", "a").write(sys.argv[1])
"""


def test_a_judged_step_is_done_while_what_it_said_is_there_and_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, JUDGES)
    mine = {"a": Task("a", Step(stage="x", task="evaluate"), (), 0.0)}
    for lost, ran in (((), "a"), ((), "a"), (("manifest.json",), "aa"), (("manifest.json", "report.json"), "aaa")):
        for name in lost:
            (tmp_path / "a" / name).unlink()
        if len(lost) == 2:
            (tmp_path / "a").rmdir()
        Run(mine, tmp_path, 1, lambda _: None)()
        assert (tmp_path / "ran").read_text() == ran
    store.commit_into(tmp_path / "a", {"report.json": b"[]"}, kind="report")
    assert not is_done(mine["a"], tmp_path)


WAITS = """
import signal, sys, time
def heard(number, frame):
    open(sys.argv[2] + "/heard", "a").write(str(int(number)))
    sys.exit(143)
signal.signal(signal.SIGTERM, heard)
open(sys.argv[2] + "/ready", "w").write("")
time.sleep(60)
"""


def test_a_recipe_that_is_told_to_stop_tells_its_steps_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, WAITS)

    def stop(seconds: float) -> None:
        if (tmp_path / "ready").exists():
            sys.exit(143)

    monkeypatch.setattr(recipe.time, "sleep", stop)
    with pytest.raises(SystemExit):
        Run(tasks("a"), tmp_path, 1, lambda _: None)()
    assert (tmp_path / "heard").read_text() == "15" and not list(tmp_path.glob("*.done"))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failure_keeps_its_code_and_what_was_done(jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, "import sys; sys.exit(5 * (sys.argv[1] == 'b'))")
    said: list[str] = []
    with pytest.raises((CascadeError, SystemExit)) as caught:
        Run(tasks("a", "b", "c"), tmp_path, jobs, said.append)()
    assert caught.value.code == 5
    if jobs == 1:  # its own `error:` line stands on the terminal
        assert isinstance(caught.value, SystemExit) and f"delete {tmp_path / 'b'}" in said[-1]
    else:
        assert "step b failed, see" in str(caught.value) and f"delete {tmp_path / 'b'}" in str(caught.value)
    assert sorted(path.name for path in tmp_path.glob("*.done")) == ["a.done"]


def test_what_ships_is_one_of_the_steps_that_run(tmp_path: Path) -> None:
    steps = {"a": {"fit": "judge", "each": [8, 4], "set": ["{}"]}, "b": {"fit": "text"}}

    def tree(reference: str) -> dict[str, Any]:
        return {"steps": steps, "ships": {"base": reference}, "out": str(tmp_path), "only": ["b"]}

    for reference in ("@a-8", "@b"):
        recipe.verb(tree(reference))
    for reference in ("@a", "@a-2", "@c"):
        with pytest.raises(ConfigError, match=f"base ships {reference}, which is no step"):
            recipe.verb(tree(reference))


def test_what_ships_is_half_as_large_and_says_the_same(tmp_path: Path) -> None:
    state = {"a": torch.tensor([1.0, 0.1, 1e-3])}
    checkpoint.save(tmp_path / "base" / "weights", state, {"kind": "x"}, card="# base")
    (made,) = ship({"base": "@base", "tsr": "@tsr"}, tmp_path)
    weights = checkpoint.load(made)
    assert weights.state["a"].dtype is torch.float16 and weights.config == {"kind": "x"}
    assert torch.allclose(weights.state["a"].float(), state["a"], atol=1e-4)


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_the_shipped_recipe_is_whole(profile: str) -> None:
    """Every step's settings compose and are known; every part of the chain ships."""
    tree = compose("train", [])
    shipped = parse(tree, Recipe)
    assert {*compose("generate")["stages"], "text", "features"} <= shipped.ships.keys()
    for task in tasks_of(shipped, profile).values():
        recipe.command(task, Path("runs/train"))
