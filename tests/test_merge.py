"""Laws of merging: differences add up, and networks of different kinds are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cascade import checkpoint
from cascade.errors import ConfigError, HostError, InputError
from cascade.fit import command
from cascade.merge import merge


def saved(path: Path, value: float, width: int = 8) -> Path:
    config = {"kind": "base", "net": {"width": width}, "steps": value}
    return checkpoint.save(path, {"a": torch.full((width,), value)}, config)


def test_what_was_learned_is_added(tmp_path: Path) -> None:
    paths = [saved(tmp_path / name, value) for name, value in (("tuned", 3.0), ("student", 7.0), ("teacher", 2.0))]
    weights = checkpoint.load(merge(tmp_path / "out", *paths))
    assert torch.equal(weights.state["a"], torch.full((8,), 8.0)) and weights.config["steps"] == 7.0


def test_a_teacher_that_was_not_tuned_gives_the_student(tmp_path: Path) -> None:
    teacher, student = saved(tmp_path / "teacher", 2.0), saved(tmp_path / "student", 7.0)
    weights = checkpoint.load(merge(tmp_path / "out", teacher, student, teacher))
    assert torch.equal(weights.state["a"], checkpoint.load(student).state["a"])


def test_half_of_what_was_learned_is_the_mean(tmp_path: Path) -> None:
    before, after = saved(tmp_path / "before", 2.0), saved(tmp_path / "after", 7.0)
    weights = checkpoint.load(merge(tmp_path / "out", after, before, before, 0.5))
    assert torch.equal(weights.state["a"], torch.full((8,), 4.5)) and weights.config["steps"] == 2.0


def test_what_is_of_another_kind_is_kept(tmp_path: Path) -> None:
    saved(tmp_path / "out", 1.0)
    with pytest.raises(InputError, match="it holds 'weights', not 'text'"):
        command(["text", str(tmp_path / "out")])
    with pytest.raises(HostError, match="Not a directory"):
        command(["judge", str(tmp_path / "out/config.json/deep")])


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    paths = [saved(tmp_path / name, 1.0, width) for name, width in (("tuned", 4), ("student", 8), ("teacher", 8))]
    with pytest.raises(InputError, match="width"):
        merge(tmp_path / "out", *paths)


def test_other_kinds_and_predictions_are_refused(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", 1.0)
    for name, config in (
        ("kind", {"kind": "ssr", "net": {"width": 8}}),
        ("prediction", {"kind": "base", "net": {"width": 8}, "diffusion": {"prediction": "v"}}),
    ):
        other = checkpoint.save(tmp_path / name, {"a": torch.ones(8)}, config)
        with pytest.raises(InputError, match=name):
            merge(tmp_path / "out", other, base, base)
    plain = checkpoint.save(tmp_path / "plain", {"a": torch.ones(8)}, {"name": "features"})
    with pytest.raises(InputError, match="are not those of a stage"):
        merge(tmp_path / "out", base, plain, base)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected one of text, features, judge, merge"),
        (["juge", "out"], "Fix: judge"),
        (["merge", "out", "a"], "2 words, expected OUT TUNED STUDENT TEACHER"),
        (["judge", "out", "one"], "'one': is no number"),
    ],
)
def test_a_fit_is_refused_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        command(words)
    assert message in str(caught.value)


def test_a_merge_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = saved(tmp_path / "before", 2.0), saved(tmp_path / "after", 7.0)
    command(["merge", str(tmp_path / "out"), str(after), str(before), str(before), "0.5"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert torch.equal(checkpoint.load(tmp_path / "out").state["a"], torch.full((8,), 4.5))
