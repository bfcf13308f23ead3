from __future__ import annotations

import inspect
import json
import weakref
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade import assets, checkpoint, store
from cascade.ask import Request
from cascade.chain import Chain, Device
from cascade.compose import compose
from cascade.config import kinds, parse, plain, plugin
from cascade.data.captions import held_out
from cascade.data.shapes import ShapesConfig
from cascade.data.source import DataConfig, World
from cascade.errors import ConfigError
from cascade.evaluation import evaluate
from cascade.evaluation.evaluate import judge_chain, judge_stage
from cascade.evaluation.exam import Case, EvaluateConfig, Exam, measure, measures
from cascade.evaluation.marks import picture, table, write
from cascade.metrics import lpips
from cascade.noise import Noise
from cascade.pipeline import Runner
from cascade.request import Given, Job, jobs_of
from cascade.sampling.sampler import Sampler
from cascade.stage import Stage
from cascade.text import Text, TextConfig, text_source
from cascade.video import Shape, Video
from cascade.windows import Windows

WORLD = World(ShapesConfig())
LARGE = {"shape": Shape(frames=4, height=24, width=24)}


class Oracle(Stage):
    """A stage that makes of its input what its rule spreads it to, and of a prompt the real clip of its number."""

    def sample(self, low: Video | None, text: Text, negative: Text | None, noise: Noise, progress: Any = None) -> Video:
        if low is not None:
            shape = self.rule.output(low.shape, self.cfg)
            return Video(self.rule.condition(low, self.cfg, shape)[0], self.cfg.fps)
        assert isinstance(self.net, Films)
        return Video(self.net.next(len(text.mask)), self.cfg.fps)


class Films(torch.nn.Module):
    """Instead of a network: real clips in the order of the questions."""

    def __init__(self, cfg: EvaluateConfig, shape: Shape, fps: float) -> None:
        super().__init__()
        exam = Exam(WORLD, cfg)
        self.clips = exam.films(exam.questions(shape, fps), shape, fps)
        self.done = 0

    def next(self, count: int) -> torch.Tensor:
        self.done += count
        return self.clips[self.done - count : self.done]


# measures and settings


@pytest.mark.parametrize("kind", kinds())
def test_every_measure_that_a_kind_names_exists_and_asks_for_what_there_is(kind: str) -> None:
    known = {field.name for field in fields(Case)}
    for name in plugin(kind).METRICS:
        assert set(inspect.signature(measure(name).judge).parameters) <= known


def test_measures_are_the_files_that_judge() -> None:
    assert {"attributes", "consistency", "fidelity", "fvd", "known", "motion", "outline"} <= set(measures())
    assert "features" not in measures()
    with pytest.raises(ConfigError, match="fidelty") as error:
        measure("fidelty")
    assert error.value.fix == "write fidelity"


@pytest.mark.parametrize("wrong", [{"n": 0}, {"batch": 0}, {"two": 1.5}, {"split": "test"}, {"wording": "rude"}])
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        parse(wrong, EvaluateConfig, "evaluate")


def test_the_verb_composes_and_refuses_what_it_does_not_know() -> None:
    tree = compose("evaluate", ["n=8", "split=held_out"])
    cfg = parse({key: tree[key] for key in tree if key in plain(EvaluateConfig())}, EvaluateConfig)
    assert (cfg.n, cfg.split, cfg.metrics) == (8, "held_out", None)
    with pytest.raises(ConfigError, match="sead") as error:
        evaluate.chain_verb(compose("evaluate", ["sead=1"]))
    assert error.value.fix == "seed"
    with pytest.raises(ConfigError, match="no measure"):
        evaluate.chain_verb(compose("evaluate", ["metrics=[beauty]"]))
    with pytest.raises(ConfigError, match="image and given are for a stage alone"):
        evaluate.chain_verb(compose("evaluate", ["given=true"]))


# what is asked


def test_both_splits_are_asked_in_turn_and_are_what_they_say() -> None:
    exam = Exam(WORLD, EvaluateConfig(n=20))
    questions = exam.questions(Shape(frames=2, height=8, width=8), 4.0)
    assert [question.group for question in questions] == ["train", "held_out"] * 10
    assert all(held_out(q.spec) == (q.group == "held_out") for q in questions if q.spec is not None)
    alone = Exam(WORLD, EvaluateConfig(n=5, split="held_out")).questions(Shape(frames=2, height=8, width=8), 4.0)
    assert {question.group for question in alone} == {"held_out"}


def test_questions_do_not_depend_on_how_many_there_are_and_follow_the_seed() -> None:
    shape = Shape(frames=2, height=8, width=8)
    few, many = (Exam(WORLD, EvaluateConfig(n=n)).questions(shape, 4.0) for n in (4, 12))
    assert many[:4] == few
    assert Exam(WORLD, EvaluateConfig(n=4, seed=1)).questions(shape, 4.0) != few
    unseen = Exam(WORLD, EvaluateConfig(n=4, wording="unseen")).questions(shape, 4.0)
    assert [q.spec for q in unseen] == [q.spec for q in few]
    assert all(a.prompt != b.prompt for a, b in zip(unseen, few, strict=True))


def test_a_film_is_the_same_at_every_frame_rate_and_another_one_is_another() -> None:
    exam = Exam(WORLD, EvaluateConfig(n=3))
    questions = exam.questions(Shape(frames=4, height=16, width=16), 4.0)
    slow = exam.films(questions, Shape(frames=4, height=16, width=16), 4.0)
    fast = exam.films(questions, Shape(frames=8, height=16, width=16), 8.0)
    assert torch.equal(slow, fast[:, :, ::2])
    other = exam.films(questions, Shape(frames=4, height=16, width=16), 4.0, "real")
    assert all((a != b).any() for a, b in zip(slow, other, strict=True))


# one stage


@pytest.mark.parametrize("kind", ["tsr", "interp", "ssr"])
def test_a_stage_that_is_a_baseline_gains_nothing_over_it(kind: str, make_stage: Any, encode: Any) -> None:
    stage = make_stage(kind)
    report = judge_stage(Oracle(stage.cfg, stage.rule, stage.net), WORLD, encode, EvaluateConfig(n=4, batch=3))
    found = {(row.name, row.group): row for row in report.rows if row.metric == "fidelity"}
    name = "bicubic" if kind == "ssr" else "blending"
    assert found[f"gain_{name}", "all"].value == pytest.approx(0, abs=1e-4)
    assert found[f"gain_{name}", "all"].n == 4 and found["psnr", "train"].n == found["psnr", "held_out"].n == 2
    assert {row.condition for row in report.rows} == {"augment=0"}
    if kind != "ssr":
        assert {row.value for row in report.rows if row.metric == "known"} == {0.0}
    assert report.skipped == {}


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_is_judged_with_its_measures_and_every_number_is_stated(
    kind: str, make_stage: Any, encode: Any, tmp_path: Path
) -> None:
    stage = make_stage(kind, augment=0.25)
    report = judge_stage(stage, WORLD, encode, EvaluateConfig(n=4), weights="abc")
    assert {row.metric for row in report.rows} == set(stage.rule.METRICS)
    expected = {"made", "real"} if kind == "base" else {"augment=0", "augment=0.25"}
    assert {row.condition for row in report.rows} == expected
    assert all(row.n > 0 and row.shape == str(stage.cfg.shape) and row.seed == 0 for row in report.rows)
    write(report, tmp_path / "out")
    assert store.problems(tmp_path / "out", "report") == []
    tree = json.loads((tmp_path / "out/report.json").read_bytes())
    assert len(tree["rows"]) == len(report.rows) and len(tree["clips"]) == 4
    assert tree["subject"]["stages"][kind]["weights"] == "abc" and tree["settings"]["n"] == 4
    assert (tmp_path / "out/report.png").read_bytes()[:4] == b"\x89PNG"
    assert all(f"{row.metric}.{row.name}" in table(report) for row in report.rows)


def test_real_clips_in_place_of_made_ones_are_right(make_stage: Any, encode: Any) -> None:
    cfg = EvaluateConfig(n=8, batch=3)
    stage = make_stage("base", fps=2.0, **LARGE)
    oracle = Oracle(stage.cfg, stage.rule, Films(cfg, stage.cfg.shape, stage.cfg.fps))
    report = judge_stage(oracle, WORLD, encode, cfg)
    found = {(row.metric, row.name, row.condition): row.value for row in report.rows if row.group == "all"}
    assert found["attributes", "background", "made"] == found["attributes", "background", "real"] == 1
    assert found["attributes", "colour", "made"] >= 0.8
    assert found["fvd", "fvd", "made"] == pytest.approx(0, abs=1e-3)
    assert found["fvd", "fvd", "real"] > 0.01


def test_clips_without_ground_truth_are_judged_by_what_remains(make_stage: Any, encode: Any, clips: Any) -> None:
    report = judge_stage(make_stage("base"), clips, encode, EvaluateConfig(n=3))
    assert set(report.skipped) == {"attributes", "outline"} and {row.metric for row in report.rows} == {"fvd"}
    assert {row.group for row in report.rows} == {"clips"}
    assert "attributes is left out" in table(report)
    tsr = judge_stage(make_stage("tsr"), clips, encode, EvaluateConfig(n=3))
    assert {row.metric for row in tsr.rows} >= {"fidelity", "known"}


def test_a_measure_that_lacks_something_here_is_left_out_with_one_line(
    make_stage: Any, encode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(assets.VARIABLE, str(tmp_path))
    cfg = EvaluateConfig(n=2, metrics=["i3d", "inception", "lpips", "seam", "drift"])
    report = judge_stage(make_stage("base"), WORLD, encode, cfg)
    assert {row.metric for row in report.rows} == {"drift"} and report.about == {}
    assert {"cascade assets" in report.skipped[name] for name in ("i3d", "inception", "lpips")} == {True}
    assert "windows" in report.skipped["seam"]
    assert sum("is left out" in line for line in table(report).splitlines()) == 4


@pytest.mark.parametrize("kind", ["base", "tsr"])
def test_a_stage_in_windows_is_judged_at_their_borders(kind: str, make_stage: Any, encode: Any) -> None:
    stage = make_stage(kind, std=0.1, shape=Shape(frames=16, height=8, width=8), windows=Windows(frames=8))
    report = judge_stage(stage, WORLD, encode, EvaluateConfig(n=2, split="train", metrics=["seam"]))
    found = {(row.name, row.condition): row for row in report.rows}
    condition = "made" if kind == "base" else "augment=0"
    assert found["seam", condition].value > 0 and found["truth", condition].n == 2


def test_an_image_is_the_first_frame_given(make_stage: Any, encode: Any) -> None:
    reports = []
    for image in (True, False):
        cfg = EvaluateConfig(n=3, image=image, given=not image, metrics=["known", "completion"])
        stage = make_stage("base", std=0.1, known=1.0, known_kinds=["first"])
        reports.append([row.value for row in judge_stage(stage, WORLD, encode, cfg).rows])
    assert reports[0] == reports[1]


@pytest.mark.parametrize("kind", ["ends", "some", "hole"])
def test_what_is_given_comes_out_as_it_went_in(kind: str, make_stage: Any, encode: Any) -> None:
    cfg = EvaluateConfig(n=3, given=True, metrics=["known", "completion", "fidelity"])
    report = judge_stage(make_stage("base", std=0.1, known=1.0, known_kinds=[kind]), WORLD, encode, cfg)
    made = {row.name: row.value for row in report.rows if row.condition == "made"}
    assert made["error"] == 0.0 and made["gain_blending"] < 0
    assert "fidelity" in report.skipped


def test_a_stage_that_is_never_given_anything_is_not_judged_by_it(make_stage: Any, encode: Any) -> None:
    with pytest.raises(ConfigError, match="nothing is given"):
        judge_stage(make_stage("base", known=0.0), WORLD, encode, EvaluateConfig(n=2, given=True, metrics=["known"]))


def test_cut_short_and_run_again_it_is_the_same_report(
    make_stage: Any, encode: Any, tmp_path: Path, one_thread: None
) -> None:
    stage, cfg = make_stage("tsr", std=0.1), EvaluateConfig(n=5, batch=2)
    whole = judge_stage(stage, WORLD, encode, cfg)
    asked: list[str] = []

    def failing(prompts: list[str]) -> Text:
        asked.extend(prompts)
        if len(asked) > 2:
            raise KeyboardInterrupt
        return encode(prompts)  # type: ignore[no-any-return]

    with pytest.raises(KeyboardInterrupt):
        judge_stage(stage, WORLD, failing, cfg, work=tmp_path)
    asked.clear()

    def counting(prompts: list[str]) -> Text:
        asked.extend(prompts)
        return encode(prompts)  # type: ignore[no-any-return]

    again = judge_stage(stage, WORLD, counting, cfg, work=tmp_path)
    assert len(asked) == 3
    assert store.canonical(again.tree()) == store.canonical(whole.tree()) and again.sheet == whole.sheet


def test_what_was_left_out_is_judged_once_it_is_there(
    make_stage: Any, source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(evaluate, "text_source", lambda cfg: source)
    monkeypatch.setenv(assets.VARIABLE, str(tmp_path / "assets"))
    cfg = saved(make_stage("ssr", std=0.1), tmp_path)
    run, own = Given(out=tmp_path / "out"), {"evaluate": {"n": 1, "metrics": ["lpips"]}}
    ask = Request(cfg, plugin("ssr"), run, Device(device="cpu"), TextConfig(encoder="x"), DataConfig(), own)  # type: ignore[arg-type]
    evaluate.stage_task(ask)
    assert "lpips is left out" in capsys.readouterr().out
    state = {name: torch.ones_like(tensor) for name, tensor in lpips.Lpips().state_dict().items()}
    checkpoint.save(tmp_path / "assets/lpips", state, {"kind": "lpips", "layout": assets.LAYOUT})
    evaluate.stage_task(ask)
    assert "lpips.lpips" in capsys.readouterr().out


def test_the_task_writes_a_report(
    stage_config: Any, make_stage: Any, source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(evaluate, "text_source", lambda cfg: source)
    cfg = saved(make_stage("ssr", std=0.1, augment=0.1), tmp_path)
    run = Given(out=tmp_path / "out", seed=3)
    own = {"evaluate": {"n": 2, "batch": 1}}
    ask = Request(cfg, plugin("ssr"), run, Device(device="cpu"), TextConfig(encoder="x"), DataConfig(), own)  # type: ignore[arg-type]
    evaluate.stage_task(ask)
    first = (tmp_path / "out/report.json").read_bytes()
    assert json.loads(first)["settings"]["seed"] == 3
    assert "fidelity.gain_bicubic" in capsys.readouterr().out
    evaluate.stage_task(ask)
    assert (tmp_path / "out/report.json").read_bytes() == first
    ask.own = {"evaluate": {"metrics": ["beauty"]}}
    with pytest.raises(ConfigError, match="no measure"):
        evaluate.stage_task(ask)


@pytest.mark.parametrize("negative", [None, ""])
def test_what_is_judged_is_what_is_generated(
    negative: str | None, make_stage: Any, net_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clip of a prompt and seed, whatever no text is."""
    text, sampler = TextConfig(negative=negative), Sampler(steps=2, guidance=3.0)
    cfg = saved(make_stage("base", std=0.2, sampler=sampler, net=net_config(text=128)), tmp_path)
    made, judged, plain_sample = Stage(cfg, plugin("base")), [], Stage.sample  # type: ignore[arg-type]
    checkpoint.apply(made.net, checkpoint.load(Path(cfg.weights)).state, "here")

    def watched(self: Stage, *args: Any, **more: Any) -> Video:
        judged.append(plain_sample(self, *args, **more))
        return judged[-1]

    monkeypatch.setattr(Stage, "sample", watched)
    own = {"evaluate": {"n": 1, "metrics": ["drift"]}}
    run, on = Given(out=tmp_path / "out", seed=3), Device(device="cpu")
    evaluate.stage_task(Request(cfg, plugin("base"), run, on, text, DataConfig(), own))  # type: ignore[arg-type]
    (asked,) = Exam(WORLD, EvaluateConfig(n=1, seed=3)).questions(cfg.shape, cfg.fps)
    chain = Chain([cfg], [plugin("base")], text)  # type: ignore[list-item]
    runner = Runner(chain, text_source(text), on, seed=3)
    (clip,) = runner.sample(made, [Job(asked.prompt, asked.copy, tmp_path)], [None], lambda step: None)
    assert torch.equal(judged[0].frames, clip.frames)
    away = replace(runner, negative="", _texts={})
    (other,) = away.sample(made, [Job(asked.prompt, asked.copy, tmp_path)], [None], lambda step: None)
    assert torch.equal(other.frames, clip.frames) == (negative == "")


def test_a_label_and_the_command_are_told_and_change_no_answer(
    make_stage: Any, source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "text_source", lambda cfg: source)
    cfg, run = saved(make_stage("ssr", std=0.1), tmp_path), Given(out=tmp_path / "out")

    def judge(command: str, **own: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        own = {"evaluate": {"n": 2, "batch": 1, **own}}
        evaluate.stage_task(
            Request(cfg, plugin("ssr"), run, Device(device="cpu"), TextConfig(encoder="x"), DataConfig(), own, command)  # type: ignore[arg-type]
        )
        report, timing = (json.loads((tmp_path / "out" / name).read_bytes()) for name in ("report.json", "timing.json"))
        return report, timing

    first, time = judge("one")
    assert time["seconds"]["ssr"] > 0 and time["calls"] == {"ssr": 2} and (time["device"], time["batch"]) == ("cpu", 1)
    monkeypatch.setattr(Stage, "sample", None)  # all answers are there
    again, same = judge("two", label={"method": "progressive"})
    assert same == time and again["rows"] == first["rows"]
    assert again["subject"].pop("label") == {"method": "progressive"} and first["subject"].pop("label") == {}
    assert again["subject"] == first["subject"] and (first["command"], again["command"]) == ("one", "two")
    assert {"report.json", "report.png", "strips/input.png", "strips/augment=0.png", "strips/truth.png"} == set(
        store.manifest(tmp_path / "out")["files"]
    )


def test_what_was_judged_is_told_with_its_work_and_what_its_weights_record(make_stage: Any, encode: Any) -> None:
    stage = make_stage("base", sampler=Sampler(steps=3, guidance=2.0))
    config = {"kind": "base", "net": {}, "steps": 3, "teacher": "abc"}
    report = judge_stage(stage, WORLD, encode, EvaluateConfig(n=2), weights="w", config=config)
    told = report.subject["stages"]["base"]
    assert (told["evaluations"], told["weights"], told["facts"]) == (6, "w", {"steps": 3, "teacher": "abc"})
    assert (report.subject["device"], report.subject["dtype"]) == ("cpu", "float32")
    assert [clips for clips, _ in report.laps["base"]] == [2]
    assert "laps" not in report.tree() and "strips" not in report.tree()


def saved(stage: Stage, folder: Path) -> Any:
    """The stage's configuration, its weights written to `folder`."""
    cfg = stage.cfg
    checkpoint.save(
        folder / cfg.name,
        stage.net.state_dict(),
        {"kind": cfg.kind, "net": plain(cfg.net), "diffusion": plain(cfg.diffusion)},
    )
    cfg.weights = str(folder / cfg.name)
    return cfg


# a chain


@pytest.fixture
def runner(make_stage: Any, source: Any, tmp_path: Path) -> Runner:
    base = make_stage("base", std=0.1, fps=4.0)
    tsr = make_stage("tsr", std=0.1, fps=8.0, shape=Shape(frames=8, height=8, width=8), train=None)
    cfgs = [saved(stage, tmp_path / "weights") for stage in (base, tsr)]
    chain = Chain(cfgs, [plugin("base"), plugin("tsr")], TextConfig(encoder="x"))  # type: ignore[list-item]
    chain.check()
    return Runner(chain, source, Device(device="cpu"))


def test_a_chain_is_judged_stage_by_stage_and_makes_nothing_twice(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    report = judge_chain(runner, WORLD, EvaluateConfig(n=4, batch=3), out)
    assert list(report.subject["stages"]) == ["base", "tsr"]
    assert all(len(stage["weights"]) == 64 for stage in report.subject["stages"].values())
    assert {name: len(laps) for name, laps in report.laps.items()} == {"base": 4, "tsr": 4}
    found = {(row.stage, row.metric, row.name, row.condition, row.group): row for row in report.rows}
    for stage, shape in (("base", "4x8x8"), ("tsr", "8x8x8")):
        for group, n in (("train", 2), ("held_out", 2), ("all", 4)):
            row = found[stage, "attributes", "colour", "made", group]
            assert (row.n, row.shape) == (n, shape)
    assert all(clip["group"] in ("train", "held_out") for clip in report.clips)
    assert "tsr: 8x8x8" in table(report) and "base" in table(report)

    def sampled(*args: Any) -> None:
        raise AssertionError("a clip was made again")

    monkeypatch.setattr(Runner, "sample", sampled)
    again = judge_chain(runner, WORLD, EvaluateConfig(n=4, batch=3), out)
    assert store.canonical(again.tree()) == store.canonical(report.tree())
    judge_chain(runner, WORLD, EvaluateConfig(n=2, batch=3), out)


def test_of_many_clips_those_that_are_worked_on_are_in_memory(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    alive, plain_sample = [], Runner.sample

    def sample(self: Runner, *args: Any) -> list[Video]:
        alive.append(sum(frames() is not None for frames in made))
        videos = plain_sample(self, *args)
        made.extend(weakref.ref(video.frames) for video in videos)
        return videos

    monkeypatch.setattr(Runner, "sample", sample)
    jobs = jobs_of(["a red circle"], 5, tmp_path / "out")
    found = runner.run(jobs, None)
    assert len(alive) == 10 and max(alive) <= 1
    held = replace(runner, disk=False).run(jobs, None)
    assert [*found] == [*held] == [job.directory for job in jobs]
    assert all(torch.equal(found[path].frames, held[path].frames) and found[path].fps == 8 for path in found)


@pytest.mark.parametrize("metrics", [[], ["known"]])
def test_a_chain_of_which_nothing_can_be_measured_is_shown(runner: Runner, metrics: list[str], tmp_path: Path) -> None:
    report = judge_chain(runner, WORLD, EvaluateConfig(n=1, metrics=metrics), tmp_path / "out")
    assert not report.rows and picture(report) and ("known is left out" in table(report)) == (metrics == ["known"])
