"""CLIP's text encoder (Radford et al. 2021), which Stable Diffusion and the video models made from it read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cascade import store
from cascade.errors import ConfigError, InputError, NumericError
from cascade.text import encoders
from cascade.text.embedded import Reader
from cascade.text.prompts import TextConfig, as_read

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

log = logging.getLogger("cascade")


class CLIPText(Reader):
    """The encoder with its byte-pair tokenizer, from a folder with config.json, weights and the tokenizer's files.

    Which token pads differs between the tokenizers of published models and, where padding is attended, changes every
    video: it is read from special_tokens_map.json or tokenizer_config.json. Raises InputError for files that are
    missing, damaged or do not fit, NumericError for weights that are not finite.
    """

    def __init__(self, cfg: TextConfig, device: str = "cpu") -> None:
        self.cfg, self.device = cfg, device
        self.length, self.negative = cfg.max_tokens, cfg.negative
        self.folder = encoders.find_encoder(cfg.encoder)
        verified = store.read(self.folder).files if (self.folder / store.MANIFEST).is_file() else {}
        self.tokenizer = _tokenizer(self.folder)
        dtype = getattr(torch, cfg.precision.value)
        names: set[str] = set()
        self.model = encoders.built(self.folder, verified, _make, partial(_weights, names), dtype, device)
        self.width = int(self.model.config.hidden_size)
        self.projects = "text_projection.weight" in names  # into the space of pictures; left out of `model`
        self.fingerprint = encoders.fingerprint(self.folder, verified, cfg.reading)
        places = int(self.model.config.max_position_embeddings)
        # Not part of the weights, so that it was left without data.
        self.model.embeddings.position_ids = torch.arange(places, device=device)[None]
        if cfg.max_tokens > places:
            raise ConfigError(
                f"text encoder {self.folder}: knows {places} positions, max_tokens is {cfg.max_tokens}",
                fix=f"text.max_tokens={places}",
            )

    def ids(self, prompt: str) -> list[int]:
        """Token ids from the start mark to the end mark, without padding; warns about what is cut off."""
        ids: list[int] = self.tokenizer(as_read(prompt, self.cfg))["input_ids"]
        if len(ids) > self.cfg.max_tokens:
            lost = self.tokenizer.decode(ids[self.cfg.max_tokens - 1 : -1])
            log.warning("prompt: longer than %d tokens, this is ignored: %s", self.cfg.max_tokens, lost)
            ids = [*ids[: self.cfg.max_tokens - 1], ids[-1]]
        return ids

    def _tokens(self, prompt: str) -> Tensor:
        ids = self.ids(prompt)
        real = len(ids)
        if self.cfg.pad:
            ids += [int(self.tokenizer.pad_token_id)] * (self.cfg.max_tokens - real)
        told = {"attention_mask": (torch.arange(len(ids)) < real)[None].long().to(self.device)} if self.cfg.mask else {}
        with torch.no_grad():
            out = self.model(input_ids=torch.tensor([ids], device=self.device), **told)
        tokens: Tensor = out.last_hidden_state[0].float().cpu()
        if not tokens.isfinite().all():
            raise NumericError(f"text encoder {self.folder}: not finite for {prompt!r}", fix="text.precision=float32")
        return tokens


def _make(settings: dict[str, Any]) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    model: torch.nn.Module = CLIPTextModel(CLIPTextConfig(**settings.get("text_config", settings)))
    return model


def _weights(names: set[str], tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The half for text under the names of today's transformers; older files say `text_model.`, and count positions.

    `names` takes those of all.
    """
    others = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
    state = {}
    for name, tensor in tensors:
        names.add(name)
        if not name.startswith(others):
            state[name.removeprefix("text_model.")] = tensor
    state.pop("embeddings.position_ids", None)
    return state


def _tokenizer(folder: Path) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    vocabulary = encoders.near(folder, encoders.tokenizer_files(folder)[0])
    store.from_json(vocabulary.read_bytes(), vocabulary)  # tokenizers raises a bare Exception
    where = vocabulary.parent
    try:
        return CLIPTokenizer.from_pretrained(str(where), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"tokenizer {where}: is not CLIP's: {reason}", fix="copy the folder again") from error
