"""Models of diffusers: a folder with config.json and safetensors, loaded strictly."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cascade import store
from cascade.config import locate
from cascade.errors import InputError, NumericError

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


def find(weights: str, name: str, what: str) -> Path:
    """The folder `weights`, which `what` (an autoencoder, a prior) of diffusers' class `name` should be in.

    Raises InputError for one that lacks a file.
    """
    folder = locate(weights)
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    absent = [file for file in (CONFIG, WEIGHTS) if file not in there]
    if absent:
        has = f"has {', '.join(there[:12]) or 'no files'}" if folder.is_dir() else "is not a folder"
        fix = f"name a folder with {CONFIG} and {WEIGHTS}"
        if any(Path(file).suffix in (".bin", ".pt", ".pth", ".ckpt") for file in there):
            fix += f"; {name}.from_pretrained(...).save_pretrained(...) of diffusers writes them"
        raise InputError(f"{what} {folder}: {', '.join(absent)} missing, it {has}", fix=fix)
    if (folder / store.MANIFEST).is_file() and (bad := store.problems(folder)):
        raise InputError(f"{what} {bad[0]}", fix="copy the folder again")
    return folder


def load(folder: Path, name: str, what: str, setting: str) -> Any:
    """The model in `folder`, frozen, on the CPU: diffusers fills what is missing with random numbers and a warning.

    `setting` names the folder. Raises InputError for what is damaged or does not fit, NumericError for weights that
    are not finite.
    """
    found = store.from_json((folder / CONFIG).read_bytes(), folder / CONFIG).get("_class_name")
    if found != name:
        raise InputError(f"{what} {folder}: {CONFIG} is of {found}, not {name}", fix=f"another {setting}")
    from safetensors import SafetensorError

    try:
        with quiet("diffusers"):
            model, report = model_class(name).from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                torch_dtype=torch.float32,
                output_loading_info=True,
            )
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).split(". ")[0]  # what follows is advice on arguments of diffusers
        raise InputError(f"{what} {folder}: {reason}", fix="copy the folder again") from error
    wrong = [f"{key} missing" for key in report["missing_keys"]]
    wrong += [f"{key} unknown" for key in report["unexpected_keys"]]
    wrong += [str(reason) for reason in (*report["mismatched_keys"], *report["error_msgs"])]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise InputError(
            f"{what} {folder}: the weights do not fit {CONFIG}: {', '.join(sorted(wrong)[:8])}{more}",
            fix="take both files from one model",
        )
    for key, value in model.state_dict().items():
        if not torch.isfinite(value).all():
            raise NumericError(f"{what} {folder}: {key} is not finite", fix="copy it again")
    return model.requires_grad_(False).eval()


def model_class(name: str) -> Any:
    """A class of diffusers, by its name."""
    with quiet("xformers"):  # diffusers imports it, and it says on six lines that it has no CUDA
        import diffusers

        return getattr(diffusers, name)


@contextmanager
def quiet(library: str) -> Iterator[None]:
    """Nothing below an error from the log of `library`."""
    log = logging.getLogger(library)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def digest(folder: Path) -> str:
    """SHA-256 over the two files."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
