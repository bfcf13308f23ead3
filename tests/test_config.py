"""Settings: strict parsing, composition, free text, plug-ins."""

from __future__ import annotations

import dataclasses
import json
import os
import string
import subprocess
import sys
import types
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade import config
from cascade.compose import compose, split_prompts
from cascade.config import fingerprint, locate, package_root, parse, plain, plugin
from cascade.errors import ConfigError


class Colour(Enum):
    RED = "red"
    DARK_BLUE = "dark_blue"


@dataclass(kw_only=True)
class Level:
    channels: int
    attention: bool = False
    scale: tuple[int, int] = (2, 2)

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"channels is {self.channels}, expected at least 1")


@dataclass(kw_only=True)
class Stage:
    name: str
    rate: float
    levels: list[Level]
    colour: Colour = Colour.RED
    weights: Path | None = None
    parts: dict[str, Level] = field(default_factory=dict)
    betas: tuple[float, ...] = (0.9, 0.99)
    mode: Literal["fast", "slow"] = "fast"
    either: int | str = 1
    extra: dict[str, Any] = field(default_factory=dict)


GOOD: dict[str, Any] = {
    "name": "base",
    "rate": 1,
    "levels": [{"channels": 8}, {"channels": 16, "attention": True, "scale": [1, 2]}],
    "colour": "dark_blue",
    "weights": "checkpoints/x",
    "parts": {"a": {"channels": 4}},
    "betas": [0.5, 1, 0.25],
    "mode": "slow",
    "either": "text",
    "extra": {"deep": [1, None, {"x": 2.5}]},
}

levels = st.builds(
    Level,
    channels=st.integers(1, 2**62),
    attention=st.booleans(),
    scale=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
finite = st.floats(-1e18, 1e18)
stages = st.builds(
    Stage,
    name=st.text(),
    rate=finite,
    levels=st.lists(levels, max_size=3),
    colour=st.sampled_from(Colour),
    weights=st.none() | st.just(Path("a/b")),
    parts=st.dictionaries(st.text().filter(lambda name: name != "_target_"), levels, max_size=2),
    betas=st.lists(finite, max_size=3).map(tuple),
    mode=st.sampled_from(["fast", "slow"]),
    either=st.integers(0, 9) | st.text(),
)


@given(stages)
@settings(max_examples=50, deadline=None)
def test_parse_is_the_inverse_of_plain(stage: Stage) -> None:
    tree = plain(stage)
    assert parse(tree, Stage) == stage
    assert parse(json.loads(json.dumps(tree)), Stage) == stage
    assert fingerprint(stage) == fingerprint(tree)


def test_parse_reads_every_kind_of_field() -> None:
    stage = parse(GOOD, Stage)
    assert stage.levels[1] == Level(channels=16, attention=True, scale=(1, 2))
    assert stage.rate == 1.0 and type(stage.rate) is float
    assert (stage.colour, stage.weights, stage.parts["a"].channels) == (Colour.DARK_BLUE, Path("checkpoints/x"), 4)
    assert stage.betas == (0.5, 1.0, 0.25) and stage.either == "text" and stage.extra["deep"][2] == {"x": 2.5}


@dataclass(kw_only=True)
class Square:
    side: int


@dataclass(kw_only=True)
class Circle:
    shape: Literal["circle"]
    radius: int


@dataclass(kw_only=True)
class Drawing:
    what: Square | Circle


def test_one_field_tells_dataclasses_apart() -> None:
    assert parse({"what": {"side": 2}}, Drawing).what == Square(side=2)
    circle = {"what": {"shape": "circle", "radius": 2}}
    assert plain(parse(circle, Drawing)) == circle
    for tree, message in (
        ({"sides": 2}, "what.sides: there is no such setting"),
        ({"shape": "circel", "radius": 2}, "what.shape: 'circel' is not one of circle"),
        ({"shape": "circle", "side": 2}, "what.side: there is no such setting"),
        (3, "what"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse({"what": tree}, Drawing)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"rate": "eight"}, "rate"),
        ({"rate": True}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"rate": float("inf")}, "rate"),
        ({"rate": 10**400}, "rate"),
        ({"levels": [{"channels": 2.5}]}, "levels[0].channels"),
        ({"levels": [{"channels": 8.0}]}, "levels[0].channels"),
        ({"levels": [{"channels": True}]}, "levels[0].channels"),
        ({"levels": [{"channels": "8"}]}, "levels[0].channels"),
        ({"levels": [{"channels": 2**63}]}, "levels[0].channels"),
        ({"levels": [{"channels": 8, "scale": [1]}]}, "levels[0].scale"),
        ({"levels": [{}]}, "levels[0].channels"),
        ({"levels": {"channels": 8}}, "levels"),
        ({"levels": None}, "levels"),
        ({"parts": {"a": {"channels": -1}}}, "parts.a: channels is -1"),
        ({"parts": {3: {"channels": 1}}}, "parts.3"),
        ({"colour": "RED"}, "colour"),
        ({"colour": None}, "colour"),
        ({"weights": ""}, "weights"),
        ({"mode": "medium"}, "mode"),
        ({"either": 1.5}, "either"),
        ({"extra": {"x": [float("nan")]}}, "extra.x[0]"),
        ({"extra": {"x": object()}}, "extra.x"),
        ({"name": 3}, "name"),
    ],
)
def test_a_wrong_value_is_refused_by_name(change: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse({**GOOD, **change}, Stage, "stages.base")
    assert f"stages.base.{names}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["name", "rate", "levels"])
def test_a_missing_key_is_named(key: str) -> None:
    tree = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(ConfigError, match=rf"base\.{key}: is missing"):
        parse(tree, Stage, "base")


def edits(word: str) -> list[str]:
    """Every word one letter away, with one letter of each kind to insert."""
    gone = [word[:i] + word[i + 1 :] for i in range(len(word))]
    other = [word[:i] + c + word[i + 1 :] for i in range(len(word)) for c in "zq_"]
    more = [word[:i] + c + word[i:] for i in range(len(word) + 1) for c in "zq_"]
    return [edit for edit in gone + other + more if edit]


def test_every_misspelt_key_is_refused_with_the_right_one() -> None:
    count = 0
    for key in GOOD:
        for wrong in set(edits(key)) - set(GOOD):
            tree = {(wrong if name == key else name): value for name, value in GOOD.items()}
            with pytest.raises(ConfigError) as caught:
                parse(tree, Stage, "base")
            assert f"base.{wrong}: there is no such setting" in caught.value.message
            assert caught.value.fix == f"write base.{key}"
            count += 1
    assert count > 250


NUMBERS = [float("nan"), float("inf"), -1, 0, 2**63, -(2**63) - 1, 10**400, 1e308, True]
TEXTS = ["", "x" * 5000, "\ud800\0", "nan", "_target_", b"x"]
OTHERS = [None, [], {}, [[]], {"": {}}, {None: 1}, (1,), object(), {"_target_": "os.system"}]
WILD = st.sampled_from([*NUMBERS, *TEXTS, *OTHERS])


def paths(tree: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path for key, item in items for path in [(*prefix, key), *paths(item, (*prefix, key))]]


@given(st.sampled_from(paths(GOOD)), WILD)
@settings(max_examples=400, deadline=None)
def test_any_value_anywhere_parses_or_is_refused_in_one_line(path: tuple[Any, ...], value: Any) -> None:
    tree: Any = json.loads(json.dumps(GOOD))
    spot = tree
    for key in path[:-1]:
        spot = spot[key]
    spot[path[-1]] = value
    try:
        stage = parse(tree, Stage, "base")
    except ConfigError as error:
        assert "base" in str(error) and "\n" not in str(error) and len(str(error)) < 600
    else:
        assert parse(json.loads(json.dumps(plain(stage), allow_nan=False)), Stage) == stage


def test_a_target_is_refused_at_any_depth() -> None:
    for spot in ({}, {"levels": [{"channels": 1, "_target_": "os.system"}]}, {"extra": {"x": [{"_target_": 1}]}}):
        tree = {**GOOD, **(spot or {"_target_": "os.system"})}
        with pytest.raises(ConfigError, match="_target_: settings are data"):
            parse(tree, Stage)


def test_fingerprint_depends_on_values_only() -> None:
    assert fingerprint({"a": 1, "b": [Colour.RED]}) == fingerprint({"b": ["red"], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    with pytest.raises(ValueError, match="JSON"):
        fingerprint({"a": float("nan")})


# composing


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    files = {
        "conf/__init__.py": "",
        "conf/generate.yaml": "defaults:\n  - chain: tiny\n  - _self_\nseed: 0\nout: null\ncopy: ${seed}\n",
        "conf/stage.yaml": "defaults:\n  - stage: tiny/base\n  - _self_\nseed: 0\n",
        "conf/chain/tiny.yaml": "# @package _global_\ndefaults:\n  - /stage/tiny@base: base\nchain: [base]\n",
        "conf/stage/tiny/base.yaml": "steps: 4\nshape: {frames: 8}\n",
        "conf/weights/tiny.yaml": "steps: {4: x}\n",
        "more/chain/big.yaml": "# @package _global_\nchain: [a, b]\n",
        "more/chain/evil.yaml": "# @package _global_\ntext: ${oc.env:HOME}\n",
        "more/chain/nested.yaml": "# @package _global_\ntext: x${oc.${seed}:HOME}\n",
        "more/chain/target.yaml": "# @package _global_\ntext: {_target_: os.system}\n",
        "more/chain/broken.yaml": "a: [\n",
        "more/chain/circle.yaml": "a: &a [*a]\n",
        "more/chain/itself.yaml": "defaults: [itself]\n",
        "more/chain/number.yaml": "defaults: 3\n",
        "more/chain/null.yaml": "null: 3\n",
        "more/chain/binary.yaml": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "more/chain/binary.yaml").write_bytes(b"a: \xff\xfe\n")
    return tmp_path / "conf"


def test_compose_merges_and_resolves_and_can_be_called_again(conf: Path) -> None:
    from hydra.core.global_hydra import GlobalHydra

    first = compose("generate", ["base.steps=8", "seed=3"], root=conf)
    assert first["base"] == {"steps": 8, "shape": {"frames": 8}} and first["copy"] == 3 and first["chain"] == ["base"]
    assert compose("generate", root=conf)["base"]["steps"] == 4
    assert compose("stage", ["stage=tiny/base"], root=conf)["stage"]["steps"] == 4
    assert not GlobalHydra.instance().is_initialized()


def test_a_folder_of_the_user_is_searched_too(conf: Path) -> None:
    more = conf.parent / "more"
    assert compose("generate", ["chain=big"], more, root=conf)["chain"] == ["a", "b"]
    odd = conf.parent / "it's a (folder)"
    more.rename(odd)
    assert compose("generate", ["chain=big"], odd, root=conf)["chain"] == ["a", "b"]
    with pytest.raises(ConfigError, match="is not a directory"):
        compose("generate", [], conf.parent / "nowhere", root=conf)


@pytest.mark.parametrize("override", ["typo=1", "+typo=1", "++typo=1", "base.stepz=1", "+base.stepz=1", "~base.steps"])
def test_keys_are_left_to_parse(conf: Path, override: str) -> None:
    @dataclass(kw_only=True)
    class Base:
        steps: int
        shape: dict[str, int]

    tree = compose("generate", [override], root=conf)
    with pytest.raises(ConfigError):
        parse({key: tree[key] for key in tree if key not in ("chain", "seed", "out", "copy")}, _only(Base))


def _only(base: type) -> type:
    return dataclasses.make_dataclass("Run", [("base", base)], kw_only=True)


def test_a_group_of_another_configuration_is_a_plain_setting(conf: Path) -> None:
    assert compose("generate", ["weights=some/dir"], root=conf)["weights"] == "some/dir"
    assert compose("generate", ["weights='odd [dir]'"], root=conf)["weights"] == "odd [dir]"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("chain=tinny", "chain=tiny"),
        ("chain=nothing_like_it", "Fix: chain=tiny"),
        ("+stage=tiny/bass", "Fix: stage=tiny/base"),
        ("+stage/tiny@x=bass", "Fix: stage/tiny=base"),
        ("chain=null", "chain"),
        ("hydra.run.dir=../..", "Hydra's own"),
        ("++hydra.job.chdir=true", "Hydra's own"),
        ("hydra/launcher=joblib", "Hydra's own"),
        ("~hydra", "Hydra's own"),
        ("hydra.searchpath=[pkg://os]", "Hydra's own"),
        ("+stage/tiny@hydra.x=base", "Hydra's own"),
        ("out=${oc.env:HOME}", "interpolated"),
        ("out='${oc.env:HOME}'", "interpolated"),
        ("out=${oc.${copy}:HOME}", "interpolated"),
        ("out=${now:%Y}", "interpolated"),
        ("out={a: {_target_: os.system}}", "_target_"),
        ("+out._target_=os.system", "_target_"),
        ("out=${nothing.here}", "nothing.here"),
        ("out=${out}", "ecursive"),
        ("out=???", "out"),
        ("seed=1,2", "several values"),
        ("prompt=a cat, a dog", "several values"),
        ("seed", "key=value"),
        ("seed==", "key=value"),
        ("seed=[1,", "key=value"),
        ("~nope", "nope"),
        ("x" * 300 + "=1", "no such setting"),
        ("chain=" + "x" * 5000, "chain"),
    ],
)
def test_a_bad_override_is_one_line_that_names_it(conf: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("generate", ["copy=1", override], root=conf)
    line = str(caught.value)
    assert says in line and "\n" not in line and "Fix: " in line and len(line) < 6000
    assert str(conf) not in line and os.environ.get("HOME", "?") not in line.replace("HOME", "")


@pytest.mark.parametrize(
    "chain", ["evil", "nested", "target", "broken", "binary", "missing", "circle", "itself", "number", "null"]
)
def test_a_hostile_file_of_the_user_is_refused(conf: Path, chain: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("generate", [f"chain={chain}"], conf.parent / "more", root=conf)
    assert "\n" not in str(caught.value) and ": ." not in str(caught.value)


@given(st.text(string.printable, max_size=30))
@settings(max_examples=40, deadline=None)
def test_any_override_composes_or_is_refused(text: str) -> None:
    try:
        compose("generate", [text], root=FIXED)
    except ConfigError as error:
        assert "\n" not in str(error)


FIXED = Path()


@pytest.fixture(autouse=True)
def _fixed_conf(tmp_path_factory: pytest.TempPathFactory) -> None:
    global FIXED
    if Path() == FIXED:
        FIXED = tmp_path_factory.mktemp("fixed")
        (FIXED / "generate.yaml").write_text("seed: 0\nbase: {steps: 1}\n")


@pytest.mark.parametrize("name", ["nothing", "../generate", "Generate", "", "chain/tiny"])
def test_an_unknown_configuration_is_refused(conf: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="configuration"):
        compose(name, root=conf)


# free text, plug-ins, paths


@given(st.text())
def test_a_prompt_survives_any_characters(text: str) -> None:
    taken, rest = split_prompts(["seed=1", "prompt=old", f"prompt={text}", f"negative_prompt={text}", "-m"])
    assert taken == {"prompt": text, "negative_prompt": text} and rest == ["seed=1", "-m"]


def test_only_the_exact_key_is_free_text() -> None:
    text = "a cat, running = fast (4k) ${oc.env:HOME}"
    given_ = [f"prompt={text}", "+prompt=x", "prompts=file", "base.prompt=y", "prompt"]
    assert split_prompts(given_) == ({"prompt": text}, given_[1:])


def test_plugin_names_the_kinds_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stages").mkdir()
    for kind in ("base", "tsr", "_private"):
        (tmp_path / "stages" / f"{kind}.py").write_text("")
    monkeypatch.setattr(config, "package_root", lambda: tmp_path)
    assert config.kinds() == ["base", "tsr"]
    for kind in ("_private", "os", "../base", "Base", "base.x", ""):
        with pytest.raises(ConfigError, match="Fix: kind="):
            plugin(kind)
    with pytest.raises(ConfigError, match="Fix: kind=tsr"):
        plugin("tsrr")


def test_plugin_gives_the_module_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("stages.base")
    monkeypatch.setitem(sys.modules, "stages.base", module)
    monkeypatch.setattr(config, "kinds", lambda: ["base"])
    assert plugin("base") is module


def test_locate_prefers_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert locate("mine") == tmp_path / "mine"
    assert locate("cascade") == package_root() / "cascade"
    assert locate("cascade.py") == tmp_path / "cascade.py"  # an error names what was meant
    assert locate(str(tmp_path / "mine")) == tmp_path / "mine"
    with pytest.raises(ConfigError, match="empty"):
        locate("")


def test_settings_load_without_torch_or_hydra() -> None:
    code = (
        "import sys, cascade.config, cascade.store; print([m for m in ('torch', 'hydra', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=package_root(), check=True)
    assert done.stdout.strip() == "[]"
