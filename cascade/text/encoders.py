"""Files and weights of text encoders, strictly: what T5 and CLIP (cascade/text) share.

A folder may be one that diffusers wrote: `text_encoder/` with the tokenizer in `tokenizer/` beside it.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade import store
from cascade.config import package_root
from cascade.errors import InputError, NumericError

CONFIG, WEIGHTS, SHARDS = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "spiece.model"  # T5's
VOCABULARY = ("vocab.json", "merges.txt")  # CLIP's
IN_ONE = "tokenizer.json"  # or all of it, as newer files have it
OTHERS = ("tokenizer_config.json", "special_tokens_map.json")  # which token pads, above all
BESIDE = "tokenizer"


def local_file(name: str, file: str) -> Path | None:
    """A file of the encoder `name` (see TextConfig) if it is on this machine; nothing is fetched."""
    folder = _folder(name)
    if folder is not None:
        return folder / file if (folder / file).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repository, inside, revision = _hub(name)
    try:
        found = try_to_load_from_cache(repository, f"{inside}{file}", revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _folder(name: str) -> Path | None:
    """The folder that the encoder `name` is in or should be in, None for a name on the hub."""
    ours = package_root() / "checkpoints" / name
    given = Path(os.path.expanduser(name))  # pathlib's raises where there is no such user
    if given.is_absolute() or name.startswith("."):
        return given
    if ours.is_dir() or not re.fullmatch(r"[\w.-]+(/[\w.-]+){0,2}(@[\w./-]+)?", name):
        return ours
    return None


def _hub(name: str) -> tuple[str, str, str | None]:
    """owner/repository/folder@revision as repository, "folder/" (or nothing) and revision."""
    path, _, revision = name.partition("@")
    owner, _, rest = path.partition("/")
    repository, _, inside = rest.partition("/")
    return f"{owner}/{repository}" if repository else owner, f"{inside}/" if inside else "", revision or None


def find_encoder(name: str) -> Path:
    """The folder of the encoder `name` (see TextConfig), fetched from the hub when it is a name there."""
    folder = _folder(name) or _fetched(name)
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    absent = [file for file in (CONFIG, *tokenizer_files(folder)) if not near(folder, file).is_file()]
    if WEIGHTS not in there and SHARDS not in there:
        absent.append(WEIGHTS)
    if absent:
        has = f"has {', '.join(there[:12]) or 'no files'}" if folder.is_dir() else "is not a folder"
        fix = f"name a T5 folder with {CONFIG}, {TOKENIZER} and {WEIGHTS}"
        if absent[0] in VOCABULARY:
            fix = f"name a CLIP folder with {CONFIG}, {' and '.join(VOCABULARY)} and {WEIGHTS}"
        if "pytorch_model.bin" in there:
            fix += "; T5EncoderModel.from_pretrained(...).save_pretrained(...) of transformers writes the last"
        raise InputError(f"text encoder {folder}: {', '.join(absent)} missing, it {has}", fix=fix)
    return folder


def near(folder: Path, file: str) -> Path:
    """`file` in `folder`, or in the folder `tokenizer` beside it if it is there alone."""
    beside = folder.parent / BESIDE / file
    return beside if not (folder / file).is_file() and beside.is_file() else folder / file


def family(folder: Path) -> str:
    """What config.json says the encoder is: t5, clip, clip_text_model, ..."""
    path = folder / CONFIG
    return str(store.from_json(path.read_bytes(), path).get("model_type")) if path.is_file() else "t5"


def is_clip(folder: Path) -> bool:
    return family(folder).startswith("clip")


def tokenizer_files(folder: Path) -> tuple[str, ...]:
    """Names of the tokenizer's files, those that have to be there."""
    if not is_clip(folder):
        return (TOKENIZER,)
    one = near(folder, IN_ONE).is_file() and not near(folder, VOCABULARY[0]).is_file()
    return (IN_ONE,) if one else VOCABULARY


def encoder_files(name: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file of the encoder `name`, its manifest too if it has one, to copy it."""
    folder = find_encoder(name)
    if (folder / store.MANIFEST).is_file():
        for file in store.manifest(folder)["files"]:
            yield file, store.member(folder, file)
        yield store.MANIFEST, (folder / store.MANIFEST).read_bytes()
        return
    shards = [folder / SHARDS] if not (folder / WEIGHTS).is_file() else []
    tokenizer = [near(folder, file) for file in tokenizer_files(folder)]
    for path in (folder / CONFIG, *tokenizer, *shards, *weight_files(folder)):
        yield path.name, path.read_bytes()


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository, inside, revision = _hub(name)
    files = [f"{inside}{file}" for file in (CONFIG, SHARDS, "*.safetensors")]
    for folder in dict.fromkeys((inside, f"{BESIDE}/" if inside else "")):
        files += [f"{folder}{file}" for file in (TOKENIZER, *VOCABULARY, IN_ONE, *OTHERS)]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files)) / inside
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(
            f"text encoder {name}: there is no such folder in {package_root() / 'checkpoints'}, and it cannot be"
            f" fetched from the Hugging Face hub ({type(error).__name__})",
            fix="set encoder to a folder, or fetch it once where huggingface.co answers",
        ) from error


def data(path: Path, verified: Mapping[str, bytes]) -> bytes:
    """A file of an encoder; from the verified ones if there is a manifest, which then has to list it."""
    if verified and path.name not in verified:
        raise InputError(f"text encoder {path}: is not in {store.MANIFEST}", fix="copy the folder again")
    return verified[path.name] if verified else path.read_bytes()


def width(config: Mapping[str, Any], path: Path) -> int:
    """Width of the embeddings by an encoder's config.json."""
    of_text = config.get("text_config", config)  # a whole CLIP has a part for text
    found = config.get("d_model") if "d_model" in config else of_text.get("hidden_size")
    if type(found) is not int:
        raise InputError(
            f"text encoder {path}: has no d_model, so it is not T5's, and no hidden_size, so it is not CLIP's",
            fix="copy it again",
        )
    return found


def built(
    folder: Path,
    verified: Mapping[str, bytes],
    make: Callable[[dict[str, Any]], torch.nn.Module],
    weights: Callable[[Iterator[tuple[str, Tensor]]], dict[str, Tensor]],
    dtype: torch.dtype,
    device: str,
) -> Any:
    """The model that `make` makes of config.json, filled with `weights` of all tensors in the files.

    Strictly: `from_pretrained` would fill what is missing with random numbers. Raises InputError for what does not fit,
    NumericError for what is not finite.
    """
    from huggingface_hub.errors import StrictDataclassError

    settings = store.from_json(data(folder / CONFIG, verified), folder / CONFIG)
    try:
        with torch.device("meta"):  # spends neither time nor the global generator on weights that are replaced
            model = make(settings)
    except (TypeError, ValueError, KeyError, RuntimeError, StrictDataclassError) as error:
        name = "CLIP" if is_clip(folder) else "T5"
        raise InputError(f"text encoder {folder}: {CONFIG} is not {name}'s: {error}", fix="copy it again") from error
    want, state = model.state_dict(), weights(_tensors(folder, verified))
    for key, value in state.items():
        if not value.isfinite().all():
            raise NumericError(f"text encoder {folder}: {key} is not finite", fix="copy it again")
    wrong = [f"{key} missing" for key in want.keys() - state.keys()]
    wrong += [f"{key} unknown" for key in state.keys() - want.keys()]
    for key in want.keys() & state.keys():
        if state[key].shape != want[key].shape:
            wrong.append(f"{key} {list(state[key].shape)} instead of {list(want[key].shape)}")
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise InputError(
            f"text encoder {folder}: the weights do not fit {CONFIG}: {', '.join(sorted(wrong)[:8])}{more}",
            fix="take both files from one model",
        )
    # Copies, not views into a file: see checkpoint.apply.
    model.load_state_dict({key: value.to(device, dtype, copy=True) for key, value in state.items()}, assign=True)
    model.requires_grad_(False)
    return model.train(False)


def _tensors(folder: Path, verified: Mapping[str, bytes]) -> Iterator[tuple[str, Tensor]]:
    for path in weight_files(folder):
        yield from _file(path, verified).items()


def _file(path: Path, verified: Mapping[str, bytes]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if verified:
        return store.bytes_to_tensors(data(path, verified), f"text encoder {path}")
    try:
        return load_file(path)  # maps the file: a large T5 should not be in memory twice
    except SafetensorError as error:
        raise InputError(f"text encoder {path}: is not a safetensors file: {error}", fix="copy it again") from error


def weight_files(folder: Path) -> list[Path]:
    """The file of the weights, or all of its shards. Raises InputError for a shard that is not here."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    shards = store.from_json((folder / SHARDS).read_bytes(), folder / SHARDS).get("weight_map")
    names = sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) else []
    lost = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if lost or not names:
        raise InputError(
            f"text encoder {folder}: {SHARDS} names {', '.join(lost) or 'no file'}, which is not here",
            fix="copy the folder again",
        )
    return [folder / name for name in names]


def fingerprint(folder: Path, verified: Mapping[str, bytes], settings: Sequence[str]) -> str:
    """SHA-256 over the files of the encoder and the settings that decide what it makes of a prompt."""
    digest = hashlib.sha256("\n".join(settings).encode())
    names = list(tokenizer_files(folder))
    names += [name for name in (IN_ONE, *OTHERS) if is_clip(folder) and name not in names]
    reads = [path for path in (near(folder, name) for name in names) if path.is_file()]
    for path in (folder / CONFIG, *reads, *weight_files(folder)):
        with io.BytesIO(data(path, verified)) if verified else path.open("rb") as file:
            content = hashlib.sha256()
            while chunk := file.read(1 << 20):
                content.update(chunk)
        digest.update(f"\n{path.name} {content.hexdigest()}".encode())
    return digest.hexdigest()
