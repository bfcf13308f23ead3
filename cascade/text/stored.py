"""Embeddings on disk, written once and read by every stage without an encoder in the process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from cascade import store
from cascade.errors import ConfigError, InputError
from cascade.text.embedded import Reader
from cascade.text.prompts import Encoder, check_negative

INDEX = "index.json"


class EmbeddingStore(Reader):
    """A directory with one small file per prompt, written once and read by every stage without T5 in the process.

    `index.json` says which encoder wrote it, `<key>.safetensors` holds the real tokens (n, D) of one prompt in float32.
    `negative` is what no text is to a stage (see `TextConfig`). Raises InputError for an index or an embedding that is
    missing or damaged.
    """

    def __init__(self, folder: Path, negative: str | None = None) -> None:
        self.folder, self.negative = folder, negative
        self.command = f"cascade embed prompts=FILE out={folder}"
        path = folder / INDEX
        if not path.is_file():
            raise InputError(f"text store {folder}: has no {INDEX}", fix=self.command)
        index = store.from_json(path.read_bytes(), path)
        if {key: type(value) for key, value in index.items()} != {"encoder": str, "width": int, "max_tokens": int}:
            raise InputError(f"text store {path}: is damaged, or not ours", fix=f"another folder: {self.command}")
        self.fingerprint: str = index["encoder"]
        self.width = int(index["width"])
        self.length = self.max_tokens = int(index["max_tokens"])

    @classmethod
    def create(cls, folder: Path, encoder: Encoder) -> EmbeddingStore:
        """Opens the store for writing by `encoder`; ConfigError where another encoder has written, InputError where
        something else lies."""
        index = {"encoder": encoder.fingerprint, "width": encoder.width, "max_tokens": encoder.cfg.max_tokens}
        if not (folder / INDEX).exists():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise InputError(f"text store {folder}: holds something else", fix="choose another out=")
            store.write_file(folder / INDEX, store.canonical(index))
        opened = cls(folder)
        if (opened.fingerprint, opened.max_tokens) != (encoder.fingerprint, encoder.cfg.max_tokens):
            raise ConfigError(f"text store {folder}: is of another encoder or max_tokens", fix="choose another out=")
        return opened

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

    def _tokens(self, prompt: str) -> Tensor:
        """What the encoder gave, bit for bit."""
        prompt = check_negative(prompt)
        path = self.path(prompt)
        if not path.is_file():
            raise InputError(f"text store {self.folder}: has no embedding of {prompt!r}", fix=self.command)
        tokens = store.bytes_to_tensors(path.read_bytes(), f"text store {path}").get("tokens", torch.empty(0))
        fits = tokens.ndim == 2 and 0 < len(tokens) <= self.max_tokens and tokens.shape[1] == self.width
        if not fits or tokens.dtype != torch.float32 or not tokens.isfinite().all():
            raise InputError(f"text store {path}: is damaged", fix=f"remove it, then {self.command}")
        return tokens
