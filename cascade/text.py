"""Prompts become vectors: a frozen encoder, T5 (here) or CLIP, and a store of embeddings that needs none to be read.

Whatever makes them, embeddings are float32 and depend on the prompt and the encoder alone: a stored prompt, a prompt
encoded alone and the same prompt in a batch are equal bit for bit.
"""

from __future__ import annotations

import hashlib
import logging
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from cascade import encoders, store
from cascade.encoders import CONFIG, TOKENIZER, find_encoder, local_file
from cascade.errors import ConfigError, InputError, NumericError
from cascade.prior import PriorConfig

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

__all__ = ["find_encoder", "local_file"]

MAX_PROMPT = 10_000  # characters
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
    name on the Hugging Face hub, owner/repository or owner/repository/folder, with an optional "@revision". Its
    config.json says whether it is T5 or CLIP. `max_tokens` counts the end mark. `store` is a directory written by
    `cascade embed`: with it, no encoder is loaded. With a `prior` all that a stage hears of a prompt is the embedding
    of a picture.

    With `pad` every prompt is padded to `max_tokens` before it is encoded, and what comes out for the padding counts as
    text: networks that attend all positions were trained so. `mask`: real tokens do not see the padding. `lower`:
    prompts are read in lower case, without space around them. `negative` is what guidance moves away from where no
    negative_prompt is given; null: no text at all, "": the empty prompt.
    """

    encoder: str = "tiny/text"
    max_tokens: int = 64
    store: str | None = None
    precision: Precision = Precision.FLOAT32
    pad: bool = False
    mask: bool = True
    lower: bool = False
    negative: str | None = None
    prior: PriorConfig | None = None

    def __post_init__(self) -> None:
        if not self.encoder.strip():
            raise ValueError("encoder is empty, expected a folder or a name on the hub")
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens is {self.max_tokens}, expected at least 2 (a piece and the end mark)")

    @property
    def reading(self) -> list[str]:
        """The settings that decide an embedding, beside the encoder and `max_tokens`."""
        said = [name for name, off in (("pad", False), ("mask", True), ("lower", False)) if getattr(self, name) != off]
        return [self.precision.value, *said]


class TextSource(Protocol):
    """What makes embeddings: an encoder or an `EmbeddingStore`."""

    @property
    def width(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, prompts: Sequence[str]) -> Text: ...


class Encoder(TextSource, Protocol):
    """`T5Text`, `CLIPText` or `PriorText`."""

    cfg: TextConfig


def encoder_of(cfg: TextConfig, device: str = "cpu") -> Encoder:
    """What makes the embeddings that stages read: T5 or CLIP, as its config.json says, and a prior if `cfg` has one."""
    encoder: Encoder
    if encoders.is_clip(find_encoder(cfg.encoder)):
        from cascade.clip import CLIPText

        encoder = CLIPText(cfg, device)
    else:
        encoder = T5Text(cfg, device)
    return encoder if cfg.prior is None else PriorText(encoder, cfg.prior, device)


def text_source(cfg: TextConfig, device: str = "cpu") -> TextSource:
    """The store if `cfg` names one, else the encoder on `device`; embeddings are on the CPU either way."""
    if cfg.store is None:
        return encoder_of(cfg, device)
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


def check_negative(prompt: str) -> str:
    """As `check_prompt`; the empty prompt too, which guidance may move away from."""
    return check_prompt(prompt) if prompt else ""


def as_read(prompt: str, cfg: TextConfig) -> str:
    """`prompt`, checked, as an encoder reads it."""
    checked = check_negative(prompt)
    return checked.lower().strip() if cfg.lower else checked


class T5Text:
    """A frozen T5 encoder (Raffel et al. 2020) with its SentencePiece tokenizer.

    The network loads when it is first asked: it may be large, and prompts whose videos are there ask nothing. Raises
    InputError for files that are missing, damaged or do not fit, NumericError for weights that are not finite.
    """

    def __init__(self, cfg: TextConfig, device: str = "cpu") -> None:
        self.cfg, self.device = cfg, device
        self.folder = find_encoder(cfg.encoder)
        verified = store.read(self.folder).files if (self.folder / store.MANIFEST).is_file() else {}
        file = encoders.near(self.folder, TOKENIZER)
        self.tokenizer = _tokenizer(file, encoders.data(file, verified))
        config = self.folder / CONFIG
        self.width = encoders.width(store.from_json(encoders.data(config, verified), config), config)
        self.fingerprint = encoders.fingerprint(self.folder, verified, cfg.reading)
        self._verified = verified
        self._told: set[str] = set()

    @cached_property
    def model(self) -> Any:
        dtype = getattr(torch, self.cfg.precision.value)
        model = encoders.built(self.folder, self._verified, _make, _weights, dtype, self.device)
        self._verified = {}
        pieces, rows = len(self.tokenizer), model.config.vocab_size
        if pieces > rows:
            raise InputError(
                f"text encoder {self.folder}: {TOKENIZER} has {pieces} pieces, the weights know {rows}",
                fix="take both files from one model",
            )
        return model

    def encode(self, prompts: Sequence[str]) -> Text:
        """Embeds `prompts`, padded with zeros to `max_tokens`.

        One prompt at a time and, but for `pad`, without padding: kernels sum in another order for another shape, so a
        prompt in a padded batch would differ in its last bits from the same prompt alone.
        """
        return padded([self._tokens(prompt) for prompt in prompts], self.cfg.max_tokens, self.width)

    def pieces(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Piece ids (N, L) int32 of many prompts, 0 where their mask (N, L) is False; nothing is warned about."""
        room, end = self.cfg.max_tokens - 1, self.tokenizer.eos_id()
        texts = [as_read(prompt, self.cfg) for prompt in prompts]
        rows = [[*ids[:room], end] for ids in self.tokenizer.encode(texts)]
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
        tokens: Tensor = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
        return Text(tokens * mask[:, :, None], mask)

    def _tokens(self, prompt: str) -> Tensor:
        pieces = self.ids(prompt)
        real, told = len(pieces), {}
        if self.cfg.pad:
            pieces += [max(0, self.tokenizer.pad_id())] * (self.cfg.max_tokens - real)
            if self.cfg.mask:
                told["attention_mask"] = (torch.arange(len(pieces)) < real)[None].long().to(self.model.device)
        ids = torch.tensor([pieces], device=self.model.device)
        with torch.no_grad():
            tokens: Tensor = self.model(input_ids=ids, **told).last_hidden_state[0].float().cpu()
        if not tokens.isfinite().all():
            raise NumericError(f"text encoder {self.folder}: not finite for {prompt!r}", fix="text.precision=float32")
        return tokens

    def ids(self, prompt: str) -> list[int]:
        """Piece ids of `prompt` and the end mark; warns about what is cut off and about words without a piece."""
        prompt = as_read(prompt, self.cfg)
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


class PriorText:
    """Prompts as one token each, the embedding of a picture that a prior makes of what `encoder` reads."""

    def __init__(self, encoder: Encoder, cfg: PriorConfig, device: str = "cpu") -> None:
        self.cfg, self.encoder = encoder.cfg, encoder
        self.prior = cfg.open(encoder.cfg.max_tokens, device)
        self.fingerprint = hashlib.sha256(f"{encoder.fingerprint} {self.prior.hash}".encode()).hexdigest()

    @property
    def width(self) -> int:
        return self.prior.cfg.width

    def encode(self, prompts: Sequence[str]) -> Text:
        """(B, 1, width), each prompt by itself."""
        read = self.encoder.encode(prompts)
        rows = [
            self.prior(read.tokens[i : i + 1], read.mask[i : i + 1], check_prompt(prompt))
            for i, prompt in enumerate(prompts)
        ]
        return Text(torch.stack(rows), torch.ones(len(rows), 1, dtype=torch.bool))


def told_tokens(cfg: TextConfig) -> int:
    """The most tokens that a stage is told of a prompt."""
    return cfg.max_tokens if cfg.prior is None else 1


def known_width(cfg: TextConfig) -> int | None:
    """Width of the embeddings that stages read, see `read_width`."""
    return cfg.prior.width if cfg.prior is not None and cfg.store is None else read_width(cfg)


def read_width(cfg: TextConfig) -> int | None:
    """Width of the encoder's embeddings, without loading or fetching it: None if it is not on this machine."""
    if cfg.store is not None:
        return EmbeddingStore(Path(cfg.store)).width if (Path(cfg.store) / INDEX).is_file() else None
    path = local_file(cfg.encoder, CONFIG)
    if path is None:
        return None
    return encoders.width(store.from_json(path.read_bytes(), path), path)


def _tokenizer(path: Path, proto: bytes) -> SentencePieceProcessor:
    # Not T5Tokenizer: given a vocab_file it ignores the file without a word, and every word becomes <unk>.
    from sentencepiece import SentencePieceProcessor

    tokenizer = SentencePieceProcessor()
    try:
        tokenizer.load_from_serialized_proto(proto)
    except RuntimeError as error:
        raise InputError(f"tokenizer {path}: is not a SentencePiece model", fix="copy it again") from error
    if tokenizer.eos_id() < 0:
        raise InputError(f"tokenizer {path}: has no end mark </s>, so it is not T5's", fix="take that of a T5")
    return tokenizer


def _make(settings: dict[str, Any]) -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    model: torch.nn.Module = T5EncoderModel(T5Config(**settings))
    return model


def _weights(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The encoder's half of the weights; token embeddings under both names that transformers has for them."""
    state = {name: tensor for name, tensor in tensors if not name.startswith(("decoder.", "lm_head."))}
    if "shared.weight" in state:
        state.pop("encoder.embed_tokens.weight", None)
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
    return state


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
    def create(cls, folder: Path, encoder: Encoder) -> EmbeddingStore:
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
        return padded([self._read(check_negative(prompt)) for prompt in prompts], self.max_tokens, self.width)

    def put(self, prompts: Iterable[str], encoder: Encoder) -> int:
        """Writes the prompts that are not there yet, each file whole or not at all; returns how many."""
        assert encoder.fingerprint == self.fingerprint, "open the store with `create`"
        written = 0
        for prompt in map(check_negative, prompts):
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


def padded(rows: Sequence[Tensor], length: int, width: int) -> Text:
    """`rows` (n, D) of different n as a Text of `length` tokens."""
    out = Text.empty(len(rows), length, width)
    for b, row in enumerate(rows):
        out.tokens[b, : len(row)] = row
        out.mask[b, : len(row)] = True
    return out


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
