"""The level of noise on a stage's input: the rule that chooses it, the sweep, and the line that it is written to."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from cascade import checkpoint, store
from cascade.ask import Request
from cascade.chain import Device
from cascade.compose import compose
from cascade.config import package_root, parse, plain, plugin
from cascade.data.shapes import ShapesConfig
from cascade.data.source import DataConfig, World
from cascade.errors import ConfigError, InputError
from cascade.evaluation import tune
from cascade.evaluation.evaluate import judge_stage
from cascade.evaluation.exam import Exam, Question
from cascade.evaluation.marks import jackknife, left_out
from cascade.evaluation.sweep import Better, Input, TuneConfig, choose, sweep
from cascade.evaluation.tune import edited
from cascade.metrics.fidelity import pooled
from cascade.noise import generator
from cascade.request import Given
from cascade.settings import Before
from cascade.stage import Stage
from cascade.text import Text, TextConfig
from cascade.training.imitation import Imitation
from cascade.video import Video

WORLD = World(ShapesConfig())
STAGES = sorted((package_root() / "conf" / "stage").rglob("*.yaml"))


def settings(**changes: Any) -> TuneConfig:
    tree = compose("stage", ["stage=tiny/ssr1"])["tune"]
    return parse({**tree, "n": 4, "before": {"stage": "tiny/tsr"}, **changes}, TuneConfig, "tune")


def means(clips: Tensor) -> Tensor:
    """What `left_out` gives of a measure that is averaged, from its value for each clip."""
    n = len(clips)
    return torch.cat([clips.mean()[None], (clips.sum() - clips) / (n - 1)]).double()


def drawn(*key: Any, n: int = 12) -> Tensor:
    return torch.randn(n, generator=generator("tune", *key), dtype=torch.float64)


# the rule


def test_the_error_of_a_mean_is_the_standard_error() -> None:
    clips = drawn("mean")
    found = left_out("motion", {"path": clips, "flicker": clips})
    assert torch.allclose(found["path"], means(clips))
    assert jackknife(found["path"]) == pytest.approx(float(clips.std()) / 12**0.5)


def test_a_number_of_all_clips_is_made_anew_without_each() -> None:
    clips = 30 + drawn("pooled", n=5)
    found = left_out("consistency", {"psnr": clips})["psnr"]
    expected = [pooled(clips), *(pooled(torch.cat([clips[:i], clips[i + 1 :]])) for i in range(5))]
    assert torch.equal(found, torch.tensor(expected, dtype=torch.float64))
    equal = left_out("consistency", {"psnr": torch.full((5,), 31.0)})["psnr"]
    assert jackknife(equal) == pytest.approx(0, abs=1e-9)


def test_levels_are_compared_clip_by_clip() -> None:
    """Clips differ by 10 dB, levels by 0.1 dB in every clip: the error of a level is 30 times what tells them apart."""
    clips = 10 * drawn("clips")
    found = choose({0.0: means(clips), 0.1: means(clips + 0.1)}, Better.HIGHER, 1.0)
    assert jackknife(means(clips)) > 1 and found.level == found.best == 0.1
    (first, gap, spread), best = found.behind
    assert (first, best) == (0.0, (0.1, 0.0, 0.0))
    assert gap == pytest.approx(0.1) and spread == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("gap", [0.5, 1.5])
@pytest.mark.parametrize("within", [0.0, 1.0, 2.0])
def test_the_smallest_level_within_the_error_is_chosen(gap: float, within: float) -> None:
    """Level 0 lies `gap` errors behind level 0.2, level 0.1 far behind both."""
    clips, noise = drawn("clips"), drawn("noise")
    noise = (noise - noise.mean()) / noise.std()
    worse = clips + noise - gap / 12**0.5  # the standard error of the difference is 1 / sqrt(12)
    levels = {0.0: means(worse), 0.1: means(clips - 5), 0.2: means(clips)}
    assert choose(levels, Better.HIGHER, within).level == (0.0 if gap <= within else 0.2)
    below = {level: -found for level, found in levels.items()}
    assert choose(below, Better.LOWER, within) == choose(levels, Better.HIGHER, within)


def test_equal_levels_are_the_smallest() -> None:
    clips = means(drawn("equal"))
    found = choose({0.1: clips, 0.05: clips, 0.02: clips}, Better.LOWER, 0.0)
    assert found.level == found.best == 0.02


# what is refused


@pytest.mark.parametrize(
    "wrong", [{"n": 2}, {"batch": 0}, {"levels": []}, {"levels": [0.1, 0.1]}, {"levels": [-0.1]}, {"split": "test"}]
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        settings(**wrong)


BY = {"measure": "fidelity.psnr", "better": "higher", "input": "before"}


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("ssr", {"levels": [0.0, 0.3]}, "has 0.3, never trained: augment_max is 0.2"),
        ("base", {}, "starts from text"),
        ("ssr", {"before": None}, "tune.before names no stage"),
        ("ssr", {"by": {**BY, "measure": "fvdd.fvd"}}, "'fvdd'"),
        ("ssr", {"metrics": ["fvd"]}, r"no 'fidelity'\. Fix: tune\.metrics=\[fvd,fidelity\]"),
        ("ssr", {"metrics": []}, r"no 'fidelity'\. Fix: tune\.metrics=\[fidelity\]"),
        ("ssr", {"metrics": ["fidelty"]}, "'fidelty', which is no measure. Fix: write fidelity"),
        ("ssr", {"by": {**BY, "measure": "fidelty.psnr"}}, r"Fix: tune\.by\.measure=fidelity\.psnr"),
    ],
)
def test_what_cannot_be_tuned_is_refused(kind: str, changes: Any, reason: str, make_stage: Any) -> None:
    stage = make_stage(kind, augment_max=0.2)
    with pytest.raises(ConfigError, match=reason):
        tune.check(stage.cfg, stage.rule, settings(**changes))


def test_the_largest_trained_level_is_legal(make_stage: Any) -> None:
    stage = make_stage("ssr", augment_max=0.2)
    tune.check(stage.cfg, stage.rule, settings(levels=[0.2, 0.0]))


def test_a_value_that_no_measure_gives_is_named(make_stage: Any, encode: Any) -> None:
    cfg = settings(levels=[0.0], by={**BY, "measure": "fidelity.psnrr", "input": "degraded"}, before=None)
    stage = make_stage("ssr", augment_max=0.2)
    with pytest.raises(ConfigError, match="no such number") as refused:
        sweep(stage, Exam(WORLD, cfg.exam(0, stage.rule)), cfg, encode)
    assert refused.value.fix == "tune.by.measure=fidelity.psnr"


# the file


@pytest.mark.parametrize("level", [0.0, 0.05, 1e-5, 1.0])
@pytest.mark.parametrize("path", STAGES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_one_number_changes_in_the_file_of_a_stage(path: Path, level: float) -> None:
    text = path.read_text(encoding="utf-8")
    before = yaml.safe_load(text)
    if "augment" not in before:
        with pytest.raises(InputError, match="0 lines"):
            edited(text, before["name"], level, str(path))
        return
    after = yaml.safe_load(new := edited(text, before["name"], level, str(path)))
    assert type(after["augment"]) is float and after == {**before, "augment": level}
    lines = zip(text.splitlines(keepends=True), new.splitlines(keepends=True), strict=True)
    changed = [(a, b) for a, b in lines if a != b]
    assert all(a.startswith("augment:") and a.partition("#")[2] == b.partition("#")[2] for a, b in changed)
    assert len(changed) == (level != before["augment"])


def test_line_endings_and_spaces_stay() -> None:
    text = "name: up\r\nnet:\r\n  augment: 3\r\naugment_max: 0.1\r\naugment:\t 0.0   # why\r\n"
    assert edited(text, "up", 0.1, "up.yaml") == text.replace("0.0   #", "0.1   #")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name: up\naugment_max: 0.1\n", "has 0 lines"),
        ("name: up\nnet: {augment: 0}\n  augment: 1\n", "has 0 lines"),
        ("name: up\naugment: 0\naugment: 0.1\n", "has 2 lines"),
        ("name: upper\naugment: 0\n", "another stage's"),
    ],
)
def test_a_file_that_does_not_say_it_once_is_refused(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        edited(text, "up", 0.1, "up.yaml")


# the sweep


class Films(torch.nn.Module):
    """Instead of a network: the real clips of the questions, over and over."""

    def __init__(self, exam: Exam, cfg: Any) -> None:
        super().__init__()
        self.clips, self.done = exam.films(exam.questions(cfg.shape, cfg.fps), cfg.shape, cfg.fps), 0

    def next(self, count: int) -> Tensor:
        self.done += count
        return self.clips[torch.arange(self.done - count, self.done) % len(self.clips)]


class Off(Stage):
    """A stage that is off by as much as its level is from 0.05, and by 0.01."""

    def sample(self, *_: Any, **__: Any) -> Video:
        assert isinstance(self.net, Films)
        return Video(self.net.next(2) + abs(self.cfg.augment - 0.05) + 0.01, self.cfg.fps)


def same(low: Video, questions: Sequence[Question], text: Text) -> Video:
    assert len(low.frames) == len(questions) == len(text.mask)
    return low


def test_the_best_level_is_found_and_every_number_is_right(make_stage: Any, encode: Any) -> None:
    cfg = settings(batch=2, metrics=["fidelity"])
    blank = make_stage("ssr", augment_max=0.1)
    exam = Exam(WORLD, cfg.exam(3, blank.rule))
    found = sweep(Off(blank.cfg, blank.rule, Films(exam, blank.cfg)), exam, cfg, encode, same)
    rows = {(row.group, row.condition): row for row in found.rows if row.name == "psnr"}
    for level in cfg.levels:
        psnr = 20 * torch.tensor(2 / (abs(level - 0.05) + 0.01)).log10()
        for of in Input:
            row = rows[of.value, f"augment={level:g}"]
            assert row.value == pytest.approx(float(psnr), abs=1e-3) and row.error == pytest.approx(0, abs=1e-3)
            assert (row.n, row.seed, row.metric) == (4, 3, "fidelity")
    assert choose(found.compared, cfg.by.better, cfg.within).level == 0.05


def test_a_level_is_judged_as_an_evaluation_judges_it(make_stage: Any, encode: Any, one_thread: None) -> None:
    by, names = {**BY, "input": "degraded"}, ["fidelity", "known", "attributes", "fvd"]
    cfg = settings(levels=[0.0, 0.1], before=None, by=by, metrics=names)
    stage = make_stage("tsr", std=0.1, augment=0.1, augment_max=0.1)
    exam = cfg.exam(0, stage.rule)
    found = {(row.metric, row.name, row.condition): row for row in sweep(stage, Exam(WORLD, exam), cfg, encode).rows}
    report = [row for row in judge_stage(stage, WORLD, encode, exam).rows if row.group == "all"]
    assert len(found) == len(report) > 20
    for row in report:
        mine = found[row.metric, row.name, row.condition]
        assert (mine.value, mine.n) == (pytest.approx(row.value, rel=1e-6), row.n)
        assert row.error is None or mine.error == pytest.approx(row.error, rel=1e-6)


def test_what_the_stage_before_makes_of_a_clip_is_its_own_and_kept(
    make_stage: Any, encode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    before, exam = make_stage("tsr", std=0.1), Exam(WORLD, settings().exam(0, plugin("ssr")))  # type: ignore[arg-type]
    questions = exam.questions(before.cfg.shape, 8.0)
    clips, text = exam.films(questions, before.cfg.shape, 8.0), encode([q.prompt for q in questions])
    comes = tune.imitated(Imitation(before, 0.5), 0, tmp_path)
    whole = comes(Video(clips, 8.0), questions, text)
    assert (whole.frames != clips).any() and torch.equal(whole.frames[:, :, ::2], clips[:, :, ::2])
    part = comes(Video(clips[2:3], 8.0), questions[2:3], text[2:3])
    assert torch.equal(part.frames, whole.frames[2:3])
    other = tune.imitated(Imitation(before, 0.5), 1, None)(Video(clips, 8.0), questions, text)
    assert (other.frames != whole.frames).any()
    monkeypatch.setattr(Stage, "imitate", None)
    assert torch.equal(comes(Video(clips, 8.0), questions, text).frames, whole.frames)


# the task


@pytest.fixture
def ask(make_stage: Any, source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`task=tune` of a tiny stage after a tiny `tsr`, with those settings."""
    before = make_stage("tsr", std=0.1)
    stage = make_stage("ssr", std=0.1, augment_max=0.1)
    monkeypatch.setattr(tune, "text_source", lambda cfg: source)
    monkeypatch.setattr(tune, "makers", lambda cfg, *_: cfg)
    monkeypatch.setattr(tune, "imitation", lambda cfg, *_: (Imitation(before, 0.5), [f"the hash of {cfg.stage}"]))
    card = {"kind": "ssr", "net": plain(stage.cfg.net), "diffusion": plain(stage.cfg.diffusion)}
    checkpoint.save(tmp_path / "weights", stage.net.state_dict(), card)
    cfg = replace(stage.cfg, weights=str(tmp_path / "weights"))

    def run(**own: Any) -> None:
        tree = {**compose("stage", ["stage=tiny/ssr1"])["tune"], "n": 3, "batch": 2, "metrics": ["fidelity"]}
        tree |= {"before": {"stage": "tiny/tsr"}, "levels": [0, 0.1], **own}
        run_cfg = Given(out=tmp_path / "out")
        on, text = Device(device="cpu"), TextConfig(encoder="x")
        tune.stage_task(Request(cfg, stage.rule, run_cfg, on, text, DataConfig(), {"tune": tree}, "typed"))  # type: ignore[arg-type]

    return run


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """The stage and the level of every call of a sampler."""
    calls: list[tuple[str, float]] = []
    real = Stage.sample

    def counting(self: Stage, *args: Any, **kwargs: Any) -> Video:
        calls.append((self.cfg.name, self.cfg.augment))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Stage, "sample", counting)
    return calls


def test_the_task_writes_what_was_found_and_the_level(
    ask: Any, sampled: list[Any], tmp_path: Path, capsys: Any
) -> None:
    file, link = tmp_path / "up.yaml", tmp_path / "link.yaml"
    file.write_text("name: ssr  # up\naugment: 0.03  # of the input\n")
    link.symlink_to("up.yaml")
    ask(write=str(link), within=0.0)
    assert link.is_symlink()
    printed = capsys.readouterr().out
    tree = json.loads((tmp_path / "out/tune.json").read_bytes())
    assert store.problems(tmp_path / "out", "tune") == []
    level = tree["choice"]["level"]
    assert file.read_text() == f"name: ssr  # up\naugment: {level}  # of the input\n"
    assert f"augment: {level:g} (was 0)" in printed and "as tiny/tsr makes them" in printed
    rows = [row for row in tree["rows"] if (row["group"], row["name"]) == ("before", "psnr")]
    found = {row["condition"]: row["value"] for row in rows}
    assert found[f"augment={level:g}"] == max(found.values()) and len(found) == 2
    assert (tree["before"], tree["command"], tree["settings"]["n"]) == (["the hash of tiny/tsr"], "typed", 3)
    assert sampled.count(("tsr", 0.0)) == 3  # once for each clip, not for each level
    assert sampled.count(("ssr", 0.0)) == sampled.count(("ssr", 0.1)) == 4  # two groups, two inputs


def test_a_level_that_was_judged_is_not_again(ask: Any, sampled: list[Any], tmp_path: Path) -> None:
    ask()
    first = (tmp_path / "out/tune.json").read_bytes()
    sampled.clear()
    ask()
    assert sampled == [] and (tmp_path / "out/tune.json").read_bytes() == first
    ask(levels=[0, 0.05, 0.1])
    assert set(sampled) == {("ssr", 0.05)}
    sampled.clear()
    ask(before={"stage": "tiny/tsr", "strength": 0.4})
    assert set(sampled) == {("tsr", 0.0), ("ssr", 0.0), ("ssr", 0.1)} and len(sampled) == 3 + 4


def test_killed_and_run_again_it_is_the_same(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    real, calls = Stage.sample, [0]

    def dying(self: Stage, *args: Any, **kwargs: Any) -> Video:
        calls[0] += 1
        if calls[0] == 6:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Stage, "sample", dying)
        ask()
    assert not (tmp_path / "out/tune.json").exists()
    ask()
    resumed = (tmp_path / "out/tune.json").read_bytes()
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    ask()
    assert (tmp_path / "out/tune.json").read_bytes() == resumed


def test_a_refusal_makes_nothing(ask: Any, sampled: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "up.yaml"
    for text in ("name: down\naugment: 0\n", "name: ssr\n"):
        file.write_text(text)
        with pytest.raises(InputError, match=r"up\.yaml"):
            ask(write=str(file))
        assert file.read_text() == text
    with pytest.raises(InputError, match="write"):
        ask(write=str(tmp_path / "absent.yaml"))
    with pytest.raises(ConfigError, match="never trained"):
        ask(levels=[0, 0.2])
    assert sampled == [] and not (tmp_path / "out").exists()


def test_a_stage_before_is_data() -> None:
    assert settings(before={"stage": "tiny/tsr", "steps": 1}).before == Before(stage="tiny/tsr", steps=1)
    tree = {"stage": "tiny/tsr", "before": {"stage": "tiny/base", "strength": 0.3}}
    assert settings(before=tree).before == Before(stage="tiny/tsr", before=Before(stage="tiny/base", strength=0.3))
    with pytest.raises(ConfigError, match="strength"):
        settings(before={"stage": "tiny/tsr", "strength": 0})
