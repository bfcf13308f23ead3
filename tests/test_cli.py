"""The commands, as a user gives them, on a chain so small that each takes a moment."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import STAGES

from cascade import cli, clipfiles, loading, pipeline, store, tasks
from cascade.chain import Chain, chain_settings
from cascade.config import kinds, package_root, parse, plugin
from cascade.errors import CascadeError, ConfigError, HostError, InputError
from cascade.settings import StageConfig
from cascade.stage import Stage
from cascade.text import T5Text, TextConfig
from cascade.video import Video

PROMPT = "a large red circle moves left on a black background"


@pytest.fixture
def cascade(mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.chdir(tmp_path)
    return lambda verb, *words: cli.command([verb, *words, "chain=mini", "--config-dir", str(mini)])


@pytest.fixture
def stage(mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.chdir(tmp_path)

    def run(name: str, *words: str) -> None:
        cli.stage_command(STAGES[name]["kind"], [f"stage=mini_{name}", *words, "--config-dir", str(mini)])

    return run


def tree_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def video(folder: Path, name: str) -> bytes:
    return (folder / "stages" / name / "video.safetensors").read_bytes()


def test_chain_equals_the_composition_of_its_stages(cascade: Any, stage: Any) -> None:
    cascade("generate", f"prompt={PROMPT}", "seed=7", "out=chain")
    before = ""
    for name in STAGES:
        given = [f"input={before}"] if before else []
        before = f"{name}.safetensors"
        stage(name, f"prompt={PROMPT}", "seed=7", f"out={before}", *given)
        assert Path(before).read_bytes() == video(Path("chain"), name)
    out = Path("chain")
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == {
        "video.mp4", "sheet.png", "manifest.json", "stages"
    }  # fmt: skip
    assert json.loads((out / "manifest.json").read_text())["shape"] == "15x16x16"


def test_the_same_command_names_the_same_directory_and_does_nothing_twice(
    cascade: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cascade("generate", f"prompt={PROMPT}")
    (out,) = Path("runs").iterdir()
    before = tree_bytes(out)
    monkeypatch.setattr(Stage, "sample", lambda *_, **__: pytest.fail("a finished stage ran again"))
    monkeypatch.setattr(pipeline, "load_stage", lambda *_: pytest.fail("weights of a finished stage were loaded"))
    monkeypatch.setattr(T5Text, "model", property(lambda _: pytest.fail("the text encoder was loaded for nothing")))
    cascade("generate", f"prompt={PROMPT}")
    assert list(Path("runs").iterdir()) == [out] and tree_bytes(out) == before


def test_while_a_stage_runs_the_next_one_loads_and_no_other(cascade: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names, loaded = list(STAGES), queue.Queue[str]()
    sample, load = Stage.sample, loading.load_stage

    def spy(self: Stage, *args: Any, **kwargs: Any) -> Any:
        for name in names[names.index(self.cfg.name) + 1 :][:1]:
            assert loaded.get(timeout=60) == name
        assert loaded.empty()
        return sample(self, *args, **kwargs)

    def noted(cfg: StageConfig, *rest: Any) -> Any:
        if cfg.name != names[0]:
            loaded.put(cfg.name)
        return load(cfg, *rest)

    monkeypatch.setattr(Stage, "sample", spy)
    monkeypatch.setattr(pipeline, "load_stage", noted)
    cascade("generate", f"prompt={PROMPT}", "out=run")
    assert loaded.empty()


def test_weights_that_cannot_be_read_stop_a_run_at_their_stage(cascade: Any, mini: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(mini / "weights" / "tsr", tmp_path / "damaged")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="SHA-256"):
        cascade("generate", f"prompt={PROMPT}", "out=run", f"tsr.weights={folder}")
    assert [path.name for path in Path("run/stages").iterdir()] == ["base"]


def test_changed_settings_replace_that_stage_and_those_after_it(cascade: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    sample = Stage.sample

    def spy(self: Stage, *args: Any, **kwargs: Any) -> Any:
        ran.append(self.cfg.name)
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(Stage, "sample", spy)
    cascade("generate", f"prompt={PROMPT}", "out=run")
    assert ran == list(STAGES)
    for changes, expected in (
        (["interp.sampler.steps=1"], ["interp"]),
        (["interp.sampler.steps=1", "tsr.augment=0.2"], ["tsr", "ssr", "interp"]),
        (["interp.sampler.steps=1", "tsr.augment=0.2", "base.train.lr=0.5"], []),
        (["interp.sampler.steps=1", "tsr.augment=0.2", "seed=1"], list(STAGES)),
    ):
        ran.clear()
        cascade("generate", f"prompt={PROMPT}", "out=run", *changes)
        assert ran == expected


def test_prompts_equal_single_runs_in_any_order(cascade: Any) -> None:
    other = "a small blue square moves up and a large white ring stands still on a gray background"
    cascade("generate", f"prompt={PROMPT}", "out=single", "samples=2")
    for number, lines in enumerate(([PROMPT, other, PROMPT], [other, PROMPT])):
        Path("prompts.txt").write_text("\ufeff" + "\r\n".join(lines) + "\n\n", encoding="utf-8")
        cascade("generate", "prompts=prompts.txt", f"out=many{number}")
    assert video(Path("many0/0000"), "interp") == video(Path("single/0000"), "interp")
    assert video(Path("many0/0002"), "interp") == video(Path("single/0001"), "interp")
    assert video(Path("many1/0001"), "interp") == video(Path("many0/0000"), "interp")
    assert video(Path("many1/0000"), "interp") != video(Path("many1/0001"), "interp")


def test_a_clip_too_fast_for_the_format_is_refused_at_once(cascade: Any) -> None:
    Path("clip.safetensors").write_bytes(clipfiles.video_bytes(Video(torch.zeros(1, 3, 8, 8, 8), 30.0)))
    with pytest.raises(ConfigError, match="gif cannot show 60"):
        cascade("generate", "prompt=x", "start=ssr", "input=clip.safetensors", "out=run", "format=[gif]")
    assert not Path("run").exists()


def test_embeddings_on_disk_replace_the_encoder(cascade: Any, mini: Path) -> None:
    Path("prompts.txt").write_text(PROMPT)
    cli.command(["embed", "prompts=prompts.txt", "out=texts"])
    cascade("generate", f"prompt={PROMPT}", "out=live")
    code = (
        "import sys; from cascade import cli; cli.command(sys.argv[1:]); assert 'transformers' not in sys.modules, 'T5'"
    )
    words = ["generate", f"prompt={PROMPT}", "out=stored", "text.store=texts", "chain=mini", "--config-dir", str(mini)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # they decide the last bits
    subprocess.run([sys.executable, "-c", code, *words], check=True, env={**os.environ, **threads})
    assert video(Path("stored"), "interp") == video(Path("live"), "interp")


def test_an_image_becomes_the_first_frame(cascade: Any) -> None:
    from cascade import media

    Path("first.png").write_bytes(media.png(torch.full((3, 8, 8), 0.25)))
    cascade("generate", f"prompt={PROMPT}", "image=first.png", "out=run")
    frames = clipfiles.read_clip(video(Path("run"), "base"), "").frames
    assert torch.allclose(frames[0, :, 0], torch.tensor(2 * round(0.625 * 255) / 255 - 1), atol=1e-6)
    assert frames[0, :, 1:].std() > 0


@pytest.fixture
def files(tmp_path: Path) -> None:
    """Pictures and a clip of 12 frames at 4 a second, twice the rate of the chain's base."""
    from cascade import media

    for name, value in (("first", 0.25), ("last", -0.5)):
        (tmp_path / f"{name}.png").write_bytes(media.png(torch.full((3, 12, 20), value)))
    hole = torch.full((3, 8, 8), -1.0)
    hole[:, 2:6, 2:6] = 1
    (tmp_path / "hole.png").write_bytes(media.png(hole))
    clip = torch.rand(1, 3, 12, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (tmp_path / "clip.safetensors").write_bytes(clipfiles.video_bytes(Video(clip, 4.0)))


GIVEN = {
    "ends": ["image=first.png", "last=last.png"],
    "extend": ["extend=clip.safetensors", "seconds=5"],
    "long": ["image=first.png", "seconds=4"],
    "hole": ["input=clip.safetensors", "mask=hole.png"],
}


@pytest.mark.parametrize("name", list(GIVEN))
def test_what_is_given_is_exact_in_the_base_and_passes_through_the_chain(
    cascade: Any, stage: Any, files: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    extend = ["windows.frames=4", "windows.overlap=2", "windows.rule=extend"]
    words = [f"prompt={PROMPT}", *GIVEN[name]]
    cascade("generate", *words, "out=run", *(f"base.{word}" for word in extend))
    base = clipfiles.read_clip(video(Path("run"), "base"), "").frames[0]
    clip = clipfiles.read_clip(Path("clip.safetensors").read_bytes(), "").frames[0, :, ::2]
    grey = {"first": round(1.25 * 127.5) / 127.5 - 1, "last": round(0.5 * 127.5) / 127.5 - 1}
    if name in ("ends", "long"):
        assert torch.allclose(base[:, 0], torch.tensor(grey["first"]), atol=1e-6)
    if name == "ends":
        assert torch.allclose(base[:, 3], torch.tensor(grey["last"]), atol=1e-6)
    if name == "extend":
        assert torch.equal(base[:, :6], clip)
    if name == "hole":
        around = torch.ones(8, 8, dtype=torch.bool)
        around[2:6, 2:6] = False
        assert torch.equal(base[..., around], clip[..., around])
        assert (base[..., ~around] != clip[..., ~around]).all()
    frames = {"ends": 4, "extend": 10, "long": 8, "hole": 6}[name]
    last = clipfiles.read_clip(video(Path("run"), "interp"), "").frames
    assert base.shape[1] == frames and last.shape == (1, 3, 4 * frames - 1, 16, 16)
    stage("base", *words, "out=alone.safetensors", *extend)
    assert Path("alone.safetensors").read_bytes() == video(Path("run"), "base")
    monkeypatch.setattr(Stage, "sample", lambda *_, **__: pytest.fail("a finished stage ran again"))
    cascade("generate", *words, "out=run", *(f"base.{word}" for word in extend))


def test_another_picture_under_the_same_name_replaces_the_video(cascade: Any, files: None) -> None:
    cascade("generate", f"prompt={PROMPT}", "image=first.png", "out=run")
    before = video(Path("run"), "interp")
    Path("first.png").write_bytes(Path("last.png").read_bytes())
    cascade("generate", f"prompt={PROMPT}", "image=first.png", "out=run")
    assert video(Path("run"), "interp") != before


@pytest.mark.parametrize("frames", [3, 21])
def test_a_clip_of_any_length_enters_in_the_middle(cascade: Any, frames: int) -> None:
    from cascade import media

    rng = torch.Generator().manual_seed(0)
    Path("clip.mp4").write_bytes(media.encoded(torch.rand(3, frames, 20, 30, generator=rng) * 2 - 1, 6.0, ".mp4"))
    windows = ["ssr.windows.frames=8", "ssr.windows.overlap=2", "interp.windows.frames=15", "interp.windows.overlap=4"]
    cascade("generate", f"prompt={PROMPT}", "start=ssr", "input=clip.mp4", "out=run", "format=[mp4,gif]", *windows)
    made = clipfiles.read_clip(video(Path("run"), "interp"), "")
    assert made.frames.shape == (1, 3, 2 * frames - 1, 16, 16) and made.fps == 12
    assert Path("run/video.gif").is_file() and not Path("run/stages/base").exists()
    between = clipfiles.read_clip(video(Path("run"), "ssr"), "").frames
    assert torch.equal(made.frames[:, :, ::2], between)


@pytest.mark.parametrize("name", list(STAGES))
def test_every_stage_trains_distils_evaluates_and_samples_alone(stage: Any, name: str) -> None:
    own = ["sampler.guidance=1"] if name == "base" else []
    stage(name, "task=train", "out=trained", *own)
    weights = "trained/weights"
    assert store.problems(Path(weights), "weights") == []
    ladder = ["distill.steps=[2,1]", "distill.round_steps=2", "distill.guidance_steps=2", f"weights={weights}"]
    stage(name, "task=distill", "out=student", *ladder, *own)
    students = sorted(path.parent.name for path in Path("student").glob("*/weights"))
    assert {"01", "02"} <= set(students)
    stage(name, "task=evaluate", "out=judged", "evaluate.n=2", f"weights={weights}", "evaluate.metrics=[]", *own)
    assert json.loads(next(Path("judged").glob("*.json")).read_text()) and list(Path("judged").glob("*.png"))
    given = []
    if name != "base":
        shape = {"tsr": (4, 8, 8), "ssr": (8, 8, 8), "interp": (8, 16, 16)}[name]
        clip = torch.linspace(-1, 1, 3 * shape[0] * shape[1] * shape[2]).view(1, 3, *shape)
        Path("in.safetensors").write_bytes(clipfiles.video_bytes(Video(clip, 2.0)))
        given = ["input=in.safetensors"]
    stage(name, f"prompt={PROMPT}", "weights=student/01/weights", "sampler.steps=1", "out=out.mp4", *given, *own)
    assert Path("out.mp4").stat().st_size > 0 and Path("out.manifest.json").is_file()


@pytest.mark.parametrize("word", ["device=cpu", "dtype=bfloat16", "attention=reference", "memory=1GB"])
def test_a_task_is_named_by_where_and_how_precisely_it_runs(mini: Path, word: str) -> None:
    words = ["stage=mini_base", "prompt=x"]
    trees = [cli.settings("stage", [*words, *more, "--config-dir", str(mini)])[0] for more in ([], [word])]
    names = {ask.out(name) for name, ask in (tasks.asked("base", tree) for tree in trees)}
    assert len(names) == 2


def test_a_command_is_told_as_it_was_typed_without_its_out() -> None:
    words = ["n=2", "out=x/y", "metrics=[fvd]", "label.gap=with"]
    (tree,) = cli.settings("evaluate", words, "cascade evaluate")
    assert tree["command"] == "cascade evaluate n=2 'metrics=[fvd]' label.gap=with" and tree["out"] == "x/y"
    several = cli.settings("evaluate", ["-m", "seed=0,1", "n=2"], "cascade evaluate")
    assert [tree["command"] for tree in several] == [f"cascade evaluate seed={k} n=2" for k in (0, 1)]
    assert "command" not in cli.settings("embed", [], "cascade embed")[0]


def test_settings_are_shown_and_swept(cascade: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cascade("generate", "prompt=a ${oc.env:HOME}, b = c", "--cfg", "job", "-m", "seed=1,2", "base.sampler.steps=1,3")
    shown = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [(tree["seed"], tree["base"]["sampler"]["steps"]) for tree in shown] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    assert {tree["prompt"] for tree in shown} == {"a ${oc.env:HOME}, b = c"}


@pytest.mark.parametrize("fault", ["base.sampler.steps=2,-1", "tsr.shape.frames=8,9", "tsr.sampler.rule=ddim,none"])
def test_of_many_runs_none_begins_before_all_are_checked(cascade: Any, tmp_path: Path, fault: str) -> None:
    with pytest.raises(ConfigError):
        cascade("generate", f"prompt={PROMPT}", "out=runs", "-m", fault)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for _, name in cli.VERBS.values()])
def test_every_verb_has_a_function_that_says_what_it_does(name: str) -> None:
    assert callable(cli.function(name)) and cli.function(name).__doc__


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_help_of_a_verb_says_what_its_settings_are(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.command([verb, "--help"])
    said, (primary, _) = capsys.readouterr().out, cli.VERBS[verb]
    assert set(re.findall(r"(?m)^  cascade (\w+)", said)) == {verb}
    assert primary is None or (package_root() / "conf" / f"{primary}.yaml").read_text() in said


def test_help_names_every_verb_task_and_kind() -> None:
    said = set(re.findall(r"\w+", cli.HELP))
    assert {*cli.VERBS, *tasks.TASKS, *kinds()} <= said


FAST = ["base.fps=16", "tsr.fps=32", "ssr.fps=32", "interp.fps=64"]
FAULTS: list[tuple[list[str], int, str]] = [
    (["generat"], 2, "generate"),
    (["generate"], 2, "prompt"),
    (["generate", "prompt=  "], 2, "empty"),
    (["generate", "prompt=x", "base.sampler.stepz=3"], 2, "steps"),
    (["generate", "prompt=x", "+base.sampler.q=3"], 2, "q"),
    (["generate", "prompt=x", "base.sampler.steps=eight"], 2, "steps"),
    (["generate", "prompt=x", "base.sampler.steps=-1"], 2, "steps"),
    (["generate", "prompt=x", "base.shape.height=10", "tsr.shape.height=9"], 2, "height"),
    (["generate", "prompt=x", "tsr.shape.frames=10"], 2, "frames"),
    (["generate", "prompt=x", "base.net.patch=3"], 2, "multiple"),
    (["generate", "prompt=x", "start=tsr"], 2, "input"),
    (["generate", "prompt=x", "start=nowhere", "input=none.mp4"], 2, "nowhere"),
    (["generate", "prompt=x", "start=ssr", "input=none.mp4"], 3, "none.mp4"),
    (["generate", "prompt=x", "image=none.png"], 3, "none.png"),
    (["generate", "prompt=x", "image=a.png", "extend=b.mp4"], 2, "image and extend"),
    (["generate", "prompt=x", "mask=a.png"], 2, "mask"),
    (["generate", "prompt=x", "input=a.mp4"], 2, "mask"),
    (["generate", "prompt=x", "start=ssr", "input=a.mp4", "mask=a.png"], 2, "start"),
    (["generate", "prompt=x", "input=a.mp4", "mask=a.png"], 3, "a.mp4"),
    (["generate", "prompt=x", "extend=a.mp4"], 3, "a.mp4"),
    (["generate", "prompt=x", "seconds=4"], 2, "windows"),
    (["generate", "prompt=x", "seconds=nan"], 2, "seconds"),
    (["generate", "prompt=x", "tsr.windows.frames=4", "tsr.windows.rule=extend"], 2, "extend"),
    (["generate", "prompts=none.txt"], 3, "none.txt"),
    (["generate", "prompt=x", "base.weights=none"], 3, "none"),
    (["generate", "prompt=x", "base.weights=null"], 2, "weights"),
    (["generate", "prompt=x", "text.encoder=./none"], 3, "none"),
    (["generate", "prompt=x", "device=cuda:99"], 4, "cuda:99"),
    (["generate", "prompt=x", "device=toaster"], 4, "toaster"),
    (["generate", "prompt=x", "attention=none"], 2, "attention"),
    (["generate", "prompt=x", "format=[avi]"], 2, "avi"),
    (["generate", "prompt=x", "format=[]"], 2, "format=[mp4]"),
    (["generate", "prompt=x", "format=gif"], 2, "format=[gif]"),
    (["generate", "prompt=x", "format=[mp4,gif]", "fps=60"], 2, ".gif cannot show 60"),
    (["generate", "prompt=x", "fps=0"], 2, ".mp4 cannot show 0"),
    (["generate", "prompt=x", "format=[gif]", *FAST], 2, ".gif cannot show 64"),
    (["generate", "prompt=x", "memory=5"], 2, "\"memory='5'\""),
    (["generate", "prompt=x", "devise=cpu"], 2, "Fix: device"),
    (["plan", "chain=headless", "--config-dir", "own"], 2, "# @package _global_"),
    (["generate", "a red circle"], 2, "prompt="),
    (["generate", "prompt=x", "prompts=file"], 2, "one of them"),
    (["generate", "prompt=x", "negative_prompt= "], 2, "empty"),
    (["generate", "prompt=x", "-m", "seed=1,"], 2, "'seed=1,'"),
    (["generate", "prompt=x", "-m", "chain=glob(*)"], 2, "'chain=glob(*)'"),
    (["generate", "prompt=x", "-m", "seed=range(0,9000000000)"], 2, "more than 10000"),
    (["generate", "prompt=x", "-m", "seed=range(0,200)", "samples=range(1,200)"], 2, "more than 10000"),
    (["generate", "prompt=x", "samples=10000000000"], 2, "samples"),
    (["generate", "prompt=x", "out="], 2, "out"),
    (["generate", "prompt=x", "image="], 2, "image"),
    (["generate", "prompt=x", "out=2024"], 2, "\"out='2024'\""),
    (["generate", "prompt=x", "out=2024", "-m", "seed=1,2"], 2, "\"out='2024'\""),
    (["embed", "prompt=x", "out=", "-m", "text=tiny"], 2, "out"),
    (["embed", "prompt=x", "out=e", "-m", "text.max_tokens=48,0"], 2, "max_tokens"),
    (["embed", "prompt=x", "out=own"], 3, "something else"),
    (["generate", "prompts="], 2, "prompts"),
    (["generate", "prompts=."], 3, "not a file"),
    (["embed", "prompt=x", "out="], 2, "out"),
    (["embed", "prompt=x", "samples=2"], 2, "samples"),
    (["embed", "prompt=x", "out=e", "device=cuda:300"], 4, "cuda:300"),
    (["plan", "device=toaster"], 4, "toaster"),
    *((["plan", f"device={name}"], 4, f"'{name}'") for name in ("meta", "mps", "privateuseone", "cuda:-1", "cuda:x")),
    (["generate", "prompt=x", "device=cuda:300"], 4, "cuda:300"),
    (["export", "out=."], 3, "not an artefact"),
    (["generate", "prompt=x", "hydra.run.dir=/tmp/x"], 2, "hydra"),
    (["generate", "prompt=x", "out=file"], 4, "file"),
    (["generate", "prompt=x", "out=file/deep"], 4, "file/deep"),
    (["generate", "prompt=x", "out=a/b/c", "text.store=none"], 3, "none"),
    (["embed", "prompt=x", "out=file/deep"], 4, "file/deep"),
    (["embed", "prompt=x", "out=a/b/c", "text.negative=' '"], 2, "empty"),
    (["import", "weights=show1", "source=none", "out=a/b/c"], 3, "none"),
    (["evaluate", "given=true", "out=a/b/c"], 2, "for a stage alone"),
    (["generate", "prompt=x", "--nonsense"], 2, "--nonsense"),
]


@pytest.mark.parametrize(("words", "code", "named"), FAULTS, ids=[" ".join(words) for words, _, _ in FAULTS])
def test_a_mistake_is_one_line_and_creates_nothing(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], code: int, named: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "own/chain").mkdir(parents=True)
    (tmp_path / "own/chain/headless.yaml").write_text("stages: [base]")
    before = tree_bytes(tmp_path), sorted(tmp_path.rglob("*"))
    more = ["chain=mini", "--config-dir", str(mini)] if words[:1] in (["generate"], ["export"]) else []
    with pytest.raises(SystemExit) as exit_:
        cli.run_main([*words, *more], cli.command, "cascade")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert exit_.value.code == code, said
    assert len(said) == 1 and named in said[0] and "Fix: " in said[0]
    assert (tree_bytes(tmp_path), sorted(tmp_path.rglob("*"))) == before


def test_what_lies_in_out_is_kept_and_named_before_anything_is_made(
    cascade: Any, mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(mini / "weights" / "base", "weights")
    Path("run/stages/tsr").mkdir(parents=True)
    Path("run/stages/tsr/thesis.txt").write_text("years of work")
    Path("file/0001").mkdir(parents=True)
    Path("file/0001/stages").write_text("in the way")
    before = tree_bytes(Path())
    monkeypatch.setattr(Stage, "sample", lambda *_, **__: pytest.fail("made for nothing"))
    for out, words in (("weights", "it holds 'weights'"), ("run", "not an artefact"), ("file", "0001/stages")):
        with pytest.raises((InputError, HostError), match=words):
            cascade("generate", "prompt=x", f"out={out}", f"samples={1 + (out == 'file')}")
    with pytest.raises(InputError, match="it holds 'weights', not 'pipeline'"):
        cascade("export", "out=weights")
    assert tree_bytes(Path()) == before


@pytest.mark.parametrize("name", ["video.mp4", "sheet.png", "manifest.json", "video.gif"])
def test_a_file_that_is_not_ours_is_never_replaced(
    cascade: Any, stage: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["prompt=x", "out=own", *(["format=[gif]"] if name.endswith("gif") else [])]
    Path("own").mkdir()
    Path("own", name).write_text('{"name": "my app", "files": {"video.mp4": 1}}')
    for clip in ("clip.mp4", "clip.safetensors"):
        Path(clip).write_text("years of work")
    before = tree_bytes(Path())
    monkeypatch.setattr(Stage, "sample", lambda *_, **__: pytest.fail("made for nothing"))
    with pytest.raises(InputError, match=f"own/{name}: it exists and Cascade did not make it"):
        cascade("generate", *words)
    for clip in ("clip.mp4", "clip.safetensors"):
        with pytest.raises(InputError, match=f"{clip}: it exists"):
            stage("base", "prompt=x", f"out={clip}")
    assert tree_bytes(Path()) == before


def test_a_stage_alone_goes_on_where_it_stopped(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load, sample, made = tasks.load_stage, Stage.sample, []
    monkeypatch.setattr(Stage, "sample", lambda *args, **more: made.append("clip") or sample(*args, **more))
    monkeypatch.setattr(tasks, "load_stage", lambda *args: made.append("load") or load(*args))
    words = ["prompt=x", "samples=3", "out=clips"]

    def run(*more: str) -> list[str]:
        made.clear()
        stage("base", *words, *more)
        return list(made)

    assert run() == ["load", "clip", "clip", "clip"] and run() == []
    before = tree_bytes(Path("clips"))
    Path("clips/0001.safetensors").write_bytes(b"damaged")
    Path("clips/0002.manifest.json").unlink()
    Path("clips/0002.safetensors").unlink()
    assert run() == ["load", "clip", "clip"] and tree_bytes(Path("clips")) == before
    assert run("seed=1") == ["load", "clip", "clip", "clip"] and tree_bytes(Path("clips")) != before
    words[1:] = ["out=clip.mp4"]
    assert run() == ["load", "clip"] and run() == []


def test_what_earlier_runs_made_is_replaced_also_after_a_kill(
    cascade: Any, stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for prompt, suffix in (("x", "mp4"), ("x", "gif"), ("y", "mp4")):
        cascade("generate", f"prompt={prompt}", f"format=[{suffix}]", "out=run")
    assert {"video.mp4", "video.gif"} < json.loads(Path("run/manifest.json").read_text())["files"].keys()
    for prompt in "xy":
        stage("base", f"prompt={prompt}", "out=clip.mp4")
    with pytest.raises(InputError, match=r"clip\.manifest\.json there is of another file"):
        stage("base", "prompt=x", "out=clip.safetensors")
    write = store.write_file
    for stop in (0, 1, 2):  # of the files that a run, or a stage alone, writes in the end

        def killed(path: Path, data: bytes, *, left: list[int]) -> Path:
            if not left:
                raise KeyboardInterrupt
            left.pop()
            return write(path, data)

        for module, make in (
            (store, lambda out: cascade("generate", "prompt=x", f"out={out}")),
            (store.writing, lambda out: stage("base", "prompt=x", f"out={out}.mp4")),
        ):
            with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
                patch.setattr(module, "write_file", partial(killed, left=[0] * stop))
                make(f"new{stop}")
            make(f"new{stop}")


def test_a_task_finds_out_first_that_it_may_not_write(stage: Any, mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_text("in the way")
    for folder in ("trained/weights", "student/02/weights"):
        shutil.copytree(mini / "weights" / "base", folder)
        Path(folder, "thesis.txt").write_text("years of work")
    for folder in ("tuned", "judged"):
        store.commit(Path(folder), {"a": b"1"}, kind="test")
    before = tree_bytes(Path())
    monkeypatch.setattr(Stage, "__init__", lambda *_: pytest.fail("a stage was made for nothing"))
    tuned = ["tune.before=null", "tune.by.input=degraded", "augment_max=0.1"]
    for task in tasks.TASKS:
        with pytest.raises(HostError, match="file/deep"):
            words = {"sample": ["prompt=x"], "tune": tuned}.get(task, [])
            stage("tsr" if task == "tune" else "base", f"task={task}", *words, "out=file/deep.mp4")
    for task, out, words in (
        ("train", "trained", "thesis"), ("distill", "student", "thesis"), ("evaluate", "judged", "'test'")
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            stage("base", f"task={task}", f"out={out}")
    with pytest.raises(InputError, match="'test', not 'tune'"):
        stage("tsr", "task=tune", "out=tuned", *tuned)
    assert tree_bytes(Path()) == before


def test_what_a_killed_run_left_is_swept(cascade: Any) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    cascade("generate", f"prompt={PROMPT}", "out=run")
    for folder in ("run", "run/stages"):
        Path(folder, f".tmp-base-{dead.pid}-0123abcd").mkdir()
    cascade("generate", f"prompt={PROMPT}", "out=run")
    assert not list(Path("run").rglob(".tmp-*"))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "stage is missing"),
        (["stage=mini_base", "prompt=x", "out=video.avi"], "video.avi"),
        (["stage=mini_base", "prompt=x", "out=."], "name of a video file"),
        (["stage=mini_base", "prompt=x", "out=video.gif", "fps=60"], "gif cannot show 60"),
        (["stage=mini_base", "prompt=x", "samples=2", f"out={__file__}"], "2 clips"),
        (["stage=mini_base", "task=train", "seed=5"], "task=train does not read seed. Fix: train.seed="),
        (["stage=mini_base", "task=train", "dtype=bfloat16"], "does not read dtype. Fix: train.precision=bf16"),
        (["stage=mini_base", "task=distill", "micro_batch=2"], "micro_batch. Fix: train.micro_batch=N"),
        (["stage=mini_base", "task=evaluate", "micro_batch=2"], "micro_batch. Fix: evaluate.batch=N"),
        (["stage=mini_base", "task=evaluate", "memory=1GB"], "memory. Fix: remove memory, or task=sample"),
        (["stage=mini_base", "task=tune", "memory=1GB"], "task=tune does not read memory"),
        (["stage=mini_base", "task=distill", "prompt=x"], "task=distill does not read prompt. Fix: .*task=sample"),
        (
            ["stage=mini_base", "prompt=x", "distill.steps=[2]"],
            "task=sample does not read distill. Fix: .*task=distill",
        ),
        (["stage=mini_base", "task=evaluate", "evaluate=null"], "evaluate: null, expected a mapping"),
        (["stage=mini_base", "task=[sample]"], "expected one of sample"),
        (["stage=mini_base", "prompt=x", "weights=null"], "Fix: weights=DIRECTORY, or weights=random"),
    ],
)
def test_a_mistake_with_one_stage_creates_nothing(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=named):
        cli.stage_command("base", [*words, "--config-dir", str(mini)])
    assert not list(tmp_path.iterdir())


def test_damaged_weights_are_refused_before_anything_runs(mini: Path, tmp_path: Path) -> None:
    import shutil

    weights = tmp_path / "weights"
    shutil.copytree(mini / "weights" / "tsr", weights)
    data = bytearray((weights / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (weights / "model.safetensors").write_bytes(data)
    settings = yaml.safe_load((mini / "stage" / "mini_tsr.yaml").read_text())
    cfg = parse({**settings, "weights": str(weights)}, plugin("tsr").Config)
    with pytest.raises(CascadeError, match="SHA-256") as error:
        loading.load_stage(cfg, plugin("tsr"), torch.device("cpu"))
    assert error.value.code == 3


def test_weights_of_another_stage_are_refused_before_anything_runs(cascade: Any, mini: Path, tmp_path: Path) -> None:
    for verb in (["generate", "prompt=x"], ["export", "out=exported"]):
        with pytest.raises(InputError, match="kind is 'base' in the weights, 'tsr' in the configuration"):
            cascade(*verb, f"tsr.weights={mini / 'weights' / 'base'}")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_killed_in_any_stage_and_run_again_is_equal_bit_for_bit(mini: Path, tmp_path: Path) -> None:
    """SIGKILL as soon as each stage has begun (its predecessor's artefact stands), then the same command again."""
    words = ["generate", f"prompt={PROMPT}", "chain=mini", "--config-dir", str(mini), "ssr.sampler.steps=20"]
    code = "import sys; from cascade import cli; cli.run_main(sys.argv[1:], cli.command, 'cascade')"
    run = [sys.executable, "-c", code, *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*run, "out=whole"], cwd=tmp_path, check=True, env=env, capture_output=True)
    for name in list(STAGES)[:-1]:
        child = subprocess.Popen(
            [*run, "out=killed"], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not (tmp_path / "killed" / "stages" / name).exists() and child.poll() is None:
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        assert child.wait() in (-signal.SIGKILL, 0)
        assert (tmp_path / "killed" / "stages" / name).is_dir()
    subprocess.run([*run, "out=killed"], cwd=tmp_path, check=True, env=env, capture_output=True)
    assert tree_bytes(tmp_path / "killed") == tree_bytes(tmp_path / "whole")


def test_the_shipped_encoder_fits_the_shipped_chain() -> None:
    from cascade.compose import compose
    from cascade.text import known_width

    tree = compose("generate")
    chain = Chain.build(tree["stages"], tree, parse(tree["text"], TextConfig))
    assert {cfg.net.text for cfg in chain.stages} == {known_width(chain.text)}


SWALLOWED = """
import signal, sys, time
from pathlib import Path
from cascade import cli

def body(argv):
    try:
        Path("ready").touch()
        time.sleep(60)
    except BaseException:  # as some libraries do while they are imported
        pass
    try:
        time.sleep(60)
    finally:
        time.sleep(0.5)  # longer than it takes to be told again
        Path("cleaned").touch()

def other(argv):
    try:
        Path("ready").touch()
        time.sleep(60)
    except BaseException as error:
        raise ImportError("initialization failed") from error

signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in what a shell runs in the background
cli.run_main([], {"swallowed": body, "other": other}[sys.argv[1]], "cascade")
"""


@pytest.mark.parametrize("how", ["swallowed", "other"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_whatever_becomes_of_what_it_raised(
    tmp_path: Path, number: int, code: int, how: str
) -> None:
    env = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    running = subprocess.Popen([sys.executable, "-c", SWALLOWED, how], cwd=tmp_path, env=env, stderr=subprocess.PIPE)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    running.send_signal(number)
    _, said = running.communicate(timeout=30)
    assert running.returncode == code and said == b""
    assert (tmp_path / "cleaned").exists() == (how == "swallowed")


def test_closed_streams_and_a_plain_terminal_are_no_fault(tmp_path: Path) -> None:
    command = shlex.join([sys.executable, "-m", "cascade.cli", "list"])
    env = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1]), "PYTHONIOENCODING": "ascii"}
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        assert subprocess.run(f"{command} {closed}", shell=True, cwd=tmp_path, env=env, timeout=60).returncode == 0
    words = [sys.executable, "-m", "cascade.cli", "generate", "prompts='\u00e9.txt'"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and done.stderr.startswith("error: prompts \\xe9.txt")


def test_unknown_task_is_refused(stage: Any) -> None:
    with pytest.raises(ConfigError, match="task"):
        stage("base", "task=dance")


def test_the_list_says_what_chains_are_and_whether_their_weights_are_here(
    mini: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.command(["list"])
    said = capsys.readouterr().out
    assert "chain=tiny: base, tsr, ssr1, interp, ssr2; weights are here\n    The shipped chain: text -> 31" in said
    assert "stage=" in said and "tiny/base" in said
    tree = chain_settings("mini", ["tsr.weights=null", "ssr.weights=none"], mini)
    assert list(Chain.read(tree).absent()) == ["tsr", "ssr"]
