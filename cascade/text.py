"""Prompts become vectors: a frozen T5 encoder, and a store of embeddings that needs no T5 to be read.

Whatever makes them, embeddings are float32 and depend on the prompt and the encoder alone: a stored prompt, a prompt
encoded alone and the same prompt in a batch are equal bit for bit.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from cascade import store
from cascade.config import package_root
from cascade.errors import ConfigError, InputError, NumericError
from cascade.t5 import T5Config, T5Encoder

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

MAX_PROMPT = 10_000  # characters
CONFIG, TOKENIZER, WEIGHTS, SHARDS = "config.json", "spiece.model", "model.safetensors", "model.safetensors.index.json"
INDEX = "index.json"
log = logging.getLogger("cascade")


@dataclass
class Text:
    """Embedded prompts: `tokens` (B, L, D) float32 and `mask` (B, L), True where a token is real.

    A prompt without real tokens is the dropped condition of classifier-free guidance. `memory` holds what networks made
    of these very prompts, see `once`; whatever is derived from a text begins without one.
    """

    tokens: Tensor
    mask: Tensor
    memory: dict[Hashable, tuple[Tensor, ...]] | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: slice | Tensor) -> Text:
        return Text(self.tokens[index], self.mask[index])

    @staticmethod
    def cat(parts: Sequence[Text]) -> Text:
        """All prompts of `parts` in order, padded to the longest L."""
        longest = max(part.mask.shape[1] for part in parts)
        padded = [part.pad(longest) for part in parts]
        return Text(torch.cat([part.tokens for part in padded]), torch.cat([part.mask for part in padded]))

    @staticmethod
    def empty(batch: int, length: int, width: int) -> Text:
        """`batch` dropped prompts."""
        return Text(torch.zeros(batch, length, width), torch.zeros(batch, length, dtype=torch.bool))

    def remembering(self) -> Text:
        """The same prompts with an empty memory: for one sampling run, in which no weight changes."""
        return Text(self.tokens, self.mask, {})

    def once(self, key: Hashable, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """make(), which depends on these prompts and `key` alone; one that remembers asks once, without gradients."""
        if self.memory is None:
            return make()
        if key not in self.memory:
            with torch.no_grad():
                self.memory[key] = make()
        return self.memory[key]

    def pad(self, length: int) -> Text:
        """The same prompts with zeros up to `length` tokens."""
        more = length - self.mask.shape[1]
        assert more >= 0, f"{self.mask.shape[1]} tokens do not fit in {length}"
        pad = torch.nn.functional.pad
        return Text(pad(self.tokens, (0, 0, 0, more)), pad(self.mask, (0, more)))

    def to(self, device: torch.device | str) -> Text:
        return Text(self.tokens.to(device), self.mask.to(device))

    def drop(self, keep: Tensor) -> Text:
        """The same prompts where `keep` (B,) is True, the dropped condition elsewhere."""
        mask = self.mask & keep[:, None]
        return Text(self.tokens * mask[:, :, None], mask)

    def pooled(self) -> Tensor:
        """Mean over the real tokens (B, D); 0 for a dropped prompt."""
        mask = self.mask[:, :, None].to(self.tokens.dtype)
        return (self.tokens * mask).sum(1) / mask.sum(1).clamp(min=1)


class Precision(Enum):
    """Of the encoder's weights. There is no float16: the activations of T5 overflow in it."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclass(kw_only=True)
class TextConfig:
    """Which encoder reads the prompts.

    `encoder` is a folder (absolute, below the checkpoints of this package, or from here with a leading "."), or a
    name on the Hugging Face hub with an optional "@revision". `max_tokens` counts the end mark. `store` is a directory
    written by `cascade embed`: with it, no encoder is loaded.
    """

    encoder: str = "tiny/text"
    max_tokens: int = 64
    store: str | None = None
    precision: Precision = Precision.FLOAT32

    def __post_init__(self) -> None:
        if not self.encoder.strip():
            raise ValueError("encoder is empty, expected a folder or a name on the hub")
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens is {self.max_tokens}, expected at least 2 (a piece and the end mark)")


class TextSource(Protocol):
    """What makes embeddings: `T5Text` or an `EmbeddingStore`."""

    @property
    def width(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, prompts: Sequence[str]) -> Text: ...


def text_source(cfg: TextConfig, device: str = "cpu") -> TextSource:
    """The store if `cfg` names one, else the encoder on `device`; embeddings are on the CPU either way."""
    if cfg.store is None:
        return T5Text(cfg, device)
    opened = EmbeddingStore(Path(cfg.store))
    if opened.max_tokens != cfg.max_tokens:
        raise ConfigError(
            f"text store {cfg.store}: holds prompts of up to {opened.max_tokens} tokens, not {cfg.max_tokens}",
            fix=f"text.max_tokens={opened.max_tokens}",
        )
    return opened


def check_prompt(prompt: str) -> str:
    """`prompt` in Unicode's NFC.

    Raises ConfigError for an empty or too long prompt, and for characters that sentencepiece chokes on (surrogates)
    or that could act on a terminal (controls other than tab and newline), with their offset.
    """
    if len(prompt) > MAX_PROMPT:
        raise ConfigError(f"prompt: {len(prompt)} characters, more than {MAX_PROMPT}", fix="shorten it")
    for offset, char in enumerate(prompt):
        if unicodedata.category(char) in ("Cc", "Cs") and char not in "\t\n":
            raise ConfigError(f"prompt: character U+{ord(char):04X} at offset {offset} is not text", fix="remove it")
    if all(unicodedata.category(char) in ("Cc", "Cf", "Zs", "Zl", "Zp") for char in prompt):
        raise ConfigError("prompt: is empty", fix='prompt="a large red circle moves left on a black background"')
    return unicodedata.normalize("NFC", prompt)


class T5Text:
    """A frozen T5 encoder (Raffel et al. 2020) with its SentencePiece tokenizer.

    The network loads when it is first asked: it may be large, and prompts whose videos are there ask nothing. Raises
    InputError for files that are missing, damaged or do not fit, NumericError for weights that are not finite.
    """

    def __init__(self, cfg: TextConfig, device: str = "cpu") -> None:
        self.cfg, self.device = cfg, device
        self.folder = find_encoder(cfg.encoder)
        verified = store.read(self.folder).files if (self.folder / store.MANIFEST).is_file() else {}
        self.tokenizer = _tokenizer(self.folder / TOKENIZER, verified)
        self.width = _width(self.folder / CONFIG, _data(self.folder / CONFIG, verified))
        self.fingerprint = _fingerprint(self.folder, verified, cfg.precision)
        self._verified = verified
        self._told: set[str] = set()

    @cached_property
    def model(self) -> T5Encoder:
        model = _encoder(self.folder, self._verified, self.cfg.precision, self.device)
        self._verified = {}
        pieces, rows = len(self.tokenizer), model.cfg.vocab_size
        if pieces > rows:
            raise InputError(
                f"text encoder {self.folder}: {TOKENIZER} has {pieces} pieces, the weights know {rows}",
                fix="take both files from one model",
            )
        return model

    def encode(self, prompts: Sequence[str]) -> Text:
        """Embeds `prompts`, padded with zeros to `max_tokens`.

        One prompt at a time and without padding: kernels sum in another order for another shape, so a prompt in a
        padded batch would differ in its last bits from the same prompt alone.
        """
        return _padded([self._tokens(prompt) for prompt in prompts], self.cfg.max_tokens, self.width)

    def pieces(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Piece ids (N, L) int32 of many prompts, 0 where their mask (N, L) is False; nothing is warned about."""
        room, end = self.cfg.max_tokens - 1, self.tokenizer.eos_id()
        rows = [[*ids[:room], end] for ids in self.tokenizer.encode([check_prompt(prompt) for prompt in prompts])]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int32)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        ids[mask] = torch.tensor([piece for row in rows for piece in row], dtype=torch.int32)
        return ids, mask

    @torch.no_grad()
    def embed(self, ids: Tensor, mask: Tensor) -> Text:
        """Piece ids (B, L), 0 where `mask` (B, L) is False, as prompts on their device: a whole batch at once.

        For training, where the last bits do not matter: they depend on what stands beside a prompt.
        """
        if self.model.device != ids.device:
            self.model.to(ids.device)
        tokens: Tensor = self.model(ids, mask).float()
        return Text(tokens * mask[:, :, None], mask)

    def _tokens(self, prompt: str) -> Tensor:
        ids = torch.tensor([self.ids(prompt)], device=self.model.device)
        with torch.no_grad():
            tokens: Tensor = self.model(ids)[0].float().cpu()
        if not tokens.isfinite().all():
            raise NumericError(f"text encoder {self.folder}: not finite for {prompt!r}", fix="text.precision=float32")
        return tokens

    def ids(self, prompt: str) -> list[int]:
        """Piece ids of `prompt` and the end mark; warns about what is cut off and about words without a piece."""
        prompt = check_prompt(prompt)
        ids: list[int] = self.tokenizer.encode(prompt)
        room = self.cfg.max_tokens - 1
        if prompt not in self._told:
            self._told.add(prompt)
            self._warn(prompt, ids, room)
        return [*ids[:room], self.tokenizer.eos_id()]

    def _warn(self, prompt: str, ids: list[int], room: int) -> None:
        if len(ids) > room:
            lost = _printable(self.tokenizer.decode(ids[room:]))
            log.warning("prompt: longer than %d tokens, this is ignored: %s", self.cfg.max_tokens, lost)
        words = dict.fromkeys(prompt.split())
        spelled = [word for word in words if any(map(self.tokenizer.is_byte, self.tokenizer.encode(word)))]
        if spelled:
            log.warning("prompt: words the text encoder can only spell out: %s", _printable(", ".join(spelled)))
        unknown = [word for word in words if any(map(self.tokenizer.is_unknown, self.tokenizer.encode(word)))]
        if unknown:
            log.warning("prompt: words the text encoder does not know: %s", _printable(", ".join(unknown)))


def known_width(cfg: TextConfig) -> int | None:
    """Width of the embeddings, without loading an encoder or fetching one: None if it is not on this machine."""
    if cfg.store is not None:
        return EmbeddingStore(Path(cfg.store)).width if (Path(cfg.store) / INDEX).is_file() else None
    path = local_file(cfg.encoder, CONFIG)
    return None if path is None else _width(path, path.read_bytes())


def _width(path: Path, data: bytes) -> int:
    width = store.from_json(data, path).get("d_model")
    if type(width) is not int:
        raise InputError(f"text encoder {path}: has no d_model, so it is not T5's", fix="copy it again")
    return width


def local_file(name: str, file: str) -> Path | None:
    """A file of the encoder `name` (see TextConfig) if it is on this machine; nothing is fetched."""
    folder = _folder(name)
    if folder is not None:
        return folder / file if (folder / file).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repository, _, revision = name.partition("@")
    try:
        found = try_to_load_from_cache(repository, file, revision=revision or None)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _folder(name: str) -> Path | None:
    """The folder that the encoder `name` is in or should be in, None for a name on the hub."""
    ours, given = package_root() / "checkpoints" / name, Path(name).expanduser()
    if given.is_absolute() or name.startswith("."):
        return given
    if ours.is_dir() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", name):
        return ours
    return None


def find_encoder(name: str) -> Path:
    """The folder of the encoder `name` (see TextConfig), fetched from the hub when it is a name there."""
    folder = _folder(name) or _fetched(name)
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    absent = [file for file in (CONFIG, TOKENIZER) if file not in there]
    if WEIGHTS not in there and SHARDS not in there:
        absent.append(WEIGHTS)
    if absent:
        has = f"has {', '.join(there[:12]) or 'no files'}" if folder.is_dir() else "is not a folder"
        fix = f"name a T5 folder with {CONFIG}, {TOKENIZER} and {WEIGHTS}"
        if "pytorch_model.bin" in there:
            fix += "; T5EncoderModel.from_pretrained(...).save_pretrained(...) of transformers writes the last"
        raise InputError(f"text encoder {folder}: {', '.join(absent)} missing, it {has}", fix=fix)
    return folder


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository, _, revision = name.partition("@")
    files = [CONFIG, TOKENIZER, SHARDS, "*.safetensors"]
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(
            f"text encoder {name}: there is no such folder in {package_root() / 'checkpoints'}, and it cannot be"
            f" fetched from the Hugging Face hub ({type(error).__name__})",
            fix="set encoder to a folder, or fetch it once where huggingface.co answers",
        ) from error


def _data(path: Path, verified: Mapping[str, bytes]) -> bytes:
    """A file of an encoder; from the verified ones if there is a manifest, which then has to list it."""
    if verified and path.name not in verified:
        raise InputError(f"text encoder {path}: is not in {store.MANIFEST}", fix="copy the folder again")
    return verified[path.name] if verified else path.read_bytes()


def _tokenizer(path: Path, verified: Mapping[str, bytes]) -> SentencePieceProcessor:
    # Not T5Tokenizer: given a vocab_file it ignores the file without a word, and every word becomes <unk>.
    from sentencepiece import SentencePieceProcessor

    tokenizer = SentencePieceProcessor()
    try:
        tokenizer.load_from_serialized_proto(_data(path, verified))
    except RuntimeError as error:
        raise InputError(f"tokenizer {path}: is not a SentencePiece model", fix="copy it again") from error
    if tokenizer.eos_id() < 0:
        raise InputError(f"tokenizer {path}: has no end mark </s>, so it is not T5's", fix="take that of a T5")
    return tokenizer


def _encoder(folder: Path, verified: Mapping[str, bytes], precision: Precision, device: str) -> T5Encoder:
    """The encoder with its weights, strictly."""
    settings = store.from_json(_data(folder / CONFIG, verified), folder / CONFIG)
    try:
        cfg = T5Config.read(settings)
    except ValueError as error:
        raise InputError(f"text encoder {folder}: {CONFIG} is not T5's: {error}", fix="copy it again") from error
    with torch.device("meta"):  # spends neither time nor the global generator on weights that are replaced
        model = T5Encoder(cfg)
    want, state = model.state_dict(), _weights(folder, verified)
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
    dtype = getattr(torch, precision.value)
    model.load_state_dict({key: value.to(device, dtype) for key, value in state.items()}, assign=True)
    model.requires_grad_(False)
    model.train(False)
    return model


def _weights(folder: Path, verified: Mapping[str, bytes]) -> dict[str, Tensor]:
    """The encoder's half of the weights; token embeddings under both names that they have in T5."""
    state: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        for key, value in _tensors(path, verified).items():
            if not key.startswith(("decoder.", "lm_head.")):
                state[key] = value
                if not value.isfinite().all():
                    raise NumericError(f"text encoder {path}: {key} is not finite", fix="copy it again")
    if "shared.weight" in state:
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
    return state


def _tensors(path: Path, verified: Mapping[str, bytes]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if verified:
        return store.bytes_to_tensors(_data(path, verified), f"text encoder {path}")
    try:
        return load_file(path)  # maps the file: a large T5 should not be in memory twice
    except SafetensorError as error:
        raise InputError(f"text encoder {path}: is not a safetensors file: {error}", fix="copy it again") from error


def _weight_files(folder: Path) -> list[Path]:
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


def _fingerprint(folder: Path, verified: Mapping[str, bytes], precision: Precision) -> str:
    """SHA-256 over the files of the encoder and the precision they are used in."""
    digest = hashlib.sha256(precision.value.encode())
    for path in (folder / CONFIG, folder / TOKENIZER, *_weight_files(folder)):
        with io.BytesIO(_data(path, verified)) if verified else path.open("rb") as file:
            content = hashlib.sha256()
            while chunk := file.read(1 << 20):
                content.update(chunk)
        digest.update(f"\n{path.name} {content.hexdigest()}".encode())
    return digest.hexdigest()


class EmbeddingStore:
    """A directory with one small file per prompt, written once and read by every stage without T5 in the process.

    `index.json` says which encoder wrote it, `<key>.safetensors` holds the real tokens (n, D) of one prompt in float32.
    Raises InputError for an index or an embedding that is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.command = folder, f"cascade embed prompts=FILE out={folder}"
        path = folder / INDEX
        if not path.is_file():
            raise InputError(f"text store {folder}: has no {INDEX}", fix=self.command)
        index = store.from_json(path.read_bytes(), path)
        if {key: type(value) for key, value in index.items()} != {"encoder": str, "width": int, "max_tokens": int}:
            raise InputError(f"text store {path}: is damaged", fix=f"remove {folder}, then {self.command}")
        self.fingerprint: str = index["encoder"]
        self.width: int = index["width"]
        self.max_tokens: int = index["max_tokens"]

    @classmethod
    def create(cls, folder: Path, encoder: T5Text) -> EmbeddingStore:
        """Opens the store for writing by `encoder`; ConfigError where another encoder has written."""
        index = {"encoder": encoder.fingerprint, "width": encoder.width, "max_tokens": encoder.cfg.max_tokens}
        if not (folder / INDEX).exists():
            store.write_file(folder / INDEX, store.canonical(index))
        opened = cls(folder)
        if (opened.fingerprint, opened.max_tokens) != (encoder.fingerprint, encoder.cfg.max_tokens):
            raise ConfigError(f"text store {folder}: is of another encoder or max_tokens", fix="choose another out=")
        return opened

    def encode(self, prompts: Sequence[str]) -> Text:
        """Reads `prompts`, padded with zeros to `max_tokens`; equal to what the encoder gave, bit for bit."""
        return _padded([self._read(check_prompt(prompt)) for prompt in prompts], self.max_tokens, self.width)

    def put(self, prompts: Iterable[str], encoder: T5Text) -> int:
        """Writes the prompts that are not there yet, each file whole or not at all; returns how many."""
        assert encoder.fingerprint == self.fingerprint, "open the store with `create`"
        written = 0
        for prompt in map(check_prompt, prompts):
            path = self.path(prompt)
            if not path.exists():
                text = encoder.encode([prompt])
                store.write_file(path, store.tensors_to_bytes({"tokens": text.tokens[text.mask]}, ("prompt", prompt)))
                written += 1
        return written

    def path(self, prompt: str) -> Path:
        """Where the embedding of `prompt` is, or will be."""
        key = f"{self.fingerprint}|{self.max_tokens}|{prompt}"
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def _read(self, prompt: str) -> Tensor:
        path = self.path(prompt)
        if not path.is_file():
            raise InputError(f"text store {self.folder}: has no embedding of {prompt!r}", fix=self.command)
        tokens = store.bytes_to_tensors(path.read_bytes(), f"text store {path}").get("tokens", torch.empty(0))
        fits = tokens.ndim == 2 and 0 < len(tokens) <= self.max_tokens and tokens.shape[1] == self.width
        if not fits or tokens.dtype != torch.float32 or not tokens.isfinite().all():
            raise InputError(f"text store {path}: is damaged", fix=f"remove it, then {self.command}")
        return tokens


def _padded(rows: Sequence[Tensor], length: int, width: int) -> Text:
    """`rows` (n, D) of different n as a Text of `length` tokens."""
    out = Text.empty(len(rows), length, width)
    for b, row in enumerate(rows):
        out.tokens[b, : len(row)] = row
        out.mask[b, : len(row)] = True
    return out


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
