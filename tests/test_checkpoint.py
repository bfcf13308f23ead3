"""Weights: strict, finite, hashed, never pickle."""

from __future__ import annotations

import ast
import copy
import io
import json
import pickle
import random
import struct
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cascade import checkpoint, store
from cascade.config import package_root
from cascade.errors import ConfigError, InputError, NumericError

CONFIG = {"channels": [8, 16], "attention": {"heads": 2, "causal": False}, "prediction": "v"}


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path / "weights", model().state_dict(), CONFIG, card="# A model\n", meta={"steps": 4})


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_load_gives_what_was_saved(saved: Path) -> None:
    weights = checkpoint.load(saved)
    assert same(weights.state, dict(model().state_dict())) and weights.config == CONFIG
    assert (saved / "README.md").read_text() == "# A model\n" and store.manifest(saved)["meta"] == {"steps": 4}
    assert checkpoint.load(saved).hash == weights.hash


def test_hash_depends_on_every_part_and_on_nothing_else(saved: Path, tmp_path: Path) -> None:
    state = dict(model().state_dict())
    again = checkpoint.save(
        tmp_path / "b", dict(reversed(state.items())), CONFIG, card="# A model\n", meta={"steps": 4}
    )
    assert checkpoint.load(again).hash == checkpoint.load(saved).hash
    others = [
        checkpoint.save(tmp_path / "c", dict(model(1).state_dict()), CONFIG, card="# A model\n", meta={"steps": 4}),
        checkpoint.save(tmp_path / "d", state, CONFIG | {"prediction": "x"}, card="# A model\n", meta={"steps": 4}),
        checkpoint.save(tmp_path / "e", state, CONFIG, card="# A model\n", meta={"steps": 2}),
        checkpoint.save(tmp_path / "f", state, CONFIG, meta={"steps": 4}),
    ]
    assert len({checkpoint.load(path).hash for path in [saved, *others]}) == 5


def test_half_precision_halves_floats_only_and_is_cast_back(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "half", model().state_dict(), CONFIG, dtype=torch.float16)
    weights = checkpoint.load(path)
    assert weights.state["0.weight"].dtype == torch.float16
    assert weights.state["1.num_batches_tracked"].dtype == torch.int64
    target = model(1)
    checkpoint.apply(target, weights.state, "half")
    expected = {name: value.half().float() for name, value in model().state_dict().items() if value.is_floating_point()}
    assert all(torch.equal(target.state_dict()[name], value) for name, value in expected.items())


def test_loaded_weights_are_not_views_into_the_file(saved: Path) -> None:
    with torch.device("meta"):
        target = model(1)
    state = checkpoint.load(saved).state
    checkpoint.apply(target, state, "saved")
    owners = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    assert not owners & {tensor.untyped_storage().data_ptr() for tensor in target.state_dict().values()}


def test_saving_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    for value, dtype in ((float("nan"), None), (float("inf"), None), (1e6, torch.float16)):
        with pytest.raises(NumericError, match="w is not finite"):
            checkpoint.save(tmp_path / "x", {"w": torch.tensor([0.0, value])}, CONFIG, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_apply_loads_the_same_function(saved: Path, device: str) -> None:
    source = model().eval()
    with torch.device(device):
        target = model(1).eval()
    checkpoint.apply(target, checkpoint.load(saved).state, "weights")
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(target(x), source(x))
    assert all(p.requires_grad and p.is_leaf and isinstance(p, nn.Parameter) for p in target.parameters())


def changes(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    rest = {name: value for name, value in state.items() if name != "0.weight"}
    weight = state["0.weight"]
    spoiled = weight.clone()
    spoiled.view(-1)[5] = float("nan")
    return {
        "0.weight is missing": rest,
        "9.weight is unknown": state | {"9.weight": weight},
        "0.weight is 2x3x3x3, expected 3x2x3x3": state | {"0.weight": weight.transpose(0, 1)},
        "0.weight is torch.int32, expected torch.float32": state | {"0.weight": weight.int()},
        "1.num_batches_tracked is torch.float32": state | {"1.num_batches_tracked": torch.tensor(0.0)},
        "0.weight is not finite": state | {"0.weight": spoiled},
        "0.bias is not finite": state | {"0.bias": torch.full((3,), 1e300, dtype=torch.float64)},
    }


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_difference_is_listed_and_nothing_is_loaded(device: str) -> None:
    for says, state in changes(dict(model().state_dict())).items():
        with torch.device(device):
            target = model(1)
        before = copy.deepcopy(target.state_dict())
        with pytest.raises(InputError) as caught:
            checkpoint.apply(target, state, "some/dir")
        assert says in str(caught.value) and "some/dir: 1 difference" in str(caught.value)
        assert device == "meta" or same(dict(target.state_dict()), dict(before))
        assert all(p.is_meta for p in target.parameters()) or device == "cpu"


def test_many_differences_are_counted() -> None:
    with pytest.raises(InputError, match=r"18 differences.*; and 10 more"):
        checkpoint.apply(model(), {f"x{i}": torch.zeros(1) for i in range(9)}, "dir")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md", "manifest.json"])
def test_damage_is_refused_before_parsing(saved: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "bytes_to_tensors", lambda *_: pytest.fail("parsed before it was verified"))
    file, rng = saved / name, random.Random(0)
    good = file.read_bytes()
    for _ in range(20):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        for data in (bad, good[: rng.randrange(len(good))], good + b"\0"):
            file.write_bytes(data)
            with pytest.raises(InputError, match="Fix:"):
                checkpoint.load(saved)


def rehashed(directory: Path, data: bytes) -> Path:
    """Weights whose manifest is right and whose content is hostile."""
    return store.commit(directory, {"model.safetensors": data, "config.json": b"{}"}, kind="weights", replace=True)


def zipped() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, buffer)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("data"), io.BytesIO())
    return buffer.getvalue()


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("canary"),)


def header(tree: Any, tail: bytes = b"") -> bytes:
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    return struct.pack("<Q", len(text)) + text + tail


def spec(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE = {
    **{f"pickle {protocol}": pickle.dumps(Bomb(), protocol) for protocol in range(6)},
    "zip": zipped(),
    "tar": tarred(),
    "empty": b"",
    "text": b"hello",
    "html": b"<!DOCTYPE html><html></html>" * 20,
    "git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "huge header": struct.pack("<Q", 2**63),
    "long header": struct.pack("<Q", 200_000_000) + b"{",
    "not json": header(b"{{{{"),
    "list": header([]),
    "deep": header(b"[" * 50_000),
    "overlap": header({"a": spec(), "b": spec()}, bytes(4)),
    "hole": header({"a": spec(offsets=(4, 8))}, bytes(8)),
    "short": header({"a": spec()}, bytes(3)),
    "long": header({"a": spec()}, bytes(5)),
    "overflow": header({"a": spec(shape=(2**62, 2**62))}, bytes(4)),
    "negative": header({"a": spec(shape=(-1,))}, bytes(4)),
    "dtype": header({"a": spec(dtype="OBJECT")}, bytes(4)),
    "dtype size": header({"a": spec(dtype="F64")}, bytes(4)),
    "backwards": header({"a": spec(offsets=(4, 0))}, bytes(4)),
    "metadata": header({"__metadata__": {"a": 1}, "a": spec()}, bytes(4)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_content_with_a_right_hash_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = rehashed(tmp_path / "w", HOSTILE[name]) if HOSTILE[name] else tmp_path
    with pytest.raises(InputError) as caught:
        checkpoint.load(path)
    assert caught.value.fix and "\n" not in str(caught.value)
    if name.split()[0] in ("zip", "tar") or (name.startswith("pickle") and name[-1] > "1"):
        assert "run code" in str(caught.value)
    assert not (tmp_path / "canary").exists()


def test_a_mutated_file_with_a_right_hash_is_refused_or_still_only_tensors(saved: Path, tmp_path: Path) -> None:
    good, rng = (saved / "model.safetensors").read_bytes(), random.Random(1)
    size = int.from_bytes(good[:8], "little")
    for _ in range(400):
        bad = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            bad[rng.randrange(8 + size)] = rng.randrange(256)
        try:
            state = store.bytes_to_tensors(bytes(bad))
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert all(isinstance(value, Tensor) for value in state.values())


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pkl", ".safetensors"])
def test_a_foreign_file_or_folder_is_refused_with_a_way_out(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(zipped())
    with pytest.raises(InputError, match=r"run code.*Fix: convert"):
        checkpoint.load(file)
    with pytest.raises(InputError, match=rf"holds model\{suffix}"):
        checkpoint.load(tmp_path)


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    for name, other in (("model.safetensors", "config.json"), ("config.json", "model.safetensors")):
        path = store.commit(tmp_path / name, {other: b"{}"}, kind="weights")
        with pytest.raises(InputError, match=f"has no {name}"):
            checkpoint.load(path)
    with pytest.raises(InputError, match="holds 'run', expected 'weights'"):
        checkpoint.load(store.commit(tmp_path / "run", {"a": b""}, kind="run"))


@pytest.mark.parametrize("data", [b"", b"[]", b"nan", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"\xff", b"[" * 100_000])
def test_a_config_that_is_not_plain_json_is_refused(tmp_path: Path, data: bytes) -> None:
    tensors = store.tensors_to_bytes({"w": torch.zeros(1)})
    path = store.commit(tmp_path / "w", {"model.safetensors": tensors, "config.json": data}, kind="weights")
    with pytest.raises(InputError, match=r"config\.json"):
        checkpoint.load(path)


def test_compatible_lists_the_fields_that_differ() -> None:
    checkpoint.compatible(CONFIG, json.loads(json.dumps(CONFIG)), "w")
    checkpoint.compatible({"a": [1, 2]}, {"a": (1, 2.0)}, "w")
    cases: list[tuple[dict[str, Any], str]] = [
        (CONFIG | {"prediction": "eps"}, "prediction is 'v' in the weights, 'eps' in the configuration"),
        (CONFIG | {"channels": [8, 32]}, r"channels\[1\] is 16 in the weights, 32"),
        (CONFIG | {"channels": [8]}, r"channels is \[8, 16\] in the weights, \[8\]"),
        (CONFIG | {"attention": {"heads": 2}}, "attention.causal is only in the weights"),
        (CONFIG | {"attention": {"heads": 2, "causal": 0}}, "attention.causal is False in the weights, 0"),
        (CONFIG | {"extra": None}, "extra is only in the configuration"),
        (CONFIG | {"attention": None}, "attention is"),
    ]
    for wanted, says in cases:
        with pytest.raises(InputError, match=says):
            checkpoint.compatible(CONFIG, wanted, "w")
    with pytest.raises(InputError, match="; and 12 more"):
        checkpoint.compatible({str(i): 0 for i in range(20)}, {str(i): 1 for i in range(20)}, "w")


FORBIDDEN = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def test_nothing_in_the_package_can_unpickle() -> None:
    root = package_root()
    for path in [*root.glob("cascade/**/*.py"), *root.glob("stages/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not FORBIDDEN & {name.partition(".")[0] for name in names}, f"{path.name}: {names}"
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("torch.load", "torch.save"), f"{path.name}:{node.lineno}"
                assert "allow_pickle" not in {word.arg for word in node.keywords}, f"{path.name}:{node.lineno}"


# which weights -------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf" / "weights").mkdir(parents=True)
    text = "base: {8: eight, 4: four}\nssr: {any: teacher, 1: one}\n"
    (tmp_path / "conf" / "weights" / "small.yaml").write_text(text)
    monkeypatch.setattr(checkpoint.config, "package_root", lambda: tmp_path)
    for name in ("eight", "four", "teacher", "one"):
        (tmp_path / name).mkdir()


def test_the_number_of_steps_picks_the_weights(table: None, tmp_path: Path) -> None:
    assert checkpoint.locate("small", "base", 8) == tmp_path / "eight"
    assert checkpoint.locate("small", "base", 4) == tmp_path / "four"
    assert checkpoint.locate("small", "ssr", 4) == checkpoint.locate("small", "ssr", 64) == tmp_path / "teacher"
    assert checkpoint.locate("small", "ssr", 1) == tmp_path / "one"
    assert checkpoint.locate("some/directory", "base", 5) == Path.cwd() / "some/directory"


@pytest.mark.parametrize(("stage", "message"), [("base", "only for 8, 4"), ("tsr", "only for nothing")])
def test_steps_without_weights_name_those_that_exist(table: None, stage: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        checkpoint.locate("small", stage, 5)
    assert f"{stage}.weights=DIRECTORY" in caught.value.fix


def test_no_weights_at_all_is_said_and_random_ones_are_in_no_directory() -> None:
    with pytest.raises(ConfigError, match="tsr has no weights"):
        checkpoint.locate(None, "tsr", 4)
    with pytest.raises(ConfigError, match=r"tsr\.weights is random.*can only sample\. Fix: tsr\.weights=DIRECTORY"):
        checkpoint.locate(checkpoint.RANDOM, "tsr", 4)


@pytest.mark.parametrize("length", [384, 640, 896, 1152, 1408])
def test_a_header_as_long_as_a_pickle_begins_is_no_pickle(length: int) -> None:
    """Little-endian, such a length is the byte 0x80 and a protocol's number."""
    short = store.tensors_to_bytes({"a": torch.ones(2)}, ("note", ""))
    data = store.tensors_to_bytes({"a": torch.ones(2)}, ("note", "x" * (length - int.from_bytes(short[:8], "little"))))
    assert int.from_bytes(data[:8], "little") == length and data[:1] == b"\x80"
    assert torch.equal(store.bytes_to_tensors(data)["a"], torch.ones(2))
