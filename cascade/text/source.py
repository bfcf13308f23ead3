"""What makes the embeddings that stages read: the encoder or the store that the settings name, and a prior."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from cascade import store
from cascade.errors import ConfigError
from cascade.text import encoders
from cascade.text.clip import CLIPText
from cascade.text.embedded import Reader
from cascade.text.encoders import CONFIG, find_encoder, local_file
from cascade.text.prior import RANDOM, PriorConfig
from cascade.text.prompts import Encoder, TextConfig, TextSource, check_negative
from cascade.text.stored import INDEX, EmbeddingStore
from cascade.text.t5 import T5Text


def encoder_of(cfg: TextConfig, device: str = "cpu") -> Encoder:
    """What makes the embeddings that stages read: T5 or CLIP, as its config.json says, and a prior if `cfg` has one.

    Raises ConfigError for a prior that would be asked otherwise than it was trained, see `PriorConfig`.
    """
    kind = CLIPText if encoders.is_clip(find_encoder(cfg.encoder)) else T5Text
    encoder: Encoder = kind(cfg, device)
    if cfg.prior is None:
        return encoder
    if cfg.prior.weights not in (None, RANDOM) and isinstance(encoder, CLIPText) and encoder.projects:
        raise ConfigError(
            f"text encoder {encoder.folder}: has a text_projection, which published priors are told of a sentence; "
            "ours tells them its end mark unprojected",
            fix=f"text.prior.weights={RANDOM}, or for a prior trained so a text.encoder without the projection",
        )
    return PriorText(encoder, cfg.prior, device)


def text_source(cfg: TextConfig, device: str = "cpu") -> TextSource:
    """The store if `cfg` names one, else the encoder on `device`; embeddings are on the CPU either way."""
    if cfg.store is None:
        return encoder_of(cfg, device)
    opened = EmbeddingStore(Path(cfg.store), cfg.negative)
    if opened.max_tokens != cfg.max_tokens:
        raise ConfigError(
            f"text store {cfg.store}: holds prompts of up to {opened.max_tokens} tokens, not {cfg.max_tokens}",
            fix=f"text.max_tokens={opened.max_tokens}",
        )
    return opened


def named(cfg: TextConfig, source: TextSource) -> list[str]:
    """What names all that stages hear of `source`: its embeddings and, unless it is zeros, what no text is."""
    return [source.fingerprint, *([] if cfg.negative is None else [cfg.negative])]


class PriorText(Reader):
    """Prompts as one token each, the embedding of a picture that a prior makes of what `encoder` reads."""

    def __init__(self, encoder: Encoder, cfg: PriorConfig, device: str = "cpu") -> None:
        self.cfg, self.encoder = encoder.cfg, encoder
        self.length, self.negative = 1, encoder.cfg.negative
        self.prior = cfg.open(encoder.cfg.max_tokens, device)
        self.width = self.prior.cfg.width
        self.fingerprint = hashlib.sha256(f"{encoder.fingerprint} {self.prior.hash}".encode()).hexdigest()

    def _tokens(self, prompt: str) -> Tensor:
        read = self.encoder.encode([prompt])
        return self.prior(read.tokens, read.mask, check_negative(prompt))


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
