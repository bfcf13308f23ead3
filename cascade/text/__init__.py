"""Prompts become vectors: a frozen encoder, T5 or CLIP, and a store of embeddings that needs none to be read.

Whatever makes them, embeddings are float32 and depend on the prompt and the encoder alone: a stored prompt, a prompt
encoded alone and the same prompt in a batch are equal bit for bit.
"""

from cascade.text.clip import CLIPText
from cascade.text.embedded import Text
from cascade.text.prompts import (
    Encoder,
    Precision,
    TextConfig,
    TextSource,
    check_negative,
    check_prompt,
    told_tokens,
)
from cascade.text.source import PriorText, encoder_of, known_width, named, read_width, text_source
from cascade.text.stored import EmbeddingStore
from cascade.text.t5 import T5Text

__all__ = [
    "CLIPText",
    "EmbeddingStore",
    "Encoder",
    "Precision",
    "PriorText",
    "T5Text",
    "Text",
    "TextConfig",
    "TextSource",
    "check_negative",
    "check_prompt",
    "encoder_of",
    "known_width",
    "named",
    "read_width",
    "text_source",
    "told_tokens",
]
