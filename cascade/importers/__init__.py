"""Weights of others: `cascade import weights=<layout> source=DIR out=DIR`. Each layout is a file here.

The source's own config.json decides what network is built, on the meta device; a field that we do not know or cannot
build is refused by name. Its tensors must then be those of that network, in names and shapes exactly. Nothing is
converted, and nothing is unpickled. What a layout can also say backwards goes back the same way, `to=source`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from cascade import checkpoint, store
from cascade.config import kinds, parse, plain, suggest
from cascade.diffusion import Diffusion, Prediction
from cascade.errors import ConfigError
from cascade.importers import _source as source
from cascade.nets.unet3d import UNet3D
from cascade.nets.unet3d_config import UNet3DConfig

PUBLISHED = "published"  # kind of a folder that is written back


@dataclass(frozen=True)
class Layout:
    """How a family of published weights lies on disk. A file here has one, LAYOUT."""

    licence: str  # of the weights, for the model card
    classes: tuple[str, ...]  # `_class_name` in config.json
    network: Callable[[Mapping[str, Any]], UNet3DConfig]  # of config.json; ConfigError or ValueError names the field
    published: Callable[[UNet3DConfig], dict[str, Any]] | None = None  # its inverse
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict  # those of the network out of a file's


class To(Enum):
    """Which way it goes."""

    CASCADE = "cascade"
    SOURCE = "source"


@dataclass(kw_only=True)
class ImportConfig:
    """What is imported, and for what."""

    weights: str
    source: Path
    out: Path
    kind: str = "base"
    prediction: Prediction = Prediction.EPS
    file: str | None = None
    to: To = To.CASCADE

    def __post_init__(self) -> None:
        for name, known in (("weights", layouts()), ("kind", kinds())):
            if (given := getattr(self, name)) not in known:
                raise ConfigError(
                    f"{name} is {given!r}, expected one of {', '.join(known)}", suggest(given, known, f"{name}=")
                )


def layouts() -> list[str]:
    """The layouts that can be named: the files of this folder without an underscore."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def layout_of(name: str) -> Layout:
    return cast(Layout, importlib.import_module(f"{__name__}.{name}").LAYOUT)


def verb(tree: dict[str, Any]) -> Callable[[], None]:
    """`cascade import`: a line for what was made."""
    for name in ("weights", "source", "out"):
        if tree.get(name) is None:
            raise ConfigError(f"{name} is missing", fix=f"{name}={'modelscope' if name == 'weights' else 'DIRECTORY'}")
    run = parse(tree, ImportConfig)
    store.check_ours(run.out, PUBLISHED if run.to is To.SOURCE else checkpoint.KIND)

    def work() -> None:
        with store.lock(run.out):
            print((write_back if run.to is To.SOURCE else bring)(run))

    return work


def bring(run: ImportConfig) -> str:
    """The source's weights as a weights directory. Raises InputError for a source that is not exactly as it says."""
    layout, folder = layout_of(run.weights), source.folder(run.source)
    config = source.config(folder)
    cfg = source.understood(folder, config, layout.classes, layout.network)
    paths = source.files(folder, run.file)
    state, hashes = source.tensors(paths)
    state = layout.tensors(state)
    with torch.device("meta"):
        wanted = UNet3D(cfg).state_dict()
    source.check(folder, state, wanted)
    parameters = sum(tensor.numel() for tensor in state.values())
    checkpoint.save(
        run.out,
        state,
        {
            "kind": run.kind,
            "net": plain(cfg),
            "diffusion": plain(Diffusion(prediction=run.prediction)),
            "source": {"layout": run.weights, "config": config, "files": hashes},
        },
        card=_card(run.weights, layout.licence, parameters, hashes),
    )
    return f"{run.out}: {len(state)} tensors, {parameters:,} parameters of {run.weights}; {layout.licence}"


def write_back(run: ImportConfig) -> str:
    """A weights directory in the source's layout: the folder that its own code loads."""
    layout = layout_of(run.weights)
    if layout.published is None:
        able = [name for name in layouts() if layout_of(name).published is not None]
        raise ConfigError(
            f"{run.weights} cannot be written back, only {', '.join(able)}", fix=suggest("", able, "weights=")
        )
    weights = checkpoint.load(run.source)
    cfg = parse(weights.config.get("net", {}), UNet3DConfig, "net")
    origin = weights.config.get("source", {})
    if origin.get("layout") == run.weights and layout.network(origin["config"]) == cfg:
        config = origin["config"]  # as it came, with the fields that do not touch the network
    else:
        config = layout.published(cfg)
    files = {
        "config.json": store.canonical(config),
        "diffusion_pytorch_model.safetensors": store.tensors_to_bytes(weights.state, metadata=("format", "pt")),
    }
    store.commit(run.out, files, kind=PUBLISHED, meta={"weights": weights.hash}, replace=True)
    return f"{run.out}: {len(weights.state)} tensors as {run.weights} has them"


def same(
    config: dict[str, Any], cfg: UNet3DConfig, network: Callable[[Mapping[str, Any]], UNet3DConfig]
) -> dict[str, Any]:
    """`config` if it says all of `cfg`. Raises ConfigError naming what it cannot say."""
    fix = "weights= the layout that the network came from"
    try:
        said = plain(network(config))
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"net: cannot be said in that layout: {error}", fix) from error
    if lost := [name for name, value in plain(cfg).items() if said[name] != value]:
        raise ConfigError(f"net: {', '.join(lost)} cannot be said in that layout", fix)
    return config


def _card(name: str, licence: str, parameters: int, hashes: Mapping[str, str]) -> str:
    lines = "\n".join(f"- `{file}`: SHA-256 {digest}" for file, digest in hashes.items())
    return (
        f"# {name}\n\nPublished weights ({parameters / 1e6:.1f} M parameters), imported as they are:\n\n{lines}\n\n"
        f"Licence: {licence}.\n"
    )
