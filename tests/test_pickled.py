from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cascade import pickled
from cascade.errors import InputError

TREE = {
    "params": {
        "Conv_0": {"kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "bias": np.zeros(3, np.float64)},
        "Branch_0/Conv": {"kernel": np.ones((1, 1), np.float16), "steps": np.arange(300, dtype=np.int64)},
    },
    "empty": {},
}


def flat(tree: dict[str, Any], path: str = "") -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    for name, part in tree.items():
        out |= flat(part, f"{path}{name}.") if isinstance(part, dict) else {path + name: part}
    return out


@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_are_those_that_unpickling_gives(protocol: int) -> None:
    data = pickle.dumps(TREE, protocol)
    found = pickled.numpy_tensors(data, "it")
    expected = flat(pickle.loads(data))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, torch.from_numpy(expected[name])) and tensor.numpy().dtype == expected[name].dtype


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_data_is_read_as_it_is(protocol: int) -> None:
    text, long = "ü" * 300, 1 << 70
    data = {
        "a": [1, -2, 70000, 1.5, None, True, False, long],
        "b": (b"x" * 300, b"y", ()),
        text: [[], {}],
        "again": text,
    }
    assert pickled.read(pickle.dumps(data, protocol), "it") == data


def test_the_state_dict_of_a_module_is_read(tmp_path: Path) -> None:
    """torch.save writes it as an OrderedDict with attributes, and parameters by a function of their own."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Conv2d(3, 4, 1).bfloat16())
    saved = {"ema": module.state_dict(), "step": 3, "own": {"weight": module[0].weight}}
    torch.save(saved, tmp_path / "it.pt")
    found = pickled.torch_tensors((tmp_path / "it.pt").read_bytes(), "it")
    expected = {f"ema.{name}": tensor for name, tensor in module.state_dict().items()} | {
        "own.weight": module[0].weight
    }
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_nothing_in_a_pickle_is_run(protocol: int, tmp_path: Path) -> None:
    data = pickle.dumps({"weight": Trap(tmp_path / "ran")}, protocol)
    call = pickled.read(data, "it")["weight"]
    assert call.what.full.endswith(".mkdir") and call.args == (str(tmp_path / "ran"),)
    with pytest.raises(InputError, match="no plain array"):
        pickled.numpy_tensors(data, "it")
    saved = io.BytesIO()
    torch.save({"weight": Trap(tmp_path / "ran"), "kept": torch.ones(2)}, saved)
    assert list(pickled.torch_tensors(saved.getvalue(), "it")) == ["kept"]
    assert not list(tmp_path.iterdir())
    pickle.loads(data)
    assert (tmp_path / "ran").is_dir()  # the trap is one


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_tensors_of_torch_save_and_of_torchscript() -> None:
    base = torch.arange(24.0).view(4, 6)
    state = {
        "a": base,
        "view": base[1:3, ::2],
        "turned": base.T,
        "half": torch.ones(3).half(),
        "none": torch.empty(0, 2),
    }
    file = io.BytesIO()
    torch.save({"net": state, "epoch": 3}, file)
    found = pickled.torch_tensors(file.getvalue(), "it")
    assert found.keys() == {f"net.{name}" for name in state}
    assert all(torch.equal(found[f"net.{name}"], tensor) for name, tensor in state.items())

    with torch.random.fork_rng(devices=[]):
        module = torch.jit.script(
            torch.nn.Sequential(torch.nn.Conv2d(3, 4, (1, 3), padding=(0, 1)), torch.nn.Linear(2, 2))
        )
    file = io.BytesIO()
    torch.jit.save(module, file)
    found, expected = pickled.torch_tensors(file.getvalue(), "it"), module.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_no_plain_data_is_refused() -> None:
    whole = pickle.dumps(TREE, 4)
    for data in (b"", b"nonsense", whole[:40], whole[:-1], pickle.dumps(TREE, 0), pickle.dumps([1], 4)):
        with pytest.raises(InputError, match="it: "):
            pickled.numpy_tensors(data, "it")
    turned = pickle.dumps({"a": np.asfortranarray(np.ones((2, 3)))}, 4)
    text = pickle.dumps({"a": np.array(["x"])}, 4)
    for data in (turned, text):
        with pytest.raises(InputError, match="no plain array"):
            pickled.numpy_tensors(data, "it")
    with pytest.raises(InputError, match=r"torch\.save"):
        pickled.torch_tensors(whole, "it")


def test_a_tensor_that_reaches_outside_its_storage_is_refused() -> None:
    file = io.BytesIO()
    torch.save({"a": torch.arange(4.0)}, file)
    # BININT1 1 (the stride) becomes 9: elements 0 to 27 of 4. The zip's checksums are made anew.
    broken = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(file.getvalue())) as old, zipfile.ZipFile(broken, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content.replace(b"K\x01\x85", b"K\x09\x85") if name.endswith("data.pkl") else content)
    with pytest.raises(InputError, match="elements 0 to 27 of 4"):
        pickled.torch_tensors(broken.getvalue(), "it")
