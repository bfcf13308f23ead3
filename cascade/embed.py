"""`cascade embed`: text embeddings of a file of prompts, written once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cascade.config import parse
from cascade.errors import ConfigError
from cascade.request import Prompts, take
from cascade.text import EmbeddingStore, TextConfig, encoder_of


def verb(tree: dict[str, Any]) -> None:
    """Text embeddings of a file of prompts, written once."""
    text = parse(tree.pop("text", {}), TextConfig, "text")
    run = take(tree, Prompts)
    texts = run.texts()
    if run.out is None:
        raise ConfigError("out is missing", fix="out=DIRECTORY")
    encoder = encoder_of(text)
    folder = EmbeddingStore.create(Path(run.out), encoder)
    texts += [] if text.negative is None else [text.negative]
    print(f"{run.out}: {folder.put(texts, encoder)} prompts embedded")
