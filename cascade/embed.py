"""`cascade embed`: text embeddings of a file of prompts, written once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cascade import store
from cascade.chain import Device
from cascade.config import parse
from cascade.errors import ConfigError
from cascade.request import Prompts
from cascade.text import EmbeddingStore, TextConfig, check_negative, encoder_of


@dataclass(kw_only=True)
class Embed(Prompts):
    """The prompts and what embeds them, and where: on the CPU all machines agree to the last bit."""

    text: TextConfig = field(default_factory=TextConfig)
    device: str = "cpu"


def verb(tree: dict[str, Any]) -> Callable[[], None]:
    """Text embeddings of a file of prompts, written once."""
    run = parse(tree, Embed)
    texts, out = run.texts(), run.out
    if out is None:
        raise ConfigError("out is missing", fix="out=DIRECTORY")
    texts += [] if run.text.negative is None else [check_negative(run.text.negative)]
    store.check_place(out)
    device = str(Device(device=run.device).torch)

    def work() -> None:
        encoder = encoder_of(run.text, device)
        folder = EmbeddingStore.create(out, encoder)
        print(f"{out}: {folder.put(texts, encoder)} prompts embedded")

    return work
