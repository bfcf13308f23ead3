"""Prompts as they are checked and read, the settings that say how, and what reads them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from cascade.errors import ConfigError
from cascade.text.embedded import Text
from cascade.text.prior import PriorConfig

MAX_PROMPT = 10_000  # characters
MAX_TOKENS = 4096  # attention in an encoder takes the square of them


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
    prompts are read in lower case, without space around them. `negative` is what no text is to a stage: what dropped
    captions become, and what guidance moves away from where no negative_prompt is given; null: zeros, of which none
    is real, "": the empty prompt.
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
        if not 2 <= self.max_tokens <= MAX_TOKENS:
            raise ValueError(f"max_tokens is {self.max_tokens}, expected 2 to {MAX_TOKENS}, the end mark among them")

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

    def encode(self, prompts: Sequence[str]) -> Text:
        """`prompts`, and as `nothing` what the settings' `negative` says."""
        ...


class Encoder(TextSource, Protocol):
    """`T5Text`, `CLIPText` or `PriorText`."""

    cfg: TextConfig


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


def told_tokens(cfg: TextConfig) -> int:
    """The most tokens that a stage is told of a prompt."""
    return cfg.max_tokens if cfg.prior is None else 1
