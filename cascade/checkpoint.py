"""Weights on disk: a directory of safetensors, the architecture they belong to, and a model card.

Nothing here can run code: no pickle, no torch.load. The order is always hash, parse, architecture, keys, shapes,
dtypes, finiteness, and only then the module; safetensors itself has no checksum and accepts any flipped bit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cascade import config, store
from cascade.errors import ConfigError, InputError, NumericError

KIND = "weights"
RANDOM = "random"  # in place of a directory: weights drawn at random, to try out a chain that has none
MODEL, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
EXPORTED = "pipeline"  # kind of a folder in diffusers' layout; each stage is a folder in it, as `portable` has it
PORTABLE, PREFIX = "diffusion_pytorch_model.safetensors", "net."  # diffusers' file; our network is `net` of its model


@dataclass(frozen=True)
class Weights:
    """Verified weights. `config` is the architecture they fit, `hash` the SHA-256 of their manifest."""

    state: dict[str, Tensor]
    config: dict[str, Any]
    hash: str


def save(
    directory: Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    card: str = "",
    dtype: torch.dtype | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a weights directory, replacing an older one; `dtype` (half precision) is for floating tensors.

    Raises NumericError if a value is not finite (in `dtype`), HostError.
    """
    ready = {}
    for name, tensor in state.items():
        cast = tensor.detach().to(dtype) if dtype is not None and tensor.is_floating_point() else tensor.detach()
        if not _finite(cast):
            raise NumericError(f"{directory}: {name} is not finite as {cast.dtype}", fix="train from an earlier step")
        ready[name] = cast
    files = {MODEL: store.tensors_to_bytes(ready), CONFIG: store.canonical(dict(config))}
    if card:
        files[CARD] = card.encode()
    return store.commit(directory, files, kind=KIND, meta=meta, replace=True)


def locate(weights: str | None, stage: str, steps: int) -> Path:
    """The directory of a stage's weights: `weights` itself, or the one that conf/weights/<weights>.yaml names.

    Such a file says for each stage which directory serves which number of sampler steps, {stage: {steps: directory}};
    `any` is a teacher, which serves all others.
    Raises ConfigError where there are none, naming those that exist, and for RANDOM, which is no directory.
    """
    if weights is None:
        raise ConfigError(
            f"{stage} has no weights", fix=f"{stage}.weights=DIRECTORY, or {stage}.weights={RANDOM} to try it out"
        )
    if weights == RANDOM:
        raise ConfigError(
            f"{stage}.weights is {RANDOM}, which is for trying a stage out: it can only sample",
            fix=f"{stage}.weights=DIRECTORY",
        )
    table = config.package_root() / "conf" / "weights" / f"{weights}.yaml"
    if not re.fullmatch(r"[\w-]+", weights) or not table.is_file():
        return config.locate(weights)
    import yaml  # type: ignore[import-untyped]

    students = yaml.safe_load(table.read_text(encoding="utf-8")).get(stage, {})
    directory = students.get(steps, students.get("any"))
    if directory is None:
        known = ", ".join(map(str, students)) or "nothing"
        raise ConfigError(
            f"{stage}: there are no weights for {steps} sampler steps, only for {known}",
            fix=f"{stage}.sampler.steps={min(students, key=lambda n: abs(n - steps))}, or {stage}.weights=DIRECTORY"
            if students
            else f"{stage}.weights=DIRECTORY",
        )
    return config.locate(directory)


def check(directory: Path) -> None:
    """Raises InputError where `load` would find no weights; their content is not read."""
    if (directory / PORTABLE).is_file():
        store.manifest(directory.parent, EXPORTED)
    else:
        store.manifest(directory, KIND)


def portable(state: Mapping[str, Tensor], settings: Mapping[str, Any], model: str) -> dict[str, bytes]:
    """The files of a folder from which diffusers makes the class `model`; `settings` are the stage's.

    Where half precision holds every value exactly it is used: what was loaded from it becomes no larger. Raises
    NumericError if a value is not finite.
    """
    for name, tensor in state.items():
        if not _finite(tensor):
            raise NumericError(f"weights: {name} is not finite", fix="train from an earlier step")
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    lossless = all(torch.equal(half[name].to(tensor), tensor) for name, tensor in state.items())
    named = {PREFIX + name: tensor for name, tensor in (half if lossless else state).items()}
    config = {"_class_name": model, "settings": dict(settings)}
    return {CONFIG: store.canonical(config), PORTABLE: store.tensors_to_bytes(named)}


def _ported(directory: Path) -> Weights:
    """The inverse of `portable`, verified by the manifest of the pipeline that the folder is in."""
    settings, model = _settings(directory), store.member(directory.parent, f"{directory.name}/{PORTABLE}", EXPORTED)
    state = store.bytes_to_tensors(model, str(directory / PORTABLE))
    if not all(name.startswith(PREFIX) for name in state):
        raise InputError(f"weights {directory}: are not of a stage of Cascade", fix="export the chain again")
    return Weights({name.removeprefix(PREFIX): tensor for name, tensor in state.items()}, settings, _named(directory))


def _settings(directory: Path) -> dict[str, Any]:
    config = store.member(directory.parent, f"{directory.name}/{CONFIG}", EXPORTED)
    settings = store.from_json(config, directory / CONFIG).get("settings")
    if not isinstance(settings, dict):
        raise InputError(f"weights {directory}: are not of a stage of Cascade", fix="export the chain again")
    return settings


def _named(directory: Path) -> str:
    """The hash of what the manifest says of the files that `portable` made."""
    files = store.manifest(directory.parent, EXPORTED)["files"]
    return hashlib.sha256(
        store.canonical([files[f"{directory.name}/{name}"] for name in (CONFIG, PORTABLE)])
    ).hexdigest()


def load(directory: Path) -> Weights:
    """Reads a weights directory that verifies. Raises InputError; other formats are refused by their content."""
    if (directory / PORTABLE).is_file():
        return _ported(directory)
    if directory.is_file():
        with directory.open("rb") as file:
            store.refuse_pickle(file.read(512), str(directory))
        raise InputError(f"weights {directory}: is a file, expected a directory", fix="name the directory it is in")
    artefact = store.read(directory, KIND)
    for name in (MODEL, CONFIG):
        if name not in artefact.files:
            raise InputError(f"weights {directory}: has no {name}", fix="make the weights again")
    state = store.bytes_to_tensors(artefact.files[MODEL], str(directory / MODEL))
    return Weights(state, store.from_json(artefact.files[CONFIG], directory / CONFIG), artefact.hash)


def about(directory: Path) -> tuple[dict[str, Any], str]:
    """`config` and `hash` of the weights in `directory`, which are not read. Raises InputError."""
    if (directory / PORTABLE).is_file():
        return _settings(directory), _named(directory)
    artefact = store.read(directory, KIND, only=(CONFIG,))
    if CONFIG not in artefact.files:
        raise InputError(f"weights {directory}: has no {CONFIG}", fix="make the weights again")
    return store.from_json(artefact.files[CONFIG], directory / CONFIG), artefact.hash


def apply(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Puts `state` into `module` (which may be on the meta device), cast to the module's dtypes.

    Every difference in keys, shapes, dtypes and finiteness is counted; if there is one, InputError lists the first
    eight and nothing is loaded.
    """
    wanted = module.state_dict()
    found = list(_differences(wanted, state))
    if found:
        more = f"; and {len(found) - 8} more" if len(found) > 8 else ""
        raise InputError(
            f"weights {where}: {len(found)} differences from the model: {'; '.join(found[:8])}{more}",
            fix="use weights made for this configuration, or the configuration in their config.json",
        )
    # Copies: the last bits of a product depend on where its factors begin, and views into a file begin anywhere.
    ready = {name: state[name].to(tensor.dtype, copy=True) for name, tensor in wanted.items()}
    module.load_state_dict(ready, assign=any(tensor.is_meta for tensor in wanted.values()))


def compatible(saved: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Raises InputError with the first differing fields (saved, wanted) of two architecture configs."""
    found = list(_fields(saved, wanted, ""))
    if found:
        more = f"; and {len(found) - 8} more" if len(found) > 8 else ""
        raise InputError(
            f"weights {where}: made for another architecture: {'; '.join(found[:8])}{more}",
            fix="name other weights, or set these fields as the weights have them",
        )


def _differences(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterator[str]:
    for name in sorted(wanted.keys() | state.keys()):
        if name not in state:
            yield f"{name} is missing"
        elif name not in wanted:
            yield f"{name} is unknown"
        elif state[name].shape != wanted[name].shape:
            yield f"{name} is {_shape(state[name])}, expected {_shape(wanted[name])}"
        elif not _same_type(state[name], wanted[name]):
            yield f"{name} is {state[name].dtype}, expected {wanted[name].dtype}"
        elif not _finite(state[name].to(wanted[name].dtype)):
            yield f"{name} is not finite"


def _same_type(given: Tensor, wanted: Tensor) -> bool:
    return given.dtype == wanted.dtype or (given.is_floating_point() and wanted.is_floating_point())


def _finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.dtype.itemsize == 1:  # isfinite is not implemented for float8
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _fields(saved: Any, wanted: Any, where: str) -> Iterator[str]:
    if isinstance(saved, Mapping) and isinstance(wanted, Mapping):
        for key in sorted(saved.keys() | wanted.keys()):
            path = f"{where}.{key}" if where else str(key)
            if key not in saved or key not in wanted:
                yield f"{path} is only in {'the configuration' if key in wanted else 'the weights'}"
            else:
                yield from _fields(saved[key], wanted[key], path)
    elif isinstance(saved, list | tuple) and isinstance(wanted, list | tuple) and len(saved) == len(wanted):
        for i, (a, b) in enumerate(zip(saved, wanted, strict=True)):
            yield from _fields(a, b, f"{where}[{i}]")
    elif saved != wanted or isinstance(saved, bool) != isinstance(wanted, bool):
        yield f"{where} is {saved!r} in the weights, {wanted!r} in the configuration"
